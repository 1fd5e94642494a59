"""Which pictures are restored, for people and for each task?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from examples.common.clean_pictures import CleanPictures, training_photographs
from examples.common.data import datasets
from examples.common.options import DataOptions
from examples.common.photos import HELD_OUT, grid_crops, load_photo, photographs
from examples.common.tasks import InMemory, Task, TaskData
from examples.unirestore.config import TASKS


def data_of(task: str, config: Any) -> tuple[TaskData, TaskData]:
    """Training and test data of a task; of restoration, clean pictures with a label that means nothing.

    Raises:
        ValueError: For an unknown task, and where no photograph is large enough.
    """
    if task == "restoration":
        return _clean(config)
    if task not in TASKS:
        raise ValueError(f"A task should be one of {', '.join(TASKS)}, found {task!r}.")
    known: Any = task
    return datasets(replace(config, task=known), config.seed)


def _clean(config: Any) -> tuple[TaskData, TaskData]:
    size = config.size or (48 if config.data in ("generated", "photos") else 512)
    if config.pictures is None:
        train: Sequence[Tensor] = training_photographs(size)
        held_out = {name: photo for name in HELD_OUT if min((photo := load_photo(name)).shape[1:]) >= size}
        if not train or not held_out:
            raise ValueError(
                f"`pictures` should be a folder of photographs for `size` {size}; those at hand are smaller."
            )
    else:
        found, held_out = photographs(config.pictures, smallest=size)
        train = list(found.values())
    each = -(-config.test_count // len(held_out))
    crops = torch.cat([grid_crops(photo, size, each) for photo in held_out.values()])[: config.test_count]
    names = CleanPictures.class_names
    return (
        CleanPictures(train, config.train_count, size),
        InMemory("classification", names, crops, torch.zeros(len(crops), dtype=torch.long)),
    )


class Mixed:
    """The pictures of several tasks in turn, without their labels: what a prior is trained on.

    Each task begins elsewhere: generated tasks have the same pictures, and a batch of them thrice would teach less.
    """

    task: Task = "classification"
    class_names: tuple[str, ...] = ("picture",)

    def __init__(self, parts: Sequence[TaskData]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        return min(len(part) for part in self.parts) * len(self.parts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        place, part = divmod(index, len(self.parts))
        each = len(self) // len(self.parts)
        sample = self.parts[part][(place + part * each // len(self.parts)) % each]
        return None if sample is None else (sample[0], torch.tensor(0))


def mixed(tasks: Sequence[str], config: DataOptions) -> tuple[TaskData, TaskData]:
    """Training and test pictures of all tasks."""
    every = [data_of(task, config) for task in tasks]
    return Mixed([train for train, _ in every]), Mixed([test for _, test in every])
