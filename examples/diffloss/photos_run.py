"""The quickstart on photographs: a restoration network with and without DiffLoss, and its controls, in a few minutes.

    python -m examples.quickstart --on photographs

Crops of photographs are blurred (Gaussian, sigma 1.5) and made noisy (standard deviation 25/255). A small NAFNet learns
to restore them four times from one start: with L1, with the squared error of image gradients beside L1 (two lines, no
prior), with ``DiffLoss(small_prior())`` beside L1, all on the same batches, and with L1 for the time of DiffLoss.
All are compared on photographs that neither the networks nor the prior were trained on.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from examples.common.data.degrade import blurred
from examples.common.data.folder import check_folder
from examples.common.data.photos import grid_crops, photographs, random_crops
from examples.common.engine.controls import ImageGradients
from examples.common.engine.run_directory import to_json
from examples.common.engine.training import Training, by_turns, restore
from examples.common.networks.restorers import restorer
from restoreloss import DiffLoss, WeightedSum, audit, small_prior

BATCH, CROP, TEST_CROP, LR = 8, 48, 96, 2e-3
TITLES = {
    "degraded": "degraded", "pixel": "L1", "gradients": "L1 + image gradients", "diff": "L1 + DiffLoss",
    "pixel_long": "L1, equal time", "clean": "clean",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Crops(Training):
    """Crops of photographs, with Gaussian blur and then Gaussian noise."""

    photos: Sequence[Tensor]
    blur: float
    noise: float

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean and degraded crops."""
        clean = random_crops(self.photos, size, CROP, generator)
        return clean.to(self.device), self.degrade(clean, generator).to(self.device)

    def degrade(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return blurred(clean, self.blur) + self.noise / 255 * torch.randn(clean.shape, generator=generator)


def scores(restored: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """PSNR in dB and SSIM of each image, (N,)."""
    psnr = peak_signal_noise_ratio(restored, clean, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim: Any = structural_similarity_index_measure(restored, clean, data_range=1.0, reduction="none")
    return {"PSNR": torch.as_tensor(psnr), "SSIM": ssim}


def table(
    found: Mapping[str, Mapping[str, Tensor]], seconds: Mapping[str, float], steps: Mapping[str, int], photographs: int
) -> str:
    """Means over the held-out crops, and what DiffLoss gains over each, with the standard error over photographs."""
    lines = [f"{'':<22}{'PSNR (dB)':>10}{'SSIM':>8}{'steps':>8}{'ms/step':>9}   DiffLoss minus it: PSNR, SSIM"]
    for name, score in found.items():
        means = f"{float(score['PSNR'].mean()):>10.2f}{float(score['SSIM'].mean()):>8.3f}"
        if name not in steps:
            lines.append(f"{TITLES[name]:<22}{means}")
            continue
        gains = []
        for metric, digits in (("PSNR", 2), ("SSIM", 3)):
            gain = found["diff"][metric] - score[metric]
            # crops of one photograph are not independent: the error is that of the photographs' means
            independent = gain.reshape(photographs, -1).mean(dim=1) if photographs > 2 else gain
            mean, error = float(gain.mean()), float(independent.std() / len(independent) ** 0.5)
            word = "no clear change" if abs(mean) <= 2 * error else "better" if mean > 0 else "WORSE"
            gains.append(f"{mean:+.{digits}f} ± {error:.{digits}f} {word}")
        change = "" if name == "diff" else "   " + ", ".join(gains)
        lines.append(f"{TITLES[name]:<22}{means}{steps[name]:>8}{1000 * seconds[name]:>9.0f}{change}")
    return "\n".join(lines)


def save_comparison(
    path: Path, names: Sequence[str], columns: Mapping[str, Tensor], psnr: Mapping[str, Tensor]
) -> None:
    """A row for each photograph, one crop of each: degraded, restored, clean."""
    figure = Figure(figsize=(2.4 * len(columns), 2.55 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for row, name in enumerate(names):
        for panel, (column, images) in zip(axes[row], columns.items(), strict=True):
            panel.imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
            panel.set_axis_off()
            label = f"{float(psnr[column][row]):.2f} dB" if column in psnr else name
            panel.set_title(f"{TITLES[column]}\n{label}" if row == 0 else label, fontsize=9)
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this run alone."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="your own images instead of the photographs")
    parser.add_argument("--blur", type=float, default=1.5, help="sigma in pixels, 0 for none (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=25.0, help="sigma in 1/255 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each network (default: %(default)s)")
    parser.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="of the gradient, of DiffLoss and of the control (default: %(default)s)",
    )
    parser.add_argument("--h-space-weight", type=float, default=0.01, help="lambda of the paper (default: %(default)s)")
    parser.add_argument(
        "--timesteps", type=int, nargs=2, default=(100, 600), metavar=("LOW", "HIGH"), help="(default: 100 600)"
    )


def _check(args: argparse.Namespace) -> None:
    if not (0 <= args.blur <= 15 and 0 <= args.noise <= 255):
        raise ValueError(
            f"--blur should be in [0, 15] and --noise in [0, 255], found {args.blur:g} and {args.noise:g}."
        )
    if args.steps < 1:
        raise ValueError(f"--steps should be at least 1, found {args.steps}.")
    if not 0 < args.share < 1:
        raise ValueError(f"--share should be between 0 and 1, found {args.share}.")
    check_folder(args.out, "--out")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train with each loss, and write what came out.

    Raises:
        ValueError: For options that cannot be; nothing has been written then.
        FloatingPointError: If a training becomes NaN or infinite.
    """
    _check(args)
    train, held_out = photographs(args.images, smallest=TEST_CROP)
    diff = DiffLoss(small_prior(), h_space_weight=args.h_space_weight, timesteps=tuple(args.timesteps))
    training = Crops(device=args.device, photos=train.in_order, blur=args.blur, noise=args.noise)
    clean = torch.cat([grid_crops(photo, TEST_CROP, 4) for photo in held_out.values()])
    degraded = training.degrade(clean, torch.Generator().manual_seed(0))
    torch.manual_seed(args.seed)
    start = restorer("nafnet-small", 1).to(args.device)
    print(
        f"NAFNet, {sum(p.numel() for p in start.parameters()):,} parameters; {len(train)} photographs to learn from, ",
        end="",
    )
    print(f"held out: {', '.join(held_out)}\ndegradation: Gaussian blur {args.blur:g}, noise {args.noise:g}/255")

    objectives: dict[str, nn.Module] = {"pixel": nn.L1Loss()}
    for name, term in (("gradients", ImageGradients()), ("diff", diff)):
        parts = {"pixel": nn.L1Loss(), name: term}
        objectives[name] = WeightedSum(parts, shares={name: args.share}).to(args.device)
    nets = {name: copy.deepcopy(start) for name in objectives}
    learn = partial(training.run, size=BATCH, lr=LR, seed=args.seed)
    for name, objective in objectives.items():
        learn(nets[name], objective, steps=args.steps, title=TITLES[name])
    # measured by turns, afterwards: shares are means over what was trained
    costs = {name: partial(training.seconds, start, objective, size=BATCH) for name, objective in objectives.items()}
    seconds = by_turns(costs)
    seconds["pixel_long"] = seconds["pixel"]
    steps = dict.fromkeys(objectives, args.steps)
    steps["pixel_long"] = max(1, round(args.steps * seconds["diff"] / seconds["pixel"]))
    nets["pixel_long"] = copy.deepcopy(start)
    learn(nets["pixel_long"], nn.L1Loss(), steps=steps["pixel_long"], title=TITLES["pixel_long"])

    images = {"degraded": degraded.clamp(0, 1)}
    images |= {name: restore(net, degraded, args.device) for name, net in nets.items()}
    found = {name: scores(image, clean) for name, image in images.items()}
    report = audit(
        objectives["diff"],
        images["diff"][:BATCH].to(args.device),
        clean[:BATCH].to(args.device),
        draws=8,
        dominates=0.99,
    )
    print(f"\nWhat pulls at {BATCH} of the restored crops\n{report}\n\n{table(found, seconds, steps, len(held_out))}\n")
    print("One seed: repeat with --seed before you believe a small difference.\n")
    result = {
        "arguments": {k: str(v) if isinstance(v, Path | torch.device) else v for k, v in vars(args).items()},
        "audit": report.to_dict(),
        "scores": {name: {metric: v.tolist() for metric, v in score.items()} for name, score in found.items()},
        "steps": steps,
        "seconds_per_step": seconds,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(to_json(result, indent=1))
    (args.out / "audit.txt").write_text(f"{report}\n")
    report.plot(args.out / "audit.png")
    first = {name: image[::4] for name, image in (images | {"clean": clean}).items()}
    psnr = {name: score["PSNR"][::4] for name, score in found.items()}
    save_comparison(args.out / "comparison.png", list(held_out), first, psnr)
    for name in ("comparison.png", "audit.png", "audit.txt", "results.json"):
        print(args.out.resolve() / name)
    return result
