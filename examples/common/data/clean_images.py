"""Clean images without labels, as random crops of photographs or of files."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.common.data.folder import UNREADABLE, Skipped, read_image, with_degraded
from examples.common.data.photo_textures import untested
from examples.common.data.photos import photographs, pyramid, random_crops
from examples.common.data.tasks import Task


class CleanImages:
    """Crops, turned and mirrored at random: samples (image (3, H, W), 0). Random choices use torch's global generator.

    Args:
        sources: photographs, or files.
        count: of samples.
        size: of the crops.
        degraded: of files, their degraded ones, which are cropped alike and follow as three more channels.
    """

    task: Task = "classification"
    class_names: tuple[str, ...] = ("clean",)

    def __init__(
        self,
        sources: Sequence[Tensor] | Sequence[Path],
        count: int,
        size: int,
        degraded: Mapping[Path, Path] | None = None,
    ) -> None:
        self.sources: list[Any] = list(sources)
        self.count, self.size, self.degraded = count, size, degraded
        self._skipped = Skipped()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        source: Tensor | Path = self.sources[index % len(self.sources)]
        if isinstance(source, Tensor):
            return random_crops(self.sources, 1, self.size, generator)[0], torch.tensor(0)
        image = read_large(source, self.size, self.degraded, self._skipped)
        return None if image is None else (random_crops([image], 1, self.size, generator)[0], torch.tensor(0))


def read_large(
    file: Path, size: int, degraded: Mapping[Path, Path] | None, skipped: Callable[[Path, str | BaseException], None]
) -> Tensor | None:
    """A file, with its degraded one where there is one; None, and told, where it cannot be read or is too small."""
    reading = file
    try:
        image = read_image(file)
        if degraded is not None:
            reading = degraded[file]
            image = with_degraded(image, reading)
    except UNREADABLE as error:
        skipped(reading, error)
        return None
    if min(image.shape[1:]) < size:
        skipped(file, f"smaller than the crops of {size}")
        return None
    return image


@functools.cache
def training_photographs(smallest: int, *, beside_textures: bool = False) -> tuple[Tensor, ...]:
    """The photographs that come with other packages, at several sizes; read once for all who ask.

    Args:
        smallest: side of an image.
        beside_textures: without what the test images of ``photo_textures`` are from.
    """
    train, _ = photographs(None, smallest=smallest)
    images = [untested(name, photo) if beside_textures else photo for name, photo in train.items()]
    return tuple(size for image in images if image is not None for size in pyramid(image, smallest))
