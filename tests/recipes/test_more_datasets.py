"""Street scenes, boxes and images of one's own, on miniature trees of the published layouts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from examples.common.data.degrade import degradation
from examples.common.data.object_boxes import RTTS_CLASSES, coco, rtts
from examples.common.data.options import DataOptions
from examples.common.data.own_images import class_folders, label_file
from examples.common.data.street_scenes import CLASSES, street_scenes
from examples.common.data.task_data import dataset
from examples.common.data.tasks import IGNORED
from examples.sr4ir.train import Trainer
from tests.helpers.datasets import draw, note, thing, write
from tests.recipes import cases
from tests.recipes.unirestore_runs import trainer as unirestore


def mask(path: Path, *values: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((30, 40), values[0], np.uint8)
    for number, value in enumerate(values):
        pixels[:, 10 * number : 10 * number + 10] = value
    Image.fromarray(pixels).save(path)


def make_cityscapes(root: Path, fog: bool = False) -> None:
    for split, city in (("train", "aachen"), ("val", "ulm")):
        name = f"{city}_000000_000019"
        folder, end = ("leftImg8bit_foggy", "leftImg8bit_foggy_beta_0.02") if fog else ("leftImg8bit", "leftImg8bit")
        draw(root / folder / split / city / f"{name}_{end}.png")
        if fog:
            draw(root / folder / split / city / f"{name}_leftImg8bit_foggy_beta_0.01.png")
        mask(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", 7, 26, 0, 33)


def make_acdc(root: Path) -> None:
    for split in ("train", "val"):
        for condition in ("fog", "night"):
            name = f"GOPR0475_frame_{split}_{condition}"
            draw(root / "rgb_anon" / condition / split / "GOPR0475" / f"{name}_rgb_anon.png")
            mask(root / "gt" / condition / split / "GOPR0475" / f"{name}_gt_labelTrainIds.png", 0, 13, 255, 18)


@pytest.mark.parametrize(
    ("name", "make", "count"),
    [
        ("cityscapes", make_cityscapes, 1), ("foggy_cityscapes", lambda root: make_cityscapes(root, fog=True), 1),
        ("acdc", make_acdc, 2),
    ],
)  # fmt: skip
def test_street_scenes_are_read(name: Any, make: Callable[[Path], None], count: int, tmp_path: Path) -> None:
    make(tmp_path)
    options = DataOptions(task="segmentation", data=name, root=tmp_path, size=24)
    train, test = dataset(options, "train", 1), dataset(options, "test", 1)
    assert len(train) == len(test) == count and test.class_names == CLASSES
    cut, whole = train[0], test[0]
    assert cut is not None and whole is not None and cut[0].shape == (3, 24, 24) and cut[1].shape == (24, 24)
    wide = whole[1].shape[1] / 8
    assert [int(whole[1][0, round(wide * k)]) for k in (1, 3, 5, 7)] == [0, 13, IGNORED, 18]
    with pytest.raises(ValueError, match=f"`root` should hold images of {name}"):
        street_scenes(tmp_path / "none", name, "train")
    with pytest.raises(ValueError, match=f"`task` should be 'segmentation' for {name}"):
        dataset(replace(options, task="detection"), "test", 1)


def test_an_image_without_a_mask_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_cityscapes(tmp_path)
    draw(tmp_path / "leftImg8bit/train/aachen/other_leftImg8bit.png")
    assert len(street_scenes(tmp_path, "cityscapes", "train")) == 1 and "other_leftImg8bit.png skipped" in caplog.text


def make_coco(root: Path) -> None:
    for part in ("train2017", "val2017"):
        draw(root / part / "1.jpg")
        content = {
            "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "gone.jpg"}],
            "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
            "annotations": [
                {"image_id": 1, "category_id": 18, "bbox": [4, 5, 10, 20]},
                {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 3]},
                {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 1},
                {"image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 7]},
            ],
        }
        (root / "annotations").mkdir(exist_ok=True, parents=True)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def test_coco_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_coco(tmp_path)
    test = coco(tmp_path, "test", size=40)
    assert len(test) == 1 and test.class_names == ("background", "person", "dog")
    assert "gone.jpg skipped: listed in instances_val2017.json, not on the disk" in caplog.text
    _, target = test[0]  # type: ignore[misc]
    assert target["boxes"].tolist() == [[4, 5, 14, 25], [0, 0, 40, 3]] and target["labels"].tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"`root` should contain annotations/instances_train2017\.json"):
        coco(tmp_path / "none", "train")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'categories'"),
        ('{"categories": [1]}', "TypeError"),
    ],
)
def test_annotations_that_are_none_of_coco_are_named(content: str, found: str, tmp_path: Path) -> None:
    make_coco(tmp_path)
    (tmp_path / "annotations/instances_train2017.json").write_text(content)
    with pytest.raises(ValueError, match=f"instances_train2017.json should be the JSON of COCO 2017's .* {found}"):
        coco(tmp_path, "train")


@pytest.mark.parametrize("listed", [False, True])
def test_rtts_is_read(listed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "RTTS"
    for number in range(6):
        draw(folder / "JPEGImages" / f"{number}.png")
        note(folder / "Annotations" / f"{number}.xml", thing("car", (7, 11, 16, 25)))
    if listed:
        write(folder / "ImageSets/Main/train.txt", "0", "1")
        write(folder / "ImageSets/Main/test.txt", "5")
    train, test = (rtts(tmp_path, split, size=40) for split in ("train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test)) == ((2, 1) if listed else (4, 2)) and test.class_names == RTTS_CLASSES
    _, target = test[0]  # type: ignore[misc]
    assert target["labels"].tolist() == [3] and target["boxes"].tolist() == [[7, 11, 16, 25]]
    note(folder / "Annotations" / "5.xml", thing("tram", (7, 11, 16, 25)))
    assert rtts(tmp_path, "test", size=40)[0 if listed else 1] is None
    with pytest.raises(ValueError, match="`root` should hold images of RTTS"):
        rtts(tmp_path / "none", "test")


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.rand(3, 36, 40), path)


def make_folders(root: Path, apart: str | None) -> None:
    for name in ("cat", "dog"):
        for number in range(12):
            image(root / ("" if apart is None else "train") / name / f"{number:02}.png")
        if apart:
            image(root / apart / name / "0.jpg")


@pytest.mark.parametrize(("apart", "counts"), [(None, (20, 4)), ("test", (24, 2)), ("val", (24, 2))])
def test_a_folder_for_each_class(apart: str | None, counts: tuple[int, int], tmp_path: Path) -> None:
    make_folders(tmp_path, apart)
    train, test = (class_folders(tmp_path, split, size=24) for split in ("train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test)) == counts and train.class_names == test.class_names == ("cat", "dog")
    assert sorted({int(test[n][1]) for n in range(len(test))}) == [0, 1]  # type: ignore[index]
    assert train[0][0].shape == (3, 24, 24)  # type: ignore[index]
    if apart:
        image(tmp_path / apart / "cow" / "0.png")
        with pytest.raises(ValueError, match="found 'cow'"):
            class_folders(tmp_path, "test")
    with pytest.raises(ValueError, match="`root` should be a folder with a folder of images for each class"):
        class_folders(tmp_path / "none", "train")


LINES = {
    "labels.txt": ["a.png cat", "b.png dog", "c.png cat", "d.png dog"],
    "labels.csv": ["name,class", "a.png,cat", "b.png,dog"],
    "train.tsv": ["a.png\t0", "b.png\t10", "c.png\t2"],
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_file_of_labels(name: str, tmp_path: Path) -> None:
    for file in "abcd":
        image(tmp_path / f"{file}.png")
    write(tmp_path / name, *LINES[name])
    train = label_file(tmp_path, "train", size=24)
    if name == "train.tsv":
        write(tmp_path / "test.txt", "d.png 2")
        test = label_file(tmp_path, "test", size=24)
        assert train.class_names == test.class_names == ("0", "2", "10")
        assert [int(train[n][1]) for n in range(3)] == [0, 2, 1] and int(test[0][1]) == 1  # type: ignore[index]
        return
    assert train.class_names == ("cat", "dog")
    if name == "labels.csv":  # of one image of a class none is for the test
        assert len(train) == 2
        with pytest.raises(ValueError, match="should list images to test with, found none"):
            label_file(tmp_path, "test", size=24)
        return
    test = label_file(tmp_path, "test", size=24)
    assert test.class_names == train.class_names and (len(train), len(test)) == (2, 2)
    assert sorted(int(test[n][1]) for n in range(2)) == [0, 1]  # type: ignore[index]
    assert not {path for path, _ in train.samples} & {path for path, _ in test.samples}
    assert len(label_file(tmp_path, "test", size=24, whole=True)) == 4


def test_lines_that_are_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`root` should hold train\.txt, or labels\.txt, found none"):
        label_file(tmp_path, "train")
    write(tmp_path / "labels.txt", "a.png cat", "alone.png")
    with pytest.raises(ValueError, match=r"line 2: expected an image and its class, found 'alone\.png'"):
        label_file(tmp_path, "train")
    (tmp_path / "labels.txt").write_bytes("a.png Bär".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.txt should be text in UTF-8"):
        label_file(tmp_path, "train")


def test_files_of_labels_that_would_train_on_the_test_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        image(tmp_path / f"{name}.png")
    write(tmp_path / "labels.txt", "a.png cat", "b.png dog")
    for other in ("train.txt", "test.csv"):
        write(tmp_path / other, "a.png cat", "b.png dog")
        for split in ("train", "test"):
            with pytest.raises(ValueError, match=r"or labels\.txt, found one of two with it"):
                label_file(tmp_path, split)  # type: ignore[arg-type]
        (tmp_path / other).unlink()
    write(tmp_path / "labels.txt", "cat", "dog")  # the classes, beside what is divided
    write(tmp_path / "train.txt", "a.png cat", "b.png dog")
    write(tmp_path / "test.txt", "c.png cat", "b.png dog")
    with pytest.raises(ValueError, match=r"test\.txt should have no image of .*train\.txt, found .*b\.png"):
        label_file(tmp_path, "test")


@pytest.mark.parametrize("names", [("train", "valid"), ("Train", "validation"), ("training", "test")])
def test_folders_of_splits_are_no_classes(names: tuple[str, str], tmp_path: Path) -> None:
    for split in names:
        for name in ("cat", "dog"):
            image(tmp_path / split / name / "0.png")
    (tmp_path / "__MACOSX").mkdir()
    train, test = (class_folders(tmp_path, split, size=24) for split in ("train", "test"))  # type: ignore[arg-type]
    assert train.class_names == test.class_names == ("cat", "dog")
    assert {path.parent.parent.name for path, _ in test.samples} == {names[1]}


def test_a_test_alone_is_enough_to_evaluate(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image(tmp_path / "test" / name / "0.png")
    assert len(class_folders(tmp_path, "test", size=24)) == 2
    with pytest.raises(ValueError, match=r"should hold train/ and test/ \(or val/\), found \['test'\]"):
        class_folders(tmp_path, "train", size=24)


def test_a_class_without_training_images_is_refused(tmp_path: Path) -> None:
    make_folders(tmp_path, None)
    (tmp_path / "cow").mkdir()
    with pytest.raises(ValueError, match="should hold training images of each class, found none of 'cow'"):
        class_folders(tmp_path, "train")


def test_few_images_change_sides_where_a_folder_grows(tmp_path: Path) -> None:
    make_folders(tmp_path, None)
    tested = {path for path, _ in class_folders(tmp_path, "test", size=24).samples}
    image(tmp_path / "cat" / "a new one.png")
    now = {path for path, _ in class_folders(tmp_path, "test", size=24).samples}
    assert len(tested) == 4 and len(tested & now) >= 3
    assert len(class_folders(tmp_path, "test", size=24, whole=True)) == 25


def test_a_recipe_trains_on_a_folder_for_each_class(tmp_path: Path) -> None:
    make_folders(tmp_path / "data", None)
    config = replace(
        cases.SR4IR, out=tmp_path / "run", data="class_folders", root=tmp_path / "data", size=32, steps=1, batch=4
    )
    results = Trainer(config).run()
    assert results["num_classes"] == 2 and 0 <= results["score"] <= 100


def test_images_that_are_foggy_as_they_are_stay_so() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert degradation(DataOptions(degradation="none", scale=1), 1)(images, 0) is images
    with pytest.raises(ValueError, match="`scale` should be 1 for none"):
        degradation(DataOptions(degradation="none"), 1)


def test_unirestore_reads_div2k_and_pairs(tmp_path: Path, folder: Path) -> None:
    for place in ("DIV2K_train_HR/0001.png", "DIV2K_valid_HR/0801.png"):
        image(tmp_path / "div2k" / place)
    for number in range(2):
        for side in ("hazy", "GT"):
            image(tmp_path / "pairs" / "test" / side / f"{number}.png")
    run = unirestore(
        tmp_path / "run", folder, "stage2", images=tmp_path / "div2k", every_prompt=True, steps=1,
        paired_tests={"haze": f"reside6k:{tmp_path / 'pairs'}"}, test_count=2,
    )  # fmt: skip
    assert len(run.readers["restoration"].train_data.sources) == 1  # type: ignore[attr-defined]
    results = run.run()
    known = {"haze_psnr", "haze_ssim", "haze_lq_psnr", "restoration_psnr_of_mse", "restoration_lq_psnr_of_mse"}
    assert known < set(results)
    for task in ("restoration", "classification", "segmentation"):
        for prompt in ("restoration", "classification", "segmentation"):
            assert f"{task}_by_{prompt}_psnr" in results
        assert results[f"{task}_by_{task}_psnr"] == pytest.approx(results[f"{task}_psnr"], rel=1e-3)


@pytest.mark.parametrize("separator", ["\t", ",", " "])
def test_names_of_images_may_have_spaces_and_images_may_be_missing(
    separator: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in ("my image", "b", "c"):
        image(tmp_path / f"{file}.png")
    write(tmp_path / "train.txt", f"my image.png{separator}cat", f"b.png{separator}dog", f"gone.png{separator}dog")
    write(tmp_path / "test.txt", f"c.png{separator}dog")
    train, test = (label_file(tmp_path, split, size=24) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog") and len(train) == 2
    assert "gone.png skipped: listed in train.txt, not on the disk" in caplog.text
    write(tmp_path / "test.txt", f"c.png{separator}bird")
    with pytest.raises(ValueError, match=r"test\.txt should hold classes of the training, found 'bird'"):
        label_file(tmp_path, "test")


def test_many_missing_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image(tmp_path / "a.png")
    write(tmp_path / "train.txt", "a.png cat", *(f"gone{n}.png dog" for n in range(50)))
    assert len(label_file(tmp_path, "train", size=24)) == 1
    assert "30 more files skipped: listed in train.txt, not on the disk" in caplog.text and len(caplog.records) == 21
