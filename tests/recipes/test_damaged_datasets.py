"""What is missing, damaged or contradictory in a data set is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from examples.common.data.datasets import cub200, stanford_cars, voc2012
from examples.common.data.tasks import collate
from tests.helpers.datasets import (
    MAKE,
    SMALL,
    annotations,
    filled,
    make_cars,
    make_cub,
    make_mask,
    make_voc,
    thing,
    warnings,
    write,
)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_image_is_named_once_and_none(damage: str, layout: Any, caplog: pytest.LogCaptureFixture) -> None:
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


@pytest.mark.parametrize("damage", ["another size", "no class", "colors", "truncated", "text"])
def test_a_damaged_mask_is_named_once_and_none(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = make_voc(tmp_path) / "SegmentationClass/b.png"
    if damage == "another size":
        make_mask(file, filled(SMALL, 3, size=(30, 40)))
    elif damage == "no class":
        make_mask(file, filled(SMALL, 21))
    elif damage == "colors":
        Image.new("RGB", (40, 30)).save(file)
    else:
        file.write_bytes(file.read_bytes()[:200] if damage == "truncated" else b"hello")
    data = voc2012(tmp_path, "train", "segmentation", size=32)
    for _ in range(2):
        assert [data[index] is None for index in range(3)] == [False, True, False]
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{file} skipped: ")
    wanted = {"another size": "30x40 pixels, its image has 40x30", "no class": "[21]", "colors": "mode RGB"}
    assert wanted.get(damage, "") in warning


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
        ("train_test_split.txt", " 1\n", " 0\n", "train_test_split.txt should list images to train with, found none"),
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
    with pytest.raises(ValueError, match=r"should give `class` and `fname` of every image, found None"):
        stanford_cars(tmp_path, "test")
    savemat(file, annotations())
    with pytest.raises(ValueError, match=r"withlabels.mat should list images to test with, found none"):
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
        ([], "train.txt should list images to train with, found none"),
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
