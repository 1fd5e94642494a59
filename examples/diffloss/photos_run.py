"""The quickstart on photographs: a restoration network with and without DiffLoss, in a few minutes.

    python -m examples.quickstart --loss diff

Crops of photographs are blurred (Gaussian, sigma 1.5) and made noisy (standard deviation 25/255). A small NAFNet learns
to restore them with the pixel loss; from the same start, on the same batches, it learns again with the pixel loss plus
``DiffLoss(small_prior())``. Both are compared on photographs that neither the networks nor the prior were trained on.
The last lines say where images and numbers are.
"""

import argparse
import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from spandrel.architectures.NAFNet import NAFNet
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from examples.common.data.folder import check_folder
from examples.common.data.photos import grid_crops, photographs, random_crops
from examples.common.engine.run_directory import to_json
from restoreloss import DiffLoss, WeightedSum, audit, calibrate, small_prior

BATCH, CROP, TEST_CROP = 8, 48, 96


@dataclass(frozen=True)
class Degradation:
    """Gaussian blur, then Gaussian noise."""

    blur: float
    noise: float

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        blurred = clean
        if self.blur > 0:
            size = 2 * math.ceil(3 * self.blur) + 1
            blurred = gaussian_blur(clean, kernel_size=[size, size], sigma=[self.blur, self.blur])
        return blurred + self.noise / 255 * torch.randn(clean.shape, generator=generator)

    def __str__(self) -> str:
        return f"Gaussian blur, sigma {self.blur:g}, then Gaussian noise, standard deviation {self.noise:g}/255"


@dataclass
class Run:
    """The state of a training: network, optimizer, stream of batches, and what was measured."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0
    seconds: list[float] = field(default_factory=list)
    pixel: list[float] = field(default_factory=list)
    psnr: dict[int, float] = field(default_factory=dict)

    def branch(self) -> "Run":
        """A copy that goes on exactly as this one would."""
        net = copy.deepcopy(self.net)
        optimizer = torch.optim.AdamW(net.parameters())
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        generator = torch.Generator().set_state(self.generator.get_state())
        return Run(net, optimizer, generator, self.step, list(self.seconds), list(self.pixel), dict(self.psnr))


@dataclass(frozen=True)
class Experiment:
    """What both runs share."""

    photos: Sequence[Tensor]
    test_clean: Tensor
    test_degraded: Tensor
    degrade: Degradation
    steps: int
    lr: float
    device: torch.device

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        clean = random_crops(self.photos, BATCH, CROP, generator)
        return clean.to(self.device), self.degrade(clean, generator).to(self.device)

    def train(self, run: Run, objective: nn.Module, until: int, title: str) -> None:
        """The training loop. DiffLoss is one term of ``objective``; nothing else knows of it."""
        with tqdm(total=self.steps, initial=run.step, desc=title, unit="step") as progress:
            while run.step < until:
                for group in run.optimizer.param_groups:
                    group["lr"] = self.lr * (1 - run.step / self.steps)
                clean, degraded = self.batch(run.generator)
                started = time.perf_counter()
                restored = run.net(degraded)
                loss = objective(restored, clean)
                run.optimizer.zero_grad()
                loss.backward()
                run.optimizer.step()
                run.pixel.append(float((restored.detach() - clean).abs().mean()))
                if not math.isfinite(run.pixel[-1]):
                    raise FloatingPointError(f"{title}, step {run.step + 1}: the pixel loss is {run.pixel[-1]}")
                run.seconds.append(time.perf_counter() - started)
                run.step += 1
                if run.step % max(1, self.steps // 10) == 0:
                    run.psnr[run.step] = float(psnr(self.restore(run.net), self.test_clean).mean())
                    progress.set_postfix(held_out_psnr=f"{run.psnr[run.step]:.2f}")
                progress.update()

    @torch.no_grad()
    def restore(self, net: nn.Module) -> Tensor:
        """The held-out crops, restored, clipped to [0, 1]."""
        restored = torch.cat([net(part).clamp(0, 1) for part in self.test_degraded.split(BATCH)])
        if not restored.isfinite().all():
            raise FloatingPointError("the restored held-out crops are not finite")
        return restored


def psnr(restored: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (N,)."""
    values = peak_signal_noise_ratio(restored, clean, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return torch.as_tensor(values)


def ssim(restored: Tensor, clean: Tensor) -> Tensor:
    """Structural similarity of each image, (N,)."""
    return torch.as_tensor(structural_similarity_index_measure(restored, clean, data_range=1.0, reduction="none"))


@torch.no_grad()
def diffusion_distance(restored: Tensor, clean: Tensor, prior: nn.Module) -> Tensor:
    """Mean of the noise term over five timesteps, (N,): what the loss sees, with fixed noise."""
    loss = DiffLoss(prior, h_space_weight=0, reduction="none")
    generator = torch.Generator().manual_seed(0)
    levels = (50, 150, 300, 500, 700)
    return torch.stack([loss(restored, clean, timestep=t, generator=generator) for t in levels]).mean(dim=0)


def table(scores: Mapping[str, Mapping[str, Tensor]], seconds: Mapping[str, float]) -> str:
    """Mean and standard deviation over the held-out crops."""
    lines = [f"{'':<18}{'PSNR (dB)':>16}{'SSIM':>16}{'diffusion distance':>24}{'ms/step':>10}"]
    for name, score in scores.items():
        cells = [
            f"{float(v.mean()):.{d}f} ± {float(v.std()):.{d}f}" for v, d in zip(score.values(), (2, 3, 5), strict=True)
        ]
        step = f"{1000 * seconds[name]:.0f}" if name in seconds else "-"
        lines.append(f"{name:<18}{cells[0]:>16}{cells[1]:>16}{cells[2]:>24}{step:>10}")
    return "\n".join(lines)


def verdict(without: Mapping[str, Tensor], with_prior: Mapping[str, Tensor], photographs: int) -> str:
    """Paired differences over the held-out crops, and what they allow to be said."""
    lines, helped = [], False
    for metric, sign in (("PSNR", 1), ("SSIM", 1), ("diffusion distance", -1)):
        gain = sign * (with_prior[metric] - without[metric])
        # crops of one photograph are not independent: the error is that of the photographs' means, if there are some
        independent = gain.reshape(photographs, -1).mean(dim=1) if photographs > 2 else gain
        mean, error = float(gain.mean()), float(independent.std() / len(independent) ** 0.5)
        word = "no clear change" if abs(mean) <= 2 * error else "better" if mean > 0 else "WORSE"
        helped = helped or (metric == "PSNR" and word == "better")
        lines.append(
            f"with the prior: {metric} {sign * mean:+.3g} ± {error:.2g} (standard error), "
            f"better on {int((gain > 0).sum())} of {len(gain)} crops: {word}"
        )
    if not helped:
        lines.append("The prior did not help fidelity here. Another --share, --timesteps or more --steps may; or not.")
    lines.append("One seed: repeat with --seed before you believe a small difference.")
    return "\n".join(lines)


def save_comparison(path: Path, names: Sequence[str], columns: Mapping[str, Tensor], clean: Tensor) -> None:
    """A row for each held-out photograph: degraded, without, with, clean."""
    rows = len(names)
    figure = Figure(figsize=(2.4 * len(columns), 2.55 * rows), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for row in range(rows):
        for column, (title, images) in enumerate(columns.items()):
            panel = axes[row][column]
            panel.imshow(images[row].clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            panel.set_axis_off()
            quality = "" if title == "clean" else f"{float(psnr(images[row : row + 1], clean[row : row + 1])):.2f} dB"
            label = f"{names[row]}" if title == "clean" else quality
            panel.set_title(f"{title}\n{label}" if row == 0 else label, fontsize=9)
    figure.savefig(path, dpi=150)


def save_curves(path: Path, runs: Mapping[str, Run]) -> None:
    """Pixel loss while training, PSNR on the held-out crops, and what the prior adds to it."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (name, run), style in zip(runs.items(), ("--", "-"), strict=True):
        width = max(1, len(run.pixel) // 20)
        smooth = torch.tensor(run.pixel).unfold(0, width, 1).mean(dim=1)
        left.plot(range(width, len(run.pixel) + 1), smooth, style, label=name)
        middle.plot(list(run.psnr), list(run.psnr.values()), style, marker="o", markersize=3, label=name)
    left.set(xlabel="step", ylabel=f"pixel loss (mean of {width})", yscale="log")
    middle.set(xlabel="step", ylabel="held-out PSNR (dB)")
    middle.legend()
    first, second = (run.psnr for run in runs.values())
    right.plot(list(first), [second[step] - first[step] for step in first], "k-", marker="o", markersize=3)
    right.axhline(0, color="gray", linewidth=0.8)
    right.set(xlabel="step", ylabel="with minus without (dB)")
    figure.savefig(path, dpi=130)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this run alone."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="your own images instead of the photographs")
    parser.add_argument("--blur", type=float, default=1.5, help="sigma in pixels, 0 for none (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=25.0, help="sigma in 1/255 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each network (default: %(default)s)")
    parser.add_argument(
        "--share", type=float, default=0.5, help="the prior's share of the gradient (default: %(default)s)"
    )
    parser.add_argument("--weight", type=float, help="the prior's weight itself, instead of --share")
    parser.add_argument("--h-space-weight", type=float, default=0.01, help="lambda of the paper (default: %(default)s)")
    parser.add_argument(
        "--timesteps", type=int, nargs=2, default=(100, 600), metavar=("LOW", "HIGH"), help="(default: 100 600)"
    )


def _check(args: argparse.Namespace) -> None:
    if not (0 <= args.blur <= 15 and 0 <= args.noise <= 255):
        raise ValueError(
            f"--blur should be in [0, 15] and --noise in [0, 255], found {args.blur:g} and {args.noise:g}."
        )
    if args.steps < 20:
        raise ValueError(f"--steps should be at least 20, found {args.steps}.")
    if args.weight is not None and not 0 < args.weight < float("inf"):
        raise ValueError(f"--weight should be above 0 and finite, found {args.weight}.")
    if not 0 < args.share < 1:
        raise ValueError(f"--share should be between 0 and 1, found {args.share}.")
    check_folder(args.out, "--out")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train without and with the prior, and write what came out.

    Raises:
        ValueError: For options that cannot be; nothing has been written then.
        FloatingPointError: If a training becomes NaN or infinite, or what it restores.
    """
    _check(args)
    torch.manual_seed(args.seed)
    device: torch.device = args.device
    train, held_out = photographs(args.images, smallest=TEST_CROP)
    diff = DiffLoss(small_prior(), h_space_weight=args.h_space_weight, timesteps=tuple(args.timesteps)).to(device)
    args.out.mkdir(parents=True, exist_ok=True)

    test_clean = torch.cat([grid_crops(photo, TEST_CROP, 4) for photo in held_out.values()])
    degrade = Degradation(args.blur, args.noise)
    test_degraded = degrade(test_clean, torch.Generator().manual_seed(0))
    experiment = Experiment(
        train.in_order, test_clean.to(device), test_degraded.to(device), degrade, args.steps, 2e-3, device
    )
    net = NAFNet(width=16, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]).to(device)
    prior, pixel = small_prior().to(device), nn.L1Loss()
    count = sum(p.numel() for p in net.parameters())
    print(f"NAFNet, {count:,} parameters; {len(train)} photographs to learn from, held out: {', '.join(held_out)}")
    print(f"degradation: {degrade}")

    # A tenth of the steps belongs to both: the weight is read off a network that has begun to restore.
    warm = Run(net, torch.optim.AdamW(net.parameters(), lr=experiment.lr), torch.Generator().manual_seed(args.seed))
    experiment.train(warm, pixel, args.steps // 10, "warm-up")
    clean, degraded = experiment.batch(torch.Generator().manual_seed(args.seed + 1))
    objectives = {"pixel": pixel, "diff": diff}
    with torch.no_grad():
        restored = warm.net(degraded)
    if args.weight is None:
        weights = calibrate(objectives, restored, clean, shares={"diff": args.share}, draws=8)
    else:
        weights = {"diff": args.weight}
    objective = WeightedSum(objectives, weights)
    report = audit(objective, restored, clean, draws=8, dominates=0.99)
    print(f"\nweight of the prior: {weights['diff']:.3g}\n{report}\n")

    without, with_prior = warm, warm.branch()
    experiment.train(without, pixel, args.steps, "pixel")
    experiment.train(with_prior, objective, args.steps, "pixel + prior")

    names = {"without prior": without, "with prior": with_prior}
    outputs = {"degraded": experiment.test_degraded.clamp(0, 1)}
    outputs |= {name: experiment.restore(run.net) for name, run in names.items()}
    scores = {
        name: {
            "PSNR": psnr(images, experiment.test_clean).cpu(),
            "SSIM": ssim(images, experiment.test_clean).cpu(),
            "diffusion distance": diffusion_distance(images, experiment.test_clean, prior).cpu(),
        }
        for name, images in outputs.items()
    }
    seconds = {name: sorted(run.seconds[args.steps // 10 :])[len(run.seconds) * 9 // 20] for name, run in names.items()}
    print(f"\n{table(scores, seconds)}\n\n{verdict(scores['without prior'], scores['with prior'], len(held_out))}\n")

    result = {
        "arguments": {
            key: str(value) if isinstance(value, Path | torch.device) else value for key, value in vars(args).items()
        },
        "weight": weights["diff"],
        "audit": report.to_dict(),
        "scores": {name: {metric: v.tolist() for metric, v in score.items()} for name, score in scores.items()},
        "seconds_per_step": seconds,
    }
    (args.out / "results.json").write_text(to_json(result, indent=1))
    (args.out / "audit.txt").write_text(f"{report}\n")
    report.plot(args.out / "audit.png")
    save_curves(args.out / "curves.png", names)
    first = {name: images[::4].cpu() for name, images in (outputs | {"clean": experiment.test_clean}).items()}
    save_comparison(args.out / "comparison.png", list(held_out), first, experiment.test_clean[::4].cpu())
    for name in ("comparison.png", "curves.png", "audit.png", "audit.txt", "results.json"):
        print(args.out.resolve() / name)
    return result
