"""What does one DiffLoss call with its backward cost, next to what it must cost?

    python -m examples.benchmarks.diffloss_cost

The floor is two forward passes of the bare U-Net without a graph and one backward pass to the input alone: the clean
image must be looked at once, the restored one once, and the gradient must come back. Everything is measured in turn,
round after round, and reported as the median over rounds of the ratio to that round's floor. Memory is the growth of
the process's peak during two steps, each variant in a process of its own (on CUDA: of the allocator's peak).
"""

import argparse
import copy
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor
from tqdm import tqdm

from restoreloss import DiffLoss, NoiseSchedule

VARIANTS = ("naive", "ours", "ours, h-space only", "ours, checkpointing")
TIMESTEP = 300


def unet(device: str) -> UNet2DModel:
    """A DDPM U-Net with attention at its deepest levels, 21 M parameters."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=64,
        block_out_channels=(64, 128, 192, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).to(device)


def images(batch: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, size, size)
    return torch.rand(shape, generator=generator).to(device), torch.rand(shape, generator=generator).to(device)


def naive_step(net: UNet2DModel, restored: Tensor, clean: Tensor) -> Callable[[], None]:
    """DiffLoss written without a thought: live weights, and a graph for the clean image too."""
    net = copy.deepcopy(net)
    schedule = NoiseSchedule.linear().to(restored.device)
    seen: list[Tensor] = []
    net.mid_block.register_forward_hook(lambda _module, _args, output: seen.append(output))

    def step() -> None:
        seen.clear()
        z = restored.clone().requires_grad_()
        noise = torch.randn_like(z)
        t = torch.full((len(z),), TIMESTEP, device=z.device)
        noise_z = net(schedule.add_noise(2 * z - 1, noise, t), t).sample
        noise_x = net(schedule.add_noise(2 * clean - 1, noise, t), t).sample
        (F.mse_loss(noise_z, noise_x) + 0.01 * F.mse_loss(seen[0], seen[1])).backward()
        # the weights' gradients stay: the optimiser that zeroes gradients is the restorer's

    return step


def our_step(net: UNet2DModel, restored: Tensor, clean: Tensor, **options: float) -> Callable[[], None]:
    loss = DiffLoss(copy.deepcopy(net), **options)  # type: ignore[arg-type]

    def step() -> None:
        loss(restored.clone().requires_grad_(), clean, timestep=TIMESTEP).backward()

    return step


def make_step(variant: str, net: UNet2DModel, restored: Tensor, clean: Tensor) -> Callable[[], None]:
    if variant == "naive":
        return naive_step(net, restored, clean)
    if variant == "ours, checkpointing":
        net = copy.deepcopy(net)
        net.enable_gradient_checkpointing()
    return our_step(net, restored, clean, noise_weight=0.0 if variant == "ours, h-space only" else 1.0)


def seconds(step: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def floor(net: UNet2DModel, restored: Tensor, clean: Tensor, device: str) -> float:
    """Seconds of two forward passes without a graph and of one backward pass to the input."""

    def look(image: Tensor) -> Tensor:
        output: Tensor = net(image, TIMESTEP).sample
        return output

    with torch.no_grad():
        forward = seconds(lambda: look(restored), device) + seconds(lambda: look(clean), device)
    z = restored.clone().requires_grad_()
    value = F.mse_loss(look(z), clean)
    return forward + seconds(value.backward, device)


def peak(variant: str, batch: int, size: int, device: str, answer: "multiprocessing.Queue[float]") -> None:
    """MiB by which two steps raise the peak of this process."""
    restored, clean = images(batch, size, device)
    net = unet(device)
    with torch.no_grad():
        net(restored[:1, :, :16, :16], TIMESTEP)  # what is loaded at the first call is not the step's
    step = make_step(variant, net, restored, clean)
    if device == "cpu":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        step()
        answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    else:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        answer.put((torch.cuda.max_memory_allocated() - before) / 2**20)


def memory_of_each(batch: int, size: int, device: str) -> dict[str, float]:
    """MiB by variant. To be called while this process is small: a child's peak starts from its parent's."""
    context, memory = multiprocessing.get_context("spawn"), {}
    # glibc then gives freed tensors back at once, so that the peak is theirs and not the heap's fragmentation
    with patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
        for variant in tqdm(VARIANTS, desc="memory"):
            answer: multiprocessing.Queue[float] = context.Queue()
            process = context.Process(target=peak, args=(variant, batch, size, device, answer))
            process.start()
            memory[variant] = answer.get(timeout=300)
            process.join()
    return memory


def import_ratio(rounds: int) -> float:
    """Median seconds of ``import restoreloss`` over those of ``import torch``, in fresh interpreters, in turn."""
    ratios = []
    for _ in range(rounds):
        times = [
            seconds(lambda name=name: subprocess.run([sys.executable, "-c", f"import {name}"], check=True), "cpu")  # type: ignore[misc]
            for name in ("torch", "restoreloss")
        ]
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()

    memory = memory_of_each(args.batch, args.size, args.device)
    net = unet(args.device)
    restored, clean = images(args.batch, args.size, args.device)
    steps = {variant: make_step(variant, net, restored, clean) for variant in VARIANTS}
    frozen = net.requires_grad_(False).eval()
    for step in steps.values():
        step()
    floor(frozen, restored, clean, args.device)
    ratios: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    floors = []
    for _ in tqdm(range(args.rounds), desc="rounds"):
        floors.append(floor(frozen, restored, clean, args.device))
        for variant, step in steps.items():
            ratios[variant].append(seconds(step, args.device) / floors[-1])

    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"UNet2DModel, {parameters:.1f} M parameters, {args.batch} images of {args.size}x{args.size}, {args.device}")
    print(f"floor {1000 * statistics.median(floors):.0f} ms; ratios are medians over {args.rounds} rounds\n")
    print(f"{'':<24}{'time / floor':>14}{'peak memory':>14}{'/ naive':>10}")
    for variant in VARIANTS:
        share = memory[variant] / memory["naive"]
        print(f"{variant:<24}{statistics.median(ratios[variant]):>14.2f}{memory[variant]:>10.0f} MiB{share:>10.2f}")
    print(f"\nimport restoreloss / import torch: {import_ratio(7):.2f}")


if __name__ == "__main__":
    main()
