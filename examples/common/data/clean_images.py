"""Clean images without labels, as random crops of photographs or of files."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.common.data.folder import UNREADABLE, Skipped, read_image
from examples.common.data.photos import photographs, pyramid, random_crops
from examples.common.data.tasks import Task


class CleanImages:
    """Crops, turned and mirrored at random: samples (image (3, H, W), 0). Random choices use torch's global generator.

    Args:
        sources: photographs, or files.
        count: of samples.
        size: of the crops.
    """

    task: Task = "classification"
    class_names: tuple[str, ...] = ("clean",)

    def __init__(self, sources: Sequence[Tensor] | Sequence[Path], count: int, size: int) -> None:
        self.sources: list[Any] = list(sources)
        self.count, self.size = count, size
        self._skipped = Skipped()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        source: Tensor | Path = self.sources[index % len(self.sources)]
        if isinstance(source, Tensor):
            return random_crops(self.sources, 1, self.size, generator)[0], torch.tensor(0)
        try:
            image = read_image(source)
        except UNREADABLE as error:
            self._skipped(source, error)
            return None
        if min(image.shape[1:]) < self.size:
            self._skipped(source, f"smaller than the crops of {self.size}")
            return None
        return random_crops([image], 1, self.size, generator)[0], torch.tensor(0)


@functools.cache
def training_photographs(smallest: int) -> tuple[Tensor, ...]:
    """The photographs that come with other packages, at several sizes; read once for all who ask."""
    train, _ = photographs(None, smallest=smallest)
    return tuple(size for photo in train.values() for size in pyramid(photo, smallest))
