"""How does an image of any size pass a network that halves it several times?"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

SizePolicy = Literal["pad", "resize", "error"]


def fit_size(image: Tensor, multiple: int, policy: SizePolicy) -> Tensor:
    """Bring height and width to the next multiple.

    Args:
        image: shape (N, C, H, W).
        multiple: what height and width must be multiples of.
        policy: "pad" continues the image to the right and below by reflection, or by its last pixel where the image is
            smaller than what is missing; "resize" stretches it (bilinear); "error" raises.

    Raises:
        ValueError: For "error", where the size does not fit.
    """
    height, width = image.shape[-2:]
    missing_height, missing_width = -height % multiple, -width % multiple
    if not (missing_height or missing_width):
        return image
    if policy == "error":
        raise ValueError(
            f"Height and width should be multiples of {multiple} for this network, found {height}x{width}; "
            "size='pad' or 'resize' accepts any."
        )
    if policy == "resize":
        size = (height + missing_height, width + missing_width)
        return F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    image = F.pad(image, (0, missing_width, 0, 0), mode="reflect" if missing_width < width else "replicate")
    return F.pad(image, (0, 0, 0, missing_height), mode="reflect" if missing_height < height else "replicate")


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
