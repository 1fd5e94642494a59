"""The quickstart on words: a restoration network with and without TDPLoss, for a reader that nobody may retrain.

    python -m examples.quickstart

Rendered words are reduced by four and made noisy. A small EDSR learns to restore them with the L1 loss until that has
little more to give. From there it goes on twice: with L1 + ``TDPLoss`` through EasyOCR's recognition network, which
stays as it is, and with L1 alone for the same time. Both are compared on words and fonts that neither was trained on,
by that reader and by a judge of another make that takes part in no training. Photographs and DiffLoss: --loss diff.
"""

import argparse
import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from examples.common.data.folder import check_folder
from examples.common.engine import command_line
from examples.common.engine.run_directory import to_json
from examples.common.networks.restorers import restorer
from examples.reading.figure import save_comparison
from examples.reading.readers import (
    TDP_LAYERS,
    Read,
    character_errors,
    english_g2,
    pp_ocr,
    reads_with,
    to_english_g2,
    words_read,
)
from examples.reading.words import Degradation, lines
from restoreloss import TDPLoss, WeightedSum, audit, calibrate

BATCH, TDP_BATCH = 16, 4
LR, FURTHER_LR = 2e-3, 1e-3
TEST_SEED = 1000
METHODS = {"l1": "L1", "tdp": "L1 + TDP"}
METRICS = {"words_read": "words read (%)", "character_error_rate": "character error rate (%)"}


@dataclass(frozen=True)
class Training:
    """Clean lines in memory, degraded anew for each batch."""

    pool: Tensor
    degrade: Degradation
    device: torch.device

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.pool), (size,), generator=generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        clean = self.pool[chosen]
        return clean.to(self.device), self.degrade(clean, seed).to(self.device)

    def run(
        self, net: nn.Module, objective: nn.Module, *, steps: int, size: int, lr: float, seed: int, title: str
    ) -> float:
        """Train with a learning rate that falls to 0, and return the seconds of a step.

        The loop is the usual one: ``TDPLoss`` is a term of ``objective``, and nothing else knows of it.

        Raises:
            FloatingPointError: If the loss becomes NaN or infinite.
        """
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(seed)
        started = time.perf_counter()
        for step in tqdm(range(steps), desc=title, unit="step"):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            clean, degraded = self.batch(size, generator)
            loss = objective(net(degraded), clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"{title}, step {step + 1}: the loss is {loss.item()}")
        return (time.perf_counter() - started) / steps


@dataclass(frozen=True)
class Scores:
    """What was measured on each test image."""

    read: dict[str, list[str]]
    words_read: dict[str, Tensor]
    character_error_rate: dict[str, Tensor]
    psnr: Tensor


def measure(images: Tensor, clean: Tensor, texts: Sequence[str], readers: Mapping[str, Read]) -> Scores:
    """The scores of images in [0, 1]."""
    read = {name: reader(images) for name, reader in readers.items()}
    return Scores(
        read,
        {name: words_read(said, texts) for name, said in read.items()},
        {name: character_errors(said, texts) for name, said in read.items()},
        -10 * (images - clean).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10(),
    )


def interval(values: Tensor) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over test images."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (2000, len(values)), generator=generator)
    low, high = values[chosen].mean(dim=1).quantile(torch.tensor([0.025, 0.975]))
    return float(low), float(high)


def _rows(scores: Scores) -> dict[str, Tensor]:
    rows = {}
    for reader in scores.read:
        rows[f"{reader} reader: {METRICS['words_read']}"] = scores.words_read[reader]
        rows[f"{reader} reader: {METRICS['character_error_rate']}"] = scores.character_error_rate[reader]
    return rows | {"PSNR (dB)": scores.psnr}


def table(scores: Mapping[str, Scores], seconds: Mapping[str, float]) -> str:
    """Means over the test images, and the paired difference that the TDP loss makes, with its 95 % interval."""
    columns = {name: _rows(scores[name]) for name in ("degraded", *METHODS)}
    lines_ = [f"{'':<42}{'degraded':>10}{'L1':>10}{'L1 + TDP':>10}   difference to L1 [95 %]"]
    for metric in columns["l1"]:
        means = "".join(f"{float(column[metric].mean()):>10.2f}" for column in columns.values())
        difference = columns["tdp"][metric] - columns["l1"][metric]
        low, high = interval(difference)
        lines_.append(f"{metric:<42}{means}   {float(difference.mean()):+.2f} [{low:+.2f}, {high:+.2f}]")
    times = "".join(f"{1000 * seconds[name]:>10.0f}" for name in METHODS)
    lines_.append(f"{'time of a step (ms)':<42}{'-':>10}{times}")
    return "\n".join(lines_)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        "quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="(default: %(default)s)")
    parser.add_argument("--noise", type=float, default=30.0, help="sigma in 1/255 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="with L1, shared by both (default: %(default)s)")
    parser.add_argument("--tdp-steps", type=int, default=500, help="with L1 + TDP (default: %(default)s)")
    parser.add_argument(
        "--l1-steps", type=int, help="further steps with L1 (default: as many as take the time of --tdp-steps)"
    )
    parser.add_argument(
        "--share", type=float, default=0.97, help="the TDP loss's share of the gradient (default: 0.97)"
    )
    parser.add_argument("--pool", type=int, default=3000, help="training lines held in memory (default: %(default)s)")
    parser.add_argument("--test-words", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--device", type=command_line.device, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args, others = parser.parse_known_args(arguments)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}; those of the run on photographs want --loss diff")
    for name, least in (("steps", 1), ("tdp_steps", 1), ("pool", 1), ("test_words", 8), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} should be at least {least}, found {getattr(args, name)}")
    if args.l1_steps is not None and args.l1_steps < 1:
        parser.error(f"--l1-steps should be at least 1, found {args.l1_steps}")
    if not 0 < args.share < 1:
        parser.error(f"--share should be between 0 and 1, found {args.share}")
    return parser, args


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser, args = parse(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        return compare(args)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"quickstart: {error}\n")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train without and with the TDP loss, and write what came out.

    Raises:
        ValueError: For options that cannot be, and where weights or fonts are missing; nothing has been written then.
        FloatingPointError: If a training becomes NaN or infinite.
    """
    torch.manual_seed(args.seed)
    check_folder(args.out, "--out")
    degrade = Degradation(noise=args.noise)
    network = english_g2().to(args.device)
    readers = {"fixed": reads_with(network), "judge": pp_ocr()}
    training = Training(lines(args.pool, "train", args.seed)[0], degrade, args.device)
    clean, texts = lines(args.test_words, "test", TEST_SEED)
    degraded = degrade(clean, TEST_SEED)
    net = restorer("edsr-small", degrade.scale).to(args.device)
    print(
        f"EDSR, {sum(p.numel() for p in net.parameters()):,} parameters; {len(texts)} test words in fonts of their own"
    )
    print(f"degradation: {degrade}")

    pixel = nn.L1Loss()
    training.run(net, pixel, steps=args.steps, size=BATCH, lr=LR, seed=args.seed, title="L1, shared")
    start = words_read(readers["fixed"](restore(net, degraded, args.device)), texts)

    objectives = {"pixel": pixel, "tdp": TDPLoss(network, TDP_LAYERS, normalize=to_english_g2)}
    target, given = training.batch(BATCH, torch.Generator().manual_seed(args.seed + 1))
    with torch.no_grad():
        restored = net(given)
    weights = calibrate(objectives, restored, target, shares={"tdp": args.share}, draws=1)  # neither loss is random
    objective = WeightedSum(objectives, weights)
    report = audit(objective, restored, target, draws=1, dominates=0.99)
    print(f"\nweight of the TDP loss: {weights['tdp']:.3g}\n{report}\n")

    nets = {"l1": net, "tdp": copy.deepcopy(net)}
    go_on = partial(training.run, lr=FURTHER_LR, seed=args.seed + 2)
    seconds = {"tdp": go_on(nets["tdp"], objective, steps=args.tdp_steps, size=TDP_BATCH, title="L1 + TDP")}
    l1_steps = args.l1_steps or equal_time(training, net, seconds["tdp"] * args.tdp_steps)
    seconds["l1"] = go_on(nets["l1"], pixel, steps=l1_steps, size=BATCH, title="L1, same time")

    images = {"degraded": F.interpolate(degraded, scale_factor=float(degrade.scale), mode="bicubic").clamp(0, 1)}
    images |= {name: restore(nets[name], degraded, args.device) for name in METHODS} | {"clean": clean}
    scores = {name: measure(image, clean, texts, readers) for name, image in images.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    written = results(args, scores, seconds, weights["tdp"], l1_steps)
    written |= {"audit": report.to_dict(), "words_read_at_the_shared_start": float(start.mean())}
    (args.out / "results.json").write_text(to_json(written, indent=1))
    (args.out / "audit.txt").write_text(f"{report}\n")
    save_comparison(args.out / "comparison.png", images, {name: score.read for name, score in scores.items()}, texts)
    print(f"\n{table(scores, seconds)}\n")
    clean_read = " and ".join(f"{v.mean():.1f} % ({reader})" for reader, v in scores["clean"].words_read.items())
    print(f"words read: clean {clean_read}; where both began {start.mean():.1f} % (fixed)")
    print("One seed: repeat with --seed before you believe a small difference.\n")
    for name in ("comparison.png", "audit.txt", "results.json"):
        print(args.out.resolve() / name)
    return written


def equal_time(training: Training, net: nn.Module, seconds: float) -> int:
    """How many steps with L1 take as long, at least one, from ten steps of a copy."""
    trial = training.run(
        copy.deepcopy(net), nn.L1Loss(), steps=10, size=BATCH, lr=FURTHER_LR, seed=0, title="timing L1"
    )
    return max(1, round(seconds / trial))


@torch.no_grad()
def restore(net: nn.Module, degraded: Tensor, device: torch.device) -> Tensor:
    """Restored images, clipped to [0, 1], on the CPU."""
    return torch.cat([net(part.to(device)).clamp(0, 1).cpu() for part in degraded.split(BATCH)])


def results(
    args: argparse.Namespace, scores: Mapping[str, Scores], seconds: Mapping[str, float], weight: float, l1_steps: int
) -> dict[str, Any]:
    """The means that the table shows, by reader and method, and what they rest on."""
    readers = list(scores["l1"].read)

    def means(names: Sequence[str]) -> dict[str, Any]:
        by_reader = {
            metric: {
                reader: {name: float(getattr(scores[name], metric)[reader].mean()) for name in names}
                for reader in readers
            }
            for metric in METRICS
        }
        return by_reader | {"psnr": {name: float(scores[name].psnr.mean()) for name in names}}

    rows = {name: _rows(scores[name]) for name in METHODS}
    return means(list(METHODS)) | {
        "references": means(["degraded", "clean"]),
        "difference": {metric: interval(rows["tdp"][metric] - rows["l1"][metric]) for metric in rows["l1"]},
        "arguments": {k: str(v) if isinstance(v, Path | torch.device) else v for k, v in vars(args).items()},
        "weight": weight,
        "l1_steps": l1_steps,
        "seconds_per_step": dict(seconds),
    }
