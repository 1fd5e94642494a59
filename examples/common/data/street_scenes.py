"""Street scenes with a class for every pixel: Cityscapes, Foggy Cityscapes and ACDC, unpacked as they are handed out.

All have the 19 classes that Cityscapes is evaluated on, and the interface of examples/common/data/datasets.py.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from examples.common.data.datasets import FolderData, Split, segmentation_transform
from examples.common.data.folder import image_files
from examples.common.data.tasks import IGNORED

logger = logging.getLogger(__name__)

Street = Literal["cityscapes", "foggy_cityscapes", "acdc"]
CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label ids of these classes, by which masks that end in labelIds name them."""
_PLACES: dict[Street, tuple[str, str, str]] = {
    "cityscapes": ("leftImg8bit/{split}/*/*_leftImg8bit.png", "_leftImg8bit", "gtFine/{split}/{folder}/{stem}_gtFine"),
    "foggy_cityscapes": (
        "leftImg8bit_foggy/{split}/*/*_foggy_beta_{beta}.png", "_leftImg8bit_foggy_beta_{beta}",
        "gtFine/{split}/{folder}/{stem}_gtFine",
    ),
    "acdc": ("rgb_anon/*/{split}/*/*_rgb_anon.png", "_rgb_anon", "gt/{condition}/{split}/{folder}/{stem}_gt"),
}  # fmt: skip
"""Images, what their names end in, and masks without their ending."""


def street_scenes(root: Path, name: Street, split: Split, *, size: int = 512, beta: str = "0.02") -> FolderData:
    """The short side is resized to 520/480 of ``size``; of that, training sees squares of ``size`` at random.

    Args:
        root: contains leftImg8bit/ (or leftImg8bit_foggy/) and gtFine/, of ACDC rgb_anon/ and gt/.
        name: which of the three; ACDC with its four conditions together.
        split: the training part, or the validation part, of which the labels are public.
        size: of the crops, in pixels.
        beta: density of the fog, as the files name it.

    Raises:
        ValueError: If there is no image, or none has a mask. An image without one is named in a warning.
    """
    part = "train" if split == "train" else "val"
    pattern, ending, mask = (text.replace("{beta}", beta) for text in _PLACES[name])
    images = image_files(root, pattern.format(split=part))
    samples: list[tuple[Path, int | Path]] = []
    for image in images:
        condition = image.relative_to(root).parts[1]
        stem = image.stem.removesuffix(ending)
        place = mask.format(split=part, folder=image.parent.name, stem=stem, condition=condition)
        found = [file for kind in ("labelTrainIds", "labelIds") if (file := root / f"{place}_{kind}.png").is_file()]
        if found:
            samples.append((image, found[0]))
        else:
            logger.warning("%s skipped: no mask %s_labelIds.png or _labelTrainIds.png", image, root / place)
    if not samples:
        raise ValueError(
            f"`root` should hold images of {name} at {pattern.format(split=part)} with their masks, found "
            f"{len(images)} images in {root}, none with a mask."
        )
    return FolderData("segmentation", CLASSES, samples, _classes, segmentation_transform(split == "train", size))


def _classes(file: Path, size: tuple[int, int]) -> Any:
    """The classes of a mask, from label ids or from the numbers of the classes themselves."""
    with Image.open(file) as opened:
        values = np.array(opened)
    if values.shape != size:
        raise ValueError(f"{values.shape} pixels, its image has {size}")
    if file.stem.endswith("labelTrainIds"):
        known = np.where(values < len(CLASSES), values, IGNORED)
    else:
        table = np.full(256, IGNORED)
        table[list(_IDS)] = range(len(_IDS))
        known = table[values]
    return tv_tensors.Mask(_whole(known))


def _whole(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).astype(np.int64))
