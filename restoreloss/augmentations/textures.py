"""Random textures of the corruptions: landscapes for fog, and ice."""

import functools
import math
from typing import TypeAlias

import torch
from torch import Tensor

from restoreloss.augmentations.mixtures import gaussian_kernel
from restoreloss.generators import uniform

Generator: TypeAlias = torch.Generator | None


def plasma(like: Tensor, decay: float, generator: Generator) -> Tensor:
    """Random landscapes between 0 and 1, one for each channel, by midpoints of squares and diamonds, ever finer.

    They are cut from a torus whose side is the next power of two, so that any size will do. What is added to a midpoint
    shrinks by the square of ``decay`` from one size to the next.
    """
    height, width = like.shape[2:]
    step = 1 << (max(height, width) - 1).bit_length()
    land = like.new_zeros(*like.shape[:2], step, step)
    wobble = 1.0
    while step > 1:
        half = step // 2
        corners, middles = land[..., ::step, ::step], land[..., half::step, half::step]
        pairs = corners + corners.roll(-1, 2)
        middles[:] = _settled(pairs + pairs.roll(-1, 3), wobble, generator)
        sides = middles + middles.roll(1, 2) + corners + corners.roll(-1, 3)
        land[..., ::step, half::step] = _settled(sides, wobble, generator)
        sides = middles + middles.roll(1, 3) + corners + corners.roll(-1, 2)
        land[..., half::step, ::step] = _settled(sides, wobble, generator)
        step, wobble = half, wobble / decay**2
    land = land - land.amin(dim=(2, 3), keepdim=True)
    return (land / land.amax(dim=(2, 3), keepdim=True))[..., :height, :width]


def _settled(four: Tensor, wobble: float, generator: Generator) -> Tensor:
    return four / 4 + wobble * (2 * uniform(four, generator) - 1)


_PANES = (
    (0.30, 0.58, 0.65, 0.06),
    (0.79, 0.81, 0.84, 0.075),
    (0.79, 0.81, 0.84, 0.075),
    (0.54, 0.60, 0.65, 0.10),
    (0.44, 0.48, 0.53, 0.135),
)
"""Red, green, blue and contrast of the five photographs of ice."""


def ice(x: Tensor, generator: Generator) -> Tensor:
    """A random window of a frozen pane for each image, in the colors and the contrast of one of five photographs."""
    texture = _frozen_pane(x.device)
    height, width = x.shape[2:]
    pane, top, left, *mirrored = uniform(x.new_empty(x.shape[0], 5, dtype=torch.float32), generator).unbind(dim=1)
    positions = []
    for start, flip, side in ((top, mirrored[0], height), (left, mirrored[1], width)):
        step = torch.where(flip < 0.5, 1, -1)[:, None]
        positions.append(((_SIDE * start).long()[:, None] + step * torch.arange(side, device=x.device)) % _SIDE)
    windows = [texture.index_select(0, rows).index_select(1, columns) for rows, columns in zip(*positions, strict=True)]
    window = _standard(torch.stack(windows)[:, None]).to(x.dtype)
    color = x.new_tensor(_PANES)[(len(_PANES) * pane).long(), :, None, None]
    return (color[:, :3] + color[:, 3:] * window).clamp_(0, 1)


_SIDE = 1024


@functools.lru_cache(maxsize=2)
def _frozen_pane(device: torch.device) -> Tensor:
    """Needles of eight directions, each where a landscape of its own is high, and clouds: one texture, on a torus.

    It is the same in every process, as the photographs are that its windows stand for.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 8, _SIDE, _SIDE, generator=generator)
    kernels = torch.stack([gaussian_kernel(41, (9, 0.8), k * math.pi / 8) for k in range(8)]).float()
    spectrum = torch.fft.rfft2(noise) * torch.fft.rfft2(kernels, s=(_SIDE, _SIDE))
    needles = torch.fft.irfft2(spectrum, s=(_SIDE, _SIDE))
    crystals = (needles.clamp(min=0) * plasma(noise, 1.4, generator).square()).amax(dim=1, keepdim=True)
    clouds = plasma(noise[:, :1], 2, generator)
    return (_standard(crystals) + 0.7 * _standard(clouds))[0, 0].to(device)


def _standard(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 in every image."""
    deviation, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
    return (x - mean) / (deviation + 1e-6)
