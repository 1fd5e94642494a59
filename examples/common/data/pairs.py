"""The pairs of degraded and clean images that a run trains and is tested on, as its options say."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.common.data.clean_images import training_photographs
from examples.common.data.degradations import degrade
from examples.common.data.folder import UNREADABLE, Skipped, read_image
from examples.common.data.options import PairOptions
from examples.common.data.pair_folders import LAYOUTS, pairs
from examples.common.data.photos import grid_crops, photographs, pyramid, random_crops
from examples.common.data.tasks import Task
from examples.common.seeds import derive_seed


def layout_and_root(options: PairOptions, name: str, pairs: dict[str, str] | None = None) -> tuple[str, Path]:
    """Layout and root of the data set of a degradation.

    Raises:
        ValueError: If it is not named, or not as "LAYOUT:ROOT".
    """
    pairs = options.pairs if pairs is None else pairs
    if name not in pairs:
        raise ValueError(f"`pairs` should name the data of {name!r} as LAYOUT:ROOT, found {pairs}.")
    layout, _, root = pairs[name].partition(":")
    if layout not in LAYOUTS or not root:
        raise ValueError(f"`pairs` should be LAYOUT:ROOT with one of {', '.join(LAYOUTS)}, found {pairs[name]!r}.")
    return layout, Path(root)


class Pairs(ABC):
    """Samples ((2, 3, H, W), number of the degradation): degraded and clean.

    Attributes:
        class_names: the degradations, by number.
    """

    task: Task = "classification"
    class_names: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None: ...


class PhotoPairs(Pairs):
    """Crops of photographs, degraded when they are asked for, by torch's global generator.

    Args:
        photos: (3, H, W) each.
        names: of degradations, which take turns.
        count: of samples.
        size: of the crops.
    """

    def __init__(self, photos: Sequence[Tensor], names: Sequence[str], count: int, size: int) -> None:
        self.photos, self.class_names, self.count, self.size = list(photos), tuple(names), count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        number = index % len(self.class_names)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        clean = random_crops(self.photos, 1, self.size, generator)[0]
        return torch.stack([degrade(self.class_names[number], clean, generator), clean]), torch.tensor(number)


class FolderPairs(Pairs):
    """Crops of pairs of files. What cannot be read is None, after one warning that names it.

    Args:
        roots: layout and root of the data set of each degradation, by its name.
        split: "train": random crops of ``size``, turned and mirrored; "test": whole images.
        size: of the crops.
    """

    def __init__(self, roots: dict[str, tuple[str, Path]], split: str, size: int) -> None:
        self.class_names, self.split, self.size = tuple(roots), split, size
        self.files = [pairs(layout, root, split, name) for name, (layout, root) in roots.items()]
        self._skipped = Skipped()

    def __len__(self) -> int:
        """The number of samples: as many of each degradation as the largest data set has."""
        return len(self.files) * max(map(len, self.files))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        number, place = index % len(self.files), index // len(self.files)
        name, files = self.class_names[number], self.files[number]
        degraded_file, clean_file = files[place % len(files)]
        reading = clean_file
        try:
            clean = read_image(clean_file)
            reading = degraded_file or clean_file
            degraded = None if degraded_file is None else read_image(degraded_file)
        except UNREADABLE as error:
            self._skipped(reading, error)
            return None
        if degraded is not None and degraded.shape != clean.shape:
            found = f"{tuple(degraded.shape[1:])} and {tuple(clean.shape[1:])}"
            self._skipped(degraded_file or clean_file, f"the pair should be of one size, found {found}")
            return None
        seed = int(torch.randint(2**62, ())) if self.split == "train" else derive_seed(place, number)
        generator = torch.Generator().manual_seed(seed)
        pair = clean[None] if degraded is None else torch.stack([degraded, clean])
        if self.split == "train":
            if min(pair.shape[2:]) < self.size:
                self._skipped(clean_file, f"smaller than the crops of {self.size}")
                return None
            pair = _turned_crop(pair, self.size, generator)
        if degraded is None:
            pair = torch.stack([degrade(name, pair[0], generator), pair[0]])
        return pair, torch.tensor(number)


def training_pairs(config: PairOptions, names: Sequence[str]) -> Pairs:
    """The training pairs of these degradations."""
    if config.data == "photos":
        if not training_photographs(config.patch):
            raise ValueError(f"`patch` should fit into the photographs, found {config.patch}.")
        return PhotoPairs(training_photographs(config.patch), names, config.train_count, config.patch)
    return FolderPairs({name: layout_and_root(config, name) for name in names}, "train", config.patch)


def test_pairs(config: PairOptions, name: str, *, shifted: bool) -> list[tuple[Tensor, Tensor]]:
    """(degraded, clean) test images (1, 3, H, W); of photographs, held-out ones, the same for all runs."""
    if config.data == "photos":
        _, held_out = photographs(None, smallest=config.patch)
        photos = [pyramid(photo, 1, (0.5,))[0] for photo in held_out.values()]
        if config.test_size > (largest := min(min(photo.shape[1:]) for photo in photos)):
            raise ValueError(f"`test_size` should be at most {largest} for photos, found {config.test_size}.")
        each = -(-config.test_count // len(photos))
        found = []
        for number, photo in enumerate(photos):
            for place, clean in enumerate(grid_crops(photo, config.test_size, each)):
                generator = torch.Generator().manual_seed(derive_seed(number, place))
                found.append((degrade(name, clean, generator, shifted=shifted)[None], clean[None]))
        return found[: config.test_count]
    if shifted:
        if name not in config.shifted_pairs:
            return []
        data = FolderPairs({name: layout_and_root(config, name, config.shifted_pairs)}, "test", config.patch)
    else:
        data = FolderPairs({name: layout_and_root(config, name)}, "test", config.patch)
    read = [data[index] for index in range(min(len(data), config.test_count))]
    return [(sample[0][:1], sample[0][1:]) for sample in read if sample is not None]


def _turned_crop(pair: Tensor, size: int, generator: torch.Generator) -> Tensor:
    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    top, left = draw(pair.shape[2] - size + 1), draw(pair.shape[3] - size + 1)
    crop = pair[:, :, top : top + size, left : left + size].rot90(draw(4), dims=(2, 3))
    return crop.flip(3) if draw(2) else crop
