"""Miniatures of the data sets of the papers, in the layouts that they are handed out in."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from examples.common.data.datasets import FolderData, cub200, stanford_cars, voc2012

RED, BLUE = (255, 0, 0), (30, 60, 200)
Box = tuple[int, int, int, int]
HALF: Box = (0, 0, 20, 30)


def draw(path: Path, size: tuple[int, int] = (40, 30), box: Box = HALF, mode: str = "RGB") -> None:
    """A blue image of (width, height) with a red box, its sides between pixels."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, box)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path, quality=100, **({} if mode == "L" else {"subsampling": 0}))


def red(image: Tensor) -> Tensor:
    return (image[0] > 0.5) & (image[2] < 0.4)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_cub(root: Path) -> Path:
    """Three training and two test images of three classes."""
    folder = root / "CUB_200_2011"
    names = ["001.Red_legged_Gull/a.jpg", "002.Crow/b.jpg", "002.Crow/c.jpg", "003.Wren/d.jpg", "003.Wren/e.jpg"]
    for name in names:
        draw(folder / "images" / name)
    write(folder / "classes.txt", "1 001.Red_legged_Gull", "2 002.Crow", "3 003.Wren")
    write(folder / "images.txt", *(f"{number} {name}" for number, name in enumerate(names, 1)))
    write(folder / "image_class_labels.txt", "1 1", "2 2", "3 2", "4 3", "5 3")
    write(folder / "train_test_split.txt", "1 1", "2 1", "3 0", "4 1", "5 0")
    return folder


def annotations(*rows: tuple[str, float], fields: Sequence[str] = ("fname", "class")) -> dict[str, Any]:
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for number, (name, label) in enumerate(rows):
        for field, value in (("fname", name), ("class", label), ("bbox_x1", 1)):
            if field in fields:
                array[field][0, number] = value
    return {"annotations": array}


def make_cars(root: Path) -> Path:
    """Three training images and one test image of two classes."""
    folder = root / "stanford_cars"
    for name in ("cars_train/00001.jpg", "cars_train/00002.jpg", "cars_train/00003.jpg", "cars_test/00001.jpg"):
        draw(folder / name)
    (folder / "devkit").mkdir()
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Audi S4"], dtype=object)})
    rows = [("00001.jpg", 2), ("00002.jpg", 1), ("00003.jpg", 2)]
    savemat(folder / "devkit/cars_train_annos.mat", annotations(*rows, fields=("bbox_x1", "fname", "class")))
    savemat(folder / "cars_test_annos_withlabels.mat", annotations(("00001.jpg", 1)))
    return folder


def thing(name: str, box: Sequence[float | str], difficult: str = "<difficult>0</difficult>") -> str:
    """An object as VOC notes it: the first and the last pixel, counted from 1."""
    corners = "".join(
        f"<{corner}>{value}</{corner}>" for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name>{part}<bndbox>{corners}</bndbox>{difficult}</object>"


def note(path: Path, *things: str, size: tuple[int, int] = (40, 30)) -> None:
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    write(path, f"<annotation>{stated}{''.join(things)}</annotation>")


def make_mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(values.astype(np.uint8), mode="L").convert("P")
    mask.putdata(values.flatten().tolist())
    mask.putpalette([(37 * i) % 256 for i in range(768)])
    mask.save(path)


def filled(box: Box, label: int, size: tuple[int, int] = (40, 30)) -> np.ndarray:
    values = np.zeros(size[::-1], dtype=np.uint8)
    values[box[1] : box[3], box[0] : box[2]] = label
    return values


SMALL: Box = (6, 10, 16, 25)


def make_voc(root: Path) -> Path:
    """Three training and two test images; in "a" and "v" a bird is the red box from (6, 10) to (16, 25)."""
    folder = root / "VOCdevkit" / "VOC2012"
    for part in ("Main", "Segmentation"):
        write(folder / f"ImageSets/{part}/train.txt", "a", "b", "c")
        write(folder / f"ImageSets/{part}/val.txt", "v", "w")
    for name in ("a", "b", "c", "v", "w"):
        draw(folder / f"JPEGImages/{name}.jpg", box=SMALL)
        make_mask(folder / f"SegmentationClass/{name}.png", filled(SMALL, 3))
        note(folder / f"Annotations/{name}.xml", thing("bird", (7, 11, 16, 25)))
    return folder


MAKE: dict[str, tuple[Callable[[Path], Path], Callable[..., FolderData], dict[str, Any]]] = {
    "cub": (make_cub, cub200, {"size": 32}),
    "cars": (make_cars, stanford_cars, {"size": 32}),
    "segmentation": (make_voc, voc2012, {"size": 32, "task": "segmentation"}),
    "detection": (make_voc, voc2012, {"size": 32, "task": "detection"}),
}


def drawn(data: FolderData, index: int, seed: int) -> tuple[Tensor, Any]:
    torch.manual_seed(seed)
    sample = data[index]
    assert sample is not None
    return sample


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one.dtype == other.dtype and torch.equal(one, other)


def plain(value: Any) -> bool:
    return all(map(plain, value.values())) if isinstance(value, dict) else type(value) is Tensor
