"""How does a picture lose its detail? Low-resolution pictures as the papers make them."""

import math

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur


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
