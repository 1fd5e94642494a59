"""How much the weight that ``calibrate`` finds for a DiffLoss varies with the seed, by how timesteps are drawn.

    python -m examples.benchmarks.calibration_spread

On crops of held-out photographs, blurred and made noisy, with the prior that ships and half of the gradient: the
largest weight over the smallest, and the standard deviation of its logarithm, over seeds. "independent" draws each
image's timestep by itself; "stratified", the default, one from each equal part of the range.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from examples.benchmarks.diffloss_bias import images
from restoreloss import DiffLoss, calibrate, small_prior

RANGES: Mapping[str, tuple[int, int]] = {"all timesteps": (0, 1000), "100 to 600": (100, 600)}


def weights(loss: DiffLoss, restored: Tensor, clean: Tensor, seeds: range, draws: int) -> list[float]:
    """The weight of the loss by the seed; no two seeds have a draw in common."""
    objectives = {"pixel": nn.L1Loss(), "diff": loss}
    return [
        calibrate(objectives, restored, clean, shares={"diff": 0.5}, draws=draws, seed=seed * draws)["diff"]
        for seed in seeds
    ]


def losses(prior: Callable[..., Any], low: int, high: int) -> dict[str, DiffLoss]:
    """The noise term, with each way to draw."""

    def independent(count: int, generator: torch.Generator | None) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    return {
        "independent": DiffLoss(prior, h_space_weight=0, timesteps=independent),
        "stratified": DiffLoss(prior, h_space_weight=0, timesteps=(low, high)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="of each calibration (default: %(default)s)")
    parser.add_argument("--size", type=int, default=48, help="of the crops (default: %(default)s)")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds should be at least 2, found {args.seeds}.")
    restored, clean = images(args.size, 2)
    print(f"{len(clean)} crops of {args.size}x{args.size}, {args.seeds} seeds of {args.draws} draws each\n")
    print(f"{'timesteps':<16}{'drawn':<14}{'mean weight':>12}{'largest / smallest':>20}{'std of log':>12}")
    for title, (low, high) in RANGES.items():
        for name, loss in losses(small_prior(), low, high).items():
            found = weights(loss, restored, clean, range(args.seeds), args.draws)
            spread = statistics.stdev(map(math.log, found))
            print(f"{title:<16}{name:<14}{statistics.mean(found):>12.3g}", end="")
            print(f"{max(found) / min(found):>20.2f}{spread:>12.3f}", flush=True)


if __name__ == "__main__":
    main()
