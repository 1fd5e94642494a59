"""Objects with boxes: COCO 2017 and RTTS (hazy streets, of RESIDE), unpacked as they are handed out."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torchvision import tv_tensors

from examples.common.data.datasets import FolderData, Split, detection_transform, existing_files
from examples.common.data.folder import image_files

logger = logging.getLogger(__name__)

RTTS_CLASSES = ("background", "bicycle", "bus", "car", "motorbike", "person")


def coco(root: Path, split: Split, *, size: int = 640) -> FolderData:
    """The 80 classes of COCO 2017; its validation part is the test here. Crowds are left out.

    Args:
        root: contains annotations/instances_train2017.json, train2017/ and the same for val2017.
        split: which of the two.
        size: the long side is reduced to it where it is above.

    Raises:
        ValueError: If a file is missing or is no annotations of COCO.
    """
    part = "train2017" if split == "train" else "val2017"
    index = root / "annotations" / f"instances_{part}.json"
    if not index.is_file():
        raise ValueError(f"`root` should contain {index.relative_to(root)}, found no such file in {root}.")
    boxes: dict[int, list[tuple[int, list[float]]]] = {}
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        kinds = sorted(content["categories"], key=lambda kind: int(kind["id"]))
        numbers = {int(kind["id"]): number for number, kind in enumerate(kinds, start=1)}
        for thing in content["annotations"]:
            if not thing.get("iscrowd"):
                boxes.setdefault(int(thing["image_id"]), []).append((numbers[int(thing["category_id"])], thing["bbox"]))
        images = [(root / part / image["file_name"], int(image["id"])) for image in content["images"]]
        names = ("background", *(str(kind["name"]) for kind in kinds))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{index} should be the JSON of COCO 2017's annotations, found {found}.") from error
    samples = existing_files(images, split, index)
    transform = detection_transform(split == "train", size)
    return FolderData("detection", names, samples, partial(_of_coco, boxes), transform)


def rtts(root: Path, split: Split, *, size: int = 640) -> FolderData:
    """Real hazy images with objects of five classes.

    Without a list ImageSets/Main/train.txt (or trainval.txt) all images but every fifth are for the training.

    Args:
        root: contains Annotations/ and JPEGImages/, or a folder RTTS that does.
        split: which part.
        size: the long side is reduced to it where it is above.

    Raises:
        ValueError: If there is no image with an annotation.
    """
    folder = root / "RTTS" if (root / "RTTS").is_dir() else root
    files = {path.stem: path for path in image_files(folder, "JPEGImages/*")}
    lists = folder / "ImageSets" / "Main"
    listed = [name for name in ("train.txt", "trainval.txt") if (lists / name).is_file()]
    if listed:
        file = lists / (listed[0] if split == "train" else "test.txt")
        if not file.is_file():
            raise ValueError(f"`root` should have a test.txt beside {listed[0]}, found none in {lists}.")
        chosen = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        every = sorted(files)
        logger.warning("%s has no list of training images: every fifth image is for the test, the others train", root)
        chosen = every[::5] if split == "test" else [name for n, name in enumerate(every) if n % 5]
    notes = {name: folder / "Annotations" / f"{name}.xml" for name in chosen}
    if missing := [name for name, note in notes.items() if name not in files or not note.is_file()]:
        logger.warning(
            "%d images skipped, %s first: no image or no annotation of it in %s", len(missing), missing[0], root
        )
    samples: list[tuple[Path, int | Path]] = [
        (files[name], note) for name, note in notes.items() if name in files and note.is_file()
    ]
    if not samples:
        raise ValueError(f"`root` should hold images of RTTS and their annotations, found none to {split} in {root}.")
    return FolderData("detection", RTTS_CLASSES, samples, _of_rtts, detection_transform(split == "train", size))


def _of_coco(boxes: dict[int, list[tuple[int, list[float]]]], number: int, size: tuple[int, int]) -> dict[str, Any]:
    found = boxes.get(number, [])
    return _target([[x, y, x + w, y + h] for _, (x, y, w, h) in found], [label for label, _ in found], size)


def _of_rtts(file: Path, size: tuple[int, int]) -> dict[str, Any]:
    boxes, labels = [], []
    for thing in ElementTree.parse(file).getroot().findall("object"):
        name = thing.findtext("name", "").strip()
        if name not in RTTS_CLASSES[1:]:
            raise ValueError(f"{name!r} is no class")
        boxes.append([float(thing.findtext(f"bndbox/{corner}", "nan")) for corner in ("xmin", "ymin", "xmax", "ymax")])
        labels.append(RTTS_CLASSES.index(name))
    return _target(boxes, labels, size)


def _target(boxes: list[list[float]], labels: list[int], size: tuple[int, int]) -> dict[str, Any]:
    """Boxes within the image that have an area, and their labels."""
    found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    if not bool(found.isfinite().all()):
        raise ValueError("a box is not complete")
    inside = found.clamp(min=0).minimum(torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32))
    kept = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    return {
        "boxes": tv_tensors.BoundingBoxes(inside[kept], format="XYXY", canvas_size=size),
        "labels": torch.tensor(labels, dtype=torch.int64)[kept],
    }
