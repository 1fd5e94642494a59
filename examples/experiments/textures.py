"""The table of several runs of the quickstart on textures: mean and spread over the seeds, and what TDP gains.

for seed in 0 1 2 3 4; do python -m examples.quickstart --seed $seed --out runs/textures/seed$seed; done
python -m examples.experiments.textures runs/textures
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.common.engine.run_directory import read_json
from examples.experiments.report import Sample, markdown
from examples.sr4ir.textures_run import READERS, TITLES


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each loss, and one for what TDP gains over it, paired by seed, with a 95 % interval."""
    rows = []
    for name, title in TITLES.items():
        if not all(name in run["right"] for run in runs.values()):  # the loss of an option
            continue
        cells = [Sample.of(run["right"][name][key] for run in runs.values()).spread(1) for key in READERS]
        if name == "clean":
            rows.append([title, *cells, "", ""])
            continue
        steps = [run["steps"].get(name) for run in runs.values()]
        cells.append(Sample.of(run["psnr"][name] for run in runs.values()).spread(2))
        cells.append("" if None in steps else str(min(steps)) if len(set(steps)) == 1 else f"{min(steps)}-{max(steps)}")
        rows.append([title, *cells])
        if name == "tdp":
            continue
        gains = [
            Sample.of(run["right"]["tdp"][key] - run["right"][name][key] for run in runs.values()).change(1)
            for key in READERS
        ]
        gains.append(Sample.of(run["psnr"]["tdp"] - run["psnr"][name] for run in runs.values()).change(2))
        rows.append(["TDP minus it", *gains, ""])
    heads = [f"right by the {title} (%)" for title in READERS.values()]
    return markdown(["", *heads, "PSNR (dB)", "steps"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs")
    folder = parser.parse_args().folder
    runs = {file.parent.name: read_json(file.read_text()) for file in sorted(folder.glob("*/results.json"))}
    if not runs:
        parser.error(f"`folder` should hold runs of the quickstart on textures, found no */results.json in {folder}.")
    different = {str({**run["arguments"], "seed": None, "out": None}) for run in runs.values()}
    if len(different) > 1:
        parser.error(f"`folder` should hold runs that differ by their seed alone, found {len(different)} settings.")
    print(f"{len(runs)} seeds\n\n{table(runs)}")


if __name__ == "__main__":
    main()
