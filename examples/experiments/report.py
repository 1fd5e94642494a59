"""Tables and figures of finished runs: means over seeds, and differences with intervals.

    python -m examples.experiments.report runs/sr4ir --out runs/sr4ir_report
    python -m examples.experiments.report runs/edtr --reference edtr --out runs/edtr_report

Every folder below the first that holds ``config.yaml`` (task, data, method, seed and other settings) and
``results.json`` (numbers such as score, psnr, seconds) is a finished run. Runs that agree in task, data, degradation,
contrast, scale, start, restorer and steps are a group; within it the methods are compared over the seeds, each by
itself and, seed by seed, with the reference. With ``--by folder`` a method is called after the folder that its seeds
lie in: for runs of one method that differ in an option. Out come report.md, table.csv, bars.png and, of runs that left
``samples.pt``, a sheet of images per group.
"""

import argparse
import csv
import logging
import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from examples.common.engine.run_directory import read_json

WORDS = {
    "oracle": "recognizer on HR", "no_restoration": "no restoration", "pre_restoration": "pixels alone",
    "pretrain": "L1", "pretrain_as_long": "L1, as long", "squared": "L1 + squared error",
    "gradients": "L1 + squared error of gradients",
    "squared_as_long": "L1 + squared error, as long", "squared_tdp": "L1 + squared error + TDP",
    "h_fixed": "L1 + TDP, H as it is", "l_to_t": "enlarged, then H", "l_to_t_3x": "enlarged, then H, 3x steps",
    "s_to_t": "S, then H", "s_to_t_3x": "S, then H, 3x steps", "t_to_s": "H, then S", "joint": "S and H, one loss",
    "tdsr": "TDSR", "rsrssn": "RSRSSN", "no_tdp": "SR4IR without TDP", "sr_only": "H on SR alone",
    "hr_only": "H on HR alone", "no_cqmix": "SR4IR without CQMix", "fixed_task": "TDP, fixed network",
    "fixed_foreign": "TDP, foreign network", "tdp_joint": "TDP trained jointly",
    "sr4ir_squared": "SR4IR, squared error for TDP", "sr4ir": "SR4IR",
    "conventional": "from pure noise", "hlf_long": "HLF, from noise, many steps", "hlf_from_noise": "HLF, from noise",
    "no_pre": "EDTR without pre-restoration", "no_hlf": "EDTR without HLF", "no_fm": "EDTR without FM",
    "no_prior": "EDTR without the prior", "only_task": "HLF of H alone", "only_reference": "HLF of H_HQ alone",
    "frozen_decoder": "EDTR, decoder frozen", "no_color_fix": "EDTR without color fix",
    "whole_batch": "EDTR, whole batches", "edtr": "EDTR", "edtr_1": "EDTR, 1 step", "edtr_4": "EDTR, 4 steps",
}  # fmt: skip
"""Methods in the order of the tables, and what images and charts call them; others keep the name of their option."""
METRICS = {
    "score": 1,
    "score_errors": 1,
    "score_on_hr": 1,
    "score_on_hr_errors": 1,
    "fixed_hr": 1,
    "fixed_hr_errors": 1,
    "judge": 1,
    "judge_errors": 1,
    "judge_distance": 3,
    "psnr": 2,
    "ssim": 4,
    "seconds": 0,
}
"""Decimals in the tables; of other numbers, three."""
NO_METRICS = ("num_classes",)
IMAGES = 5

logger = logging.getLogger(__name__)


class Group(NamedTuple):
    """Runs that differ in method and seed alone; None is what their recipe does not know."""

    task: str
    data: str
    scale: int | None = None
    start: str | None = None
    restorer: str | None = None
    degradation: str | None = None
    mixture_extent: float | None = None
    contrast: str | None = None
    steps: int | None = None

    def __str__(self) -> str:
        mixed = self.degradation not in (None, "bicubic")
        words = [
            ("{}", self.task),
            ("{}", self.data),
            ("{}", self.degradation if mixed else None),
            ("extent {}", self.mixture_extent if mixed else None),
            ("x{}", None if mixed else self.scale),
            ("contrast {}", self.contrast if self.data == "generated" else None),
            ("start {}", self.start),
            ("{}", self.restorer),
            ("{} steps", self.steps),
        ]
        return ", ".join(form.format(value) for form, value in words if value is not None)

    @property
    def slug(self) -> str:
        """A file name."""
        return re.sub(r"[^\w.-]+", "-", str(self))


class Run(NamedTuple):
    """One finished run: where it lies and the numbers it ended with."""

    folder: Path
    numbers: Mapping[str, float]


Methods = Mapping[str, Mapping[int, Run]]
"""The runs of a group by method, in the order of the tables, and seed."""


@dataclass(frozen=True)
class Sample:
    """One number of each seed."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Sample":
        """Summarize numbers."""
        return cls(tuple(values))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean (Student's t); None of a single seed."""
        if self.std is None:
            return None
        n = len(self.values)
        half = float(student_t.ppf(0.975, n - 1)) * self.std / math.sqrt(n)
        return self.mean - half, self.mean + half

    def spread(self, digits: int) -> str:
        """Mean ± standard deviation, as far as the seeds tell; nothing of none."""
        if not self.values:
            return ""
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f" ± {self.std:.{digits}f}")

    def change(self, digits: int) -> str:
        """Signed mean [interval], as far as the seeds tell; nothing of none."""
        if not self.values:
            return ""
        ends = "" if self.interval is None else " [{:+.{d}f}, {:+.{d}f}]".format(*self.interval, d=digits)
        return f"{self.mean:+.{digits}f}{ends}"


def read_runs(root: Path, *, by_folder: bool = False) -> dict[Group, Methods]:
    """The finished runs below ``root``. What is unfinished or cannot be read is named in a warning and left out.

    With ``by_folder`` runs are called after the folder above them, not after their method, whatever start and steps.
    """
    groups: dict[Group, dict[str, dict[int, Run]]] = {}
    for folder in sorted({path.parent for name in ("config.yaml", "results.json") for path in root.rglob(name)}):
        try:
            group, method, seed, run = read_run(folder)
            if by_folder:
                group, method = group._replace(start=None, steps=None), folder.parent.name
            seeds = groups.setdefault(group, {}).setdefault(method, {})
            if seed in seeds:
                raise ValueError(f"{method} with seed {seed} is already that of {seeds[seed].folder}")
        except (OSError, ValueError, yaml.YAMLError) as error:
            logger.warning("%s skipped: %s", folder, " ".join(str(error).split()))
            continue
        seeds[seed] = run
    order = {method: index for index, method in enumerate(WORDS)}
    return {
        group: {
            method: dict(sorted(groups[group][method].items()))
            for method in sorted(groups[group], key=lambda name: (order.get(name, len(order)), name))
        }
        for group in sorted(groups, key=str)
    }


def read_run(folder: Path) -> tuple[Group, str, int, Run]:
    """Group, method, seed and numbers of a finished run; ValueError says why it is none."""
    for name in ("config.yaml", "results.json"):
        if not (folder / name).exists():
            raise ValueError(f"no {name}" + (": unfinished" if name == "results.json" else ""))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    results = read_json((folder / "results.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(results, dict):
        raise ValueError("config.yaml and results.json should each hold names and values")
    for key, kind in {"task": str, "data": str, "method": str, "seed": int}.items():
        if not isinstance(config.get(key), kind):
            raise ValueError(f"`{key}` of config.yaml should be {kind.__name__}, found {config.get(key)!r}")
    settings: dict[str, Any] = {key: config.get(key) for key in Group._fields}
    if settings["contrast"] is not None:
        settings["contrast"] = " to ".join(map(str, settings["contrast"]))
    figures = {
        name: float(value)
        for name, value in results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    numbers = {name: value for name, value in figures.items() if math.isfinite(value)}
    if not numbers:
        raise ValueError("results.json holds no number")
    for name in figures.keys() - numbers.keys():
        logger.warning("%s: %s is %s, and left out", folder, name, figures[name])
    return Group(**settings), config["method"], config["seed"], Run(folder, numbers)


def measured(runs: Mapping[int, Run], metric: str) -> Sample:
    """``metric`` of the runs that measured it."""
    return Sample(tuple(run.numbers[metric] for run in runs.values() if metric in run.numbers))


def paired(reference: Mapping[int, Run], other: Mapping[int, Run], metric: str) -> Sample:
    """``metric`` of the reference minus that of the other, seed by seed, over the seeds that both have."""
    pairs = [(reference[seed].numbers, other[seed].numbers) for seed in reference if seed in other]
    return Sample(tuple(a[metric] - b[metric] for a, b in pairs if metric in a and metric in b))


def metrics_of(methods: Methods) -> list[str]:
    """The names measured by any run: the known ones first, then the others."""
    found = {name for runs in methods.values() for run in runs.values() for name in run.numbers}
    return [name for name in METRICS if name in found] + sorted(found - METRICS.keys() - set(NO_METRICS))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_table(methods: Methods) -> str:
    """Mean and standard deviation over the seeds."""

    def cell(runs: Mapping[int, Run], metric: str) -> str:
        sample = measured(runs, metric)
        return sample.spread(METRICS.get(metric, 3)) + count(sample, len(runs))

    metrics = metrics_of(methods)
    rows = [[method, str(len(runs)), *(cell(runs, metric) for metric in metrics)] for method, runs in methods.items()]
    return markdown(["method", "seeds", *metrics], rows)


def difference_table(methods: Methods, reference: str) -> str:
    """Paired differences with their 95 % confidence intervals."""

    def cell(runs: Mapping[int, Run], metric: str, seeds: int) -> str:
        sample = paired(methods[reference], runs, metric)
        return sample.change(METRICS.get(metric, 3)) + count(sample, seeds)

    metrics = [metric for metric in metrics_of(methods) if measured(methods[reference], metric).values]
    rows = []
    for method, runs in methods.items():
        if method != reference:
            seeds = len(methods[reference].keys() & runs.keys())
            rows.append([f"{reference} - {method}", str(seeds), *(cell(runs, metric, seeds) for metric in metrics)])
    return markdown(["difference", "common seeds", *metrics], rows)


def count(sample: Sample, expected: int) -> str:
    """How many seeds a cell rests on, where that is not what its row says."""
    return "" if len(sample.values) in (0, expected) else f" (n={len(sample.values)})"


def report(groups: Mapping[Group, Methods], reference: str, sheets: Mapping[Group, Path]) -> str:
    """The whole report as Markdown."""
    parts = ["# Methods compared"]
    for group, methods in groups.items():
        parts += [f"## {group}", "Mean ± standard deviation over the seeds.", mean_table(methods)]
        if reference not in methods:
            parts.append(f"No finished run of {reference} here, so no differences.")
        elif len(methods) > 1:
            parts += [
                f"{reference} minus each other method with the same seed: mean and 95 % confidence interval "
                "(Student's t; not corrected for the number of comparisons).",
                difference_table(methods, reference),
            ]
        if group in sheets:
            parts.append(f"![images]({sheets[group].name})")
    return "\n\n".join([*parts, "![score by method](bars.png)"]) + "\n"


def table_rows(groups: Mapping[Group, Methods], reference: str) -> Iterator[dict[str, Any]]:
    """One row per group, method and metric; what a single seed cannot say is left empty."""
    for group, methods in groups.items():
        for method, runs in methods.items():
            for metric in metrics_of({method: runs}):
                sample = measured(runs, metric)
                difference = paired(methods.get(reference, {}) if method != reference else {}, runs, metric)
                low, high = difference.interval or (None, None)
                yield {
                    **group._asdict(),
                    "method": method,
                    "metric": metric,
                    "n": len(sample.values),
                    "mean": sample.mean,
                    "std": sample.std,
                    "reference": reference,
                    "pairs": len(difference.values),
                    "difference": difference.mean if difference.values else None,
                    "low": low,
                    "high": high,
                }


def save_bars(path: Path, groups: Mapping[Group, Methods], reference: str) -> None:
    """The score of every method: mean, standard deviation, and each seed as a dot. One panel per group."""
    columns = min(3, len(groups))
    lengths = [len(methods) for methods in groups.values()]
    most = [max(lengths[first : first + columns]) for first in range(0, len(lengths), columns)]
    heights = [1.1 + 0.32 * length for length in most]
    figure = Figure(figsize=(5 * columns, sum(heights)), layout="constrained")
    panels = figure.subplots(len(most), columns, squeeze=False, height_ratios=heights).flat
    for number, ((group, methods), axes) in enumerate(zip(groups.items(), panels, strict=False)):
        scores = {method: measured(runs, "score") for method, runs in methods.items()}
        scores = {method: sample for method, sample in scores.items() if sample.values}
        for y, (method, sample) in enumerate(scores.items()):
            color = "tab:orange" if method == reference else "tab:blue"
            axes.barh(y, sample.mean, xerr=sample.std, color=color, alpha=0.6, capsize=3)
            axes.plot(sample.values, [y + 0.25] * len(sample.values), "o", color="white", mec="black", markersize=4)
        axes.set_yticks(range(len(scores)), [WORDS.get(method, method) for method in scores])
        axes.set_ylim(most[number // columns] - 0.4, -0.6)  # bars of one thickness
        axes.set_title(textwrap.fill(str(group), 60), fontsize=9)
        axes.set_xlabel("score: mean, standard deviation, seeds")
        axes.grid(axis="x", alpha=0.3)
    for axes in panels:
        axes.set_axis_off()
    figure.savefig(path, dpi=130)


def read_samples(methods: Methods) -> dict[str, dict[str, Any]]:
    """samples.pt of the lowest seed that all methods which left one have in common, by method."""
    left = {
        method: {seed: run.folder / "samples.pt" for seed, run in runs.items() if (run.folder / "samples.pt").exists()}
        for method, runs in methods.items()
    }
    left = {method: files for method, files in left.items() if files}
    common = set.intersection(*(set(files) for files in left.values())) if left else set()
    if left and not common:
        logger.warning("no image sheet: %s have samples.pt of no common seed", ", ".join(left))
    samples: dict[str, dict[str, Any]] = {}
    for method, files in left.items() if common else ():
        try:
            found = torch.load(files[min(common)], map_location="cpu", weights_only=True)
            sizes = {len(found[key]) for key in ("lr", "restored", "hr", "predictions", "truth")}
            if len(sizes) > 1:
                raise ValueError(f"its parts should be as many, found {sorted(sizes)}")
            first = next(iter(samples.values()), found)
            if found["truth"] != first["truth"] or not torch.equal(found["hr"], first["hr"]):
                raise ValueError(f"its images are not those of {next(iter(samples))}")
        except Exception as error:  # of a damaged file torch raises nearly anything
            logger.warning("%s skipped: %s", files[min(common)], str(error).partition("\n")[0] or type(error).__name__)
        else:
            samples[method] = found
    return samples


def save_sheet(path: Path, samples: Mapping[str, Mapping[str, Any]]) -> None:
    """Test images by row: LR, every method's restored image with what the task network read in it, HR."""
    first = next(iter(samples.values()))
    columns = {"LR": first["lr"], **{method: found["restored"] for method, found in samples.items()}, "HR": first["hr"]}
    rows = min(IMAGES, len(first["truth"]))
    height, width = first["hr"].shape[-2:]
    figure = Figure(figsize=(1.3 * len(columns), (1.2 * height / width + 0.3) * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for row, panels in enumerate(grid):
        truth = first["truth"][row]
        for axes, (title, images) in zip(panels, columns.items(), strict=True):
            axes.imshow(images[row].float().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if title in samples:
                if prediction := samples[title]["predictions"][row]:  # empty where no network read it
                    mark, color = ("✓", "green") if prediction == truth else ("✗", "red")
                    axes.set_xlabel(f"{mark} {prediction}", color=color, fontsize=8)
            elif title == "HR":
                axes.set_xlabel(truth, fontsize=8)
            if row == 0:
                axes.set_title(textwrap.fill(WORDS.get(title, title), 16), fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder with the runs, at any depth")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="(default: %(default)s)")
    parser.add_argument("--reference", default="sr4ir", help="the method the others are compared with")
    parser.add_argument("--by", choices=["method", "folder"], default="method", help="what runs are called after")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    groups = read_runs(args.runs, by_folder=args.by == "folder")
    if not groups:
        raise SystemExit(f"report: no finished run (config.yaml and results.json) below {args.runs}")
    args.out.mkdir(parents=True, exist_ok=True)
    sheets = {}
    for group, methods in groups.items():
        if samples := read_samples(methods):
            sheets[group] = args.out / f"sheet_{group.slug}.png"
            save_sheet(sheets[group], samples)
    save_bars(args.out / "bars.png", groups, args.reference)
    rows = list(table_rows(groups, args.reference))
    with (args.out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = report(groups, args.reference, sheets)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    for name in ("report.md", "table.csv", "bars.png", *(sheet.name for sheet in sheets.values())):
        print(args.out / name)


if __name__ == "__main__":
    main()
