"""Padding, resizing and cropping, so that images of any size pass networks that halve them several times."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from restoreloss.images import mirrored

SizePolicy = Literal["pad", "resize", "error"]


def fit_size(image: Tensor, multiple: int, policy: SizePolicy, *, square: bool = False) -> Tensor:
    """Bring height and width to the next multiple, both to the same where a square is wanted.

    Args:
        image: shape (N, C, H, W).
        multiple: what height and width must be multiples of.
        policy: "pad" continues the image to the right and below by reflection, as often as it takes; "resize" stretches
            it (bilinear); "error" raises.
        square: as high as wide.

    Raises:
        ValueError: For "error", where the size does not fit.
    """
    height, width = image.shape[-2:]
    wanted = (max(height, width),) * 2 if square else (height, width)
    # a ceiling and no remainder, which torch.compile (2.15) cannot compute with where a network divides by such a size
    missing_height, missing_width = (
        -(-side // multiple) * multiple - own for side, own in zip(wanted, (height, width), strict=True)
    )
    if not (missing_height or missing_width):
        return image
    if policy == "error":
        raise ValueError(
            f"Height and width should be multiples of {multiple}{' and equal' if square else ''} for this network, "
            f"found {height}x{width}; size='pad' or 'resize' accepts any."
        )
    if policy == "resize":
        size = (height + missing_height, width + missing_width)
        return F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    return pad_to(image, (height + missing_height, width + missing_width))


def pad_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Continue an image (N, C, H, W) to the right and below, as "pad" does."""
    for dim, side in zip((-2, -1), size, strict=True):
        if (length := image.shape[dim]) < side:
            image = image.index_select(dim, mirrored(length, 0, side - length).to(image.device))
    return image


def crop_map(features: Tensor, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cut from a feature map of a padded image what lies over the image itself, a partly covered cell included.

    Maps that are not (N, C, h, w), such as tokens, come back whole.
    """
    if features.ndim != 4 or padded == size:
        return features
    rows, columns = (
        -(-want * have // full) for want, have, full in zip(size, features.shape[-2:], padded, strict=True)
    )
    return features[..., :rows, :columns]
