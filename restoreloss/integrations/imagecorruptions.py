"""A successor of the package ``imagecorruptions``: its two functions, on today's numpy and scikit-image.

from restoreloss.integrations.imagecorruptions import corrupt, get_corruption_names
"""

from typing import Any

import torch

from restoreloss._optional import needed_by
from restoreloss.augmentations.corruptions import CORRUPTIONS, Corruption
from restoreloss.checks import describe
from restoreloss.integrations.transforms import ON_BYTES, corrupted

with needed_by("restoreloss.integrations.imagecorruptions", install="numpy Pillow"):
    import numpy as np
    from PIL import Image

_SUBSETS = {
    "common": CORRUPTIONS[:15],
    "validation": CORRUPTIONS[15:],
    "all": CORRUPTIONS,
    "noise": CORRUPTIONS[:3],
    "blur": CORRUPTIONS[3:7],
    "weather": CORRUPTIONS[7:11],
    "digital": CORRUPTIONS[11:15],
}


def corrupt(image: Any, severity: int = 1, corruption_name: str | None = None, corruption_number: int = -1) -> Any:
    """A corruption of ImageNet-C of one 8-bit image, called as in ``imagecorruptions``.

    Args:
        image: uint8 (H, W, 3) or gray (H, W), a numpy array or PIL image, with sides of at least 32 pixels.
        severity: 1 to 5.
        corruption_name: one of :func:`get_corruption_names` ("all").
        corruption_number: its number in that list, where there is no name.

    Returns:
        uint8 (H, W, 3), a numpy array.

    Raises:
        ValueError: For another kind of image, a severity, name or number that does not exist, and neither name nor
            number.

    Example:
        >>> import numpy as np
        >>> from restoreloss.integrations.imagecorruptions import corrupt
        >>> corrupt(np.zeros((32, 48, 3), dtype=np.uint8), corruption_name="fog", severity=3).shape
        (32, 48, 3)

    Randomness is torch's global one (``torch.manual_seed``), where the package has numpy's. What differs otherwise is
    listed at :func:`restoreloss.corrupt`.
    """
    if isinstance(image, Image.Image) and image.mode not in ("RGB", "L"):
        raise ValueError(f"A PIL image should be RGB, found mode {image.mode!r}: `image.convert('RGB')` makes one.")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(
            f"`image` should be uint8 of shape (H, W, 3) or (H, W), found {describe(image)} of {array.dtype} and shape "
            f"{array.shape}."
        )
    if min(array.shape[:2]) < 32:
        raise ValueError(f"`image` should have sides of at least 32 pixels, found {array.shape[:2]}.")
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=-1)
    if corruption_name is None:
        if isinstance(corruption_number, bool) or corruption_number not in range(len(CORRUPTIONS)):
            raise ValueError(
                f"`corruption_name` should be given, or a `corruption_number` from 0 to {len(CORRUPTIONS) - 1}, found "
                f"{corruption_number!r}."
            )
        corruption_name = CORRUPTIONS[corruption_number]
    if corruption_name not in CORRUPTIONS:
        raise ValueError(f"`corruption_name` should be one of {', '.join(CORRUPTIONS)}, found {corruption_name!r}.")
    if isinstance(severity, bool) or severity not in range(1, 6):
        raise ValueError(f"`severity` should be a whole number from 1 to 5, found {severity!r}.")
    if corruption_name in ON_BYTES:
        return np.array(ON_BYTES[corruption_name](Image.fromarray(array), severity - 1))
    batch = torch.from_numpy(np.stack([array[..., channel] for channel in range(3)]))[None]
    return np.stack(list(corrupted(batch, Corruption(corruption_name, severity))[0].numpy()), axis=-1)


def get_corruption_names(subset: str = "common") -> list[str]:
    """Names of corruptions, as in ``imagecorruptions``.

    Args:
        subset: "common" (the fifteen), "validation" (the other four), "all", "noise", "blur", "weather" or "digital".

    Raises:
        ValueError: For another subset.

    Example:
        >>> from restoreloss.integrations.imagecorruptions import get_corruption_names
        >>> get_corruption_names("noise")
        ['gaussian_noise', 'shot_noise', 'impulse_noise']
    """
    if subset not in _SUBSETS:
        raise ValueError(f"`subset` should be one of {', '.join(_SUBSETS)}, found {subset!r}.")
    return list(_SUBSETS[subset])
