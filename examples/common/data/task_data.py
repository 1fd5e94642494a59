"""The labeled images that a run trains and is tested on, as its options say."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common.data.datasets import FolderData, cub200, stanford_cars, voc2012
from examples.common.data.options import DataName, DataOptions
from examples.common.data.pair_folders import degraded_files
from examples.common.data.pairs import check_likeness
from examples.common.data.tasks import Task, TaskData, map_images

_Options = TypeVar("_Options", bound=DataOptions)

_SIZES: dict[str, int] = {"classification": 224, "segmentation": 480, "detection": 500}
_ON_DISK: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("cub200", "cars", "class_folders", "label_file"), ("classification",)),
    **dict.fromkeys(("cityscapes", "foggy_cityscapes", "acdc"), ("segmentation",)),
    **dict.fromkeys(("coco", "rtts"), ("detection",)),
    "voc2012": ("segmentation", "detection"),
}
"""The tasks of each data set."""
TEST_SEED = 1_000_003
"""Added to a seed for test images."""


def of_task(config: _Options, task: Task) -> _Options:
    """The options of a run of one task, with the data that ``data_sets`` has for it.

    Raises:
        ValueError: For data that are not NAME or NAME:ROOT.
    """
    if task not in config.data_sets:
        return replace(config, task=task, data_sets={})
    found: Any
    found, _, root = config.data_sets[task].partition(":")
    if found not in get_args(DataName):
        raise ValueError(
            f"`data_sets` should be NAME:ROOT with one of {', '.join(get_args(DataName))} for {task}, found "
            f"{config.data_sets[task]!r}."
        )
    return replace(config, task=task, data=found, root=Path(root) if root else None, lq=None, data_sets={})


def check_data_sets(config: DataOptions, tasks: Collection[str]) -> None:
    """Raise ``ValueError`` for data of a task that the run does not have, and degraded images that none reads."""
    if unknown := [task for task in config.data_sets if task not in tasks]:
        raise ValueError(f"`data_sets` should be for the tasks {', '.join(tasks)} of this run, found {unknown[0]!r}.")
    if config.lq is not None and not [task for task in tasks if task not in ("restoration", *config.data_sets)]:
        raise ValueError(f"`lq` should be for a task that reads `root`, found none of {', '.join(tasks)}.")


def datasets(config: DataOptions, seed: int) -> tuple[TaskData, TaskData]:
    """Training and test data, as :func:`dataset` gives them."""
    return dataset(config, "train", seed), dataset(config, "test", seed)


def dataset(config: DataOptions, split: Literal["train", "test"], seed: int, *, whole: bool = False) -> TaskData:
    """One split; images that are generated are a function of ``seed``, or of ``data_seed``.

    Args:
        config: the options.
        split: "train" or "test".
        seed: of the run.
        whole: test all of your own images that are not divided, as nothing trains on them.

    Raises:
        ValueError: For a data set that lacks its ``root`` or does not know the task, and for ``data_sets``, which
            :func:`of_task` reads.
    """
    if config.data_sets:
        raise ValueError(
            f"`data_sets` should be left out of a run of one task, which reads `data`, found {config.data_sets}."
        )
    seed = seed if config.data_seed is None else config.data_seed
    count = config.train_count
    if split == "test":
        seed, count = seed + TEST_SEED, config.test_count
    if (config.task == "reading") != (config.data == "words"):
        raise ValueError(
            f"`data` should be 'words' for the task 'reading' alone, found {config.data!r} for {config.task!r}."
        )
    if config.lq is not None and (config.data not in _ON_DISK or config.scale != 1):
        raise ValueError(
            f"`lq` should be for data on disk and a `scale` of 1, found {config.data!r} and {config.scale}."
        )
    if config.root is not None and config.data not in _ON_DISK:
        raise ValueError(f"`data` should be on disk for `root`, found {config.data!r}, which is made on the spot.")
    inside = config.lq is not None and config.root is not None and config.data == "class_folders"
    if inside and config.lq.resolve().is_relative_to(config.root.resolve()):  # type: ignore[union-attr]
        raise ValueError(f"`lq` should lie outside of `root`, found {config.lq} in {config.root}.")
    if config.data == "generated":
        from examples.common.data.generated import generated

        return generated(config.task, count, seed, size=config.size or 48, contrast=config.contrast)
    if config.data == "photos":
        from examples.common.data.photo_textures import photo_textures

        return photo_textures(config.task, split, count, seed, size=config.size or 48)
    if config.data == "words":
        from examples.common.data.words import word_data

        return word_data(split, count, seed)
    if config.root is None:
        raise ValueError(f"`root` should be the folder of the data set {config.data!r}, found None.")
    known = _ON_DISK[config.data]
    if config.task not in known:
        one_of = " or ".join(repr(task) for task in known)
        raise ValueError(f"`task` should be {one_of} for {config.data}, found {config.task!r}.")
    data = _on_disk(config, config.root, split, config.size or _SIZES[config.task], whole)
    if config.lq is not None:
        found = degraded_files([path for path, _ in data.samples], config.root, config.lq)
        check_likeness("lq", [(degraded, clean) for clean, degraded in found.items()])
        data.pair(found)
    return data


def _on_disk(config: DataOptions, root: Path, split: Literal["train", "test"], size: int, whole: bool) -> FolderData:
    from examples.common.data import object_boxes, own_images
    from examples.common.data.street_scenes import street_scenes

    name: Any = config.data
    if name == "voc2012":
        task: Any = config.task
        return voc2012(root, split, task, size=size, scales=config.voc_scales)
    if name in ("cityscapes", "foggy_cityscapes", "acdc"):
        return street_scenes(root, name, split, size=size)
    loads: dict[str, Any] = {
        "cub200": cub200, "cars": stanford_cars, "coco": object_boxes.coco, "rtts": object_boxes.rtts,
        "class_folders": partial(own_images.class_folders, whole=whole),
        "label_file": partial(own_images.label_file, whole=whole),
    }  # fmt: skip
    data: FolderData = loads[name](root, split, size=size)
    return data


def image_side(config: DataOptions) -> int:
    """The side of the training images in pixels; of words, which are lines, their height."""
    if config.size is not None:
        return config.size
    small = {"generated": 48, "photos": 48, "words": 32}
    return small.get(config.data, _SIZES.get(config.task, 48))


def crop_to_multiple(hr: Any, targets: Any, multiple: int) -> tuple[Any, Any]:
    """Images cut at the right and at the bottom to multiples of the scale; masks and boxes with them.

    A box that is cut away altogether is dropped.
    """
    if isinstance(hr, Tensor):
        height, width = (side // multiple * multiple for side in hr.shape[2:])
        if height == hr.shape[2] and width == hr.shape[3]:
            return hr, targets
        return hr[:, :, :height, :width], targets[:, :height, :width] if targets.ndim == 3 else targets
    cut = [_cut(image, target, multiple) for image, target in zip(hr, targets, strict=True)]
    return [image for image, _ in cut], [target for _, target in cut]


def pad_to_multiple(images: Any, multiple: int) -> Any:
    """Images continued by their edges, at the right and at the bottom, to multiples of the scale."""
    return map_images(lambda x: F.pad(x, (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple), "replicate"), images)


def _cut(image: Tensor, target: dict[str, Tensor], multiple: int) -> tuple[Tensor, dict[str, Tensor]]:
    height, width = (side // multiple * multiple for side in image.shape[1:])
    if (height, width) == tuple(image.shape[1:]):
        return image, target
    boxes = target["boxes"].minimum(torch.tensor([width, height, width, height], dtype=target["boxes"].dtype))
    left = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return image[:, :height, :width], {"boxes": boxes[left], "labels": target["labels"][left]}
