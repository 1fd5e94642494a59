"""The claims of DiffLoss that two cores can test: all runs of docs/results/diffloss.md.

    python -m examples.experiments.diffloss gamma --out runs/diffloss       # Fig. 7: terms and weights
    python -m examples.experiments.diffloss constrain --out runs/diffloss   # Table 4: noise, x0-hat, x_{t-1}
    python -m examples.experiments.diffloss controls --out runs/diffloss    # what a loss without the prior gives
    python -m examples.experiments.diffloss settings --out runs/diffloss    # low timesteps, h-space, no Jacobian
    python -m examples.diffloss.train_prior --out runs/prior --steps 1000 --keep 0 100 300 1000
    python -m examples.experiments.diffloss dose --prior runs/prior --out runs/diffloss   # how much a prior has learned
    python -m examples.experiments.diffloss tables --out runs/diffloss
    python -m examples.experiments.diffloss plot --out runs/diffloss

Finished runs are not done again: the same command goes on after a stop. Rows with a learning rate in their name are
compared to the pixel loss with that one; the rows of the pixel loss are what they are, not differences. Rows called
"long" take about the time of DiffLoss for losses that know no network: compare them by the seconds in the table.
"""

import argparse
import csv
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from examples.common.engine.run_directory import read_json
from examples.diffloss.config import Adversarial, Config, Diff, Filter, Perceptual
from examples.diffloss.train import Trainer
from examples.experiments.report import Sample, markdown

logger = logging.getLogger(__name__)

STUDIES = ("gamma", "constrain", "controls", "settings", "dose")
DEGRADATIONS = ("hazy", "rainy", "low_light")
"""The paper's three."""
TERMS: Mapping[str, tuple[float, float]] = {"noise": (1.0, 0.0), "h_space": (0.0, 0.01), "both": (1.0, 0.01)}
"""Weights of the two terms, with the paper's lambda."""
GAMMAS = (1e-4, 1e-3, 1e-2, 1e-1)
SHARES = (0.2, 0.5)
LEARNING_RATES, TUNED = (5e-4, 3e-3, 6e-3), 3e-3
"""Others than the recipe's of 1e-3, and the one that each control is run with as well."""
LAMBDAS = (0.1, 1.0, 10.0)
LONG = 6
"""A step with DiffLoss takes about as long as so many with a loss that knows no network (docs/guides/diffloss.md)."""
CONSTRAINED = ("noise", "image", "previous")
NOISE = Diff(share=0.5, timesteps=(100, 600), h_space_weight=0.0)
"""The noise term with half of the gradient, by the prior that ships."""
COLUMNS: Mapping[str, tuple[str, float, int]] = {
    "psnr": ("PSNR", 1.0, 2), "ssim": ("SSIM", 1.0, 3), "ms_ssim": ("MS-SSIM", 1.0, 3), "vif": ("VIF", 1.0, 3),
    "lite0": ("Lite0 distance", 1.0, 3), "lite0_agreement": ("Lite0 agreement (%)", 1.0, 1),
    "share": ("share of the gradient (%)", 100.0, 1), "seconds": ("seconds of training", 1.0, 0),
}  # fmt: skip
"""Name, factor and digits of the figures; those that no run has are left out."""


@dataclass(frozen=True)
class Experiment:
    """Runs below one folder."""

    out: Path
    base: Config
    prior: Path | None = None
    figures: Path | None = None

    def configs(self, study: str, seed: int) -> Iterator[tuple[str, Config]]:
        """Every run of a study by its name, "DEGRADATION/NAME"."""
        for degradation in DEGRADATIONS:
            if study not in ("gamma", "constrain") and degradation != "rainy":
                continue
            for name, changes in self._rows(study):
                options = {"out": self.out / study / degradation / name / f"seed{seed}", "seed": seed, **changes}
                yield f"{degradation}/{name}", replace(self.base, degradations=[degradation], **options)

    def _rows(self, study: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if study == "controls":
            yield from self._controls()
        elif study in ("settings", "dose"):
            diffs = self._settings() if study == "settings" else self._doses()
            losses: dict[str, dict[str, Any]] = {name: {"diff": diff} for name, diff in diffs.items()}
            for name, options in {"pixel": {}, "gradients": {"filter": Filter(share=0.5)}, **losses}.items():
                yield name, {**options, "lr": TUNED}
        else:
            for name, diff in self._priors(study):
                yield name, {"diff": diff}

    @staticmethod
    def _settings() -> dict[str, Diff]:
        """Half of the gradient each: timesteps whose gradient has heavy tails, h-space, score distillation."""
        low = replace(NOISE, timesteps=(3, 60))
        return {
            "noise": NOISE,
            "low": low,
            "low_stratified": replace(low, randomness="batch"),
            "low_snr": replace(low, snr_power=-1.0),
            "low_rms": replace(low, distance="rms"),
            "low_rms_snr": replace(low, distance="rms", snr_power=-0.5),
            "low_snr_stratified": replace(low, snr_power=-1.0, randomness="batch"),
            **{f"h_space_{weight:g}": replace(NOISE, h_space_weight=weight) for weight in LAMBDAS},
            "no_jacobian": replace(NOISE, jacobian=False),
            "low_no_jacobian": replace(low, jacobian=False),
        }

    def _doses(self) -> dict[str, Diff]:
        """Half of the gradient for each state of one prior, and for the prior that ships."""
        if self.prior is None:
            raise ValueError("`--prior` should be the folder of a prior that was trained with --keep, found none.")
        kept = {step: str(self.prior / "kept" / step) for step in _errors(self.prior)}
        return {f"prior_{step}": replace(NOISE, prior=folder) for step, folder in {**kept, "small": "small"}.items()}

    def _controls(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Half of the gradient each, learning rates of the pixel loss alone, and the time of DiffLoss without it."""
        yield "pixel", {}
        for rate in LEARNING_RATES:
            yield f"pixel_lr_{rate:g}", {"lr": rate}
        losses: dict[str, dict[str, Any]] = {
            "images": {"filter": Filter(kind="images", share=0.5)},
            "gradients": {"filter": Filter(kind="gradients", share=0.5)},
            "fourier": {"filter": Filter(kind="fourier", share=0.5)},
            "lite0": {"perceptual": Perceptual(network="lite0", share=0.5)},
            "adversarial": {"adversarial": Adversarial(share=0.5)},
        }
        for name, options in {"pixel": {}, "gradients": losses["gradients"]}.items():
            yield f"{name}_lr_{TUNED:g}_long", {**options, "lr": TUNED, "steps": LONG * self.base.steps}
        for prior in ("small", "untrained"):
            losses[prior] = {"diff": replace(NOISE, prior=prior)}
        yield from _tuned(losses)

    @staticmethod
    def _priors(study: str) -> Iterator[tuple[str, Diff]]:
        yield "pixel", Diff()
        if study == "gamma":
            for terms, (noise, h_space) in TERMS.items():
                for gamma in GAMMAS:
                    yield f"{terms}_{gamma:.0e}", Diff(weight=gamma, noise_weight=noise, h_space_weight=h_space)
            for share in SHARES:
                yield f"share_{share:g}", Diff(share=share, timesteps=(100, 600))
        else:
            for kind in CONSTRAINED:
                found: Any = kind
                yield kind, Diff(share=0.2, h_space_weight=0.0, constrain=found, timesteps=(100, 600))

    def run(self, study: str, seeds: list[int], names: list[str] | None = None) -> None:
        """Run what is not finished, one after the other, the first seed of all runs first."""
        for seed in seeds:
            for name, config in self.configs(study, seed):
                if names is not None and name.split("/")[1] not in names:
                    continue
                fresh = not (config.out / "results.json").exists()
                results = Trainer(config).run()
                if fresh:
                    logger.info("%s, seed %d: %.2f dB, %.3f", name, seed, results["psnr"], results["ssim"])

    def results(self, study: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Figures by degradation, name and seed."""
        found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        for file in sorted((self.out / study).glob("*/*/seed*/results.json")):
            degradation, name, seed = file.parts[-4:-1]
            figures = read_json(file.read_text(encoding="utf-8"))
            shares = {key: value for key, value in figures.items() if key.startswith("share/")}
            figures["share"] = sum(value for key, value in shares.items() if key != "share/pixel")
            found.setdefault(degradation, {}).setdefault(name, {})[seed] = figures
        return found

    def tables(self) -> str:
        """Differences to the pixel loss alone, paired by seed, with 95 % intervals."""
        parts = []
        for study in STUDIES:
            for degradation, runs in self.results(study).items():
                known = {key for seeds in runs.values() for run in seeds.values() for key in run}
                columns = {key: column for key, column in COLUMNS.items() if key in known}
                rows = []
                for name, seeds in runs.items():
                    cells = [f"`{name}`"]
                    _, rate, value = name.partition("_lr_")
                    plain = runs.get(f"pixel{rate}{value}", {})
                    for key, (_, factor, digits) in columns.items():
                        values = {seed: factor * run[key] for seed, run in seeds.items() if key in run}
                        if key in ("share", "seconds") or name.startswith("pixel"):
                            cells.append(Sample.of(values.values()).spread(digits))
                        else:
                            before = {seed: factor * run[key] for seed, run in plain.items() if key in run}
                            gaps = [value - before[seed] for seed, value in values.items() if seed in before]
                            cells.append(Sample.of(gaps).change(digits))
                    rows.append(cells)
                header = ["", *(title for title, _, _ in columns.values())]
                parts.append(f"### {study}, {degradation}\n\n{markdown(header, rows)}")
        return "\n\n".join(parts)

    def plot(self) -> list[Path]:
        """The figures of the studies that have runs."""
        import matplotlib

        matplotlib.use("Agg")
        plots = {"gamma": self._plot_gamma, "dose": self._plot_dose}
        return [plot() for study, plot in plots.items() if self.results(study)]

    def _plot_dose(self) -> Path:
        """What a prior adds by how well it predicts noise: PSNR against its held-out error."""
        from matplotlib import pyplot
        from matplotlib.ticker import NullFormatter

        if self.prior is None:
            raise ValueError("`--prior` should be the folder of the prior whose states were compared, found none.")
        (runs,) = self.results("dose").values()
        figure, axis = pyplot.subplots(figsize=(5, 3.6))
        points = []
        for step, error in _errors(self.prior).items():
            gain = _gain(runs.get(f"prior_{step}", {}), runs["pixel"])
            if gain.values:
                points.append((error, gain.mean, gain.std or 0.0))
                axis.annotate(step, points[-1][:2], (4, 4), textcoords="offset points", fontsize=7)
        axis.errorbar(*zip(*points, strict=True), marker="o", capsize=3, label="DiffLoss, by the prior's steps")
        free = _gain(runs.get("gradients", {}), runs["pixel"])
        if free.values:
            axis.axhline(free.mean, color="tab:orange", linestyle="--", linewidth=1, label="squared image gradients")
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set(
            xscale="log",
            xlabel="held-out error of the predicted noise",
            ylabel="PSNR, difference to pixels (dB)",
        )
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=7)
        return self._save(figure, "dose")

    def _save(self, figure: Any, name: str) -> Path:
        from matplotlib import pyplot

        path = (self.figures or self.out) / f"diffloss-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return path

    def _plot_gamma(self) -> Path:
        """Fig. 7: the difference in PSNR by gamma, a panel for each degradation, a line for each set of terms."""
        from matplotlib import pyplot

        found = self.results("gamma")
        figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.2), sharey=True, squeeze=False)
        for axis, (degradation, runs) in zip(axes[0], found.items(), strict=True):
            for terms in TERMS:
                points = []
                for gamma in GAMMAS:
                    seeds = runs.get(f"{terms}_{gamma:.0e}", {})
                    gaps = torch.tensor(
                        [run["psnr"] - runs["pixel"][seed]["psnr"] for seed, run in seeds.items()], dtype=torch.float64
                    )
                    if len(gaps):
                        points.append((gamma, float(gaps.mean()), float(gaps.std()) if len(gaps) > 1 else 0.0))
                if points:
                    x, y, error = zip(*points, strict=True)
                    axis.errorbar(x, y, error, marker="o", capsize=3, label=terms)
            axis.axhline(0, color="gray", linewidth=0.8)
            axis.set(xscale="log", xlabel="gamma", title=degradation.replace("_", " "))
        axes[0][0].set_ylabel("PSNR, difference to pixels alone (dB)")
        axes[0][0].legend()
        return self._save(figure, "gamma")


def _tuned(losses: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each with the recipe's learning rate, and with that at which the pixel loss is better."""
    for name, options in losses.items():
        yield name, options
        yield f"{name}_lr_{TUNED:g}", {**options, "lr": TUNED}


def _errors(prior: Path) -> dict[str, float]:
    """The mean held-out error at timesteps from 100 to 600: of each state of a prior, by its steps, and of "small"."""
    file = prior / "kept.csv"
    if not file.is_file():
        raise ValueError(f"`--prior` should be a folder that train_prior wrote with --keep, found no {file}.")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {row["step"]: sum(float(row[t]) for t in ("100", "200", "400")) / 3 for row in rows}


def _gain(runs: Mapping[str, Mapping[str, float]], plain: Mapping[str, Mapping[str, float]]) -> Sample:
    """The difference in PSNR to the pixel loss with the same seeds."""
    return Sample.of(run["psnr"] - plain[seed]["psnr"] for seed, run in runs.items() if seed in plain)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "tables", "plot"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prior", type=Path, help="of `dose`: the folder of a prior that was trained with --keep")
    parser.add_argument("--figures", type=Path, help="of `plot`: where they go; the default is OUT")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--test_count", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--names", nargs="+", help="of the runs; the default is all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # runs side by side, and figures that do not depend on the number of cores
    base = Config(
        out=arguments.out, steps=arguments.steps, batch=arguments.batch, test_count=arguments.test_count, cpu=True,
        perception=True,
    )  # fmt: skip
    experiment = Experiment(arguments.out, base, arguments.prior, arguments.figures)
    try:
        if arguments.study == "tables":
            print(experiment.tables())
        elif arguments.study == "plot":
            print(*experiment.plot(), sep="\n")
        else:
            experiment.run(arguments.study, arguments.seeds, arguments.names)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
