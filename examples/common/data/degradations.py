"""Ten degradations of a photograph, made by seeded models, each with a harsher variant.

A degradation is a function of an image and a generator: the same seed spoils it in the same way. ``shifted`` is the
degradation as it is elsewhere (heavier rain at another angle, denser haze that is not even): what a network that
learned the first one meets in the world. They are models of the paper's data sets, which need a download, and not these
sets: see docs/recipes/dtp.md.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from restoreloss.augmentations.mixtures import blur, gaussian_kernel, jpeg


class Harshness(NamedTuple):
    """The strength of a degradation, and its direction; each function below reads it in its own way."""

    low: float
    high: float
    angle: float = 0.0


def blurry(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """The camera moved along an arc: ``low`` to ``high`` pixels."""
    return blur(image[None], motion_kernel(_between(how, generator), _angle(generator), bend=1.0))[0]


def hazy(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """Air light: J t + A (1 - t), t = exp(-beta d), with beta from ``low`` to ``high`` and d that rises to the top.

    An ``angle`` above 0 makes the air uneven.
    """
    height, width = image.shape[1:]
    depth = torch.linspace(1, 0.4, height)[:, None] + 0.3 * _clouds((height, width), 4, generator)
    if how.angle > 0:
        depth = depth * (1 + how.angle * _clouds((height, width), 8, generator))
    light = 0.75 + 0.25 * torch.rand((), generator=generator) + 0.03 * torch.randn(3, 1, 1, generator=generator)
    through = torch.exp(-_between(how, generator) * depth.clamp(min=0.05))
    return image * through + light * (1 - through)


def jpeg_compressed(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """JPEG of a quality from ``low`` to ``high``."""
    return jpeg(image[None], round(_between(how, generator)))[0]


def low_light(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """``low`` to ``high`` of the light, in linear intensities, with the noise of a sensor that sees little."""
    linear = image.clamp(0, 1) ** 2.2 * _between(how, generator)
    noise = torch.randn(image.shape, generator=generator)
    dark = linear + noise * (0.002 * linear + (0.003 + 0.01 * how.angle) ** 2).sqrt()
    return dark.clamp(1e-6, 1) ** (1 / 2.2)


def noisy(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """Gaussian noise of ``low`` to ``high`` of 255; with an ``angle``, of neighboring pixels alike."""
    noise = torch.randn(image.shape, generator=generator)
    if how.angle > 0:
        kernel = gaussian_kernel(5, (how.angle, how.angle))
        noise = blur(noise[None], kernel)[0] / kernel.square().sum().sqrt()
    return image + _between(how, generator) / 255 * noise


def raindrop(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """Drops on the lens, ``low`` to ``high`` for each 100 x 100 pixels, that show the scene upside down and blurred."""
    height, width = image.shape[1:]
    seen = blur(image.flip(1)[None], gaussian_kernel(9, (2.0, 2.0)))[0]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = torch.zeros(height, width)
    for _ in range(max(1, round(_between(how, generator) * height * width / 1e4))):
        y, x, size, slim = torch.rand(4, generator=generator).tolist()
        radius = 2 + (3 + how.angle) * size
        distance = (((rows - y * height) / (0.7 + 0.6 * slim)) ** 2 + (columns - x * width) ** 2).sqrt()
        mask = torch.maximum(mask, ((radius - distance) / 1.5 + 0.5).clamp(0, 1))
    return image * (1 - 0.9 * mask) + (0.85 * seen + 0.1) * 0.9 * mask


def rainy(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """Streaks at about ``angle`` degrees from the vertical that cover ``low`` to ``high`` of the image."""
    cover = _between(how, generator)
    tilt = math.radians(how.angle + 15 * (2 * float(torch.rand((), generator=generator)) - 1))
    streaks = torch.zeros(image.shape[1:])
    for length, share in ((7, 0.4), (11, 0.6)):
        seeds = (torch.rand(image.shape[1:], generator=generator) < share * cover / length).float()
        kernel = motion_kernel(length, math.pi / 2 + tilt)
        streaks = streaks + blur(seeds[None, None], kernel / kernel.max())[0, 0]
    brightness = 0.5 + 0.4 * float(torch.rand((), generator=generator))
    veil = 0.25 * cover
    return image * (1 - veil) + 0.7 * veil + brightness * streaks.clamp(0, 1)


def shadowed(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """A soft-edged shadow over about half of the image, in which ``low`` to ``high`` of the light is left."""
    field = _clouds((image.shape[1], image.shape[2]), 3, generator)
    mask = torch.sigmoid((field - 0.2 * torch.randn((), generator=generator)) * (12 - 6 * how.angle))
    tint = 1 + 0.08 * torch.tensor([-1.0, 0.0, 1.0])[:, None, None]  # what is left of the light is the sky's
    return image * (1 - mask) + image * _between(how, generator) * tint * mask


def snowy(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """Flakes of three sizes, ``low`` to ``high`` of the pixels the seed of one."""
    cover, snow = _between(how, generator), torch.zeros(image.shape[1:])
    for size, share in ((0.6, 0.5), (1.2 + how.angle, 0.35), (2.0 + 2 * how.angle, 0.15)):
        seeds = (torch.rand(image.shape[1:], generator=generator) < cover * share).float()
        kernel = gaussian_kernel(2 * math.ceil(3 * size) + 1, (size, 1.5 * size), _angle(generator))
        snow = torch.maximum(snow, blur(seeds[None, None], kernel / kernel.max())[0, 0].clamp(0, 1))
    alpha = 0.85 * snow
    return image * (1 - alpha) + 0.95 * alpha


def inpainting(image: Tensor, generator: torch.Generator, how: Harshness) -> Tensor:
    """Thin strokes, ``low`` to ``high`` for each 50 x 50 pixels, black."""
    height, width = image.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = torch.zeros(height, width, dtype=torch.bool)
    for _ in range(max(1, round(_between(how, generator) * height * width / 2500))):
        y, x, turn, far = torch.rand(4, generator=generator).tolist()
        down, right = rows - y * height, columns - x * width
        angle = math.pi * turn
        along = down * math.sin(angle) + right * math.cos(angle)
        across = down * math.cos(angle) - right * math.sin(angle) + 2 * torch.sin(along / 6)
        mask |= (across.abs() <= 1 + how.angle) & (along.abs() <= 10 + 20 * far)
    return image * ~mask


Function = Callable[[Tensor, torch.Generator, Harshness], Tensor]
DEGRADATIONS: Mapping[str, tuple[Function, Harshness, Harshness]] = {
    "blurry": (blurry, Harshness(4, 9), Harshness(9, 15)),
    "hazy": (hazy, Harshness(0.6, 1.4), Harshness(1.0, 2.0, 0.5)),
    "jpeg": (jpeg_compressed, Harshness(10, 30), Harshness(5, 10)),
    "low_light": (low_light, Harshness(0.08, 0.25), Harshness(0.04, 0.1, 1.0)),
    "noisy": (noisy, Harshness(25, 50), Harshness(30, 60, 0.8)),
    "raindrop": (raindrop, Harshness(15, 30), Harshness(30, 50, 2.0)),
    "rainy": (rainy, Harshness(0.05, 0.2, -15), Harshness(0.2, 0.4, 25)),
    "shadowed": (shadowed, Harshness(0.3, 0.6), Harshness(0.15, 0.3, 1.0)),
    "snowy": (snowy, Harshness(0.01, 0.03), Harshness(0.015, 0.035, 0.5)),
    "inpainting": (inpainting, Harshness(2, 5), Harshness(4, 8, 1.0)),
}
"""By the paper's names: function, how it is in training, how it is elsewhere."""


FIXED = {"noisy": Harshness(50, 50), "jpeg": Harshness(10, 10)}
"""The strength of the paper's tests on clean images of data sets."""


def degrade(
    name: str, image: Tensor, generator: torch.Generator, *, shifted: bool = False, fixed: bool = False
) -> Tensor:
    """An image (3, H, W) in [0, 1], spoiled, in [0, 1] and in 8 bits; with ``fixed`` by the strength of ``FIXED``.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in DEGRADATIONS:
        raise ValueError(f"`degradation` should be one of {', '.join(DEGRADATIONS)}, found {name!r}.")
    function, usual, elsewhere = DEGRADATIONS[name]
    how = FIXED.get(name, usual) if fixed else elsewhere if shifted else usual
    spoiled = function(image, generator, how).to(image.dtype)
    return (spoiled.clamp(0, 1) * 255).round() / 255


def motion_kernel(length: float, angle: float, bend: float = 0.0) -> Tensor:
    """The path of a point, as a kernel that sums to 1: a line, or an arc that turns by ``bend`` radians."""
    side = 2 * math.ceil(length / 2) + 1
    steps = torch.linspace(-0.5, 0.5, 8 * side)
    turned = angle + bend * steps
    gaps = torch.stack([turned.sin(), turned.cos()]) * length / len(steps)
    positions = gaps.cumsum(1)
    positions = positions - positions.mean(1, keepdim=True) + side // 2
    whole = positions.floor()
    kernel = torch.zeros(side + 1, side + 1)
    for down in (0, 1):
        for right in (0, 1):
            weights = 1 - (positions - whole - torch.tensor([[down], [right]])).abs()
            index = whole.long() + torch.tensor([[down], [right]])
            kernel.index_put_((index[0], index[1]), weights[0] * weights[1], accumulate=True)
    kernel = kernel[:side, :side]
    return kernel / kernel.sum()


def _between(how: Harshness, generator: torch.Generator) -> float:
    return how.low + (how.high - how.low) * float(torch.rand((), generator=generator))


def _angle(generator: torch.Generator) -> float:
    return math.pi * float(torch.rand((), generator=generator))


def _clouds(size: tuple[int, int], cells: int, generator: torch.Generator) -> Tensor:
    """A smooth random field around 0, about as far as 1 from it."""
    coarse = torch.randn(1, 1, cells, cells, generator=generator)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)[0, 0]
