"""Data sets on the disk, in miniature: layouts, augmentation, and everything that can be wrong with the files."""

import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from examples.common.data.datasets import VOC_CLASSES, FolderData, cub200, stanford_cars, voc2012
from examples.common.data.folder import read_picture
from examples.common.data.task_data import datasets
from examples.common.data.tasks import IGNORED, collate
from examples.common.engine.batches import Batches, loader
from examples.common.engine.recognition import Recognition
from examples.sr4ir.config import Config

RED, BLUE = (255, 0, 0), (30, 60, 200)
Box = tuple[int, int, int, int]
HALF: Box = (0, 0, 20, 30)


def draw(path: Path, size: tuple[int, int] = (40, 30), box: Box = HALF, mode: str = "RGB") -> None:
    """A blue picture of (width, height) with a red box, its sides between pixels."""
    picture = Image.new("RGB", size, BLUE)
    picture.paste(RED, box)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.convert(mode).save(path, quality=100, **({} if mode == "L" else {"subsampling": 0}))


def red(image: Tensor) -> Tensor:
    return (image[0] > 0.5) & (image[2] < 0.4)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_cub(root: Path) -> Path:
    """Three training and two test pictures of three classes."""
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
    """Three training pictures and one test picture of two classes."""
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
    """Three training and two test pictures; in "a" and "v" a bird is the red box from (6, 10) to (16, 25)."""
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


@pytest.fixture(params=MAKE)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Callable[..., FolderData]]:
    """(root, its folder, the loader) of each data set."""
    make, load, options = MAKE[request.param]
    return tmp_path, make(tmp_path), lambda root, split="train": load(root, split, **options)


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


# layouts


def test_cub_as_its_files_say(tmp_path: Path) -> None:
    folder = make_cub(tmp_path)
    train, test = cub200(tmp_path, "train", size=32), cub200(folder, "test", size=32)
    assert train.task == "classification"
    assert train.class_names == test.class_names == ("Red legged Gull", "Crow", "Wren")
    assert [int(train[i][1]) for i in range(len(train))] == [0, 1, 2]
    assert [int(test[i][1]) for i in range(len(test))] == [1, 2]
    assert [path.name for path, _ in train.samples + test.samples] == ["a.jpg", "b.jpg", "d.jpg", "c.jpg", "e.jpg"]
    assert train[0][1].dtype == torch.int64 and train[0][1].shape == ()
    assert cub200(tmp_path, "test")[0][0].shape == (3, 224, 224)
    write(folder / "train_test_split.txt", "5 0", "", "4 1", "3 0", "1 1", "  2 1  ")  # in any order
    assert [path.name for path, _ in cub200(tmp_path, "train").samples] == ["a.jpg", "b.jpg", "d.jpg"]


def test_cars_as_their_files_say(tmp_path: Path) -> None:
    folder = make_cars(tmp_path)
    train, test = stanford_cars(tmp_path, "train", size=32), stanford_cars(folder, "test", size=32)
    assert train.task == "classification"
    assert train.class_names == test.class_names == ("AM General Hummer", "Audi S4")
    assert [int(train[i][1]) for i in range(len(train))] == [1, 0, 1]
    assert [int(test[i][1]) for i in range(len(test))] == [0]
    assert [str(path.relative_to(folder)) for path, _ in train.samples[:1] + test.samples] == [
        "cars_train/00001.jpg",
        "cars_test/00001.jpg",
    ]
    assert stanford_cars(tmp_path, "train")[0][0].shape == (3, 224, 224)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_voc_as_its_files_say(task: Any, tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    write(folder / f"ImageSets/{'Main' if task == 'segmentation' else 'Segmentation'}/train.txt", "z")  # the other task
    for root in (tmp_path, tmp_path / "VOCdevkit", folder):
        train, test = voc2012(root, "train", task), voc2012(root, "test", task)
        assert [path.stem for path, _ in train.samples] == ["a", "b", "c"]
        assert [path.stem for path, _ in test.samples] == ["v", "w"]
    assert train.task == task
    assert len(train.class_names) == 21 and train.class_names[0] == "background" and train.class_names[3] == "bird"
    assert list(train.class_names[1:]) == sorted(train.class_names[1:])


def test_every_sample_is_of_its_task(layout: Any) -> None:
    root, _, load = layout
    for split in ("train", "test"):
        data = load(root, split)
        for index in range(len(data)):
            image, target = drawn(data, index, 0)
            assert image.dtype == torch.float32 and image.ndim == 3 and image.shape[0] == 3
            assert image.min() >= 0 and image.max() <= 1
            assert plain(image) and plain(target)
        batch = collate([data[0]])
        Recognition(data.task, data.class_names).check(batch[1])
        with pytest.raises(IndexError):
            data[len(data)]


def test_the_recipe_reads_them(layout: Any, request: pytest.FixtureRequest) -> None:
    root, _, load = layout
    name = request.node.callspec.params["layout"]
    data = {"cub": "cub200", "cars": "cars"}.get(name, "voc2012")
    task = name if data == "voc2012" else "classification"
    train, test = datasets(Config(out=Path(), data=data, task=task, root=root, size=32), 1)
    for split, found in (("train", train), ("test", test)):
        image, target = drawn(load(root, split), 0, 5)
        found_image, found_target = drawn(found, 0, 5)
        assert torch.equal(image, found_image) and same(target, found_target)


# augmentation


def test_the_seed_alone_decides_a_training_sample(layout: Any) -> None:
    root, _, load = layout
    data = load(root)
    again = pickle.loads(pickle.dumps(data))
    seen = set()
    for seed in range(12):
        (image, target), (same_image, same_target) = drawn(data, 0, seed), drawn(again, 0, seed)
        assert torch.equal(image, same_image) and same(target, same_target)
        seen.add(image.numpy().tobytes())
    assert len(seen) == 2 if data.task == "detection" else len(seen) > 8
    test = load(root, "test")
    (image, target), (other, other_target) = drawn(test, 0, 1), drawn(test, 0, 2)
    assert torch.equal(image, other) and same(target, other_target)
    state = torch.get_rng_state()
    test[0]
    assert torch.equal(state, torch.get_rng_state())


def test_workers_read_the_same_batches(tmp_path: Path) -> None:
    make_voc(tmp_path)
    data = voc2012(tmp_path, "train", "segmentation", size=32)
    batches = [list(loader(data, Batches(3, 3, seed=4, first=0, last=3), workers=workers)) for workers in (0, 1)]
    for (images, masks), (same_images, same_masks) in zip(*batches, strict=True):
        assert images.shape == (3, 3, 32, 32) and torch.equal(images, same_images) and torch.equal(masks, same_masks)


def noise(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture of (width, height) in which every part is another, as it is read back."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=100)
    return read_picture(path)


def place(image: Tensor, whole: Tensor) -> tuple[int, int, bool]:
    """Where the image was cut from: top, left, and whether it was flipped; from exactly one place."""
    (height, width), found = image.shape[-2:], []
    for top in range(whole.shape[-2] - height + 1):
        for left in range(whole.shape[-1] - width + 1):
            part = whole[..., top : top + height, left : left + width]
            for flip in (False, True):
                if torch.allclose(image, part.flip(-1) if flip else part, atol=1e-5):
                    found.append((top, left, flip))
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", ["cub", "cars"])
def test_training_pictures_are_cut_and_flipped(name: str, tmp_path: Path) -> None:
    make, load, _ = MAKE[name]
    make(tmp_path)
    data = load(tmp_path, "train", size=21)  # the short side becomes 24
    picture = noise(data.samples[0][0], (60, 40))
    whole = F.interpolate(picture[None], (24, 36), mode="bilinear", antialias=True)[0].clamp(0, 1)
    places = [place(drawn(data, 0, seed)[0], whole) for seed in range(150)]
    tops, lefts, flips = (set(values) for values in zip(*places, strict=True))
    assert tops == set(range(4)) and lefts == set(range(16)) and flips == {True, False}


@pytest.mark.parametrize(("name", "index"), [("cub", 0), ("cars", 0)])
def test_test_pictures_are_the_middle(name: str, index: int, tmp_path: Path) -> None:
    make, load, _ = MAKE[name]
    make(tmp_path)
    data = load(tmp_path, "test", size=21)  # the short side becomes 24
    path, _ = data.samples[index]
    draw(path, size=(60, 40), box=(20, 10, 45, 25))
    whole = F.interpolate(read_picture(path)[None], (24, 36), mode="bilinear", antialias=True)[0]
    top, left = 2, 8  # round(1.5), round(7.5)
    image, _ = drawn(data, index, 0)
    torch.testing.assert_close(image, whole[:, top : top + 21, left : left + 21], atol=1e-6, rtol=0)


def test_masks_move_with_their_pictures(tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    picture = noise(folder / "JPEGImages/a.jpg", (48, 28))
    values = np.random.default_rng(1).choice([*range(21), IGNORED], (28, 48))
    make_mask(folder / "SegmentationClass/a.png", values)
    data = voc2012(tmp_path, "train", "segmentation", size=24)  # the short side becomes 26
    whole = F.interpolate(picture[None], (26, 44), mode="bilinear", antialias=True)[0].clamp(0, 1)
    labels = F.interpolate(torch.from_numpy(values).float()[None, None], (26, 44), mode="nearest")[0, 0]
    places = []
    for seed in range(150):
        image, mask = drawn(data, 0, seed)
        assert image.shape == (3, 24, 24) and mask.dtype == torch.int64
        places.append(place(image, whole))
        assert place(mask.float(), labels) == places[-1]
    tops, lefts, flips = (set(values) for values in zip(*places, strict=True))
    assert tops == set(range(3)) and lefts == set(range(21)) and flips == {True, False}


@pytest.mark.parametrize(("size", "shape"), [((40, 30), (26, 34)), ((30, 41), (35, 26)), ((20, 13), (26, 40))])
def test_test_masks_stay_whole(size: tuple[int, int], shape: tuple[int, int], tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    draw(folder / "JPEGImages/v.jpg", size=size)
    values = filled(SMALL, 20, size=size)
    values[9] = IGNORED  # VOC's border
    make_mask(folder / "SegmentationClass/v.png", values)
    image, mask = drawn(voc2012(tmp_path, "test", "segmentation", size=24), 0, 0)  # the short side becomes 26
    whole = read_picture(folder / "JPEGImages/v.jpg")[None]
    torch.testing.assert_close(image, F.interpolate(whole, shape, mode="bilinear", antialias=True)[0])
    labels = F.interpolate(torch.from_numpy(values).float()[None, None], shape, mode="nearest")[0, 0]
    assert mask.dtype == torch.int64 and torch.equal(mask, labels.long())


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [480, 40, 20])
def test_boxes_move_with_their_pictures(split: Any, size: int, tmp_path: Path) -> None:
    make_voc(tmp_path)
    data = voc2012(tmp_path, split, "detection", size=size)
    scale = min(1, size / 40)
    seen = set()
    for seed in range(12):
        image, target = drawn(data, 0, seed)
        assert image.shape == (3, 30 * scale, 40 * scale)
        assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
        assert target["labels"].tolist() == [3]
        left, top, right, bottom = target["boxes"][0].tolist()
        seen.add(left)
        assert (top, bottom) == (10 * scale, 25 * scale)
        inside = red(image)[int(top + 0.5) : int(bottom), int(left) : int(right)]
        assert inside.all()
        assert abs(int(red(image).sum()) - 10 * 15 * scale**2) <= 10 * scale
    straight, flipped = 6 * scale, (40 - 16) * scale
    assert seen == ({straight, flipped} if split == "train" else {straight})


def test_difficult_boxes_are_left_out_in_training_only(tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    things = [
        thing("car", (1, 1, 10, 10), "<difficult>1</difficult>"),
        thing("cat", (1.5, 1, 20, 20), ""),
        thing("dog", (5, 5, 30, 30)),
    ]
    for name in ("a", "v"):
        note(folder / f"Annotations/{name}.xml", *things)
    labels = {}
    for split in ("train", "test"):
        _, target = drawn(voc2012(tmp_path, split, "detection"), 0, 0)
        assert len(target["boxes"]) == len(target["labels"])
        labels[split] = [VOC_CLASSES[label] for label in target["labels"]]
    assert labels == {"train": ["cat", "dog"], "test": ["car", "cat", "dog"]}
    assert target["boxes"].tolist() == [[0, 0, 10, 10], [0.5, 0, 20, 20], [4, 4, 30, 30]]


def test_boxes_without_an_area_are_left_out(tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    things = [
        thing("car", (10, 5, 8, 20)),
        thing("cat", (10, 25, 20, 5)),
        thing("dog", (41, 1, 60, 20)),
        thing("sheep", (1, -9, 20, 0)),
        thing("cow", (7, 7, 7, 7)),
        thing("horse", (30, 20, 90, 90)),
        thing("train", (-3, 0, 10, 10)),
    ]
    note(folder / "Annotations/v.xml", *things)
    _, target = drawn(voc2012(tmp_path, "test", "detection"), 0, 0)
    assert [VOC_CLASSES[label] for label in target["labels"]] == ["cow", "horse", "train"]
    assert target["boxes"].tolist() == [[6, 6, 7, 7], [29, 19, 40, 30], [0, 0, 10, 10]]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("things", [[], [thing("car", (10, 5, 8, 20))]])
def test_a_picture_without_a_box_has_none(split: Any, things: list[str], tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    for name in ("a", "v"):
        note(folder / f"Annotations/{name}.xml", *things)
    data = voc2012(tmp_path, split, "detection", size=20)
    for seed in range(4):
        image, target = drawn(data, 0, seed)
        assert image.shape == (3, 15, 20)
        assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
        assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
    Recognition("detection", data.class_names).check([target])


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_pictures_of_other_colours(mode: str, layout: Any) -> None:
    root, _, load = layout
    for split in ("train", "test"):
        data = load(root, split)
        draw(data.samples[0][0], mode=mode)
        image, _ = drawn(data, 0, 0)
        assert image.shape[0] == 3
        assert image.min() >= 0 and image.max() <= 1
        assert torch.equal(image[0], image[1]) == (mode == "L")


def test_white_stays_white(tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    Image.new("RGB", (40, 30), "white").save(folder / "JPEGImages/a.jpg")
    data = voc2012(tmp_path, "train", "segmentation", size=48)
    for seed in range(20):
        image, _ = drawn(data, 0, seed)
        assert image.max() <= 1 and image.min() > 0.999


def test_batches(layout: Any) -> None:
    root, _, load = layout
    data = load(root)
    images, targets = collate([data[0], None, data[1]])
    assert len(images) == len(targets) == 2
    if data.task == "detection":
        assert isinstance(images, list) and isinstance(targets, list)
    else:
        assert images.shape == (2, 3, 32, 32)
        assert targets.shape == ((2, 32, 32) if data.task == "segmentation" else (2,))
    Recognition(data.task, data.class_names).check(targets)
    assert collate([None, None]) is None


# what can be wrong with the files


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_picture_is_named_once_and_none(damage: str, layout: Any, caplog: pytest.LogCaptureFixture) -> None:
    root, _, load = layout
    data = load(root)
    path = data.samples[1][0]
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    data = load(root)
    assert not caplog.records
    for _ in range(2):
        assert [data[index] is None for index in range(3)] == [False, True, False]
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith(f"{path} skipped: ")
    assert warnings(caplog)[0].count(path.name) == 1
    images, _ = collate([data[index] for index in range(3)])
    assert len(images) == 2


DAMAGED_ANNOTATIONS = {
    "no tag closed": ("<annotation><object>", "no element found|mismatched"),
    "empty": ("", "no element found"),
    "unknown encoding": ("<?xml version='1.0' encoding='none'?><annotation/>", "unknown encoding"),
    "something else": ("<html></html>", "<html>"),
    "unknown class": (f"<annotation>{thing('unicorn', (1, 1, 5, 5))}</annotation>", "'unicorn' is no class"),
    "background": (f"<annotation>{thing('background', (1, 1, 5, 5))}</annotation>", "'background' is no class"),
    "words for numbers": (f"<annotation>{thing('cat', (1, 'one', 5, 5))}</annotation>", "one"),
    "not a number": (f"<annotation>{thing('cat', (1, 'nan', 5, 5))}</annotation>", "the cat in it has no complete box"),
    "no box": ("<annotation><object><name>cat</name></object></annotation>", "the cat in it has no complete box"),
    "another size": ("<annotation><size><width>30</width><height>40</height></size></annotation>", "30x40 .* 40x30"),
}


@pytest.mark.parametrize("damage", DAMAGED_ANNOTATIONS)
def test_a_damaged_annotation_is_named_once_and_none(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, message = DAMAGED_ANNOTATIONS[damage]
    file = make_voc(tmp_path) / "Annotations/b.xml"
    file.write_text(text)
    data = voc2012(tmp_path, "train", "detection")
    for _ in range(2):
        assert [data[index] is None for index in range(3)] == [False, True, False]
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{file} skipped: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(warning)


@pytest.mark.parametrize("damage", ["another size", "no class", "colours", "truncated", "text"])
def test_a_damaged_mask_is_named_once_and_none(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = make_voc(tmp_path) / "SegmentationClass/b.png"
    if damage == "another size":
        make_mask(file, filled(SMALL, 3, size=(30, 40)))
    elif damage == "no class":
        make_mask(file, filled(SMALL, 21))
    elif damage == "colours":
        Image.new("RGB", (40, 30)).save(file)
    else:
        file.write_bytes(file.read_bytes()[:200] if damage == "truncated" else b"hello")
    data = voc2012(tmp_path, "train", "segmentation", size=32)
    for _ in range(2):
        assert [data[index] is None for index in range(3)] == [False, True, False]
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{file} skipped: ")
    wanted = {"another size": "30x40 pixels, its picture has 40x30", "no class": "[21]", "colours": "mode RGB"}
    assert wanted.get(damage, "") in warning


def test_a_grey_mask_is_a_mask(tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    Image.fromarray(filled(SMALL, 5)).save(folder / "SegmentationClass/v.png")
    _, mask = drawn(voc2012(tmp_path, "test", "segmentation", size=28), 0, 0)
    assert torch.equal(mask, torch.from_numpy(filled(SMALL, 5)).long())


def test_missing_files_are_named_and_left_out(layout: Any, caplog: pytest.LogCaptureFixture) -> None:
    root, _, load = layout
    samples = load(root).samples
    missing = [path for path in samples[1] if isinstance(path, Path)]
    for path in missing:
        path.unlink()
    data = load(root)
    assert data.samples == [samples[0], samples[2]]
    assert len(warnings(caplog)) == len(missing)
    for path, warning in zip(missing, warnings(caplog), strict=True):
        assert warning.startswith(f"{path} skipped: listed in ")
    if len(missing) == 2:  # the target alone
        samples[0][1].unlink()
        assert load(root).samples == [samples[2]]
    caplog.clear()
    load(root, "test")
    assert not caplog.records
    for path, _ in data.samples:
        path.unlink()
    caplog.clear()
    with pytest.raises(ValueError, match=r"found those of none; the first one missing is .*\.jpg"):
        load(root)
    assert not caplog.records


def test_a_root_that_is_not_there_or_empty(layout: Any, tmp_path: Path) -> None:
    _, folder, load = layout
    with pytest.raises(
        ValueError, match=rf"`root` should be the folder that contains .*{folder.name}, found no folder"
    ):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"should contain .*{folder.name}/.*empty there is nothing"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "file", "split"),
    [
        *(("cub", f"{file}.txt", "test") for file in ("images", "image_class_labels", "train_test_split", "classes")),
        ("cars", "devkit/cars_meta.mat", "train"),
        ("cars", "devkit/cars_meta.mat", "test"),
        ("cars", "devkit/cars_train_annos.mat", "train"),
        ("cars", "cars_test_annos_withlabels.mat", "test"),
        ("segmentation", "ImageSets/Segmentation/train.txt", "train"),
        ("segmentation", "ImageSets/Segmentation/val.txt", "test"),
        ("detection", "ImageSets/Main/train.txt", "train"),
        ("detection", "ImageSets/Main/val.txt", "test"),
    ],
)
def test_a_missing_index_is_named(name: str, file: str, split: str, tmp_path: Path) -> None:
    make, load, options = MAKE[name]
    folder = make(tmp_path)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=rf"`root` should contain {folder.relative_to(tmp_path)}/{file}") as error:
        load(tmp_path, split, **options)
    there = (folder / file).parent
    assert f"in {there} there is " in str(error.value)
    assert sorted(path.name for path in there.iterdir())[0] in str(error.value)


def test_another_year_is_seen(tmp_path: Path) -> None:
    make_voc(tmp_path).rename(tmp_path / "VOCdevkit" / "VOC2007")
    with pytest.raises(ValueError, match=r"VOCdevkit there is VOC2007\."):
        voc2012(tmp_path, "train", "detection")


BAD_CUB = [
    ("images.txt", "6 003.Wren/f.jpg", "images.txt, line 6: image 6 is not in image_class_labels.txt"),
    ("image_class_labels.txt", "7 1", "image_class_labels.txt, line 6: image 7 is not in images.txt"),
    ("train_test_split.txt", "8 1", "train_test_split.txt, line 6: image 8 is not in images.txt"),
    ("images.txt", "2 003.Wren/f.jpg", "images.txt, line 6: 2 is in line 2 already"),
    ("images.txt", "lonely", "images.txt, line 6: expected two words, found 'lonely'"),
    ("classes.txt", "5 005.Owl", "classes.txt, line 4: expected class 4, found '5'"),
]


@pytest.mark.parametrize(("file", "line", "message"), BAD_CUB)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_line_too_much_is_named(file: str, line: str, message: str, split: Any, tmp_path: Path) -> None:
    path = make_cub(tmp_path) / file
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        cub200(tmp_path, split)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("image_class_labels.txt", "3 2\n", "", "images.txt, line 3: image 3 is not in image_class_labels.txt"),
        ("train_test_split.txt", "3 0\n", "", "images.txt, line 3: image 3 is not in train_test_split.txt"),
        ("image_class_labels.txt", "3 2", "3 4", "line 3: expected a class from 1 to 3, found '4'"),
        ("image_class_labels.txt", "3 2", "3 0", "line 3: expected a class from 1 to 3, found '0'"),
        ("image_class_labels.txt", "3 2", "3 Crow", "line 3: expected a class from 1 to 3, found 'Crow'"),
        ("classes.txt", "3 003.Wren\n", "", "image_class_labels.txt, line 4: expected a class from 1 to 2, found '3'"),
        ("train_test_split.txt", "3 0", "3 2", r"line 3: expected 1 \(training\) or 0 \(test\), found '2'"),
        ("train_test_split.txt", " 1\n", " 0\n", "train_test_split.txt should list pictures to train with, found none"),
    ],
)
def test_cub_lines_that_do_not_agree(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    path = make_cub(tmp_path) / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        cub200(tmp_path, "train")


def test_an_index_that_is_no_text(tmp_path: Path) -> None:
    (make_cub(tmp_path) / "images.txt").write_bytes(b"1 \xff\xfe")
    with pytest.raises(ValueError, match=r"images.txt should be text in UTF-8"):
        cub200(tmp_path, "train")


@pytest.mark.parametrize("label", [0, 3, 1.5, "Audi S4", np.array([1, 2]), np.array([])])
def test_a_car_outside_the_classes_is_named(label: Any, tmp_path: Path) -> None:
    folder = make_cars(tmp_path)
    rows = [("00001.jpg", 2), ("00002.jpg", label)]
    savemat(folder / "devkit/cars_train_annos.mat", annotations(*rows))
    expected = r"cars_train_annos.mat, annotation 2 \(00002.jpg\): expected a class from 1 to 2, found"
    with pytest.raises(ValueError, match=expected):
        stanford_cars(tmp_path, "train")


def test_cars_without_labels_or_in_other_files(tmp_path: Path) -> None:
    folder = make_cars(tmp_path)
    file = folder / "cars_test_annos_withlabels.mat"
    savemat(file, annotations(("00001.jpg", 1), fields=("bbox_x1", "fname")))
    with pytest.raises(ValueError, match=r"should give `class` and `fname` .* found \('bbox_x1', 'fname'\)"):
        stanford_cars(tmp_path, "test")
    savemat(file, {"notes": np.ones(3)})
    with pytest.raises(ValueError, match=r"withlabels.mat should contain `annotations`, found \['notes'\]"):
        stanford_cars(tmp_path, "test")
    savemat(file, {"annotations": np.ones(3)})
    with pytest.raises(ValueError, match=r"should give `class` and `fname` of every picture, found None"):
        stanford_cars(tmp_path, "test")
    savemat(file, annotations())
    with pytest.raises(ValueError, match=r"withlabels.mat should list pictures to test with, found none"):
        stanford_cars(tmp_path, "test")
    for content in (b"", b"hello", (folder / "devkit/cars_train_annos.mat").read_bytes()[:300]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"withlabels.mat should be a MATLAB file that scipy reads"):
            stanford_cars(tmp_path, "test")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a", "b  1"], "train.txt, line 2: expected one word, found 'b  1'"),
        (["a", "", "b", "a"], "train.txt, line 4: a is in line 1 already"),
        ([], "train.txt should list pictures to train with, found none"),
    ],
)
def test_voc_lists_of_another_kind(lines: list[str], message: str, tmp_path: Path) -> None:
    write(make_voc(tmp_path) / "ImageSets/Main/train.txt", *lines)
    with pytest.raises(ValueError, match=message):
        voc2012(tmp_path, "train", "detection")


def test_bad_arguments(tmp_path: Path) -> None:
    make_cub(tmp_path)
    make_cars(tmp_path)
    make_voc(tmp_path)
    for load, options in ((cub200, {}), (stanford_cars, {}), (voc2012, {"task": "detection"})):
        with pytest.raises(ValueError, match="`split` should be 'train' or 'test', found 'val'"):
            load(tmp_path, "val", **options)  # type: ignore[operator]
        with pytest.raises(ValueError, match="`size` should be at least 1, found 0"):
            load(tmp_path, "train", size=0, **options)  # type: ignore[operator]
    with pytest.raises(ValueError, match="`task` should be 'segmentation' or 'detection', found 'classification'"):
        voc2012(tmp_path, "train", "classification")  # type: ignore[arg-type]
