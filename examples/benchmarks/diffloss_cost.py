"""The cost of a DiffLoss with its backward pass, next to the least that it must cost.

    python -m examples.benchmarks.diffloss_cost                                              # two cores
    python -m examples.benchmarks.diffloss_cost --prior adm --size 256 --device cuda         # the paper's prior
    python -m examples.benchmarks.diffloss_cost --prior sd --size 512 --device cuda          # Stable Diffusion 2.1

The floor is two forward passes of the bare network without a graph and one backward pass to the input alone: the clean
image must be looked at once, the restored one once, and the gradient must come back. Everything is measured in turn,
round after round, and reported as the median over rounds of the ratio to that round's floor. Memory is the growth of
the process's peak during two steps, each variant in a process of its own (on CUDA: of the allocator's peak). Priors
have the sizes of the published ones and random weights.
"""

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor
from tqdm import tqdm

from examples.benchmarks.measure import peak_of_each, seconds
from restoreloss import DiffLoss, LatentPrior, NoiseSchedule, Objective, Subsampled
from restoreloss.diffusion.latents import normalize_latents

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "naive": {},
    "ours": {},
    "ours, h-space only": {"noise_weight": 0.0},
    "ours, no Jacobian": {"h_space_weight": 0.0, "jacobian": False},
    "ours, crop=0.5": {"crop": 0.5},
    "ours, subset=0.25": {"subset": 0.25},
    "ours, checkpointing": {"checkpointing": True},
    "ours, bfloat16": {"dtype": torch.bfloat16},
    "ours, compiled": {},
}
"""Options of :meth:`Subject.loss`."""

TIMESTEP = 300


@dataclass(frozen=True)
class Subject:
    """A prior: a diffusion model, and for a latent one its autoencoder and the embedded prompt."""

    net: Any
    vae: Any = None
    states: Tensor | None = None

    def look(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted noise and bottleneck for images in [0, 1] under noise."""
        z = 2 * image - 1
        if self.vae is not None:
            z = normalize_latents(self.vae.encode(z).latent_dist.mode(), self.vae.config)
        noise = torch.randn(z.shape, generator=torch.Generator(z.device).manual_seed(0), device=z.device)
        z_t = NoiseSchedule.linear().to(z.device).add_noise(z, noise, TIMESTEP)
        seen: list[Tensor] = []
        handle = self.net.mid_block.register_forward_hook(lambda _module, _args, output: seen.append(output))
        text = () if self.states is None else (self.states.expand(len(z), -1, -1),)
        output = self.net(z_t, TIMESTEP, *text).sample
        handle.remove()
        return output, seen[0]

    def loss(self, *, subset: float | None = None, dtype: torch.dtype | None = None, **options: Any) -> Objective:
        prior: Any = self.net
        if self.vae is not None:
            prior = LatentPrior(self.vae, self.net, self.states, schedule=NoiseSchedule.scaled_linear())
        if dtype is not None:
            prior.to(dtype)
        loss = DiffLoss(prior, timesteps=(TIMESTEP, TIMESTEP + 1), **options)
        return loss if subset is None else Subsampled(loss, subset=subset)

    def parameters(self) -> list[Tensor]:
        modules = [self.net] if self.vae is None else [self.net, self.vae.encoder]
        return [weight for module in modules for weight in module.parameters()]


def subject(prior: str, device: str) -> Subject:
    """A DDPM of 21 M parameters with attention at its deepest level, the ADM of the paper (552.8 M), or the U-Net and
    the encoder of Stable Diffusion 2.1 (865.9 M and 34.2 M).
    """
    torch.manual_seed(0)
    with torch.device(device):
        if prior == "ddpm":
            return Subject(
                UNet2DModel(
                    sample_size=64,
                    block_out_channels=(64, 128, 192, 256),
                    layers_per_block=2,
                    down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
                    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
                )
            )
        if prior == "adm":
            return Subject(
                UNet2DModel(
                    out_channels=6,
                    block_out_channels=(256, 256, 512, 512, 1024, 1024),
                    layers_per_block=2,
                    down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
                    up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
                    downsample_type="resnet",
                    upsample_type="resnet",
                    resnet_time_scale_shift="scale_shift",
                    attention_head_dim=64,
                    attn_norm_num_groups=32,
                )
            )
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        return Subject(unet, vae, torch.zeros(1, 77, 1024))


def images(batch: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, size, size)
    return torch.rand(shape, generator=generator).to(device), torch.rand(shape, generator=generator).to(device)


def naive_step(prior: Subject, restored: Tensor, clean: Tensor) -> Callable[[], None]:
    """DiffLoss written without a thought: live weights, and a graph for the clean image too."""

    def step() -> None:
        (noise_z, h_z), (noise_x, h_x) = prior.look(restored.clone().requires_grad_()), prior.look(clean)
        (F.mse_loss(noise_z, noise_x) + 0.01 * F.mse_loss(h_z, h_x)).backward()
        # the weights' gradients stay: the optimizer that zeroes gradients is the restorer's

    return step


def make_step(variant: str, prior: Subject, restored: Tensor, clean: Tensor) -> Callable[[], None]:
    """A copy of the prior, used one way."""
    prior = copy.deepcopy(prior)
    if variant == "naive":
        return naive_step(prior, restored, clean)
    loss: Any = prior.loss(**VARIANTS[variant])
    if variant == "ours, compiled":
        loss = torch.compile(loss)

    def step() -> None:
        loss(restored.clone().requires_grad_(), clean).backward()

    return step


def floor(prior: Subject, restored: Tensor, clean: Tensor, device: str) -> float:
    """Seconds of two forward passes without a graph and of one backward pass to the input."""
    with torch.no_grad():
        forward = seconds(lambda: prior.look(restored), device) + seconds(lambda: prior.look(clean), device)
    noise, _ = prior.look(restored.clone().requires_grad_())
    value = noise.square().mean()
    return forward + seconds(value.backward, device)


def step_alone(variant: str, name: str, batch: int, size: int, device: str) -> Callable[[], None]:
    """The step of a variant in a process of its own."""
    restored, clean = images(batch, size, device)
    prior = subject(name, device)
    with torch.no_grad():
        prior.look(restored[:1, :, :32, :32])  # what is loaded at the first call is not the step's
    return make_step(variant, prior, restored, clean)


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
    parser.add_argument("--prior", default="ddpm", choices=["ddpm", "adm", "sd"], help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also compiled, which takes minutes")
    args = parser.parse_args()

    variants = [variant for variant in VARIANTS if args.compile or variant != "ours, compiled"]
    memory = peak_of_each(
        step_alone, variants, args.prior, args.batch, args.size, args.device, device=args.device
    )  # fmt: skip
    prior = subject(args.prior, args.device)
    restored, clean = images(args.batch, args.size, args.device)
    ratios: dict[str, list[float]] = {variant: [] for variant in variants}
    floors: list[float] = []
    steps = {}
    for variant in variants:
        steps[variant] = make_step(variant, prior, restored, clean)
        steps[variant]()
    for module in (prior.net, prior.vae):
        if module is not None:
            module.requires_grad_(False).eval()
    floor(prior, restored, clean, args.device)
    for _ in tqdm(range(args.rounds), desc="rounds"):
        floors.append(floor(prior, restored, clean, args.device))
        for variant, step in steps.items():
            ratios[variant].append(seconds(step, args.device) / floors[-1])

    parameters = sum(p.numel() for p in prior.parameters()) / 1e6
    print(f"{args.prior}, {parameters:.1f} M parameters, {args.batch} images of {args.size}x{args.size}, {args.device}")
    print(f"floor {1000 * statistics.median(floors):.0f} ms; ratios are medians over {args.rounds} rounds\n")
    print(f"{'':<24}{'time / floor':>14}{'peak memory':>14}{'/ naive':>10}")
    for variant in variants:
        line = f"{variant:<24}{statistics.median(ratios[variant]):>14.2f}"
        if args.device != "cpu" or variant != "ours, bfloat16":  # a process's peak still holds the float32 weights
            line += f"{memory[variant]:>10.0f} MiB{memory[variant] / memory['naive']:>10.2f}"
        print(line)
    print(f"\nimport restoreloss / import torch: {import_ratio(7):.2f}")


if __name__ == "__main__":
    main()
