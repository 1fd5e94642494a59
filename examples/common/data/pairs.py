"""The pairs of degraded and clean images that a run trains and is tested on, as its options say."""

import logging
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common.data.clean_images import training_photographs
from examples.common.data.degradations import DEGRADATIONS, degrade
from examples.common.data.folder import (
    UNREADABLE,
    Skipped,
    a_tenth,
    image_files,
    image_size,
    read_image,
    with_degraded,
)
from examples.common.data.options import PairOptions
from examples.common.data.pair_folders import LAYOUTS, own_pairs, pairs
from examples.common.data.photos import grid_crops, photographs, pyramid, random_crops
from examples.common.data.tasks import Task
from examples.common.engine.learned import has_learned_from
from examples.common.seeds import derive_seed, seeded

logger = logging.getLogger(__name__)

Options = TypeVar("Options", bound=PairOptions)


def check_pair_options(config: PairOptions, *, own_names: bool = False) -> None:
    """Raise ``ValueError`` for options of the pairs that do not fit each other: none may do nothing without a word.

    Args:
        config: the options.
        own_names: whether degradations may have names of your own, as those of a finished run; beside ``lq`` they may.
    """
    names = config.degradations
    known = [*DEGRADATIONS, *names] if own_names or config.lq is not None else [*DEGRADATIONS]
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(f"`degradations` should be of {', '.join(known)}, each once, found {names}.")
    if config.lq is None:
        for option in ("gt", "test_lq", "test_gt"):
            if getattr(config, option) is not None:
                raise ValueError(f"`lq` should be given with `{option}`, found None.")
        for option in ("pairs", "shifted_pairs", "clean"):
            if config.data == "photos" and getattr(config, option, None):
                raise ValueError(f"`data` should be 'folders' for `{option}`, found 'photos'.")
    elif config.pairs:
        raise ValueError(f"`pairs` should be left out beside `lq`, found {config.pairs}.")
    for option in ("pairs", "shifted_pairs"):
        if unknown := [name for name in getattr(config, option) if name not in known]:
            raise ValueError(f"`{option}` should be by names of {', '.join(known)}, found {unknown[0]!r}.")


def layout_and_root(pairs: Mapping[str, str], name: str, *, option: str = "pairs") -> tuple[str, Path]:
    """Layout and root of the data set of a degradation, of an option.

    Raises:
        ValueError: If it is not named, or not as "LAYOUT:ROOT".
    """
    if name not in pairs:
        raise ValueError(f"`{option}` should name the data of {name!r} as LAYOUT:ROOT, found {pairs}.")
    layout, _, root = pairs[name].partition(":")
    if layout not in LAYOUTS or not root:
        raise ValueError(f"`{option}` should be LAYOUT:ROOT with one of {', '.join(LAYOUTS)}, found {pairs[name]!r}.")
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
        found = {name: pairs(layout, root, split, name) for name, (layout, root) in roots.items()}
        self._begin(found, split, size)

    @classmethod
    def of(cls, files: dict[str, list[tuple[Path | None, Path]]], split: str, size: int) -> "FolderPairs":
        """Pairs of files that are known."""
        data = cls.__new__(cls)
        data._begin(files, split, size)
        return data

    def _begin(self, files: dict[str, list[tuple[Path | None, Path]]], split: str, size: int) -> None:
        self.class_names, self.split, self.size = tuple(files), split, size
        self.files = [*files.values()]
        self._skipped = Skipped()
        for name, found in files.items():
            if name not in DEGRADATIONS and any(degraded is None for degraded, _ in found):
                raise ValueError(f"The data of {name!r} should have degraded images, found clean ones alone.")
            if split == "train":
                check_likeness(name, found)

    def __len__(self) -> int:
        """The number of samples: as many of each degradation as the largest data set has."""
        return len(self.files) * max(map(len, self.files))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        number, place = index % len(self.files), index // len(self.files)
        name, files = self.class_names[number], self.files[number]
        degraded_file, clean_file = files[place % len(files)]
        reading = clean_file
        try:
            pair = read_image(clean_file)[None]
            if degraded_file is not None:
                reading = degraded_file
                pair = torch.stack(with_degraded(pair[0], degraded_file).split(3)[::-1])
        except UNREADABLE as error:
            self._skipped(reading, error)
            return None
        seed = int(torch.randint(2**62, ())) if self.split == "train" else derive_seed(place, number)
        generator = torch.Generator().manual_seed(seed)
        if self.split == "train":
            if min(pair.shape[2:]) < self.size:
                self._skipped(clean_file, f"smaller than the crops of {self.size}")
                return None
            pair = _turned_crop(pair, self.size, generator)
        if degraded_file is None:  # noise of 50, JPEG of quality 10, as in the paper
            pair = torch.stack([degrade(name, pair[0], generator, fixed=True), pair[0]])
        return pair, torch.tensor(number)


def check_likeness(name: str, files: Sequence[tuple[Path | None, Path]], looked_at: int = 4) -> None:
    """Warn of degraded images that look like others than their clean ones, in some pairs from the whole of the list.

    Raises:
        ValueError: If the degraded images are the clean ones.
    """
    likenesses, same = [], []
    for degraded_file, clean_file in files[:: max(1, -(-len(files) // looked_at))]:
        if degraded_file is None:
            return
        try:
            degraded, clean = read_image(degraded_file), read_image(clean_file)
        except UNREADABLE:  # of which training tells
            continue
        small = [F.adaptive_avg_pool2d(image.mean(dim=0, keepdim=True), 32).flatten() for image in (degraded, clean)]
        if min(float(image.std()) for image in small) > 1e-3:  # else there is nothing to compare by
            likenesses.append(abs(float(torch.corrcoef(torch.stack(small))[0, 1])))
        same.append(torch.equal(degraded, clean))
    if same and all(same):
        raise ValueError(
            f"The degraded images of {name!r} should differ from the clean ones, found the same pixels in all of "
            f"{len(same)} looked at, as in {files[0][0]} and {files[0][1]}."
        )
    if likenesses and (median := statistics.median(likenesses)) < 0.3:
        logger.warning(
            "The pairs of %r look unlike each other (a correlation of %.2f in %d of them): do their names pair?",
            name, median, len(likenesses),
        )  # fmt: skip


def training_pairs(config: PairOptions, names: Sequence[str]) -> Pairs:
    """The training pairs of these degradations."""
    if config.data == "photos" and config.lq is None:
        if not training_photographs(config.patch):
            raise ValueError(f"`patch` should fit into the photographs, found {config.patch}.")
        return PhotoPairs(training_photographs(config.patch), names, config.train_count, config.patch)
    if config.lq is not None:
        return FolderPairs.of({names[0]: own_pairs_of(config, "train")}, "train", config.patch)
    return FolderPairs({name: layout_and_root(config.pairs, name) for name in names}, "train", config.patch)


class TestPairs(Sequence[tuple[Tensor, Tensor]]):
    """Test images of folders, each read when it is asked for; what cannot be read was left out before.

    Args:
        data: pairs of one degradation.
        count: how many; the default is all.
    """

    def __init__(self, data: FolderPairs, count: int | None = None) -> None:
        self.data, self.number = data, len(data) if count is None else min(count, len(data))

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Tensor, Tensor]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        sample = self.data[range(len(self))[index]]
        if sample is None:
            raise LookupError("The image cannot be read.")
        return sample[0][:1], sample[0][1:]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(self)):
            if (sample := self.data[index]) is not None:
                yield sample[0][:1], sample[0][1:]

    def of_each_size(self, most: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
        """The first pair of each of the first sizes, of those that can be read; only these are read."""
        seen: set[tuple[int, int]] = set()
        for index, (_, clean) in enumerate(self.data.files[0][: len(self)]):
            if len(seen) == most:
                return
            size = image_size(clean)
            if size is not None and size not in seen and (sample := self.data[index]) is not None:
                seen.add(size)
                yield sample[0][:1], sample[0][1:]


def pairs_to_try(name: str, found: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """A test pair of each size; of files of up to eight sizes, with a warning if they look unlike each other."""
    if isinstance(found, TestPairs):
        check_likeness(name, found.data.files[0])
        return [*found.of_each_size()]
    return list({clean.shape: (degraded, clean) for degraded, clean in reversed(found)}.values())


def evaluated_whole(config: Options, trained: Mapping[str, Any]) -> Options:
    """The options of an evaluation: of folders that its run has not seen all pairs are tested, not a tenth."""
    given = [folder for folder in (config.lq, config.gt) if folder is not None]
    if not given or config.test_lq is not None or any(has_learned_from(folder, trained) for folder in given):
        return config
    logger.info("Nothing is known to have learned from %s: all of its pairs are tested", config.lq)
    return replace(config, test_lq=config.lq, test_gt=config.gt)


def pairs_to_test(config: PairOptions, name: str, *, shifted: bool) -> Sequence[tuple[Tensor, Tensor]]:
    """(degraded, clean) test images (1, 3, H, W); of photographs, held-out ones, the same for all runs."""
    if config.data == "photos" and config.lq is None:
        count = 24 if config.test_count is None else config.test_count
        _, held_out = photographs(None, smallest=config.patch)
        photos = [pyramid(photo, 1, (0.5,))[0] for photo in held_out.values()]
        if config.test_size > (largest := min(min(photo.shape[1:]) for photo in photos)):
            raise ValueError(f"`test_size` should be at most {largest} for photos, found {config.test_size}.")
        each = -(-count // len(photos))
        found = []
        for number, photo in enumerate(photos):
            for place, clean in enumerate(grid_crops(photo, config.test_size, each)):
                generator = seeded(number, place)
                found.append((degrade(name, clean, generator, shifted=shifted)[None], clean[None]))
        return found[:count]
    if shifted:
        if name not in config.shifted_pairs:
            return []
        root = layout_and_root(config.shifted_pairs, name, option="shifted_pairs")
        data = FolderPairs({name: root}, "test", config.patch)
    elif config.lq is not None:
        data = FolderPairs.of({name: own_pairs_of(config, "test")}, "test", config.patch)
    else:
        data = FolderPairs({name: layout_and_root(config.pairs, name)}, "test", config.patch)
    return TestPairs(data, config.test_count)


def own_pairs_of(config: PairOptions, split: str) -> list[tuple[Path | None, Path]]:
    """The pairs of ``lq`` and ``gt``; of their own folders for the test, or a tenth."""
    assert config.lq is not None
    if config.gt is None or (config.test_lq is None) != (config.test_gt is None):
        raise ValueError("`gt` should be given with `lq`, and `test_gt` with `test_lq`, found one of two.")
    if len(config.degradations) != 1:
        raise ValueError(f"`degradations` should be one name for `lq`, found {config.degradations}.")
    if split == "test" and config.test_lq is not None and config.test_gt is not None:
        return own_pairs(config.test_lq, config.test_gt)
    found = own_pairs(config.lq, config.gt)
    if config.test_lq is not None and config.test_gt is not None:
        tested = {clean.resolve() for _, clean in own_pairs(config.test_lq, config.test_gt)}
        kept = [pair for pair in found if pair[1].resolve() not in tested]
        if not kept:
            raise ValueError(f"`lq` should hold other pairs than `test_lq`, found none in {config.lq}.")
        if len(kept) < len(found):
            logger.warning("%d pairs of %s are for the test: nothing trains on them", len(found) - len(kept), config.lq)
        return kept
    if len(found) < 2:
        raise ValueError(f"`lq` should hold at least two images with a clean one, found {len(found)} in {config.lq}.")
    tested = a_tenth(image_files(config.gt), config.gt)  # of all, so that it is the same beside any degraded images
    kept = [pair for pair in found if (pair[1] in tested) == (split == "test")]
    if not kept:
        raise ValueError(f"`lq` should hold images to {split} with, found none: give `test_lq` and `test_gt`.")
    return kept


def _turned_crop(pair: Tensor, size: int, generator: torch.Generator) -> Tensor:
    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    top, left = draw(pair.shape[2] - size + 1), draw(pair.shape[3] - size + 1)
    crop = pair[:, :, top : top + size, left : left + size].rot90(draw(4), dims=(2, 3))
    return crop.flip(3) if draw(2) else crop
