"""The gradients of all losses under autocast, next to those of float32.

    python -m examples.benchmarks.mixed_precision

A small NAFNet, trained for a moment to take noise out of photographs, makes one step on photographs that it has not
seen: in float32, and under autocast in bfloat16 and in float16 (there with a scaled loss), of the same weights,
noise and timesteps. The table has the cosine of the gradients with those of float32: what reaches a restored image in
float32, with only the objective under autocast; what reaches the same image rounded to half; what reaches the weights
of the NAFNet in the whole step. The ResNet18 is random, with the batch-norm statistics of photographs.
"""

import argparse
import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from examples.common.data.photos import HELD_OUT, TRAIN, load_photo, random_crops
from examples.common.networks.restorers import nafnet
from restoreloss import (
    CQMix,
    DenoisingLoss,
    DiffLoss,
    FeatureMatchingLoss,
    HLFLoss,
    LatentPrior,
    NoiseSchedule,
    TDPLoss,
    WeightedSum,
    as_denoiser,
    partial_diffusion,
    short_steps,
    small_prior,
)

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NEAR = (0.1, 0.03, 0.01, 0.003)

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Batch:
    """Photographs, and what a network restores them from."""

    degraded: Tensor
    clean: Tensor


@cache
def photographs(count: int = 4, size: int = 32, *, held_out: bool = True) -> Batch:
    """Crops with noise of 25 of 255."""
    generator = torch.Generator().manual_seed(int(held_out))
    photos = [load_photo(name) for name in (HELD_OUT if held_out else TRAIN)]
    clean = random_crops(photos, count, size, generator)
    return Batch(clean + 25 / 255 * torch.randn(clean.shape, generator=generator), clean)


@cache
def restorer(steps: int = 30) -> nn.Module:
    """A small NAFNet after a few steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nafnet(12, (1, 1), 1, (1, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    batch = photographs(8, held_out=False)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.l1_loss(network(batch.degraded), batch.clean).backward()
        optimizer.step()
    return network


@cache
def reader(seed: int = 0) -> nn.Module:
    """A ResNet18 without weights, whose batch-norm statistics are those of photographs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = resnet18(num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # an average over all that is seen
    with torch.no_grad():
        network.train()(photographs(8, held_out=False).clean)
    return network.eval()  # type: ignore[no-any-return]


def latent_prior() -> LatentPrior:
    """A tiny autoencoder and U-Net of diffusers, without weights."""
    from diffusers import AutoencoderKL, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8,
        )  # fmt: skip
        unet = UNet2DModel(
            in_channels=4, out_channels=4, block_out_channels=(32, 32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
        )  # fmt: skip
    return LatentPrior(autoencoder, unet)


CASES: dict[str, Callable[[], Loss]] = {
    "L1 of the pixels": nn.L1Loss,
    "MSE of the pixels": nn.MSELoss,
    "DiffLoss(small_prior())": lambda: DiffLoss(small_prior()),
    "DiffLoss, rms": lambda: DiffLoss(small_prior(), distance="rms"),
    "DiffLoss, l1": lambda: DiffLoss(small_prior(), distance="l1"),
    "DiffLoss, h-space": lambda: DiffLoss(small_prior(), noise_weight=0, h_space_weight=1),
    "DiffLoss, timesteps below 250": lambda: DiffLoss(small_prior(), timesteps=(0, 250)),
    "DiffLoss, timesteps from 750": lambda: DiffLoss(small_prior(), timesteps=(750, 1000)),
    "DiffLoss, crop and checkpointing": lambda: DiffLoss(small_prior(), crop=0.5, checkpointing=True),
    "DiffLoss, latents": lambda: DiffLoss(latent_prior()),
    "TDPLoss(resnet18)": lambda: TDPLoss(reader()),
    "TDPLoss, mse": lambda: TDPLoss(reader(), distance="mse"),
    "TDPLoss, four layers": lambda: TDPLoss(reader(), [f"layer{k}" for k in (1, 2, 3, 4)]),
    "HLFLoss(resnet18, resnet18)": lambda: HLFLoss(reader(), reader(1)),
    "WeightedSum of L1, DiffLoss, TDPLoss": lambda: WeightedSum(
        {"pixel": nn.L1Loss(), "diff": DiffLoss(small_prior()), "tdp": TDPLoss(reader())},
        weights={"diff": 0.1, "tdp": 0.01},
    ),
}


def value_and_gradients(
    loss: Callable[[], Tensor], tensors: Iterable[Tensor], precision: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    """A loss and its gradients, under autocast where a precision is given.

    In float16 the loss is scaled, and the scale lowered until nothing overflows, as ``GradScaler`` does from step to
    step. What the loss draws from torch's global generator is the same at every call.
    """
    tensors = list(tensors)
    for scale in [2.0**power for power in (12, 8, 4, 0, -4)] if precision == torch.float16 else [1.0]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                value = loss()
            found = torch.autograd.grad(scale * value, tensors, allow_unused=True, materialize_grads=True)
        if all(gradient.isfinite().all() for gradient in found):
            break
    return value.detach(), [gradient.double() / scale for gradient in found]


def cosine(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """The cosine of two gradients, all their tensors together."""
    flat = [torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (one, other)]
    return float(torch.cosine_similarity(flat[0], flat[1], dim=0, eps=1e-300))


def seeded(objective: Any) -> Loss:
    """The objective with a generator, the same at every call, where it takes one."""
    if "generator" not in inspect.signature(getattr(objective, "forward", objective)).parameters:
        return objective  # type: ignore[no-any-return]
    return lambda restored, clean: objective(restored, clean, generator=torch.Generator().manual_seed(0))


def measure(
    objective: Any, network: nn.Module, batch: Batch, precisions: Mapping[str, torch.dtype] = PRECISIONS
) -> dict[str, list[float]]:
    """For each precision the cosines with float32: to an image in float32, to one in half, to the weights.

    Not a number where the loss or a gradient is not finite.
    """
    loss, found = seeded(objective), {}
    image, weights = network(batch.degraded).detach().requires_grad_(), list(network.parameters())

    def step() -> Tensor:
        return loss(network(batch.degraded), batch.clean)

    _, to_image = value_and_gradients(lambda: loss(image, batch.clean), [image], None)
    _, to_weights = value_and_gradients(step, weights, None)
    for name, precision in precisions.items():
        rounded = image.detach().to(precision).requires_grad_()
        same = rounded.detach().float().requires_grad_()
        _, to_same = value_and_gradients(lambda same=same: loss(same, batch.clean), [same], None)  # type: ignore[misc]
        pairs = [
            (value_and_gradients(lambda: loss(image, batch.clean), [image], precision), to_image),
            (value_and_gradients(lambda one=rounded: loss(one, batch.clean), [rounded], precision), to_same),  # type: ignore[misc]
            (value_and_gradients(step, weights, precision), to_weights),
        ]
        found[name] = [
            cosine(half, exact) if all(tensor.isfinite().all() for tensor in (value, *half)) else math.nan
            for (value, half), exact in pairs
        ]
    return found


def others(network: nn.Module, batch: Batch) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """The other losses, and the tensors that learn from them."""
    student, prior, mix = copy.deepcopy(reader()), small_prior(), CQMix()
    matching, denoising = FeatureMatchingLoss(student, reader(1)), DenoisingLoss(prior, NoiseSchedule.linear())
    restored = network(batch.degraded).detach()
    start = restored.clone().requires_grad_()
    seeded = torch.Generator

    def diffused() -> Tensor:
        return nn.functional.l1_loss(
            partial_diffusion(as_denoiser(prior), start, short_steps(200, 2), generator=seeded().manual_seed(0)),
            batch.clean,
        )

    def mixed() -> Tensor:
        mixture = mix(network(batch.degraded), batch.clean, generator=seeded().manual_seed(0))
        return nn.functional.mse_loss(mixture, batch.degraded)

    weights = {
        "student": [p for p in student.parameters() if p.requires_grad],
        "prior": [p.requires_grad_() for p in prior.parameters()],
    }
    return {
        "FeatureMatchingLoss(resnet18, resnet18), to the student": (
            lambda: matching(restored, batch.clean), weights["student"],
        ),
        "DenoisingLoss of the small prior, to its weights": (
            lambda: denoising(batch.clean, generator=seeded().manual_seed(0)), weights["prior"],
        ),
        "partial_diffusion, two steps, to the restored image": (diffused, [start]),
        "CQMix and MSE, to the restorer": (mixed, list(network.parameters())),
    }  # fmt: skip


def nearer(objective: Any, batch: Batch, precision: torch.dtype) -> list[float]:
    """The cosine at the image as it comes nearer the target: clean photographs with noise of each of ``NEAR``."""
    loss, found = seeded(objective), []
    noise = torch.randn(batch.clean.shape, generator=torch.Generator().manual_seed(5))
    for strength in NEAR:
        image = (batch.clean + strength * noise).requires_grad_()
        exact, half = (
            value_and_gradients(lambda image=image: loss(image, batch.clean), [image], one)[1]  # type: ignore[misc]
            for one in (None, precision)
        )
        found.append(cosine(half, exact))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4, help="images")
    parser.add_argument("--size", type=int, default=32, help="of an image")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch, network = photographs(options.count, options.size), restorer()
    columns = [f"{name}, {where}" for name in PRECISIONS for where in ("image", "half image", "weights")]
    print("What reaches the restored image, and the restorer\n")
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, build in CASES.items():
        cells = [f"{value:.4f}" for values in measure(build(), network, batch).values() for value in values]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\nWhat trains another network\n\n| | {' | '.join(PRECISIONS)} |\n|---|{'---|' * len(PRECISIONS)}")
    for name, (step, tensors) in others(network, batch).items():
        _, exact = value_and_gradients(step, tensors, None)
        halves = [value_and_gradients(step, tensors, precision)[1] for precision in PRECISIONS.values()]
        print(f"| {name} | {' | '.join(f'{cosine(half, exact):.4f}' for half in halves)} |", flush=True)
    print(f"\nAs the image comes nearer the target: its distance; bfloat16\n\n| | {' | '.join(map(str, NEAR))} |")
    print(f"|---|{'---|' * len(NEAR)}")
    for name in ("DiffLoss(small_prior())", "DiffLoss, l1", "DiffLoss, timesteps from 750", "TDPLoss(resnet18)"):
        cells = [f"{value:.4f}" for value in nearer(CASES[name](), batch, torch.bfloat16)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
