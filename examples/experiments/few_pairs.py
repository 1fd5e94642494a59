"""DiffLoss where pairs are few: restorers of words, beside a prior that has seen many words and none of the pairs.

    python -m examples.experiments.few_pairs --out runs/few_pairs --seeds 0 1 2 --pairs 16 64 256
    python -m examples.experiments.few_pairs --out runs/words_diffloss --seeds 1 2 3 --pairs 3000 --extent 0.5

A restorer (EDSR) sees few pairs, each of one word degraded once, and then words and fonts that it has never
seen. Words are made four times smaller and noisy, or with ``--extent`` degraded by Mixture-B, which keeps their size.
The prior is trained on other words, as long as ``--prior-steps`` say; earlier states of it tell whether a prior that
knows more helps more. Controls have the same share of the gradient and know no words: the squared error, that of image
gradients, an untrained prior, the prior of photographs. Finished runs are not done again.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from examples.common.data.degrade import degradation
from examples.common.data.options import DataOptions
from examples.common.data.words import TEST_SEED, Degradation, lines
from examples.common.engine.controls import ImageGradients
from examples.common.engine.run_directory import check_settings, lock_folder, to_json
from examples.common.engine.training import restore
from examples.common.networks.restorers import restorer
from examples.common.networks.text_readers import PPOCR, english_g2
from examples.diffloss.train_prior import ARCHITECTURE, Recipe
from examples.diffloss.train_prior import Trainer as PriorTrainer
from examples.experiments.reading import plain, values
from examples.experiments.report import markdown
from examples.reading.scores import FIDELITY, READING, interval, measure
from examples.reading.training import BATCH, LR, Lines
from restoreloss import DiffLoss, NoiseSchedule, WeightedSum, small_prior

logger = logging.getLogger(__name__)

PRIOR_WORDS, PRIOR_SEED = 2000, 77_000
DOSES = (0.1, 0.3, 1.0)
"""Parts of its training after which the prior is kept."""
TITLES = {
    "l1": "L1",
    "l1_half": "L1, half the learning rate",
    "l1_double": "L1, twice the learning rate",
    "squared": "L1 + squared error",
    "gradients": "L1 + squared error of image gradients",
    "untrained": "L1 + DiffLoss, untrained prior",
    "photos": "L1 + DiffLoss, prior of photographs",
    "words_0.1": "L1 + DiffLoss, prior of words, a tenth of its training",
    "words_0.3": "L1 + DiffLoss, prior of words, a third of its training",
    "words": "L1 + DiffLoss, prior of words",
    "words_low": "the same, timesteps 5 to 60",
    "words_h": "the same, h-space alone",
}
RATES = {"l1_half": 0.5, "l1_double": 2.0}


@dataclass(frozen=True)
class Pairs(Lines):
    """Lines that are degraded once."""

    @cached_property
    def degraded(self) -> Tensor:
        return self.degrade(self.pool, 1)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean and degraded lines, drawn with replacement."""
        chosen = torch.randint(len(self.pool), (size,), generator=generator)
        return self.pool[chosen].to(self.device), self.degraded[chosen].to(self.device)


@dataclass(frozen=True)
class Experiment:
    """Runs below one folder, ``pairs16/seed0/l1.json`` and so on."""

    out: Path
    test_words: int
    noise: float
    extent: float | None
    steps: int
    share: float
    prior_steps: int

    @cached_property
    def readers(self) -> dict[str, Any]:
        return {"fixed": english_g2().read, "judge": PPOCR().read}

    @cached_property
    def test(self) -> tuple[Tensor, list[str], Tensor]:
        clean, texts = lines(self.test_words, "test", TEST_SEED)
        return clean, texts, self.degrade(clean, TEST_SEED)

    @cached_property
    def degrade(self) -> Callable[[Tensor, int], Tensor]:
        """(clean, seed) -> degraded."""
        if self.extent is None:
            return Degradation(noise=self.noise)
        options = DataOptions(degradation="mixture_b", scale=1, mixture_extent=self.extent)
        return lambda clean, seed: degradation(options, seed)(clean, 0)

    def train_prior(self) -> None:
        """Diffusion on crops of clean words, kept at each of ``DOSES``, with its error on unseen words."""
        folder = self.out / "prior"
        if (folder / "errors.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        words = list(lines(PRIOR_WORDS, "train", PRIOR_SEED)[0])
        unseen = lines(8, "validation", PRIOR_SEED)[0]
        trainer = PriorTrainer(Recipe(steps=self.prior_steps, jitter=False))
        errors = {"0": self._error(trainer.average.module, unseen)}
        kept = {max(1, round(dose * self.prior_steps)): f"{dose:g}" for dose in DOSES}
        for step in tqdm(range(1, self.prior_steps + 1), desc="prior", unit="step"):
            trainer.train_step(words)
            if step in kept:
                save_file(trainer.average.module.state_dict(), folder / f"{kept[step]}.safetensors")
                errors[kept[step]] = self._error(trainer.average.module, unseen)
        (folder / "errors.json").write_text(to_json(errors, indent=1))

    @staticmethod
    @torch.no_grad()
    def _error(net: nn.Module, images: Tensor) -> dict[str, float]:
        """Mean squared error of the predicted noise, by timestep."""
        schedule, generator = NoiseSchedule.linear(), torch.Generator().manual_seed(0)
        found = {}
        for t in (10, 60, 200, 500, 900):
            noise = torch.randn(images.shape, generator=generator)
            steps = torch.full((len(images),), t)
            predicted = net(schedule.add_noise(2 * images - 1, noise, steps), steps).sample
            found[str(t)] = float((predicted - noise).square().mean())
        return found

    def run(self, pairs: int, seed: int, methods: Sequence[str]) -> None:
        """What is missing of a number of pairs and a seed."""
        folder = self.out / f"pairs{pairs}" / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        clean, texts, degraded = self.test
        pool = lines(pairs, "train", seed)[0]
        training = Pairs(device=torch.device("cpu"), clock=time.process_time, pool=pool, degrade=self.degrade)
        for name in methods:
            file = folder / f"{name}.json"
            if file.exists():
                continue
            torch.manual_seed(seed)
            net = restorer("edsr-small", 4 if self.extent is None else 1)
            seconds = training.run(
                net, self._objective(name, seed), steps=self.steps, size=BATCH // 2, lr=LR * RATES.get(name, 1.0),
                seed=seed, title=f"{pairs} pairs, {seed}: {name}",
            )  # fmt: skip
            scores = measure(restore(net, degraded, training.device), clean, texts, self.readers)
            found = {key: plain(value) for key, value in asdict(scores).items()} | {"seconds_per_step": seconds}
            file.write_text(to_json(found))
            logger.info("%d pairs, seed %d, %s: %s", pairs, seed, name, scores.means())

    def _objective(self, name: str, seed: int) -> nn.Module:
        if name == "l1" or name in RATES:
            return nn.L1Loss()
        if name in ("squared", "gradients"):
            other: nn.Module = nn.MSELoss() if name == "squared" else ImageGradients()
        else:
            other = self._diff_loss(name, seed)
        return WeightedSum({"pixel": nn.L1Loss(), "other": other}, shares={"other": self.share})

    def _diff_loss(self, name: str, seed: int) -> DiffLoss:
        from diffusers import UNet2DModel

        options: dict[str, Any] = {"h_space_weight": 0.0, "timesteps": (100, 600), "crop": 0.25}
        if name == "photos":
            return DiffLoss(small_prior(), **options)
        torch.manual_seed(seed)
        net = UNet2DModel(**ARCHITECTURE)
        if name != "untrained":
            dose = name.removeprefix("words_") if name in ("words_0.1", "words_0.3") else "1"
            net.load_state_dict(load_file(self.out / "prior" / f"{dose}.safetensors"))
        if name == "words_low":
            options["timesteps"] = (5, 60)
        if name == "words_h":
            options |= {"noise_weight": 0.0, "h_space_weight": 1.0}
        return DiffLoss(net.eval().requires_grad_(False), NoiseSchedule.linear(), **options)


def load(out: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """What was found, by number of pairs, then by seed and method."""
    return {
        int(folder.name.removeprefix("pairs")): {
            one.name: {path.stem: json.loads(path.read_text()) for path in one.glob("*.json")}
            for one in sorted(folder.glob("seed*"))
        }
        for folder in sorted(out.glob("pairs*"), key=lambda path: int(path.name.removeprefix("pairs")))
    }


def table(found: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> str:
    """Means over images and seeds with the paired difference to L1, a block for each number of pairs."""
    metrics = {f"words_read/{reader}": f"{reader}: {READING['words_read']}" for reader in ("fixed", "judge")} | FIDELITY
    rows = []
    for pairs, seeds in found.items():
        for name, title in TITLES.items():
            runs = [of_seed for of_seed in seeds.values() if name in of_seed]
            if not runs:
                continue
            times = [1000 * of_seed[name]["seconds_per_step"] for of_seed in runs]
            row = [str(pairs), title, str(len(runs)), f"{sum(times) / len(times):.0f}"]
            for metric in metrics:
                digits = 3 if metric == "ssim" else 2 if metric == "psnr" else 1
                mean = torch.stack([values(of_seed[name], metric) for of_seed in runs]).mean()
                cell = f"{float(mean):.{digits}f}"
                gaps = [values(one[name], metric) - values(one["l1"], metric) for one in runs if "l1" in one]
                if name != "l1" and gaps:
                    gap = torch.stack(gaps)
                    low, high = interval(gap)
                    cell += f" ({float(gap.mean()):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}])"
                row.append(cell)
            rows.append(row)
    return markdown(["pairs", "", "seeds", "ms / step", *metrics.values()], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser("few_pairs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--methods", nargs="+", choices=tuple(TITLES), default=list(TITLES), metavar="NAME")
    parser.add_argument("--test-words", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--noise", type=float, help="sigma in 1/255 (default: 20)")
    parser.add_argument("--extent", type=float, help="of Mixture-B in the place of reduction and noise")
    parser.add_argument("--steps", type=int, default=600, help="of each restorer (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="of the second term (default: %(default)s)")
    parser.add_argument("--prior-steps", type=int, default=1200, help="(default: %(default)s)")
    args = vars(parser.parse_args(arguments))
    torch.set_num_threads(1)
    seeds, pairs, methods = args.pop("seeds"), args.pop("pairs"), args.pop("methods")
    if min(pairs) < 1 or min(seeds) < 0 or not 0 < args["share"] < 1:
        parser.error("--pairs should be at least 1, --seeds at least 0 and --share between 0 and 1")
    if args["extent"] is not None and (args["noise"] is not None or not args["extent"] > 0):
        parser.error("--extent should be above 0, without --noise, which belongs to smaller words")
    args["noise"] = 20.0 if args["noise"] is None else args["noise"]
    _ = lock_folder(args["out"])
    experiment = Experiment(**args)
    try:
        check_settings(args["out"], {name: value for name, value in args.items() if name != "out"})
    except ValueError as error:
        parser.error(str(error))
    experiment.train_prior()
    for seed in seeds:
        for number in pairs:
            experiment.run(number, seed, methods)
    print(table(load(args["out"])))


if __name__ == "__main__":
    main()
