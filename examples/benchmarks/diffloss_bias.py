"""How near the gradient of a cheaper DiffLoss is to that of the whole one, and what it costs.

    python -m examples.benchmarks.diffloss_bias

On held-out photographs, blurred and made noisy, with the prior that ships. For each setting the gradient at the
restored images is averaged over so many draws of timesteps, noise, tiles and samples that all settings have looked at
as many pixels, and compared by its cosine with an average of the whole over draws of its own. "again" is the whole
itself, averaged anew: no estimate can be nearer. Time is of one call with its backward, as a ratio to the floor (two
forward passes without a graph and one backward pass to the input), the median over interleaved rounds.
"""

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from examples.benchmarks.diffloss_cost import Subject, floor
from examples.benchmarks.measure import seconds
from examples.common.data.photos import HELD_OUT, grid_crops, load_photo
from restoreloss import DiffLoss, Subsampled, small_prior

SETTINGS: Mapping[str, tuple[dict[str, Any], int]] = {
    "again": ({}, 1),
    "crop=0.5": ({"crop": 0.5}, 4),
    "subset=0.25": ({"subset": 0.25}, 4),
    "every=4": ({"every": 4}, 4),
    "crop=0.5, subset=0.5": ({"crop": 0.5, "subset": 0.5}, 8),
}
"""Options of DiffLoss and Subsampled, and how many draws look at as much as one of the whole."""


def images(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Degraded and clean crops of all held-out photographs."""
    clean = torch.cat([grid_crops(load_photo(name), size, count) for name in HELD_OUT])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return (gaussian_blur(clean, [9, 9], [1.5, 1.5]) + 10 / 255 * noise).clamp(0, 1), clean


def step(loss: Subsampled, restored: Tensor, clean: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of one call."""
    z = restored.clone().requires_grad_()
    loss(z, clean, generator=generator).backward()
    assert z.grad is not None
    return z.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="of the whole (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    args = parser.parse_args()

    restored, clean = images(args.size, 1)
    timesteps = (100, 600)
    losses = {
        name: Subsampled(
            DiffLoss(small_prior(), timesteps=timesteps, crop=options.get("crop")),
            every=options.get("every", 1),
            subset=options.get("subset"),
        )
        for name, (options, _) in SETTINGS.items()
    }
    whole = losses["again"]
    generator = torch.Generator().manual_seed(1)
    reference = sum(step(whole, restored, clean, generator) for _ in tqdm(range(args.draws), desc="whole"))
    assert isinstance(reference, Tensor)
    cosines = {}
    for name, (_, draws) in SETTINGS.items():
        generator = torch.Generator().manual_seed(2)
        count = args.draws * draws
        found = sum(step(losses[name], restored, clean, generator) for _ in tqdm(range(count), desc=name))
        assert isinstance(found, Tensor)
        cosines[name] = float(torch.cosine_similarity(found.flatten(), reference.flatten(), dim=0))

    bare = Subject(small_prior().requires_grad_(False))
    ratios: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in tqdm(range(args.rounds), desc="rounds"):
        least = floor(bare, restored, clean, "cpu")
        for name, loss in losses.items():
            times = [
                seconds(lambda loss=loss: step(loss, restored, clean, generator), "cpu")  # type: ignore[misc]
                for _ in range(loss.every)
            ]
            ratios[name].append(sum(times) / len(times) / least)
    print(f"{len(clean)} crops of {args.size}x{args.size}, as much as {args.draws} draws of the whole\n")
    print(f"{'':<24}{'time / floor':>14}{'cosine':>10}")
    for name in SETTINGS:
        print(f"{name:<24}{statistics.median(ratios[name]):>14.2f}{cosines[name]:>10.3f}")


if __name__ == "__main__":
    main()
