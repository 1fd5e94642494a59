"""The interface of a data set of labeled images, whatever the task.

A sample is (image, target): the image a float (3, H, W) tensor in [0, 1], or (6, H, W), the clean image and then the
degraded one of a pair on disk, which are resized, cropped and flipped alike; the target

============== ==============================================================================================
classification the class, an int64 tensor of shape ()
segmentation   the class of every pixel, int64 (H, W); ``IGNORED`` is counted nowhere
detection      {"boxes": float (M, 4), x1 y1 x2 y2 in pixels, "labels": int64 (M,), from 1; 0 is background}
reading        the characters of a line of text, int64 (L,), from 1; 0, CTC's blank, fills up the shorter lines
============== ==============================================================================================
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Task = Literal["classification", "segmentation", "detection", "reading"]
IGNORED = 255
ENGLISH_G2_CHARACTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)
"""The classes 1 to 96 of EasyOCR's recognizer of English, and of the task "reading"."""


class TaskData(Protocol):
    """A map-style data set of one task. A sample that cannot be read is None, after a warning that names it."""

    task: Task
    class_names: tuple[str, ...]
    """By label; of detection, the first is "background", and of reading it is "", the blank."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Any] | None: ...


class InMemory:
    """Images in memory, as tensors.

    Args:
        task: how ``targets`` are read.
        class_names: by label; of detection, the first is "background".
        images: float (N, 3, H, W) in [0, 1].
        targets: N of them, as the module says.
    """

    def __init__(self, task: Task, class_names: Sequence[str], images: Tensor, targets: Sequence[Any] | Tensor) -> None:
        if len(images) != len(targets):
            raise ValueError(f"`targets` should be as many as `images` ({len(images)}), found {len(targets)}.")
        self.task: Task = task
        self.class_names = tuple(class_names)
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.images[index], self.targets[index]


def collate(samples: Sequence[tuple[Tensor, Any] | None]) -> tuple[Any, Any] | None:
    """A batch: stacked tensors, or lists for detection, whose images differ in size.

    Unreadable samples drop out; None if there is no other.
    """
    read = [sample for sample in samples if sample is not None]
    if not read:
        return None
    images, targets = zip(*read, strict=True)
    if isinstance(targets[0], dict):
        return list(images), list(targets)
    return torch.stack(images), torch.stack(targets)


def map_images(function: Callable[[Tensor], Tensor], images: Any) -> Any:
    """A function of (N, C, H, W) on a batch, or on each image of a list."""
    if isinstance(images, Tensor):
        return function(images)
    return [function(image[None])[0] for image in images]


def clean_of(images: Any) -> Any:
    """The clean images of pairs; others are clean."""
    return map_images(lambda x: x[:, :3], images)


def degraded_of(images: Any) -> Any | None:
    """The degraded images of pairs; None where there are none."""
    return map_images(lambda x: x[:, 3:], images) if len(images) and images[0].shape[0] == 6 else None


def to_device(value: Any, device: torch.device | str) -> Any:
    """Tensors, also in lists, tuples and mappings, on a device; strings are what they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return type(value)(to_device(item, device) for item in value)
