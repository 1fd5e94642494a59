"""The claims of DTP that two cores can test: all runs of docs/results/dtp.md.

    python -m examples.experiments.dtp pretrain --out runs/dtp
    python -m examples.experiments.dtp forgetting --out runs/dtp          # setting A: penalties, replay, projection
    python -m examples.experiments.dtp elsewhere --out runs/dtp           # setting A on three more degradations
    python -m examples.experiments.dtp parts --out runs/dtp               # shares, decay, options of the authors' code
    python -m examples.experiments.dtp order --out runs/dtp               # setting B: TIT and experts
    python -m examples.experiments.dtp timesteps --out runs/dtp           # t* of the ten degradations
    python -m examples.experiments.dtp tables --out runs/dtp

Finished runs are not done again: the same command goes on after a stop.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from examples.common.data.degradations import DEGRADATIONS
from examples.common.engine.run_directory import read_json
from examples.dtp.config import PAPER, Config
from examples.dtp.finetune import FineTuning
from examples.dtp.train import trainer
from examples.experiments.report import Sample, markdown
from restoreloss.training.matching import plot_matches

logger = logging.getLogger(__name__)

STRENGTHS: Mapping[str, Sequence[float]] = {
    "l2sp": (0.001, 0.01, 0.1, 1.0),
    "fisher": (1e3, 1e4, 1e5, 1e6),
    "mas": (0.001, 0.01, 0.1, 1.0),
    "gn": (0.0003, 0.003, 0.03, 0.3),
    "taylor2": (0.006, 0.02, 0.2, 2.0, 20.0),
}
"""lambda of each penalty; 0.006 is the authors' 0.2. The gradient of the four largest is about 0.005, 0.05, 0.5 and 5
times that of restoration, in time."""
GEF = 0.02
"""lambda of taylor2 beside other means."""
ELSEWHERE = ("hazy", "low_light", "snowy")
SEVERAL = ["noisy", "rainy", "snowy", "shadowed"]
COLUMNS = {"psnr": "PSNR", "shifted_psnr": "shifted", "generative": "generative"}


@dataclass(frozen=True)
class Experiment:
    """Runs below one folder; those of a seed begin with the same pre-trained network."""

    out: Path
    base: Config
    pretrain_steps: int

    def pretrained(self, seed: int) -> Path:
        """The pre-trained network of a seed."""
        out = self.out / "pretrained" / f"seed{seed}"
        trainer(replace(self.base, method="pretrain", seed=seed, steps=self.pretrain_steps, out=out)).run()
        return out

    def run(self, study: str, name: str, seed: int, **changes: Any) -> None:
        """One run by the name of its folder."""
        out = self.out / study / name / f"seed{seed}"
        config = replace(self.base, seed=seed, out=out, pretrained=self.pretrained(seed), **changes)
        results = trainer(config).run()
        logger.info("%s seed %d: %s", name, seed, {key: round(results[key], 2) for key in COLUMNS})

    def forgetting(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Setting A, rain: every way not to forget."""
        for method in ("scratch", "plain", "replay", "replay_degraded", "project", "full", "orthogonality"):
            yield "forgetting", method, {"method": method}
        yield "forgetting", "scratch_longer", {"method": "scratch", "steps": self.base.steps + self.pretrain_steps}
        for method, strengths in STRENGTHS.items():
            for strength in strengths:
                yield "forgetting", f"{method}_{strength:g}", {"method": method, "penalty_weight": strength}
        for method in ("gef", "gef_project"):
            yield "forgetting", method, {"method": method, "penalty_weight": GEF}
        for method in ("orthogonality", "gef"):
            changes = {"method": method, "orthogonality_weight": 0.1, "penalty_weight": GEF}
            yield "forgetting", f"{method}_0.1", changes
        for timesteps in ("first", "matched"):
            yield "forgetting", f"plain_{timesteps}", {"method": "plain", "timesteps": timesteps}

    def elsewhere(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Setting A, three more degradations: with and without TMGP, with and without GEF."""
        for name in ELSEWHERE:
            for method in ("scratch", "plain", "gef_project"):
                weight = {"penalty_weight": GEF} if method == "gef_project" else {}
                yield f"elsewhere_{name}", method, {"method": method, "degradations": [name], **weight}

    def order(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Setting B: orders, and experts."""
        common = {"degradations": SEVERAL, "timesteps": "paper"}
        for order in ("joint", "ascending", "descending", "random"):
            yield "order", order, {**common, "method": "plain", "order": order}
        gef = {"method": "gef_project", "penalty_weight": GEF}
        yield "order", "ascending_gef", {**common, **gef, "order": "ascending"}
        for order in ("joint", "ascending"):
            yield "order", f"{order}_moe", {**common, "method": "plain", "order": order, "moe": True}
        for count in (5, 20):
            changes = {"method": "plain", "order": "ascending", "moe": True, "experts": count}
            yield "order", f"ascending_moe_{count}", {**common, **changes}
        code = {"method": "plain", "order": "ascending", "moe": True, "experts_form": "code"}
        yield "order", "ascending_moe_code", {**common, **code}

    def parts(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Rain: how much of the layers and of the batch generation has, without decay, and what the code adds."""
        gef = {"method": "gef_project", "penalty_weight": GEF}
        yield "parts", "plain", {"method": "plain"}
        yield "parts", "gef_project", gef
        yield "parts", "no_decay", {**gef, "decay": 0.0}
        for share in (0.25, 0.75, 1.0):
            yield "parts", f"shallow_{share:g}", {**gef, "shallow": share}
        for share in (0.05, 0.3, 0.5):
            yield "parts", f"replay_{share:g}", {**gef, "replay_share": share}
        yield "parts", "plain_fft", {"method": "plain", "fft_weight": 0.1}
        for method in ("scratch", "plain", "gef_project"):
            code = {"method": method, "fft_weight": 0.1, "betas": (0.9, 0.99), "flips": True}
            yield "parts", f"{method}_as_in_the_code", {**(gef if method == "gef_project" else {}), **code}

    def timesteps(self, seed: int) -> None:
        """t* of the ten degradations: a table and an image."""
        config = replace(
            self.base, method="plain", seed=seed, degradations=list(DEGRADATIONS), order="joint", steps=1,
            timesteps="matched",
            pretrained=self.pretrained(seed), out=self.out / "timesteps" / f"seed{seed}",
        )  # fmt: skip
        plot_matches(FineTuning(config).matches, config.out / "timesteps.png")

    def tables(self) -> str:
        """Means, spreads and paired differences of all that is finished."""
        parts = []
        for study in sorted(path for path in self.out.iterdir() if path.is_dir()):
            runs = {
                folder.name: {run.parent.name: read_json(run.read_text()) for run in folder.glob("seed*/results.json")}
                for folder in sorted(study.iterdir())
                if folder.is_dir()
            }
            runs = {name: seeds for name, seeds in runs.items() if seeds}
            if runs:
                parts.append(f"### {study.name}\n\n{_table(runs)}")
        matched = [json.loads(path.read_text()) for path in sorted(self.out.glob("timesteps/seed*/timesteps.json"))]
        if matched:
            parts.append(f"### Timesteps\n\n{_timesteps(matched)}")
        return "\n\n".join(parts)


def _table(runs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    reference = next((name for name in ("plain", "joint") if name in runs), next(iter(runs)))
    order = sorted(runs, key=lambda name: (name != "scratch", name != reference, name))
    head = ["", *COLUMNS.values(), *(f"{title} minus `{reference}`" for title in COLUMNS.values()), "seeds"]
    rows = []
    for name in order:
        seeds = runs[name]
        cells = [Sample.of(run[key] for run in seeds.values()).spread(2) for key in COLUMNS]
        both = [seed for seed in seeds if seed in runs[reference]]
        for key in COLUMNS:
            gaps = [seeds[seed][key] - runs[reference][seed][key] for seed in both]
            cells.append("" if name == reference else Sample.of(gaps).change(2))
        rows.append([f"`{name}`", *cells, str(len(seeds))])
    return markdown(head, rows)


def _timesteps(matched: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    rows = []
    for name in sorted(PAPER, key=lambda name: PAPER[name]):
        best = ", ".join(str(found[name]["best"]) for found in matched)
        gain = Sample.of(100 * found[name]["gain"] for found in matched).spread(1)
        never = sum(bool(found[name]["degenerate"]) for found in matched)
        rows.append([name, best, f"{gain} %", f"{never} of {len(matched)}", str(round(50 * PAPER[name]))])
    return markdown(["", "t*", "distance it removes", "none does", "the authors'"], rows)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", choices=["pretrain", "forgetting", "elsewhere", "parts", "order", "timesteps", "tables"]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--network", default="restormer-small")
    parser.add_argument("--pretrain_steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=500, help="of fine-tuning, for each degradation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--names", nargs="+", help="folders of the study; the default is all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # runs side by side, and figures that do not depend on the number of cores
    base = Config(
        out=arguments.out, network=arguments.network, steps=arguments.steps, timesteps="paper", cpu=True
    )  # fmt: skip
    experiment = Experiment(arguments.out, base, arguments.pretrain_steps)
    if arguments.study == "tables":
        print(experiment.tables())
        return
    for seed in arguments.seeds:
        if arguments.study in ("pretrain", "timesteps"):
            experiment.pretrained(seed) if arguments.study == "pretrain" else experiment.timesteps(seed)
            continue
        for study, name, changes in getattr(experiment, arguments.study)():
            if arguments.names is None or name in arguments.names:
                experiment.run(study, name, seed, **changes)


if __name__ == "__main__":
    main()
