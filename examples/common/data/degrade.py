"""How does a picture lose its detail? Low-resolution and degraded pictures as the papers make them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from examples.common.data.tasks import each
from examples.common.engine.batches import chance
from examples.common.engine.options import DataOptions
from restoreloss import MixtureA, MixtureB
from restoreloss.augmentations.corruptions import CORRUPTIONS, Corruptions

Degrade = Callable[[Any, int], Any]
"""(pictures, number of the first) -> degraded pictures, in which the number decides all chance."""


def degradation(options: DataOptions, *seed: int) -> Degrade:
    """What the options do to pictures.

    Raises:
        ValueError: For a mixture with a scale: it keeps the size.
    """
    if options.degradation == "bicubic":
        return lambda pictures, _: each(lambda x: low_resolution(x, options.scale, blur=options.blur), pictures)
    if options.scale != 1:
        raise ValueError(f"`scale` should be 1 for {options.degradation}, which keeps the size, found {options.scale}.")
    extent = options.mixture_extent
    if options.degradation == "mixture_a":
        mixture_a = MixtureA(1 + 7 * extent)
        return lambda pictures, _: each(mixture_a, pictures)
    drawn: nn.Module
    if options.degradation == "mixture_b":
        drawn = MixtureB(sigma=(min(0.1, 8 * extent), 8 * extent), scale=(1, 1 + 15 * extent))
    else:
        seen = options.degradation == "corruptions"
        drawn = Corruptions(CORRUPTIONS[:15] if seen else CORRUPTIONS[15:], options.severities)

    def degrade(pictures: Any, first: int) -> Any:
        degraded = [
            drawn(picture[None], generator=torch.Generator().manual_seed(chance(*seed, first + number)))[0]
            for number, picture in enumerate(pictures)
        ]
        return torch.stack(degraded) if isinstance(pictures, Tensor) else degraded

    return degrade


def low_resolution(picture: Tensor, scale: int, *, blur: float = 0.0) -> Tensor:
    """Gaussian blur, bicubic reduction by ``scale`` without antialiasing (as in SR4IR's code), rounding to 8 bits.

    Args:
        picture: (N, 3, H, W) in [0, 1], both sides multiples of ``scale``.
        scale: 1 keeps the size.
        blur: standard deviation in pixels of the picture.
    """
    if picture.shape[2] % scale or picture.shape[3] % scale:
        raise ValueError(f"The picture should have sides that are multiples of {scale}, found {tuple(picture.shape)}.")
    if blur > 0:
        size = 2 * math.ceil(3 * blur) + 1
        picture = gaussian_blur(picture, kernel_size=[size, size], sigma=[blur, blur])
    if scale > 1:
        picture = F.interpolate(picture, scale_factor=1 / scale, mode="bicubic", align_corners=False)
    return (picture.clamp(0, 1) * 255).round() / 255
