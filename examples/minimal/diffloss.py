"""DiffLoss in one file: a frozen diffusion model judges the output of a restoration network while it trains.

    python -m examples.minimal.diffloss

A small network learns to restore blurred and noisy photographs, four times from the same start: with the pixel loss
alone, with pixel loss + DiffLoss, with pixel loss + the squared error of image gradients (a control of two lines
without any prior), and with the pixel loss alone for as long as DiffLoss took. Compare the last two rows before you
believe that a gain is the prior's. Four held-out photographs; --seed gives other batches.

Tan et al., "DiffLoss: Unleashing Diffusion Model as Constraint for Training Image Restoration Network", ACCV 2024.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence

import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomCrop
from torchvision.transforms.v2.functional import gaussian_blur

from restoreloss import DiffLoss, WeightedSum, audit, small_prior

TRAIN, TEST = ("astronaut", "brick", "coins", "grass"), ("camera", "chelsea", "coffee", "rocket")
BATCH, CROP, SHARE = 8, 32, 0.5


def photograph(name: str) -> Tensor:
    """A photograph of scikit-image, (3, H, W) in [0, 1]."""
    pixels = torch.from_numpy(getattr(skimage.data, name)()).float() / 255
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)


def crops(photographs: Sequence[Tensor], count: int, size: int) -> Tensor:
    """Random crops of random photographs, (N, 3, size, size)."""
    chosen = torch.randint(len(photographs), (count,)).tolist()
    return torch.stack([RandomCrop(size)(photographs[k]) for k in chosen])


def degrade(clean: Tensor) -> Tensor:
    """Gaussian blur of sigma 1.5, then noise of standard deviation 25/255."""
    return gaussian_blur(clean, [9, 9], [1.5, 1.5]) + 25 / 255 * torch.randn_like(clean)


class Restorer(nn.Module):
    """A residual network of plain convolutions: use your own in its place."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        hidden = [layer for _ in range(depth) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.GELU())]
        first, last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.body = nn.Sequential(first, nn.GELU(), *hidden, last)

    def forward(self, degraded: Tensor) -> Tensor:
        return degraded + self.body(degraded)


def image_gradients(restored: Tensor, target: Tensor) -> Tensor:
    """The control: mean squared error of horizontal and vertical differences."""
    difference = restored - target
    return difference.diff(dim=3).square().mean() + difference.diff(dim=2).square().mean()


def train(net: nn.Module, objective: Callable[..., Tensor], photos: Sequence[Tensor], steps: int, seed: int) -> None:
    """The training loop: of DiffLoss it sees a call."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clean = crops(photos, BATCH, CROP)
        restored = net(degrade(clean))
        loss = objective(restored, clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    photos = [photograph(name) for name in TRAIN]
    test = torch.cat([crops([photograph(name)], 12, 96) for name in TEST])
    degraded = degrade(test)

    # L_Diff = L_nat + lambda L_sem (Eqs. 11, 14, 15): images made noisy alike (Eq. 7), predicted noise and h-space
    # compared. lambda = 0.01. The paper's gamma belongs to its prior: a share of the gradient, kept while training,
    # takes its place. Eq. 16: L_total = L_pixel + gamma L_Diff.
    prior = DiffLoss(small_prior(), h_space_weight=0.01, timesteps=(100, 600))
    objectives: dict[str, Callable[..., Tensor]] = {"pixel loss": nn.L1Loss()}
    for name, term in (("pixel + DiffLoss", prior), ("pixel + image gradients", image_gradients)):
        objectives[name] = WeightedSum({"pixel": nn.L1Loss(), "extra": term}, shares={"extra": SHARE})

    print(f"{'degraded':24} PSNR {-10 * F.mse_loss(degraded, test).log10().item():.2f} dB")
    prior(degraded[:1], test[:1])  # the first call loads what it needs, which is not counted
    start, took = Restorer(), dict[str, float]()
    objectives["pixel loss, equal time"] = nn.L1Loss()
    for name, objective in objectives.items():
        as_long = took["pixel + DiffLoss"] / took["pixel loss"] if name.endswith("equal time") else 1
        net, began, steps = copy.deepcopy(start), time.process_time(), round(as_long * options.steps)
        train(net, objective, photos, steps, options.seed + 1)
        took[name] = time.process_time() - began
        with torch.no_grad():
            mse = F.mse_loss(net(degraded).clamp(0, 1), test)
        milliseconds = 1000 * took[name] / steps
        print(f"{name:24} PSNR {-10 * mse.log10().item():.2f} dB, {steps} steps of {milliseconds:.0f} ms of CPU time")
    restored = net(degraded[:4]).detach()
    print(f"\nWhat pulls at four of them\n{audit(objectives['pixel + DiffLoss'], restored, test[:4])}")


if __name__ == "__main__":
    main()
