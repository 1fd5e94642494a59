"""The claims of DiffLoss that two cores can test: all runs of docs/results/diffloss.md.

    python -m examples.experiments.diffloss gamma --out runs/diffloss       # Fig. 7: terms and weights
    python -m examples.experiments.diffloss constrain --out runs/diffloss   # Table 4: noise, x0-hat, x_{t-1}
    python -m examples.experiments.diffloss controls --out runs/diffloss    # what a loss without the prior gives
    python -m examples.experiments.diffloss tables --out runs/diffloss
    python -m examples.experiments.diffloss plot --out runs/diffloss

Finished runs are not done again: the same command goes on after a stop.
"""

import argparse
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

DEGRADATIONS = ("hazy", "rainy", "low_light")
"""The paper's three."""
TERMS: Mapping[str, tuple[float, float]] = {"noise": (1.0, 0.0), "h_space": (0.0, 0.01), "both": (1.0, 0.01)}
"""Weights of the two terms, with the paper's lambda."""
GAMMAS = (1e-4, 1e-3, 1e-2, 1e-1)
SHARES = (0.2, 0.5)
LEARNING_RATES, TUNED = (5e-4, 3e-3, 6e-3), 3e-3
"""Others than the recipe's of 1e-3, and the one that each control is run with as well."""
CONSTRAINED = ("noise", "image", "previous")
COLUMNS: Mapping[str, tuple[str, float, int]] = {
    "psnr": ("PSNR", 1.0, 2), "ssim": ("SSIM", 1.0, 3), "ms_ssim": ("MS-SSIM", 1.0, 3), "vif": ("VIF", 1.0, 3),
    "lite0": ("Lite0 distance", 1.0, 3), "lite0_agreement": ("Lite0 agreement (%)", 1.0, 1),
    "share": ("share of the gradient (%)", 100.0, 1),
}  # fmt: skip
"""Name, factor and digits of the figures; those that no run has are left out."""


@dataclass(frozen=True)
class Experiment:
    """Runs below one folder."""

    out: Path
    base: Config

    def configs(self, study: str, seed: int) -> Iterator[tuple[str, Config]]:
        """Every run of a study by its name, "DEGRADATION/NAME"."""
        for degradation in DEGRADATIONS:
            if study == "controls" and degradation != "rainy":
                continue
            for name, changes in self._controls() if study == "controls" else self._priors(study):
                out = self.out / study / degradation / name / f"seed{seed}"
                options = {"diff": changes} if isinstance(changes, Diff) else changes
                yield (
                    f"{degradation}/{name}",
                    replace(self.base, out=out, seed=seed, degradations=[degradation], **options),
                )

    @staticmethod
    def _controls() -> Iterator[tuple[str, dict[str, Any]]]:
        """Half of the gradient each, and learning rates of the pixel loss alone."""
        yield "pixel", {}
        for rate in LEARNING_RATES:
            yield f"pixel_lr_{rate:g}", {"lr": rate}
        losses: dict[str, dict[str, Any]] = {
            "images": {"filter": Filter(kind="images", share=0.5)},
            "gradients": {"filter": Filter(kind="gradients", share=0.5)},
            "lite0": {"perceptual": Perceptual(network="lite0", share=0.5)},
            "adversarial": {"adversarial": Adversarial(share=0.5)},
        }
        for prior in ("small", "untrained"):
            losses[prior] = {"diff": Diff(prior=prior, share=0.5, timesteps=(100, 600), h_space_weight=0.0)}
        for name, options in losses.items():
            yield name, options
            yield f"{name}_lr_{TUNED:g}", {**options, "lr": TUNED}

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
        for study in ("gamma", "constrain", "controls"):
            for degradation, runs in self.results(study).items():
                plain = runs.get("pixel", {})
                known = {key for seeds in runs.values() for run in seeds.values() for key in run}
                columns = {key: column for key, column in COLUMNS.items() if key in known}
                rows = []
                for name, seeds in runs.items():
                    cells = [f"`{name}`"]
                    for key, (_, factor, digits) in columns.items():
                        values = {seed: factor * run[key] for seed, run in seeds.items() if key in run}
                        if key == "share" or name == "pixel":
                            cells.append(Sample.of(values.values()).spread(digits))
                        else:
                            before = {seed: factor * run[key] for seed, run in plain.items() if key in run}
                            gaps = [value - before[seed] for seed, value in values.items() if seed in before]
                            cells.append(Sample.of(gaps).change(digits))
                    rows.append(cells)
                header = ["", *(title for title, _, _ in columns.values())]
                parts.append(f"### {study}, {degradation}\n\n{markdown(header, rows)}")
        return "\n\n".join(parts)

    def plot(self) -> Path:
        """Fig. 7: the difference in PSNR by gamma, a panel for each degradation, a line for each set of terms."""
        import matplotlib

        matplotlib.use("Agg")
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
        path = self.out / "gamma.png"
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return path


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["gamma", "constrain", "controls", "tables", "plot"])
    parser.add_argument("--out", type=Path, required=True)
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
    experiment = Experiment(arguments.out, base)
    if arguments.study == "tables":
        print(experiment.tables())
    elif arguments.study == "plot":
        print(experiment.plot())
    else:
        experiment.run(arguments.study, arguments.seeds, arguments.names)


if __name__ == "__main__":
    main()
