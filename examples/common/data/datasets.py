"""The data sets that the papers measure on, read from disk: what is missing or damaged is named.

CUB-200-2011, Stanford Cars and PASCAL VOC 2012, unpacked as they are handed out; nothing is downloaded. All give a
:class:`FolderData`. Augmentation draws from torch's global generator: seed it for a sample, and the sample is the same.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from examples.common.data.folder import UNREADABLE, Skipped, read_image, with_degraded
from examples.common.data.tasks import IGNORED, Task

logger = logging.getLogger(__name__)

_NAMED = 20

Split = Literal["train", "test"]
VocTask = Literal["segmentation", "detection"]
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class FolderData:
    """Images read from files when they are asked for; a :class:`~examples.common.data.tasks.TaskData`.

    With :meth:`pair` each is read with its degraded image, behind its three channels.

    An image or annotation that cannot be read is named in one warning (of each worker), and its sample is None.

    Args:
        task: how the targets are read.
        class_names: by label; of detection, the first is "background".
        samples: (image, annotation), the annotation a label or a file.
        annotate: (annotation, (H, W)) -> target; raises ``ValueError`` for a damaged one.
        transform: (image, target) -> (image, target), random in training.
    """

    def __init__(
        self,
        task: Task,
        class_names: Sequence[str],
        samples: Sequence[tuple[Path, int | Path]],
        annotate: Callable[[Any, tuple[int, int]], Any],
        transform: Callable[[Any, Any], tuple[Tensor, Any]],
    ) -> None:
        self.task: Task = task
        self.class_names = tuple(class_names)
        self.samples = list(samples)
        self.annotate, self.transform = annotate, transform
        self.degraded: Mapping[Path, Path] = {}
        self._skipped = Skipped()

    def pair(self, degraded: Mapping[Path, Path]) -> None:
        """Keep the samples that have a degraded image, and read it with them."""
        self.samples = [sample for sample in self.samples if sample[0] in degraded]
        self.degraded = degraded

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Any] | None:
        path, annotation = self.samples[index]
        reading = path
        try:
            image = read_image(path)
            if self.degraded:
                reading = self.degraded[path]
                image = with_degraded(image, reading)
            reading = annotation if isinstance(annotation, Path) else path
            target = self.annotate(annotation, (image.shape[1], image.shape[2]))
        except UNREADABLE as error:
            self._skipped(reading, error)
            return None
        image, target = self.transform(tv_tensors.Image(image), target)
        return _plain(image).clamp(0, 1), target


def cub200(root: Path, split: Split, *, size: int = 224) -> FolderData:
    """Birds of 200 species: 5,994 training and 5,794 test images.

    The short side is resized to 256/224 of ``size``; of that, training sees ``size`` x ``size`` at random, flipped or
    not, and the test the middle.

    Args:
        root: contains CUB_200_2011 with images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and
            images/; or is that folder.
        split: of train_test_split.txt.
        size: of the images, in pixels.

    Raises:
        ValueError: If files are missing or do not agree; the message names the file and the line. An image that is
            listed and not there is a warning, unless none is there.
    """
    train = _is_train(split, size)
    files = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    folder = _folder(root, "CUB_200_2011", files)
    images, labels, splits, classes = (_table(folder / file) for file in files)
    for position, (label, (_, line)) in enumerate(classes.items(), start=1):
        if label != str(position):
            raise ValueError(f"{folder / 'classes.txt'}, line {line}: expected class {position}, found {label!r}.")
    for table, file in ((labels, files[1]), (splits, files[2])):
        _same_images(folder, images, "images.txt", table, file)
        _same_images(folder, table, file, images, "images.txt")
    samples: list[tuple[Path, int | Path]] = []
    for image, (name, _) in images.items():
        label, line = labels[image]
        if label not in classes:
            raise ValueError(
                f"{folder / files[1]}, line {line}: expected a class from 1 to {len(classes)}, found {label!r}."
            )
        part, line = splits[image]
        if part not in ("0", "1"):
            raise ValueError(f"{folder / files[2]}, line {line}: expected 1 (training) or 0 (test), found {part!r}.")
        if (part == "1") == train:
            samples.append((folder / "images" / name, int(label) - 1))
    names = [re.sub(r"^\d+\.", "", name).replace("_", " ") for name, _ in classes.values()]
    found = existing_files(samples, split, folder / files[2])
    return FolderData("classification", names, found, label_of, classification_transform(train, size))


def stanford_cars(root: Path, split: Split, *, size: int = 224) -> FolderData:
    """Cars of 196 models: 8,144 training and 8,041 test images, prepared as those of :func:`cub200`.

    Args:
        root: contains stanford_cars, in the layout of ``torchvision.datasets.StanfordCars``: devkit/cars_meta.mat,
            devkit/cars_train_annos.mat and cars_train/ for training, cars_test_annos_withlabels.mat and cars_test/ for
            the test; or is that folder.
        split: which of the two.
        size: of the images, in pixels.

    Raises:
        ValueError: As :func:`cub200` does; the message names the file and the annotation, counted from 1.
    """
    train = _is_train(split, size)
    index = "devkit/cars_train_annos.mat" if train else "cars_test_annos_withlabels.mat"
    folder = _folder(root, "stanford_cars", ("devkit/cars_meta.mat", index))
    names = [str(name) for name in _matlab(folder / "devkit/cars_meta.mat", "class_names")]
    annotations = _matlab(folder / index, "annotations")
    if not {"class", "fname"} <= set(annotations.dtype.names or ()):
        raise ValueError(
            f"{folder / index} should give `class` and `fname` of every image, found {annotations.dtype.names}."
        )
    samples: list[tuple[Path, int | Path]] = []
    for number, annotation in enumerate(annotations, start=1):
        label, name = annotation["class"], str(annotation["fname"])
        if np.size(label) != 1 or label not in range(1, len(names) + 1):
            place = f"{folder / index}, annotation {number} ({name})"
            raise ValueError(f"{place}: expected a class from 1 to {len(names)}, found {label}.")
        samples.append((folder / ("cars_train" if train else "cars_test") / name, int(label) - 1))
    found = existing_files(samples, split, folder / index)
    return FolderData("classification", names, found, label_of, classification_transform(train, size))


def voc2012(
    root: Path, split: Split, task: VocTask, *, size: int = 480, scales: tuple[float, float] | None = None
) -> FolderData:
    """Everyday images with objects of 20 classes; its validation part is the test here, as in the papers.

    Segmentation: the short side is resized to 520/480 of ``size``, the mask alike. The 1,464 training images are
    cropped to ``size`` x ``size`` at random, flipped or not; the 1,449 test images stay whole and so differ in size:
    read them in batches of one.

    Detection, 5,717 training images: the long side is reduced to ``size`` where it is above, flipped or not, without
    the boxes marked difficult. 5,823 test images: the same without flip and with all boxes.

    No image of VOC has a side above 500 pixels. Boxes run from the left edge of the first pixel, 0, to the right edge
    of the last; those without an area in the image are left out. An image that has none left has boxes (0, 4).

    Args:
        root: contains VOCdevkit/VOC2012 with ImageSets/Segmentation or ImageSets/Main, JPEGImages and SegmentationClass
            or Annotations; or is one of these two folders.
        split: train.txt or val.txt.
        task: masks or boxes.
        size: in pixels, as above.
        scales: for segmentation, lowest and highest factor of a random scale, in the place of the resizing: training
            images are fitted into ``size`` x ``size`` times such a factor and cropped, what is missing is ignored; test
            images keep their size. EDTR has (0.5, 2) and 512.

    Raises:
        ValueError: As :func:`cub200` does. A mask or annotation that is listed and not there is a warning too.
    """
    train = _is_train(split, size)
    if task not in get_args(VocTask):
        raise ValueError(f"`task` should be 'segmentation' or 'detection', found {task!r}.")
    part, target_folder, ending = (
        ("Segmentation", "SegmentationClass", ".png") if task == "segmentation" else ("Main", "Annotations", ".xml")
    )
    index = f"ImageSets/{part}/{'train' if train else 'val'}.txt"
    folder = _folder(root, "VOCdevkit/VOC2012", (index,))
    samples: list[tuple[Path, int | Path]] = [
        (folder / "JPEGImages" / f"{name}.jpg", folder / target_folder / f"{name}{ending}")
        for name in _table(folder / index, values=False)
    ]
    found = existing_files(samples, split, folder / index)
    if task == "segmentation":
        return FolderData(task, VOC_CLASSES, found, _mask, segmentation_transform(train, size, scales))
    annotate = partial(_boxes, difficult=not train)
    return FolderData(task, VOC_CLASSES, found, annotate, detection_transform(train, size))


def _is_train(split: str, size: int) -> bool:
    if split not in get_args(Split):
        raise ValueError(f"`split` should be 'train' or 'test', found {split!r}.")
    if size < 1:
        raise ValueError(f"`size` should be at least 1, found {size}.")
    return split == "train"


def _folder(root: Path, name: str, files: Sequence[str]) -> Path:
    """The folder called ``name`` in ``root``, or ``root`` itself, with ``files`` in it."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"`root` should be the folder that contains {name}, found no folder {root}.")
    parts = Path(name).parts
    folder = next(path for i in range(len(parts) + 1) if (path := root.joinpath(*parts[i:])).is_dir())
    for file in files:
        if not (folder / file).is_file():
            above = [path for wanted in (folder / file, root / name / file) for path in wanted.parents if path.is_dir()]
            nearest = max(above, key=lambda path: len(path.parts))
            inside = sorted(path.name for path in nearest.iterdir())
            found = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
            raise ValueError(
                f"`root` should contain {name}/{file}, found no such file; in {nearest} there is {found or 'nothing'}."
            )
    return folder


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} should be text in UTF-8, found {error}.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def _table(file: Path, *, values: bool = True) -> dict[str, tuple[str, int]]:
    """Lines of a key and a value, or of a key without ``values``, as key -> (value, number of the line)."""
    table: dict[str, tuple[str, int]] = {}
    for number, line in _lines(file):
        key, *rest = line.split(maxsplit=1)
        if len(rest) != values:
            wanted = "two words" if values else "one word"
            raise ValueError(f"{file}, line {number}: expected {wanted}, found {line!r}.")
        if key in table:
            raise ValueError(f"{file}, line {number}: {key} is in line {table[key][1]} already.")
        table[key] = (rest[0] if rest else "", number)
    return table


def _same_images(
    folder: Path, table: dict[str, tuple[str, int]], file: str, other: dict[str, tuple[str, int]], other_file: str
) -> None:
    for image, (_, line) in table.items():
        if image not in other:
            raise ValueError(f"{folder / file}, line {line}: image {image} is not in {other_file}.")


def _matlab(file: Path, name: str) -> Any:
    """The array called ``name`` in a MATLAB file."""
    from scipy.io import loadmat

    try:
        content = loadmat(file, squeeze_me=True)
    except Exception as error:  # damage shows as any of a dozen exceptions
        raise ValueError(f"{file} should be a MATLAB file that scipy reads, found {error!r}.") from error
    if name not in content:
        found = sorted(key for key in content if not key.startswith("__"))
        raise ValueError(f"{file} should contain `{name}`, found {found}.")
    return np.atleast_1d(content[name])


def existing_files(
    samples: Sequence[tuple[Path, int | Path]], split: str, index: Path
) -> list[tuple[Path, int | Path]]:
    """The samples whose files are there, after warnings that name the first files that are not and count the others."""
    if not samples:
        raise ValueError(f"{index} should list images to {split} with, found none.")
    missing = {
        number: [path for path in sample if isinstance(path, Path) and not path.is_file()]
        for number, sample in enumerate(samples)
    }
    if all(missing.values()):
        raise ValueError(
            f"`root` should contain the files of the {len(samples)} samples that {index} lists, found those of none; "
            f"the first one missing is {missing[0][0]}."
        )
    absent = [path for paths in missing.values() for path in paths]
    for path in absent[:_NAMED]:
        logger.warning("%s skipped: listed in %s, not on the disk", path, index.name)
    if len(absent) > _NAMED:
        logger.warning("%d more files skipped: listed in %s, not on the disk", len(absent) - _NAMED, index.name)
    return [sample for number, sample in enumerate(samples) if not missing[number]]


def label_of(label: int, _: tuple[int, int]) -> Tensor:
    return torch.tensor(label)


def _mask(file: Path, size: tuple[int, int]) -> Any:
    with Image.open(file) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"a mask should be a palette or gray image, found mode {image.mode}")
        values = np.array(image)
    if values.shape != size:
        raise ValueError(f"{values.shape[1]}x{values.shape[0]} pixels, its image has {size[1]}x{size[0]}")
    strange = np.unique(values[(values >= len(VOC_CLASSES)) & (values != IGNORED)])
    if strange.size:
        raise ValueError(f"labels {strange.tolist()} are no classes")
    return tv_tensors.Mask(torch.from_numpy(values))


def _boxes(file: Path, size: tuple[int, int], *, difficult: bool) -> dict[str, Any]:
    """Boxes and labels; those marked difficult if ``difficult``."""
    root = ElementTree.parse(file).getroot()
    if root.tag != "annotation":
        raise ValueError(f"expected <annotation>, found <{root.tag}>")
    stated = tuple(int(root.findtext(f"size/{side}", "0")) for side in ("height", "width"))
    if all(stated) and stated != size:
        raise ValueError(f"{stated[1]}x{stated[0]} pixels, its image has {size[1]}x{size[0]}")
    boxes, labels = [], []
    for thing in root.findall("object"):
        name = thing.findtext("name", "").strip()
        if name not in VOC_CLASSES[1:]:
            raise ValueError(f"{name!r} is no class")
        first_x, first_y, last_x, last_y = (
            float(thing.findtext(f"bndbox/{corner}", "nan")) for corner in ("xmin", "ymin", "xmax", "ymax")
        )
        box = (first_x - 1, first_y - 1, last_x, last_y)  # VOC counts pixels from 1
        if not all(math.isfinite(side) for side in box):
            raise ValueError(f"the {name} in it has no complete box")
        if difficult or int(thing.findtext("difficult", "0")) == 0:
            boxes.append(box)
            labels.append(VOC_CLASSES.index(name))
    inside = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4).clamp(min=0)
    inside = inside.minimum(torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32))
    kept = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    return {
        "boxes": tv_tensors.BoundingBoxes(inside[kept], format="XYXY", canvas_size=size),
        "labels": torch.tensor(labels, dtype=torch.int64)[kept],
    }


def classification_transform(train: bool, size: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The short side at 256/224 of ``size``, of that a square of ``size`` at random, flipped or not, or the middle."""
    steps = [v2.RandomCrop(size), v2.RandomHorizontalFlip()] if train else [v2.CenterCrop(size)]
    return partial(_of_image, v2.Compose([v2.Resize(round(size * 256 / 224)), *steps]))


def _of_image(transform: Callable[[Any], Any], image: Any, target: Any) -> tuple[Any, Any]:
    return transform(image), target


def segmentation_transform(
    train: bool, size: int, scales: tuple[float, float] | None = None
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The short side at 520/480 of ``size``, in training cropped and flipped or not; with ``scales`` as
    :func:`voc2012` says.
    """
    if scales is not None:
        crop = v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORED})
        jitter = v2.ScaleJitter((size, size), scale_range=scales)
        return partial(_of_mask, v2.Compose([jitter, crop, v2.RandomHorizontalFlip()]) if train else v2.Identity())
    steps = [v2.RandomCrop(size), v2.RandomHorizontalFlip()] if train else []
    return partial(_of_mask, v2.Compose([v2.Resize(round(size * 520 / 480)), *steps]))


def _of_mask(transform: Callable[[Any, Any], tuple[Any, Any]], image: Any, mask: Any) -> tuple[Any, Tensor]:
    image, mask = transform(image, mask)
    return image, _plain(mask).long()


def detection_transform(train: bool, size: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The long side at most ``size``; in training flipped or not."""
    return partial(_detection, train=train, size=size)


def _detection(image: Any, target: dict[str, Any], *, train: bool, size: int) -> tuple[Any, dict[str, Tensor]]:
    image, boxes = _at_most(size, image, target["boxes"])
    if train:
        image, boxes = v2.RandomHorizontalFlip()(image, boxes)
    return image, {"boxes": _plain(boxes), "labels": target["labels"]}


def _at_most(size: int, image: Any, other: Any) -> tuple[Any, Any]:
    """An image, and what belongs to it, made smaller where its long side is above ``size``."""
    sides = image.shape[-2:]
    if max(sides) <= size:
        return image, other
    smaller = [max(1, round(side * size / max(sides))) for side in sides]
    return v2.functional.resize(image, smaller), v2.functional.resize(other, smaller)


def _plain(value: Any) -> Tensor:
    tensor: Tensor = value.as_subclass(Tensor)
    return tensor
