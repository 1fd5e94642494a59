"""Data sets on the disk, in miniature: layouts, augmentation, and everything that can be wrong with the files."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from examples.common.data.datasets import VOC_CLASSES, cub200, stanford_cars, voc2012
from examples.common.data.folder import read_image
from examples.common.data.task_data import datasets
from examples.common.data.tasks import IGNORED, collate
from examples.common.engine.batches import Batches, loader
from examples.common.engine.recognition import Recognition
from examples.sr4ir.config import Config
from tests.helpers.datasets import (
    MAKE,
    SMALL,
    draw,
    drawn,
    filled,
    make_cars,
    make_cub,
    make_mask,
    make_voc,
    note,
    plain,
    red,
    same,
    thing,
    write,
)


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
    """An image of (width, height) in which every part is another, as it is read back."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=100)
    return read_image(path)


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
def test_training_images_are_cut_and_flipped(name: str, tmp_path: Path) -> None:
    make, load, _ = MAKE[name]
    make(tmp_path)
    data = load(tmp_path, "train", size=21)  # the short side becomes 24
    image = noise(data.samples[0][0], (60, 40))
    whole = F.interpolate(image[None], (24, 36), mode="bilinear", antialias=True)[0].clamp(0, 1)
    places = [place(drawn(data, 0, seed)[0], whole) for seed in range(150)]
    tops, lefts, flips = (set(values) for values in zip(*places, strict=True))
    assert tops == set(range(4)) and lefts == set(range(16)) and flips == {True, False}


@pytest.mark.parametrize(("name", "index"), [("cub", 0), ("cars", 0)])
def test_test_images_are_the_middle(name: str, index: int, tmp_path: Path) -> None:
    make, load, _ = MAKE[name]
    make(tmp_path)
    data = load(tmp_path, "test", size=21)  # the short side becomes 24
    path, _ = data.samples[index]
    draw(path, size=(60, 40), box=(20, 10, 45, 25))
    whole = F.interpolate(read_image(path)[None], (24, 36), mode="bilinear", antialias=True)[0]
    top, left = 2, 8  # round(1.5), round(7.5)
    image, _ = drawn(data, index, 0)
    torch.testing.assert_close(image, whole[:, top : top + 21, left : left + 21], atol=1e-6, rtol=0)


def test_masks_move_with_their_images(tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    image = noise(folder / "JPEGImages/a.jpg", (48, 28))
    values = np.random.default_rng(1).choice([*range(21), IGNORED], (28, 48))
    make_mask(folder / "SegmentationClass/a.png", values)
    data = voc2012(tmp_path, "train", "segmentation", size=24)  # the short side becomes 26
    whole = F.interpolate(image[None], (26, 44), mode="bilinear", antialias=True)[0].clamp(0, 1)
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
    whole = read_image(folder / "JPEGImages/v.jpg")[None]
    torch.testing.assert_close(image, F.interpolate(whole, shape, mode="bilinear", antialias=True)[0])
    labels = F.interpolate(torch.from_numpy(values).float()[None, None], shape, mode="nearest")[0, 0]
    assert mask.dtype == torch.int64 and torch.equal(mask, labels.long())


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [480, 40, 20])
def test_boxes_move_with_their_images(split: Any, size: int, tmp_path: Path) -> None:
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
def test_a_image_without_a_box_has_none(split: Any, things: list[str], tmp_path: Path) -> None:
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
def test_images_of_other_colors(mode: str, layout: Any) -> None:
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


def test_a_grey_mask_is_a_mask(tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    Image.fromarray(filled(SMALL, 5)).save(folder / "SegmentationClass/v.png")
    _, mask = drawn(voc2012(tmp_path, "test", "segmentation", size=28), 0, 0)
    assert torch.equal(mask, torch.from_numpy(filled(SMALL, 5)).long())
