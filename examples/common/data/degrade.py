"""Low-resolution and degraded images as the papers make them."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from examples.common.data.options import DataOptions
from examples.common.data.tasks import degraded_of, map_images
from examples.common.seeds import derive_seed, seeded
from restoreloss import MixtureA, MixtureB
from restoreloss.augmentations.corruptions import CLEAN, CORRUPTIONS, Corruptions
from restoreloss.augmentations.mixtures import jpeg

logger = logging.getLogger(__name__)

Degrade = Callable[[Any, int], Any]
"""(images, number of the first) -> degraded images, in which the number decides all randomness."""


def degradation(options: DataOptions, *seed: int) -> Degrade:
    """The degradation that the options describe; of pairs, what is on disk.

    Raises:
        ValueError: For a scale of what keeps the size, and weights that are not as many as the severities.
    """
    made = _made(options, *seed)

    def degrade(images: Any, first: int) -> Any:
        on_disk = degraded_of(images)
        return made(images, first) if on_disk is None else on_disk

    return degrade


def _made(options: DataOptions, *seed: int) -> Degrade:
    if options.degradation == "bicubic":
        if options.scale == 1 and not (options.blur or options.noise or options.jpeg or options.lq):
            logger.warning("`degradation` 'bicubic' with a `scale` of 1 leaves the images as they are.")
        return _bicubic(options, *seed)
    if options.scale != 1:
        raise ValueError(f"`scale` should be 1 for {options.degradation}, which keeps the size, found {options.scale}.")
    if options.degradation == "none":
        return lambda images, _: images
    extent = options.mixture_extent
    if options.degradation == "mixture_a":
        mixture_a = MixtureA(1 + 7 * extent)
        return lambda images, _: map_images(mixture_a, images)
    drawn: nn.Module
    if options.degradation == "mixture_b":
        drawn = MixtureB(sigma=(min(0.1, 8 * extent), 8 * extent), scale=(1, 1 + 15 * extent))
    else:
        names = CORRUPTIONS[:15] if options.degradation == "corruptions" else CORRUPTIONS[15:]
        drawn = Corruptions(
            [*names, CLEAN] if options.clean_too else names, _weighted(options),
            side=options.corruption_side, extent=options.corruption_extent,
        )  # fmt: skip

    def degrade(images: Any, first: int) -> Any:
        degraded = [
            drawn(image[None], generator=seeded(*seed, first + number))[0] for number, image in enumerate(images)
        ]
        return torch.stack(degraded) if isinstance(images, Tensor) else degraded

    return degrade


def _bicubic(options: DataOptions, *seed: int) -> Degrade:
    """Blur, reduction, and, with a number of each image, noise; then 8 bits and JPEG."""
    if options.noise < 0:
        raise ValueError(f"`noise` should be at least 0, found {options.noise}.")
    if options.jpeg is not None and not 1 <= options.jpeg <= 100:
        raise ValueError(f"`jpeg` should be from 1 to 100, found {options.jpeg}.")

    def degrade(images: Any, first: int) -> Any:
        small = map_images(lambda x: low_resolution(x, options.scale, blur=options.blur), images)
        if options.noise:
            noisy = [add_noise(image, options.noise, derive_seed(*seed, first + n)) for n, image in enumerate(small)]
            small = torch.stack(noisy) if isinstance(small, Tensor) else noisy
        quality = options.jpeg
        return small if quality is None else map_images(lambda x: jpeg(x, quality), small)

    return degrade


def add_noise(image: Tensor, sigma: float, seed: int) -> Tensor:
    """Gaussian noise of ``sigma``/255, rounding to 8 bits; a gray image, of equal channels, stays gray."""
    gray = bool((image == image[:1]).all())
    shape = (1 if gray else len(image), *image.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(image)
    return (255 * image + sigma * noise).round().clamp(0, 255) / 255


def _weighted(options: DataOptions) -> list[int] | dict[int, float]:
    """The severities, with their weights where there are any."""
    weights = options.severity_weights
    if weights is None:
        return options.severities
    if len(weights) != len(options.severities):
        raise ValueError(
            f"`severity_weights` should be one for each of {len(options.severities)} `severities`, found {weights}."
        )
    return dict(zip(options.severities, weights, strict=True))


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; none at 0."""
    size = 2 * math.ceil(3 * sigma) + 1
    return gaussian_blur(image, kernel_size=[size, size], sigma=[sigma, sigma]) if sigma > 0 else image


def low_resolution(image: Tensor, scale: int, *, blur: float = 0.0) -> Tensor:
    """Gaussian blur, bicubic reduction by ``scale`` without antialiasing (as in SR4IR's code), rounding to 8 bits.

    Args:
        image: (N, 3, H, W) in [0, 1], both sides multiples of ``scale``.
        scale: 1 keeps the size.
        blur: standard deviation in pixels of the image.
    """
    if image.shape[2] % scale or image.shape[3] % scale:
        raise ValueError(f"The image should have sides that are multiples of {scale}, found {tuple(image.shape)}.")
    image = blurred(image, blur)
    if scale > 1:
        image = F.interpolate(image, scale_factor=1 / scale, mode="bicubic", align_corners=False)
    return (image.clamp(0, 1) * 255).round() / 255
