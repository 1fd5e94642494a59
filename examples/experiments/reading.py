"""What two readers gain from TDPLoss, and why: the seeds and controls of docs/results/reading.md.

    python -m examples.experiments.reading --out runs/reading --seeds 0 1 2 3 4
    python -m examples.experiments.reading --out runs/reading --seeds 0 1 2 --methods gradients untrained

Every method goes on from the same start, for the time that the steps of L1 + TDP take: that of one core, so that a busy
machine does not count. Finished runs are not done again: the same command goes on after a stop. It ends with the table
of all that is there.
"""

import argparse
import copy
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.common.data.words import TEST_SEED, Degradation, Split, lines
from examples.common.engine.controls import ImageGradients
from examples.common.engine.reading import words_read
from examples.common.engine.run_directory import check_settings, lock_folder, to_json
from examples.common.engine.training import by_turns, check_options, restore
from examples.common.networks.restorers import restorer
from examples.common.networks.text_readers import PPOCR, EnglishG2, Read, english_g2
from examples.experiments.report import markdown
from examples.reading.figure import save_comparison
from examples.reading.retraining import retrained
from examples.reading.scores import FIDELITY, READING, interval, measure
from examples.reading.training import (
    BATCH,
    FURTHER_LR,
    LEAST,
    LR,
    TDP_BATCH,
    Lines,
    enlarged,
    tdp_loss,
)
from restoreloss import DiffLoss, WeightedSum, small_prior

logger = logging.getLogger(__name__)

RATES = {"l1": 1.0, "l1_half": 0.5, "l1_double": 2.0}
"""Learning rates of L1 alone, by the one that L1 + TDP has."""
TITLES = {
    "degraded": "degraded (bicubic)",
    "l1": "L1",
    "l1_half": "L1, half the learning rate",
    "l1_double": "L1, twice the learning rate",
    "tdp": "L1 + TDP",
    "untrained": "L1 + TDP, untrained reader",
    "squared": "L1 + squared error",
    "gradients": "L1 + squared error of image gradients",
    "diffloss": "L1 + DiffLoss",
    "retrained": "degraded, the fixed reader retrained on such words",
    "clean": "clean",
}
THROUGH_A_NETWORK = ("tdp", "untrained", "diffloss")
"""Methods with batches of few words, since a network has to look at them."""
METHODS = tuple(name for name in TITLES if name not in ("degraded", "clean"))


@dataclass(frozen=True)
class Experiment:
    """Runs below one folder, ``seed0/l1.json`` and so on."""

    out: Path
    split: Split
    test_words: int
    noise: float
    blur: float
    steps: int
    tdp_steps: int
    share: float
    pool: int

    @cached_property
    def network(self) -> EnglishG2:
        return english_g2()

    @cached_property
    def readers(self) -> dict[str, Read]:
        return {"fixed": self.network.read, "judge": PPOCR().read}

    @cached_property
    def test(self) -> tuple[Tensor, list[str], Tensor]:
        clean, texts = lines(self.test_words, self.split, TEST_SEED)
        return clean, texts, self.degrade(clean, TEST_SEED)

    @property
    def degrade(self) -> Degradation:
        return Degradation(noise=self.noise, blur=self.blur)

    def check_settings(self) -> None:
        """Write the settings beside the runs, or raise ``ValueError`` where those that are there have others."""
        names = [option.name for option in fields(self) if option.name != "out"]
        check_settings(self.out, {name: getattr(self, name) for name in names})

    def run(self, seed: int, methods: Sequence[str]) -> None:
        """What is missing of a seed."""
        folder = self.out / f"seed{seed}"
        methods = [name for name in methods if not (folder / f"{name}.json").exists()]
        methods += [name for name in ("degraded", "clean") if not any(self.out.glob(f"seed*/{name}.json"))]
        if not methods:
            return
        folder.mkdir(parents=True, exist_ok=True)
        clean, _, degraded = self.test
        pool, texts = lines(self.pool, "train", seed)
        training = Lines(device=torch.device("cpu"), clock=time.process_time, pool=pool, degrade=self.degrade)
        net = self._start(folder / "start.pt", training, seed)
        references = {"degraded": enlarged(degraded), "clean": clean}
        for name in methods:
            if name in references:
                self._write(folder, name, references[name])
            elif name == "retrained":
                self._retrain(folder, training, texts, seed)
            else:
                branch = copy.deepcopy(net)
                steps = self._go_on(branch, name, training, seed)
                torch.save(branch.state_dict(), folder / f"{name}.pt")
                self._write(folder, name, restore(branch, degraded, training.device), steps=steps)

    def draw(self, seed: int, file: Path) -> None:
        """The picture of the quickstart, from the runs of a seed."""
        clean, texts, degraded = self.test
        found = load(self.out)
        images = {"degraded": enlarged(degraded), "clean": clean}
        scores = {name: next(runs[name] for runs in found.values() if name in runs) for name in images}
        for name in ("l1", "squared", "tdp"):
            if name not in found[f"seed{seed}"]:
                continue
            net = self._net()
            net.load_state_dict(torch.load(self.out / f"seed{seed}" / f"{name}.pt", weights_only=True))
            images[name] = restore(net, degraded, torch.device("cpu"))
            scores[name] = found[f"seed{seed}"][name]
        read = {name: score["read"] for name, score in scores.items()}
        psnr = {name: float(values(score, "psnr").mean()) for name, score in scores.items()}
        save_comparison(file, images, read, psnr, texts)

    def _start(self, file: Path, training: Lines, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = self._net()
        if file.exists():
            net.load_state_dict(torch.load(file, weights_only=True))
        else:
            training.run(net, nn.L1Loss(), steps=self.steps, size=BATCH, lr=LR, seed=seed, title=f"{seed}: start")
            torch.save(net.state_dict(), file)
        return net

    def _go_on(self, net: nn.Module, name: str, training: Lines, seed: int) -> int:
        """Train on with a method for its number of steps, which is returned."""
        rate, size = FURTHER_LR * RATES.get(name, 1.0), TDP_BATCH if name in THROUGH_A_NETWORK else BATCH
        objective: nn.Module = nn.L1Loss()
        if name not in RATES:
            objective = training.with_share(net, self._loss(name, seed), share=self.share, seed=seed + 1)
        steps = self._steps(name if name not in RATES else "l1", training, objective, size)
        training.run(net, objective, steps=steps, size=size, lr=rate, seed=seed + 2, title=f"{seed}: {TITLES[name]}")
        return steps

    def _loss(self, name: str, seed: int) -> nn.Module:
        if name == "diffloss":
            return DiffLoss(small_prior(), timesteps=(100, 600))
        if name == "squared":
            return nn.MSELoss()
        if name == "gradients":
            return ImageGradients()
        torch.manual_seed(seed)
        return tdp_loss(self.network if name == "tdp" else EnglishG2().eval().requires_grad_(False))

    def _retrain(self, folder: Path, training: Lines, texts: list[str], seed: int) -> None:
        """The reader itself learns, for the time that the restorer has had in all."""
        learn = partial(retrained, self.network, (training.pool, texts), self.degrade, seed=seed, clock=training.clock)
        l1 = self._cost("l1", training, partial(training.seconds, self._net(), nn.L1Loss(), size=BATCH))
        cost = self._cost("retrained", training, lambda: learn(steps=3)[1])
        steps = max(1, round((self.steps * l1 + self.tdp_steps) / cost))
        reader = learn(steps=steps)[0].read
        clean, expected, degraded = self.test
        still = float(words_read(reader(clean), expected).mean())
        readers = self.readers | {"fixed": reader}
        self._write(folder, "retrained", enlarged(degraded), readers=readers, steps=steps, clean_words_read=still)

    def _steps(self, name: str, training: Lines, objective: nn.Module, size: int) -> int:
        """As many as take the time of L1 + TDP."""
        if name in ("tdp", "untrained"):  # the same network
            return self.tdp_steps
        cost = self._cost(name, training, partial(training.seconds, self._net(), objective, size=size))
        return max(1, round(self.tdp_steps / cost))

    def _cost(self, name: str, training: Lines, measure: Callable[[], float]) -> float:
        """Of a step, in steps of L1 + TDP; measured once, so that all seeds have as many."""
        file = self.out / "cost_of_a_step.json"
        known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        if name not in known:
            tdp = WeightedSum({"pixel": nn.L1Loss(), "tdp": self._loss("tdp", 0)})
            found = by_turns({"tdp": partial(training.seconds, self._net(), tdp, size=TDP_BATCH), name: measure})
            known[name] = found[name] / found["tdp"]
            file.write_text(to_json(known, indent=1))
        return known[name]

    def _net(self) -> nn.Module:
        return restorer("edsr-small", 4)

    def _write(
        self, folder: Path, name: str, images: Tensor, *, readers: Mapping[str, Read] | None = None, **more: float
    ) -> None:
        clean, texts, _ = self.test
        scores = measure(images, clean, texts, readers or self.readers)
        found = {key: plain(value) for key, value in asdict(scores).items()} | more
        partial = folder / f"{name}.json.partial"
        partial.write_text(to_json(found))
        partial.rename(folder / f"{name}.json")
        logger.info("seed %s, %s: %s", folder.name, TITLES[name], scores.means())


def plain(value: Any) -> Any:
    """Tensors as lists, also in mappings."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def load(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What was found, by seed and method."""
    return {
        folder.name: {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        for folder in sorted(out.glob("seed*"))
    }


def values(found: Mapping[str, Any], metric: str) -> Tensor:
    """A metric of every test image, "psnr" or "words_read/judge"."""
    name, _, reader = metric.partition("/")
    numbers = found[name][reader] if reader else found[name]
    return torch.tensor([float(number) for number in numbers])  # "inf" is the PSNR of clean images


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], reference: str = "l1") -> str:
    """Means over images and seeds; below each, the paired difference to a method with its interval."""
    metrics = [f"{metric}/{reader}" for reader in ("fixed", "judge") for metric in READING] + list(FIDELITY)
    heads = [f"{reader}: {READING[metric]}" for reader in ("fixed", "judge") for metric in READING]
    rows = []
    for name, title in TITLES.items():
        seeds = {seed: runs for seed, runs in found.items() if name in runs}
        if not seeds:
            continue
        steps = sorted({str(runs[name].get("steps", "")) for runs in seeds.values()})
        row = [title, str(len(seeds)), ", ".join(steps)]
        below = ["", "", ""]
        for metric in metrics:
            digits = 3 if metric == "ssim" else 2 if metric == "psnr" else 1
            mean = torch.stack([values(runs[name], metric) for runs in seeds.values()]).mean()
            row.append(f"{float(mean):.{digits}f}")
            pairs = [
                values(runs[name], metric) - values(runs[reference], metric)
                for runs in seeds.values()
                if reference in runs
            ]
            if name in METHODS and name != reference and pairs:
                difference = torch.stack(pairs)
                low, high = interval(difference)
                below.append(f"{float(difference.mean()):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
        rows += [row, below] if len(below) > 3 else [row]
    return markdown(["", "seeds", "steps", *heads, *FIDELITY.values()], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser("reading", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["l1", "tdp"], metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument(
        "--reference", choices=METHODS, default="l1", metavar="NAME", help="of the differences (default: %(default)s)"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="(default: %(default)s)")
    parser.add_argument("--test-words", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--noise", type=float, default=40.0, help="(default: %(default)s)")
    parser.add_argument("--blur", type=float, default=0.0, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="with L1, shared by all (default: %(default)s)")
    parser.add_argument("--tdp-steps", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.97, help="(default: %(default)s)")
    parser.add_argument("--pool", type=int, default=3000, help="training words (default: %(default)s)")
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="of the first seed: words, and what is read in them"
    )
    torch.set_num_threads(1)
    args = vars(parser.parse_args(arguments))
    seeds, methods, picture, reference = (args.pop(name) for name in ("seeds", "methods", "picture", "reference"))
    try:
        for seed in seeds:
            check_options({"seed": seed, **args}, LEAST)
        Degradation(noise=args["noise"], blur=args["blur"])
        _ = lock_folder(args["out"])
        experiment = Experiment(**args)
        experiment.check_settings()
        for seed in seeds:
            experiment.run(seed, methods)
        if picture is not None:
            experiment.draw(seeds[0], picture)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"reading: {error}\n")
    print(table(load(args["out"]), reference))


if __name__ == "__main__":
    main()
