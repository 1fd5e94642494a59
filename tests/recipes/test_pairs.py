"""Pairs of degraded and clean images: the degradations, and the layouts of pairs on disk."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.utils import save_image

from examples.common.data.degradations import DEGRADATIONS, degrade, motion_kernel
from examples.common.data.pair_folders import LAYOUTS, pairs
from examples.common.data.pairs import FolderPairs


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
    "universal": ("train/rainy/LQ/1.png", "train/rainy/GT/1.png", "val/rainy/LQ/2.png", "val/rainy/GT/2.png"),
}  # fmt: skip
CLEAN = {
    "cbsd68": ("train/1.png", "original_png/2.png"),
    "celebahq": ("train/1.jpg", "test/2.jpg"),
    "clean": ("train/1.png", "test/2.png"),
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
    assert "4.png skipped: no clean image" in caplog.text
    assert "2.png" in caplog.text and "of one size" in caplog.text and "smaller than the crops" in caplog.text
    with pytest.raises(ValueError, match="found none at train"):
        pairs("gopro", tmp_path, "train", "blurry")
