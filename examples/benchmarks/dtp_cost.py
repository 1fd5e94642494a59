"""The cost of the parts of DTP, next to a training step, and to the same thing written plainly.

    python -m examples.benchmarks.dtp_cost

On a small U-Net of convolutions (diffusers, 70 thousand parameters and up), in one run, medians over rounds:

- the importance of its parameters, against a loop over the samples (both are ours: they must agree);
- the penalty in closed form (``apply_``), and as a loss with a graph, against a training step;
- the projection of gradients, and the orthogonality loss, against a training step on both objectives;
- a training step with experts against one without; their parameters and multiplications.
"""

import argparse
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from examples.benchmarks.measure import median_seconds
from examples.dtp.networks import timed_network
from restoreloss import GradientOrthogonality, ParameterImportance
from restoreloss.regularizers.layer_decay import execution_order, shallow


def small_unet(width: int = 8) -> nn.Module:
    """Two levels of residual blocks."""
    torch.manual_seed(0)
    network: nn.Module = UNet2DModel(
        block_out_channels=(width, 2 * width), norm_num_groups=4, layers_per_block=1, add_attention=False,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    return network


def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """L1 of the noise."""
    noisy, t, noise = batch
    return F.l1_loss(model(noisy, t).sample, noise)


def batch(count: int, size: int) -> tuple[Tensor, ...]:
    """Images with noise, timesteps, noise."""
    noise = torch.randn(count, 3, size, size)
    return torch.rand(count, 3, size, size) + 0.04 * noise, torch.randint(1, 50, (count,)), noise


def importance(size: int, samples: int, rounds: int) -> float:
    """The factor by which it is faster than the loop."""
    network, data = small_unet(), [batch(samples, size)]
    found: dict[bool, dict[str, Tensor]] = {}

    def measure(loop: bool) -> Callable[[], object]:
        def run() -> None:
            estimate = ParameterImportance(network, chunk_size=samples)
            estimate._one_by_one = loop
            estimate.accumulate(loss_fn, data)
            if estimate._one_by_one != loop:
                raise SystemExit("torch.func should take the gradients of this network.")
            found[loop] = estimate.importance()

        return run

    seconds = median_seconds({"loop": measure(True), "at once": measure(False)}, rounds, "importance")
    one, other = (torch.cat([value.flatten() for value in found[loop].values()]) for loop in (True, False))
    if float((one - other).norm() / one.norm()) > 1e-4:
        raise SystemExit("Both ways should find the same importance.")
    return seconds["loop"] / seconds["at once"]


def penalty(size: int, count: int, rounds: int) -> tuple[float, float]:
    """Shares of a training step: the closed form, and as a loss."""
    network, data = small_unet(), batch(count, size)
    estimate = ParameterImportance(network)
    estimate.accumulate(loss_fn, [data])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(network, data).backward()
        optimizer.step()

    seconds = median_seconds(
        {"step": step, "closed": estimate.apply_, "loss": lambda: estimate().backward()}, rounds, "penalty"
    )
    return seconds["closed"] / seconds["step"], seconds["loss"] / seconds["step"]


def gradients(size: int, count: int, rounds: int) -> tuple[float, float]:
    """Times of a step on both objectives: with the projection, and with the orthogonality loss."""
    network = small_unet()
    generation, restoration = batch(count, size), batch(count, size)
    shared = shallow(network, execution_order(network, *generation[:2]), 0.5)
    known = {id(p) for p in shared}
    deep = [p for p in network.parameters() if id(p) not in known]
    orthogonality = GradientOrthogonality(shared)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def plain() -> None:
        optimizer.zero_grad()
        (loss_fn(network, generation) + loss_fn(network, restoration)).backward()
        optimizer.step()

    def projected() -> None:
        optimizer.zero_grad()
        orthogonality.project(loss_fn(network, generation), loss_fn(network, restoration), others=deep)
        optimizer.step()

    def orthogonal() -> None:
        optimizer.zero_grad()
        half = count // 2
        parts = (slice(0, half), slice(half, count))
        sides = [
            [loss_fn(network, tuple(x[part] for x in data)) for part in parts] for data in (generation, restoration)
        ]
        (torch.stack([*sides[0], *sides[1]]).sum() / 2 + 0.1 * orthogonality(*sides)).backward()
        optimizer.step()

    seconds = median_seconds({"plain": plain, "projected": projected, "orthogonal": orthogonal}, rounds, "gradients")
    return seconds["projected"] / seconds["plain"], seconds["orthogonal"] / seconds["plain"]


def experts(name: str, size: int, count: int, rounds: int) -> tuple[float, ...]:
    """With experts against without: time of a step (0 without rounds), parameters, multiplications of one image."""
    networks = {moe: timed_network(name, num_timesteps=50, moe=moe) for moe in (False, True)}
    images = torch.rand(count, 3, size, size)
    floating = []
    for network in networks.values():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(images[:1], 10)
        floating.append(counter.get_total_flops())

    def step(moe: bool) -> Callable[[], object]:
        return lambda: networks[moe](images, 10).mean().backward()

    ratio = 0.0
    if rounds:
        seconds = median_seconds({"without": step(False), "with": step(True)}, rounds, "experts")
        ratio = seconds["with"] / seconds["without"]
    counts = [sum(p.numel() for p in network.parameters() if p.requires_grad) for network in networks.values()]
    return ratio, counts[0] / 1e6, counts[1] / 1e6, floating[0] / 2e9, floating[1] / 2e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*performance drop.*")
    print("Importance, vectorised: times faster than one sample after the other")
    faster = {size: importance(size, args.samples, args.rounds) for size in (8, 16, 32)}
    print("".join(f"{f'{size} x {size}':>12}{value:>8.1f}\n" for size, value in faster.items()), end="")
    closed, as_loss = penalty(32, 8, args.rounds)
    print(f"Penalty, share of a training step (8 images of 32): closed form {closed:.3f}, as a loss {as_loss:.3f}")
    projected, orthogonal = gradients(32, 8, args.rounds)
    print(f"Step on both objectives: projected {projected:.2f} of the plain one, orthogonality loss {orthogonal:.2f}")
    print("Experts                time of a step    parameters (M)      multiplications of 128 x 128 (G)")
    for name, rounds in (("nafnet-small", args.rounds), ("restormer-small", args.rounds), ("nafnet", 0)):
        ratio, without, with_experts, before, after = experts(name, 64 if rounds else 128, 4, rounds)
        area = (128 / 64) ** 2 if rounds else 1
        time_of_step = f"{ratio:.2f}" if rounds else "-"
        print(
            f"{name:<20}{time_of_step:>17}{f'{without:.2f} -> {with_experts:.2f}':>18}"
            f"{f'{area * before:.1f} -> {area * after:.1f}':>30}"
        )
    if closed > 0.1:
        raise SystemExit("The penalty in closed form should take at most a tenth of a step.")
    if max(faster.values()) < 3:
        raise SystemExit("The vectorised importance should be at least three times as fast as the loop.")


if __name__ == "__main__":
    main()
