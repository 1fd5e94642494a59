"""Photographs and generators for the tests of corruptions."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image
from skimage import data as photos
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
every_severity = pytest.mark.parametrize("severity", SEVERITIES)
sizes = pytest.mark.parametrize("size", [(96, 96), (40, 61)], ids=str)


def photo(name: str = "astronaut", height: int = 224, width: int = 224) -> Tensor:
    """The middle of a photograph of scikit-image, (1, 3, height, width), of 8 bits as the package takes it."""
    pixels = getattr(photos, name)()
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    small = np.asarray(square.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(small.copy()).permute(2, 0, 1)[None].double() / 255


def picture(height: int, width: int) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """A photograph as we and as scikit-image take it."""
    image = photo("astronaut", height, width)
    return image, image[0].permute(1, 2, 0).numpy()


def pixels(image: Tensor) -> np.ndarray[Any, Any]:
    assert len(image) == 1
    return image[0].permute(1, 2, 0).numpy()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zoomed(array: np.ndarray[Any, Any], factor: float) -> np.ndarray[Any, Any]:
    height, width = array.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = array[top : top + rows, left : left + columns]
    return scipy.ndimage.zoom(middle, (factor, factor, 1), order=1)  # type: ignore[no-any-return]
