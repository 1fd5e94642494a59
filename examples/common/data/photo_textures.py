"""Recognition tasks made of real photographs, without a download.

Patches of photographs that come with scikit-image and scikit-learn, gray and of equal mean and contrast, so that only
texture tells them apart; the class is the photograph. The left part of each is for training, the right part for
testing, and a strip between them for neither. Photographs of ``photos.HELD_OUT`` are not used, those of
``photos.TRAIN`` are: the prior that ships has seen them, test parts included.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from examples.common.data.generated import Floats, Mask, box_of
from examples.common.data.photos import load_photo, pyramid
from examples.common.data.tasks import InMemory, Task

Split = Literal["train", "test"]
Window = tuple[float, int, int, int, int]
"""The scale at which a photograph is sharp, and the first and last row and column of what is used of it."""

PHOTOS: dict[str, Window] = {
    "brick": (0.5, 0, 512, 0, 512),
    "china": (1.0, 80, 350, 85, 320),
    "coins": (1.0, 0, 303, 0, 384),
    "flower": (1.0, 100, 340, 180, 435),
    "grass": (0.5, 0, 512, 0, 512),
    "gravel": (0.5, 0, 512, 0, 512),
    "hubble_deep_field": (0.5, 0, 872, 0, 1000),
    "immunohistochemistry": (0.5, 0, 512, 0, 512),
    "page": (1.0, 0, 191, 0, 384),
    "retina": (0.35, 200, 1200, 350, 1250),
    "text": (1.0, 0, 172, 0, 448),
}
"""The classes."""
BACKGROUNDS: dict[str, Window] = {
    "astronaut": (1.0, 0, 512, 0, 512),
    "clock": (1.0, 0, 300, 0, 400),
    "moon": (0.5, 0, 512, 0, 512),
    "motorcycle_left": (1.0, 100, 400, 0, 741),
}
"""Those that objects are pasted on."""
CLASSES = tuple(PHOTOS)
CUT, GAP = 0.55, 8
"""Where a window is cut, as a share of its width, and how many columns are left out there."""
CONTRAST = 0.15
SMALLEST = 24


def photo_textures(task: Task, split: Split, count: int, seed: int, *, size: int = 48) -> InMemory:
    """``count`` images, a pure function of the seed, whose first ones are the same for every count.

    ============== ==============================================================================================
    classification a patch; as many images in a row as there are classes show every class once
    segmentation   a mosaic of two to four photographs, each on the pixels nearest to its own random point
    detection      one or two discs and boxes, of a third to 7/12 of the image, on a fainter other photograph
    ============== ==============================================================================================

    Args:
        task: what the images and targets are.
        split: "train" | "test", which part of the photographs they are from.
        count: at least 1.
        seed: from 0.
        size: side of the images, from 24 to the shortest side of a part of a photograph.

    Raises:
        ValueError: For an unknown task or split and for values out of range.
    """
    for name, choice, known in (("task", task, get_args(Task)), ("split", split, get_args(Split))):
        if choice not in known:
            raise ValueError(f"`{name}` should be one of {known}, found {choice!r}.")
    for name, value, least in (("count", count, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"`{name}` should be at least {least}, found {value}.")
    largest = min(min(part(name, side)[0].shape) for name in (*PHOTOS, *BACKGROUNDS) for side in get_args(Split))
    if not SMALLEST <= size <= largest:
        raise ValueError(f"`size` should be from {SMALLEST} to {largest}, found {size}.")

    pixels = np.empty((count, size, size), np.uint8)
    targets: list[Any] = []
    draw = {"classification": _patch, "segmentation": _mosaic, "detection": _pasted}[task]
    for index in range(count):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
        first = index % len(CLASSES)
        labels = [first, *(int(label) for label in rng.permutation(len(CLASSES)) if label != first)]
        image, target = draw(rng, split, labels, size)
        pixels[index] = np.rint(image.clip(0, 1) * 255)
        targets.append(target)
    images = torch.from_numpy(pixels).float().div(255)[:, None].repeat(1, 3, 1, 1)
    class_names = ("background", *CLASSES) if task == "detection" else CLASSES
    return InMemory(task, class_names, images, targets if task == "detection" else torch.stack(targets))


@cache
def part(name: str, split: Split) -> list[Floats]:
    """The gray training or test part of a photograph, at its scale and, last, at three quarters of it, (H, W) each."""
    scale, top, bottom, left, right = (PHOTOS | BACKGROUNDS)[name]
    photo = load_photo(name)[:, top:bottom, left:right].mean(dim=0, keepdim=True)
    start, stop = columns(name, split)
    scales = (scale, 0.75 * scale)
    return [level[0].numpy() for level in pyramid(photo[:, :, start - left : stop - left], SMALLEST, scales)]


def columns(name: str, split: Split) -> tuple[int, int]:
    """The first column of a photograph that belongs to the split, and the one after the last."""
    *_, left, right = (PHOTOS | BACKGROUNDS)[name]
    cut = left + round(CUT * (right - left))
    return (left, cut) if split == "train" else (cut + GAP, right)


def untested(name: str, photo: Tensor) -> Tensor | None:
    """A photograph without its test part, (3, H, W); None of another view of one that has a test part."""
    if name == "motorcycle_right":
        return None
    return photo[:, :, : columns(name, "train")[1]] if name in PHOTOS | BACKGROUNDS else photo


def _patch(rng: np.random.Generator, split: Split, labels: Sequence[int], size: int) -> tuple[Floats, Tensor]:
    everywhere = np.ones((size, size), np.bool_)
    return _standard(_crop(rng, CLASSES[labels[0]], split, size), everywhere), torch.tensor(labels[0])


def _mosaic(rng: np.random.Generator, split: Split, labels: Sequence[int], size: int) -> tuple[Floats, Tensor]:
    y, x = np.mgrid[:size, :size]
    number, share = int(rng.integers(2, 5)), 0.0
    while share < 0.1:  # each photograph should show enough of itself
        points = rng.uniform(0, size, (number, 2, 1, 1))
        nearest = np.hypot(y - points[:, 0], x - points[:, 1]).argmin(axis=0)
        share = np.bincount(nearest.ravel(), minlength=number).min() / size**2
    image = np.zeros((size, size), np.float32)
    for index, label in enumerate(labels[:number]):
        mask = nearest == index
        image[mask] = _standard(_crop(rng, CLASSES[label], split, size), mask)[mask]
    return image, torch.tensor(labels[:number])[torch.from_numpy(nearest)]


def _pasted(
    rng: np.random.Generator, split: Split, labels: Sequence[int], size: int
) -> tuple[Floats, dict[str, Tensor]]:
    name = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    image = _standard(_crop(rng, name, split, size), np.ones((size, size), np.bool_), contrast=CONTRAST / 2)
    taken = np.zeros((size, size), np.bool_)
    boxes = []
    for label in labels[: int(rng.integers(1, 3))]:
        masks = (_object(rng, size) for _ in range(20))
        mask = next((mask for mask in masks if not (mask & taken).any()), None)
        if mask is None:  # no room for a second one
            break
        image[mask] = _standard(_crop(rng, CLASSES[label], split, size), mask)[mask]
        taken |= mask
        boxes.append(box_of(mask))
    return image, {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels[: len(boxes)]) + 1}


def _object(rng: np.random.Generator, size: int) -> Mask:
    """A disc or a box that lies within the image, (H, W)."""
    disc = rng.integers(2) == 0
    sides = np.rint(rng.uniform(16, 28, 2) * size / 48)
    if disc:
        sides[1] = sides[0]
    corner = np.floor(rng.uniform(0, 1, 2) * (size - sides + 1))
    side = np.arange(size) + 0.5
    y, x = ((side - low) / length * 2 - 1 for low, length in zip(corner, sides, strict=True))
    mask: Mask = (np.hypot if disc else np.maximum)(np.abs(y)[:, None], np.abs(x)) <= 1
    return mask


def _crop(rng: np.random.Generator, name: str, split: Split, size: int) -> Floats:
    """A crop of a photograph's part, (size, size), turned and mirrored at random: of three the least flat."""
    levels = [level for level in part(name, split) if min(level.shape) >= size]
    crops = []
    for _ in range(3):
        level = levels[rng.integers(len(levels))]
        top, left = rng.integers(level.shape[0] - size + 1), rng.integers(level.shape[1] - size + 1)
        crops.append(level[top : top + size, left : left + size])
    crop = np.rot90(max(crops, key=lambda crop: float(crop.std())), int(rng.integers(4)))
    return np.fliplr(crop) if rng.integers(2) else crop


def _standard(crop: Floats, mask: Mask, contrast: float = CONTRAST) -> Floats:
    """The crop with mean 0.5 and standard deviation ``contrast`` within the mask."""
    inside = crop[mask]
    result: Floats = (crop - inside.mean()) / (inside.std() + 1e-3) * contrast + 0.5
    return result
