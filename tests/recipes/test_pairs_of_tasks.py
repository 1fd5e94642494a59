"""Degraded images of one's own in the recipes of tasks: two trees of files, resized, cropped and flipped alike."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from skimage import data as photographs
from torch import Tensor
from torchvision.utils import save_image

from examples.common.data.options import DataOptions
from examples.common.data.pair_folders import degraded_files
from examples.common.data.task_data import dataset
from examples.edtr import prepare as edtr_preparing
from examples.edtr.train import Trainer as EdtrTrainer
from examples.sr4ir.train import Trainer as Sr4irTrainer
from tests.recipes import cases
from tests.recipes.unirestore_runs import trainer as unirestore


def photo(number: int, height: int = 40, width: int = 52) -> Tensor:
    pixels = torch.from_numpy(photographs.astronaut()).permute(2, 0, 1) / 255
    top = 30 * number
    return pixels[:, top : top + height, 100 : 100 + width]


def half(clean: Tensor) -> Tensor:
    return clean / 2


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """Two classes of clean images, and degraded ones of half of their brightness, of which one has no partner."""
    for number, (part, name) in enumerate([("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")]):
        for image in range(3):
            place, clean = f"{part}/{name}", photo(3 * number + image)
            for root, pixels, ending in (("hq", clean, "_HR"), ("lq", half(clean), "_LR")):
                (tmp_path / root / place).mkdir(parents=True, exist_ok=True)
                if (root, part, image) != ("lq", "train", 2):
                    save_image(pixels, tmp_path / root / place / f"{image}{ending}.png")
    return {
        "data": "class_folders", "root": tmp_path / "hq", "lq": tmp_path / "lq", "size": 32, "scale": 1,
        "data_sets": {}, "steps": 2, "batch": 2, "cpu": True,
    }  # fmt: skip


def options(own: dict[str, Any]) -> DataOptions:
    return DataOptions(**{name: own[name] for name in ("data", "root", "lq", "size", "scale")})


def assert_half(degraded: Tensor, clean: Tensor) -> None:
    """All that happens to a pair is linear, up to the rounding of the files."""
    torch.testing.assert_close(degraded, half(clean), rtol=0, atol=2 / 255)


def test_a_pair_is_resized_cropped_and_flipped_alike(own: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    train = dataset(options(own), "train", 0)
    assert len(train) == 4 and "2 images skipped" in caplog.text and "no degraded image in" in caplog.text
    seen = []
    for seed in range(4):
        torch.manual_seed(seed)
        image, label = train[1]  # type: ignore[misc]
        assert image.shape == (6, 32, 32) and int(label) == 0
        assert_half(image[3:], image[:3])
        seen.append(image)
    assert not torch.equal(seen[0], seen[1])
    assert len(dataset(options(own), "test", 0)) == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own: own.update(lq=own["lq"] / "nowhere"), "`lq` should be a folder of images, found"),
        (lambda own: own.update(lq=own["lq"] / "train"), "`lq` should hold degraded images of those in .*, found none"),
        (lambda own: own.update(lq=own["root"]), "`lq` should lie outside of `root`"),
        (lambda own: own.update(scale=4), "`lq` should be for data on disk and a `scale` of 1, found 'class_.* and 4"),
        (lambda own: own.update(data="generated"), "`lq` should be for data on disk"),
    ],
)
def test_what_does_not_pair_is_named(
    own: dict[str, Any], spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    spoil(own)
    with pytest.raises(ValueError, match=message):
        dataset(options(own), "train", 0)


def test_names_that_say_otherwise_are_refused(own: dict[str, Any], tmp_path: Path) -> None:
    exchanged = replace(options(own), root=own["lq"], lq=own["root"])
    with pytest.raises(ValueError, match="should be the first of a pair, found .*_HR.png for .*_LR.png"):
        dataset(exchanged, "train", 0)
    files = [tmp_path / "of" / name for name in ("view_low.png", "view_high.png")]
    for file in (*files, tmp_path / "degraded" / "view_high.png"):
        file.parent.mkdir(exist_ok=True)
        save_image(photo(0), file)
    with pytest.raises(ValueError, match="view_high.png should be of one clean image, found .*low.png and .*high.png"):
        degraded_files(files, tmp_path / "of", tmp_path / "degraded")


def test_a_degraded_image_of_another_size_is_named_and_left_out(
    own: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    save_image(half(photo(0, 20, 26)), own["lq"] / "train" / "cat" / "0_LR.png")
    with caplog.at_level(logging.WARNING):
        assert dataset(options(own), "train", 0)[0] is None
    assert "0_LR.png skipped: 26x20 pixels, its clean image has 52x40" in caplog.text


def test_sr4ir_and_edtr_train_on_pairs(own: dict[str, Any], tmp_path: Path) -> None:
    run: Any = Sr4irTrainer(replace(cases.SR4IR, **own, out=tmp_path / "sr4ir"))
    batch = run.batch(*next(run.read(0, 1)), 0, 2)
    assert batch.hr.shape == batch.lr.shape == (2, 3, 32, 32)
    assert_half(batch.lr, batch.hr)
    results = run.run()
    assert 5 < results["lq_psnr"] < 20  # of half the brightness

    folder = tmp_path / "prepared"
    data = {**cases.EDTR_DATA, **own}
    edtr_preparing.prepare(edtr_preparing.Config(**data, prior_steps=1, out=folder))
    edtr: Any = EdtrTrainer(replace(cases.EDTR, **data, prepared=folder, out=tmp_path / "edtr"))
    images, targets = next(edtr.read(0, 1))
    restored = edtr.batch(images, targets, 0, 2)
    assert restored.first.shape == restored.second.shape == (1, 3, 32, 32)
    expected = edtr.restorer.hint(images[:1, 3:])
    torch.testing.assert_close(restored.hint.image, expected.image)
    assert edtr.run()["lq_psnr"] == pytest.approx(results["lq_psnr"], abs=1e-3)


def test_unirestore_trains_on_pairs_for_people_and_for_a_task(
    own: dict[str, Any], tmp_path: Path, prepared: cases.Prepared
) -> None:
    oracle = replace(cases.SR4IR, **own, method="oracle")
    for kind in ("hq", "judge"):
        Sr4irTrainer(replace(oracle, out=tmp_path / "prepared" / f"classification_{kind}")).run()
    changes: dict[str, Any] = {
        **own, "images": own["root"], "images_lq": own["lq"], "tasks": ["restoration", "classification"],
        "prepared": tmp_path / "prepared", "prior": prepared.unirestore / "prepared" / "prior",
    }  # fmt: skip
    with pytest.raises(ValueError, match="`unseen` should be false where degraded images are on disk"):
        unirestore(tmp_path / "run", prepared.unirestore, **changes, unseen=True)
    with pytest.raises(ValueError, match="`images_lq` should be beside `images`, for the task restoration"):
        unirestore(tmp_path / "run", prepared.unirestore, **{**changes, "tasks": ["classification"]})
    (tmp_path / "one").mkdir()
    save_image(half(photo(0)), tmp_path / "one" / "a_LR.png")
    save_image(photo(0), tmp_path / "a_HR.png")
    with pytest.raises(ValueError, match="`images_lq` should hold images to train and to test with, found 1 and 0"):
        unirestore(
            tmp_path / "run", prepared.unirestore, **{**changes, "images": tmp_path, "images_lq": tmp_path / "one"}
        )
    run: Any = unirestore(tmp_path / "run", prepared.unirestore, **changes)
    batch = run.batch(*next(run.read(0, 1)), 0, 2)
    for part in batch.parts:
        assert part.clean.shape == part.degraded.shape == (2, 3, 32, 32)
        assert_half(part.degraded, part.clean)
    results = run.run()
    assert results["restoration_lq_psnr"] < 20 and results["classification_lq_psnr"] < 20
