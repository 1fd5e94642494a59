"""The corruptions of ImageNet-C one by one: functions of images in [0, 1], a level from 0 to 4 and a generator."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from restoreloss.augmentations.filters import drag, relief, smooth, zoom
from restoreloss.augmentations.mixtures import blur, gaussian_kernel, jpeg
from restoreloss.augmentations.textures import ice, plasma
from restoreloss.generators import standard_normal, uniform

Generator: TypeAlias = torch.Generator | None
JPEG_QUALITY = (25, 18, 15, 10, 7)
PIXELATE_SHARE = (0.6, 0.5, 0.4, 0.3, 0.25)
"""Cells in a side, as a share of its pixels."""


def _gaussian_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    scale = (0.08, 0.12, 0.18, 0.26, 0.38)[level]
    return standard_normal(x, generator).mul_(scale).add_(x)


def _shot_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    photons = (60, 25, 12, 5, 3)[level]
    device = x.device if generator is None else generator.device
    return torch.poisson((photons * x).to(device), generator=generator).to(x.device).div_(photons)


def _impulse_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    drawn = uniform(x, generator)
    return x.masked_fill(drawn < share / 2, 0).masked_fill_(drawn >= 1 - share / 2, 1)


def _defocus_blur(x: Tensor, level: int, _: Generator, extent: float = 1.0) -> Tensor:
    radius, softness = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    if extent != 1:
        return blur(x, _disk(radius * extent, softness * extent).to(x.device, x.dtype))
    place = torch.arange(-max(radius, 8), max(radius, 8) + 1)
    disk = (place.square() + place.square()[:, None] <= radius**2).double()[None, None]
    soft = blur(disk / disk.sum(), gaussian_kernel(3 if radius <= 8 else 5, (softness, softness)))
    return blur(x, soft[0, 0].to(x.device, x.dtype))


@lru_cache(maxsize=64)
def _disk(radius: float, softness: float) -> Tensor:
    """The share of each pixel that lies within a radius of any length, softened; it sums to 1."""
    reach, parts = math.ceil(radius + 3 * softness), 16
    place = (torch.arange((2 * reach + 1) * parts, dtype=torch.float64) + 0.5) / parts - reach - 0.5
    fine = (place.square() + place.square()[:, None] <= radius**2).double()[None, None]
    shares = F.avg_pool2d(smooth(fine, (softness * parts, softness * parts)), parts)[0, 0]
    return shares / shares.sum()


def _glass_blur(x: Tensor, level: int, generator: Generator, extent: float = 1.0) -> Tensor:
    sigma, reach, passes = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    sigma, reach = sigma * extent, _pixels(reach * extent)
    seen = smooth(x, (sigma, sigma))
    for _ in range(passes):
        offsets = (2 * reach * uniform(seen[:, :2], generator)).long() - reach
        origin = _copied_from(offsets, reach).flatten(1)[:, None].expand(-1, 3, -1)
        seen = seen.flatten(2).gather(2, origin).view_as(seen)
    return smooth(seen, (sigma, sigma))


def _copied_from(offsets: Tensor, reach: int) -> Tensor:
    """Which pixel each one shows after the pixels, from the last to the first, were overwritten by another one each.

    Args:
        offsets: whole (N, 2, H, W), rows and columns from a pixel to the one that overwrites it, from -reach to
            reach - 1. The authors mean to swap the two; their code copies, and so do their images.
        reach: the frame of pixels that stay as they are.

    Returns:
        (N, H, W), indices of pixels.
    """
    count, _, height, width = offsets.shape
    here = torch.arange(height * width, device=offsets.device).view(1, height, width)
    row, column = here // width, here % width
    moves = (reach < row) & (row <= height - reach) & (reach < column) & (column <= width - reach)
    source = here + moves * (offsets[:, 0] * width + offsets[:, 1])
    # A later pixel was overwritten before this one: follow where it has its own from, until that one is earlier.
    done = height * width
    follow = torch.where(source > here, source, source + done).flatten(1)
    final = torch.arange(done, 2 * done, device=offsets.device).expand(count, -1)
    while (follow < done).any():
        follow = torch.cat([follow, final], dim=1).gather(1, follow)
    return (follow - done).view(count, height, width)


def _motion_blur(x: Tensor, level: int, generator: Generator, extent: float = 1.0) -> Tensor:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return drag(x, _pixels(radius * extent), sigma * extent, (-45, 45), generator)


def _zoom_blur(x: Tensor, level: int, _: Generator) -> Tensor:
    step, count = ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))[level]
    height, width = x.shape[2:]
    total = x.clone()
    for k in range(count):
        total += zoom(x, 1 + k * step)[..., :height, :width]
    return total.div_(count + 1)


def _snow(x: Tensor, level: int, generator: Generator, extent: float = 1.0) -> Tensor:
    mean, spread, size, least, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = zoom(mean + spread * standard_normal(x[:, :1], generator), max(1.0, size * extent))
    flakes = flakes.masked_fill(flakes < least, 0).clamp(0, 1)
    fallen = drag(flakes, _pixels(radius * extent), sigma * extent, (-135, -45), generator)
    fallen = fallen[..., : x.shape[2], : x.shape[3]]
    gray = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    white = torch.maximum(x, gray.mul_(1.5).add_(0.5)).mul_(1 - keep).add_(keep * x)
    return white.add_(fallen).add_(fallen.rot90(2, (2, 3)))


def _fog(x: Tensor, level: int, generator: Generator) -> Tensor:
    amount, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[level]
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    return (x + amount * plasma(x[:, :1], decay, generator)).mul_(brightest).div_(brightest + amount)


def _frost(x: Tensor, level: int, generator: Generator) -> Tensor:
    keep, add = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    return ice(x, generator).mul_(add).add_(keep * x)


def _brightness(x: Tensor, level: int, _: Generator) -> Tensor:
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[level]).clamp_(max=1)
    black = value < torch.finfo(x.dtype).tiny  # Elsewhere hue and saturation are ratios of the channels.
    return (x * (brighter / value).masked_fill_(black, 0)).add_(brighter * black)


def _contrast(x: Tensor, level: int, _: Generator) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean).mul_((0.4, 0.3, 0.2, 0.1, 0.05)[level]).add_(mean)


def _elastic_transform(x: Tensor, level: int, generator: Generator) -> Tensor:
    strength = (12.5, 16.25, 21.25, 25, 30)[level]
    height, width = x.shape[2:]
    push = 0.01 * height * (uniform(x[:, :2], generator) - 0.5)
    push = strength * smooth(push, (0.01 * height, 0.01 * width), truncate=3, mirror=True)
    row = torch.arange(height, device=x.device)[:, None] + push[:, 0]
    column = torch.arange(width, device=x.device) + push[:, 1]
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _pixelate(x: Tensor, level: int, _: Generator) -> Tensor:
    share = PIXELATE_SHARE[level]
    for dim in (2, 3):
        side = x.shape[dim]
        cells = int(side * share)
        middle = 2 * torch.arange(side, device=x.device) + 1  # The cells are 2 side / cells wide.
        belongs = (middle * cells - 1) // (2 * side)
        shape = [1, 1, 1, 1]
        shape[dim] = cells
        counts = belongs.bincount(minlength=cells).to(x.dtype).view(shape)
        sums = x.new_zeros(*x.shape[:dim], cells, *x.shape[dim + 1 :]).index_add(dim, belongs, x)
        x = (sums / counts).index_select(dim, middle * cells // (2 * side))
    return x


def _jpeg_compression(x: Tensor, level: int, _: Generator) -> Tensor:
    return jpeg(x, JPEG_QUALITY[level])


def _speckle_noise(x: Tensor, level: int, generator: Generator) -> Tensor:
    scale = (0.15, 0.2, 0.35, 0.45, 0.6)[level]
    return x + scale * x * standard_normal(x, generator)


def _gaussian_blur(x: Tensor, level: int, _: Generator, extent: float = 1.0) -> Tensor:
    sigma = (1, 2, 3, 4, 6)[level] * extent
    return smooth(x, (sigma, sigma))


def _spatter(x: Tensor, level: int, generator: Generator, extent: float = 1.0) -> Tensor:
    mean, spread, sigma, least, strength = (
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    )[level]
    width, spread = sigma * extent, spread * extent  # Less is smoothed: the same share of the image gets wet.
    liquid = smooth(mean + spread * standard_normal(x[:, :1], generator), (width, width))
    wet = liquid >= least
    if level < 3:
        water = x.new_tensor([175, 238, 238]).view(3, 1, 1) / 255
        liquid = (255 * liquid * wet).floor()
        shine = liquid * relief(liquid, _pixels(20 * extent))
        return x + strength * shine / shine.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6) * water
    mud = x.new_tensor([63, 42, 20]).view(3, 1, 1) / 255
    cover = smooth(wet.to(x.dtype), (strength * extent, strength * extent))
    cover = cover.masked_fill(cover < 0.8, 0)
    return (1 - cover) * x + cover * mud


def _saturate(x: Tensor, level: int, _: Generator) -> Tensor:
    factor, add = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[level]
    value, chroma = x.amax(dim=1, keepdim=True), x.amax(dim=1, keepdim=True) - x.amin(dim=1, keepdim=True)
    red = x.new_tensor([0, 1, 1]).view(3, 1, 1)  # Gray has the hue 0.
    hue = torch.where(chroma > 0, (value - x) / chroma, red)
    saturation = torch.where(value > 0, chroma / value, 0)
    return value * (1 - (factor * saturation + add).clamp(max=1) * hue)


def _pixels(length: float) -> int:
    """The nearest whole number of pixels, at least one."""
    return max(1, round(length))


APPLY: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}
"""By name: (images, level, generator) -> images."""

WITH_LENGTHS: dict[str, Callable[[Tensor, int, Generator, float], Tensor]] = {
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "snow": _snow,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
}
"""Those whose lengths are pixels: the last argument is what these lengths are multiplied by."""
