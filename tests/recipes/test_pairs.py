"""Pairs of degraded and clean images: the degradations, and the layouts of pairs on disk."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.utils import save_image

from examples.common.data.degradations import DEGRADATIONS, degrade, motion_kernel
from examples.common.data.pair_folders import LAYOUTS, own_pairs, pairs
from examples.common.data.pairs import FolderPairs, pairs_to_test, training_pairs
from examples.diffloss.config import Config
from examples.diffloss.train import Trainer
from examples.dtp.train import trainer as dtp_trainer
from tests.recipes import cases


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_degradations_are_those_of_their_seed_and_harsher_elsewhere(name: str) -> None:
    from examples.common.data.photos import load_photo

    photo = load_photo("coffee")[:, 100:163, 200:277]

    def spoiled(seed: int, shifted: bool = False) -> Tensor:
        return degrade(name, photo, torch.Generator().manual_seed(seed), shifted=shifted)

    one = spoiled(1)
    assert one.shape == photo.shape and torch.equal(one, spoiled(1)) and not torch.equal(one, spoiled(2))
    assert float(one.min()) >= 0 and float(one.max()) <= 1
    torch.testing.assert_close(255 * one, (255 * one).round())
    usual, elsewhere = (
        sum(float((spoiled(seed, shifted) - photo).square().mean()) for seed in range(8)) for shifted in (False, True)
    )
    assert 0 < usual < elsewhere


def test_motion_is_a_path_of_its_length_and_direction() -> None:
    level, upright = motion_kernel(9, 0.0), motion_kernel(9, math.pi / 2)
    assert float(level.sum()) == pytest.approx(1) and torch.allclose(level, upright.T, atol=1e-5)
    assert float(level[level.shape[0] // 2].sum()) == pytest.approx(1, abs=1e-4)
    places = torch.arange(level.shape[1]).float()
    columns = level.sum(0)
    mean = float((columns * places).sum())
    spread = float((columns * (places - mean).square()).sum())
    assert mean == pytest.approx(level.shape[1] // 2, abs=0.01)
    assert spread == pytest.approx(9**2 / 12 + 1 / 6, rel=0.05)  # of a line, and of bilinear splatting


def test_an_unknown_degradation_is_named() -> None:
    with pytest.raises(ValueError, match="'foggy'"):
        degrade("foggy", torch.rand(3, 8, 8), torch.Generator())


PAIRED = {
    "gopro": ("train/a/blur/1.png", "train/a/sharp/1.png", "test/b/blur/2.png", "test/b/sharp/2.png"),
    "reside6k": ("train/hazy/1.jpg", "train/GT/1.png", "test/hazy/2.png", "test/GT/2.png"),
    "lol": ("our485/low/2.png", "our485/high/2.png", "eval15/low/1.png", "eval15/high/1.png"),
    "raindrop": ("train/data/0_rain.png", "train/gt/0_clean.png", "test_a/data/3_rain.png", "test_a/gt/3_clean.png"),
    "rain100h": (
        "train/rain/norain-1x2.png", "train/norain/norain-1.png", "test/rain/rain-002.png",
        "test/norain/norain-002.png",
    ),
    "srd": (
        "train/shadow/I_1.jpg", "train/shadow_free/I_1_no_shadow.jpg", "test/shadow/I_2.png",
        "test/shadow_free/I_2.png",
    ),
    "snow100k": (
        "train/synthetic/s_1.png", "train/gt/s_1.png", "test/Snow100K-L/synthetic/s_2.png",
        "test/Snow100K-L/gt/s_2.png",
    ),
    "reside": ("ITS/hazy/7_2_0.9.png", "ITS/clear/7.png", "SOTS/indoor/hazy/14_1.png", "SOTS/indoor/gt/14.png"),
    "dense_haze": ("hazy/07_hazy.png", "GT/07_GT.png", "hazy/53_hazy.png", "GT/53_GT.png"),
    "revide": (
        "Train/hazy/C001/00001.JPG", "Train/gt/C001/00001.JPG", "Test/hazy/W002/00000.JPG", "Test/gt/W002/00000.JPG"
    ),
    "lol_v2": (
        "Real_captured/Train/Low/low00001.png", "Real_captured/Train/Normal/normal00001.png",
        "Real_captured/Test/Low/00690.png", "Real_captured/Test/Normal/00690.png",
    ),
    "lol_v2_made": (
        "Synthetic/Train/Low/r1.png", "Synthetic/Train/Normal/r1.png", "Synthetic/Test/Low/r2.png",
        "Synthetic/Test/Normal/r2.png",
    ),
    "rain13k": (
        "train/Rain13K/input/1.jpg", "train/Rain13K/target/1.jpg", "test/Rain100H/input/2.png",
        "test/Rain100H/target/2.png",
    ),
    "realsnow": ("training/input/1.png", "training/gt/1.png", "testing/input/2.png", "testing/gt/2.png"),
    "uhdsnow": ("train/input/1.jpg", "train/GT/1.jpg", "test/input/2.jpg", "test/GT/2.jpg"),
    "universal": ("train/rainy/LQ/1.png", "train/rainy/GT/1.png", "val/rainy/LQ/2.png", "val/rainy/GT/2.png"),
}  # fmt: skip
CLEAN = {
    "cbsd68": ("train/1.png", "original_png/2.png"),
    "celebahq": ("train/1.jpg", "test/2.jpg"),
    "clean": ("train/1.png", "test/2.png"),
    "div2k": ("DIV2K_train_HR/0001.png", "DIV2K_valid_HR/0801.png"),
}


def write(path: Path, *, size: tuple[int, int] = (30, 34)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.rand(3, *size), path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_read(layout: str, tmp_path: Path) -> None:
    files = PAIRED.get(layout) or CLEAN[layout]
    for file in files:
        write(tmp_path / file)
    (tmp_path / files[0]).with_name("Thumbs.db").write_bytes(b"")
    found = {split: pairs(layout, tmp_path, split, "rainy") for split in ("train", "test")}
    if layout in PAIRED:
        assert found == {
            "train": [(tmp_path / files[0], tmp_path / files[1])],
            "test": [(tmp_path / files[2], tmp_path / files[3])],
        }
    else:
        assert found == {"train": [(None, tmp_path / files[0])], "test": [(None, tmp_path / files[1])]}
    data = FolderPairs({"rainy": (layout, tmp_path)}, "train", 16)
    pair, number = data[0]  # type: ignore[misc]
    assert pair.shape == (2, 3, 16, 16) and int(number) == 0
    test = FolderPairs({"rainy": (layout, tmp_path)}, "test", 16)
    assert torch.equal(test[0][0], test[0][0]) and test[0][0].shape == (2, 3, 30, 34)  # type: ignore[index]


def test_what_is_broken_on_disk_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("1", "2", "3", "4", "5"):
        write(tmp_path / "our485/low" / f"{name}.png")
        if name != "4":
            write(tmp_path / "our485/high" / f"{name}.png", size=(30, 34) if name != "3" else (20, 34))
    (tmp_path / "our485/low/2.png").write_bytes(b"no image")
    write(tmp_path / "our485/low/5.png", size=(8, 8))
    write(tmp_path / "our485/high/5.png", size=(8, 8))
    data = FolderPairs({"low_light": ("lol", tmp_path)}, "train", 16)
    assert [data[index] is None for index in range(len(data))] == [False, True, True, True]
    assert "Degraded images without a clean one: 1 of 5, " in caplog.text
    assert "2.png" in caplog.text and "its clean image has" in caplog.text and "smaller than the crops" in caplog.text
    with pytest.raises(ValueError, match="found none at train"):
        pairs("gopro", tmp_path, "train", "blurry")


def test_the_folder_of_div2k_that_was_downloaded_is_its_root_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [tmp_path / "DIV2K_train_HR" / f"{number:04}.png" for number in range(1, 13)]
    for file in files:
        write(file)
    for root in (tmp_path, tmp_path / "DIV2K_train_HR"):  # without its validation part
        train, test = (pairs("div2k", root, split, "noisy") for split in ("train", "test"))
        assert test == [(None, files[0]), (None, files[10])]
        assert train == [(None, file) for file in files if (None, file) not in test]
    assert "every tenth image is for the test" in caplog.text
    write(tmp_path / "DIV2K_valid_HR" / "0801.png")
    assert pairs("div2k", tmp_path / "DIV2K_train_HR", "train", "noisy") == [(None, file) for file in files]


def test_tests_that_are_made_have_the_strength_of_the_paper(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    save_image(torch.full((3, 100, 100), 0.5), tmp_path / "test" / "gray.png")
    write(tmp_path / "test" / "texture.png", size=(64, 64))
    data = FolderPairs({"noisy": ("clean", tmp_path)}, "test", 16)
    degraded, clean = data[0][0]  # type: ignore[index]
    assert float((degraded - clean).std()) * 255 == pytest.approx(50, rel=0.05)
    compressed = FolderPairs({"jpeg": ("clean", tmp_path)}, "test", 16)
    found, source = compressed[1][0]  # type: ignore[index]
    assert torch.equal(found, degrade("jpeg", source, torch.Generator(), fixed=True))
    softer = degrade("jpeg", source, torch.Generator().manual_seed(1))
    assert float((found - source).square().mean()) >= float((softer - source).square().mean())


OWN = {
    "same": ("a.png", "a.jpg"), "LR and HR": ("a_LR.png", "a_HR.png"), "scale": ("0001x4.png", "0001.png"),
    "lq and gt": ("x-lq.png", "x-GT.png"), "input": ("night_input.png", "night_target.png"),
    "below": ("one/a.png", "one/a.png"),
}  # fmt: skip


@pytest.mark.parametrize("names", OWN.values(), ids=OWN)
def test_two_folders_of_ones_own(names: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "lq" / names[0])
    write(tmp_path / "gt" / names[1])
    write(tmp_path / "lq" / "lonely.png")
    assert own_pairs(tmp_path / "lq", tmp_path / "gt") == [(tmp_path / "lq" / names[0], tmp_path / "gt" / names[1])]
    assert "lonely.png first" in caplog.text


def test_own_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write(tmp_path / "lq" / "a.png")
    with pytest.raises(ValueError, match="`gt` should be a folder of images"):
        own_pairs(tmp_path / "lq", tmp_path / "gt")
    write(tmp_path / "gt" / "b.png")
    with pytest.raises(ValueError, match="`gt` should hold a clean image for those in .*, found none of 1"):
        own_pairs(tmp_path / "lq", tmp_path / "gt")
    write(tmp_path / "gt" / "a.jpg")
    write(tmp_path / "gt" / "a.bmp")
    with pytest.raises(ValueError, match="should have one partner"):
        own_pairs(tmp_path / "lq", tmp_path / "gt")
    with pytest.raises(ValueError, match="`lq` should hold the degraded images of those in `gt`"):
        own_pairs(tmp_path / "gt", tmp_path / "lq" / ".." / "gt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`lq` should hold images, found none"):
        own_pairs(tmp_path / "empty", tmp_path / "gt")


@pytest.mark.parametrize(("shift", "told"), [(0, False), (1, True)])
def test_pairs_that_look_unlike_each_other_are_told(
    shift: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [torch.rand(3, 40, 44, generator=torch.Generator().manual_seed(number)) for number in range(12)]
    files: list[tuple[Path | None, Path]] = []
    for number, image in enumerate(images):
        noisy = 0.3 * images[(number + shift) % 12] + 0.1 * torch.rand(3, 40, 44)
        files.append((tmp_path / f"lq{number}.png", tmp_path / f"gt{number}.png"))
        for image_, path in zip((noisy, image), files[-1], strict=True):
            save_image(image_, path)  # type: ignore[arg-type]
    FolderPairs.of({"mine": files}, "train", 16)
    assert ("The pairs of 'mine' look unlike each other" in caplog.text) == told


def test_images_without_a_likeness_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "texture.png")
    save_image(torch.full((3, 30, 34), 0.3), tmp_path / "gray.png")
    FolderPairs.of({"mine": [(tmp_path / "gray.png", tmp_path / "texture.png")], "none": []}, "train", 16)
    assert not caplog.text


def test_clean_images_of_both_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    with pytest.raises(
        ValueError, match="of 'mine' should differ from the clean ones, found the same pixels in all of 1"
    ):
        FolderPairs.of({"mine": [(tmp_path / "a.png", tmp_path / "b.png")]}, "train", 16)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for number in range(12):
        size = (40, 40 + number)
        write(tmp_path / "lq" / f"{number:02}_LQ.png", size=size)
        write(tmp_path / "gt" / f"{number:02}_GT.png", size=size)
    return tmp_path


def test_a_tenth_of_the_pairs_is_for_the_test_and_read_at_need(own: Path) -> None:
    config = Config(out=own / "run", lq=own / "lq", gt=own / "gt", patch=24, degradations=["mine"])
    train, test = training_pairs(config, ["mine"]), pairs_to_test(config, "mine", shifted=False)
    assert len(train) == 10 and len(test) == 2
    (degraded, clean), *_ = test
    assert degraded.shape == clean.shape and degraded.shape[2] == 40 and not torch.equal(degraded, clean)
    test.data.files[0][1][0].write_bytes(b"")  # type: ignore[attr-defined]
    assert len(list(test)) == 1
    (own / "more").mkdir()
    for folder in ("lq", "gt"):
        write(own / "more" / folder / "a.png")
    other = Config(
        out=own, lq=own / "lq", gt=own / "gt", test_lq=own / "more/lq", test_gt=own / "more/gt", degradations=["mine"]
    )  # fmt: skip
    assert len(pairs_to_test(other, "mine", shifted=False)) == 1 and len(training_pairs(other, ["mine"])) == 12
    for broken in ({"gt": None}, {"test_lq": own / "lq"}, {"degradations": ["a", "b"]}):
        with pytest.raises(ValueError, match="`gt` should be given|`degradations` should be one name"):
            training_pairs(replace(config, **broken), ["mine"])  # type: ignore[arg-type]


def test_own_pairs_train_diffloss_and_dtp(own: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "lq": own / "lq", "gt": own / "gt", "degradations": ["mine"], "patch": 24, "tile": 32, "steps": 1,
    }  # fmt: skip
    results = Trainer(replace(cases.DIFFLOSS, out=tmp_path / "diffloss", **changes)).run()
    assert math.isfinite(results["mine_psnr"])
    pretrained = tmp_path / "pretrained"
    dtp_trainer(replace(cases.DTP, out=pretrained, method="pretrain", **changes)).run()
    changes["pretrained"] = pretrained
    run = dtp_trainer(replace(cases.DTP, out=tmp_path / "dtp", **{**changes, "timesteps": "matched"}))
    assert math.isfinite(run.run()["psnr"])
    with pytest.raises(ValueError, match="`timesteps` should be 'matched' or 'first' for 'mine'"):
        dtp_trainer(replace(cases.DTP, out=tmp_path / "table", **changes))
