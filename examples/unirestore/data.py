"""The images that are restored, for people and for each task."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize

from examples.common.data.clean_images import CleanImages, read_large, training_photographs
from examples.common.data.folder import Skipped, a_tenth, image_files
from examples.common.data.options import DataOptions
from examples.common.data.pair_folders import degraded_files, pairs
from examples.common.data.pairs import check_likeness
from examples.common.data.photos import HELD_OUT, grid_crops, load_photo
from examples.common.data.task_data import dataset, datasets, image_side, of_task
from examples.common.data.tasks import InMemory, Task, TaskData
from examples.unirestore.config import TASKS


def data_of(task: str, config: Any) -> tuple[TaskData, TaskData]:
    """Training and test data of a task; of restoration, clean images with a label that means nothing.

    Raises:
        ValueError: For an unknown task, and where no photograph is large enough.
    """
    if task == "restoration":
        return _clean(config)
    if task not in TASKS:
        raise ValueError(f"A task should be one of {', '.join(TASKS)}, found {task!r}.")
    known: Any = task
    return datasets(of_task(config, known), config.seed)


def test_data_of(task: str, config: Any, is_elsewhere: Callable[[Path | None], bool]) -> TaskData:
    """The test data alone, where no training data are needed.

    Args:
        task: what they are for.
        config: the options.
        is_elsewhere: whether nothing was trained on a folder, all of which is then for the test.
    """
    if task == "restoration":
        return _clean(config, whole=is_elsewhere(config.images))[1]
    known: Any = task
    data = of_task(config, known)
    return dataset(data, "test", config.seed, whole=is_elsewhere(data.root))


def _clean(config: Any, *, whole: bool = False) -> tuple[TaskData, TaskData]:
    if config.data == "words":  # for people the same as for readers
        return _unlabeled(*datasets(of_task(config, "reading"), config.seed))
    size = config.size or (48 if config.data in ("generated", "photos") else 512)
    if config.images is not None:
        return _clean_files(config.images, config, size, whole)
    train = training_photographs(size, beside_textures=True)  # which the tasks may be of, today or in a later stage
    held_out = {name: photo for name in HELD_OUT if min((photo := load_photo(name)).shape[1:]) >= size}
    if not train or not held_out:
        raise ValueError(f"`images` should be a folder of photographs for `size` {size}; those found are smaller.")
    each = -(-config.test_count // len(held_out))
    # of all photographs in turn, so that the first few show each
    crops = torch.stack([grid_crops(photo, size, each) for photo in held_out.values()], dim=1).flatten(0, 1)
    crops = crops[: config.test_count]
    names = CleanImages.class_names
    return (
        CleanImages(train, config.train_count, size),
        InMemory("classification", names, crops, torch.zeros(len(crops), dtype=torch.long)),
    )


def _unlabeled(*parts: TaskData) -> tuple[TaskData, TaskData]:
    """Images in memory, with a label that means nothing."""
    train, test = (
        InMemory("classification", CleanImages.class_names, part.images, torch.zeros(len(part), dtype=torch.long))
        for part in parts
        if isinstance(part, InMemory)
    )
    return train, test


def _clean_files(folder: Path, config: Any, size: int, whole: bool) -> tuple[TaskData, TaskData]:
    """A tenth of the images of a folder is for the test, or the ``whole``; of DIV2K its validation part. Each is read
    when it is wanted.

    They are divided before those without a degraded image are left out, so that what was prepared without ``images_lq``
    has learned from none of the test.
    """
    if (folder / "DIV2K_train_HR").is_dir():
        train, test = ([file for _, file in pairs("div2k", folder, split, "clean")] for split in ("train", "test"))
    else:
        files = image_files(folder)
        tested = set(files) if whole else a_tenth(files, folder)
        train, test = ([file for file in files if (file in tested) == side] for side in (False, True))
    lq = getattr(config, "images_lq", None)  # preparation has no use for it
    degraded = None if lq is None else degraded_files([*train, *test], folder, lq, option="images_lq")
    if degraded is not None:
        train, test = ([file for file in part if file in degraded] for part in (train, test))
        if not test or not (train or whole):
            found = f"{len(train)} and {len(test)}"
            raise ValueError(f"`images_lq` should hold images to train and to test with, found {found}.")
        check_likeness("images_lq", [(degraded[file], file) for file in [*train, *test]])
    if not test or not (train or whole):
        raise ValueError(f"`images` should be a folder of at least two images, found {len(train + test)} in {folder}.")
    each = -(-config.test_count // len(test))
    crops = [(file, number) for number in range(each) for file in test][: config.test_count]
    return CleanImages(train, config.train_count, size, degraded), FileCrops(crops, each, size, degraded)


class FileCrops:
    """Crops spread evenly over image files: samples as of CleanImages, None where a file cannot be used.

    Args:
        crops: file, and number of its crop.
        each: crops of a file.
        size: of the crops.
        degraded: as of CleanImages.
    """

    task: Task = "classification"
    class_names = CleanImages.class_names

    def __init__(
        self, crops: Sequence[tuple[Path, int]], each: int, size: int, degraded: Mapping[Path, Path] | None = None
    ) -> None:
        self.crops, self.each, self.size, self.degraded = list(crops), each, size, degraded
        self._skipped = Skipped()

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        file, number = self.crops[index]
        image = read_large(file, self.size, self.degraded, self._skipped)
        return None if image is None else (grid_crops(image, self.size, self.each)[number], torch.tensor(0))


class Mixed:
    """The images of several tasks in turn, without their labels: what a prior is trained on.

    Each task begins elsewhere: generated tasks have the same images, and a batch of them thrice would teach less.

    Args:
        parts: of each task.
        side: that images are reduced and cut to, where those of the tasks differ in size.
    """

    task: Task = "classification"
    class_names: tuple[str, ...] = ("image",)

    def __init__(self, parts: Sequence[TaskData], side: int | None = None) -> None:
        self.parts, self.side = list(parts), side

    def __len__(self) -> int:
        return min(len(part) for part in self.parts) * len(self.parts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        place, part = divmod(index, len(self.parts))
        each = len(self) // len(self.parts)
        sample = self.parts[part][(place + part * each // len(self.parts)) % each]
        if sample is None:
            return None
        image = sample[0][:3]
        if self.side is not None:
            image = center_crop(resize(image, [self.side]), [self.side, self.side])
        return image, torch.tensor(0)


def mixed(tasks: Sequence[Any], config: DataOptions) -> tuple[TaskData, TaskData]:
    """Training and test images of all tasks."""
    every = [data_of(task, config) for task in tasks]
    side = None
    if config.data not in ("generated", "photos", "words") or config.data_sets:
        side = min(image_side(of_task(config, task)) for task in tasks if task != "restoration")
    return Mixed([train for train, _ in every], side), Mixed([test for _, test in every], side)
