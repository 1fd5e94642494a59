"""Image files: which of a folder are images, how they pair, and that files of 16 bits are read with 16."""

import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor

from examples.common.data.folder import LazyTensors, image_files, load_folder, read_image, restore_folder
from examples.common.data.pair_folders import pairs
from examples.common.data.pairs import FolderPairs
from examples.common.data.photos import grid_crops, levels, photographs, pyramid, random_crops


def write(path: Path, value: int = 100, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)
    return path


def deep_png(path: Path, pixels: np.ndarray, *chunks: tuple[bytes, bytes]) -> None:
    """A PNG of 16 bits, written by hand: Pillow writes none in color."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    parts = [head, *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    )


@pytest.fixture
def deep() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(np.uint16)


# which files


def test_hidden_files_and_directories_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = [write(tmp_path / name) for name in ("a.png", "deep/b.JPG")]
    for name in (".a.png", "._a.png", ".cache/c.png", "deep/.d/e.png"):
        write(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    inside = write(tmp_path / "folder.png" / "f.png")
    bare = tmp_path / "no_suffix"
    bare.write_bytes(wanted[0].read_bytes())
    (tmp_path / "LICENSE").write_text("free to use")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert image_files(tmp_path) == sorted([*wanted, inside, bare])
    assert image_files(tmp_path, "*") == [wanted[0], bare]
    told = [record.getMessage() for record in caplog.records]
    assert sum("LICENSE skipped" in line for line in told) == 2 and any("gone.png skipped" in line for line in told)
    assert not any("._a" in line or "folder.png" in line for line in told)


@pytest.mark.parametrize("layout", ["lol", "raindrop", "universal", "clean"])
def test_layouts_list_images_alone(layout: str, tmp_path: Path) -> None:
    places = {
        "lol": ("our485/low", "our485/high"), "raindrop": ("train/data", "train/gt"),
        "universal": ("train/rainy/LQ", "train/rainy/GT"), "clean": ("train",),
    }  # fmt: skip
    for folder in places[layout]:
        for name in ("1.png", "._1.png", ".2.png"):
            write(tmp_path / folder / name)
        (tmp_path / folder / "3.png").mkdir()
    assert [clean.name for _, clean in pairs(layout, tmp_path, "train", "rainy")] == ["1.png"]


# which pairs


DA_CLIP = {"blurry": "motion-blurry", "jpeg": "jpeg-compressed", "low_light": "low-light", "inpainting": "uncompleted"}


def paired(root: Path, layout: str, degraded: list[str], clean: list[str], name: str = "rainy") -> dict[str, str]:
    folder = DA_CLIP.get(name, name)
    folders = {
        "universal": (f"train/{folder}/LQ", f"train/{folder}/GT"), "raindrop": ("train/data", "train/gt"),
        "rain100h": ("train/rain", "train/norain"), "srd": ("train/shadow", "train/shadow_free"),
        "lol": ("our485/low", "our485/high"),
    }  # fmt: skip
    for folder, names in zip(folders[layout], (degraded, clean), strict=True):
        for file in names:
            write(root / folder / file)
    return {one.name: other.name for one, other in pairs(layout, root, "train", name) if one is not None}


NAMES = [
    "7.png",
    "7x2.png",
    "lane.png",
    "lane_rain.png",
    "lane_clean.png",
    "sugar_free.png",
    "rain-1.png",
    "norain-1.png",
]


@pytest.mark.parametrize("layout", ["universal", "raindrop", "rain100h", "srd", "lol"])
def test_a_file_of_the_same_name_is_the_pair_in_every_layout(layout: str, tmp_path: Path) -> None:
    assert paired(tmp_path, layout, NAMES, NAMES) == {name: name for name in NAMES}


RULES: list[tuple[str, str, str, str]] = [
    ("raindrop", "raindrop", "0_rain.png", "0_clean.png"),
    ("rain100h", "rainy", "norain-1x2.png", "norain-1.png"),
    ("rain100h", "rainy", "rain-001.png", "norain-001.png"),
    ("srd", "shadowed", "A.jpg", "A_no_shadow.png"),
    ("universal", "raindrop", "0_rain.png", "0_clean.png"),
    ("universal", "rainy", "norain-1x2.png", "norain-1.png"),
    ("universal", "shadowed", "A.jpg", "A_no_shadow.jpg"),
    ("lol", "low_light", "x.png", "x.jpg"),
    *(("universal", name, "1.png", "1.jpg") for name in DA_CLIP),
]


@pytest.mark.parametrize(("layout", "name", "degraded", "clean"), RULES)
def test_a_layout_renames_by_its_own_rule(layout: str, name: str, degraded: str, clean: str, tmp_path: Path) -> None:
    assert paired(tmp_path, layout, [degraded], [clean, "other.png"], name) == {degraded: clean}


def test_universal_takes_our_names_too(tmp_path: Path) -> None:
    for side in ("LQ", "GT"):
        write(tmp_path / "train" / "low_light" / side / "1.png")
    assert len(pairs("universal", tmp_path, "train", "low_light")) == 1


@pytest.mark.parametrize(
    ("layout", "name", "degraded", "clean"),
    [
        ("lol", "low_light", "0_rain.png", "0_clean.png"),
        ("universal", "low_light", "A.png", "A_no_shadow.png"),
        ("universal", "snowy", "norain-1x2.png", "norain-1.png"),
        ("raindrop", "raindrop", "7x2.png", "7.png"),
    ],
)
def test_a_rule_of_another_layout_is_not_applied(
    layout: str, name: str, degraded: str, clean: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no two of one name") as error:
        paired(tmp_path, layout, [degraded], [clean], name)
    for part in ("1 degraded images", degraded, "1 clean ones", clean):
        assert part in str(error.value)


def test_two_clean_files_of_one_degraded_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.bmp should have one partner, found .*x\.jpg and .*x\.png"):
        paired(tmp_path, "lol", ["x.bmp"], ["x.png", "x.jpg"])
    (tmp_path / "our485/low/x.bmp").rename(tmp_path / "our485/low/x.jpg")
    assert paired(tmp_path, "lol", [], []) == {"x.jpg": "x.jpg"}


def test_a_file_is_named_once_however_often_it_is_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paired(tmp_path, "lol", ["1.png"], ["1.png"])
    (tmp_path / "our485/low/1.png").write_bytes(b"no image")
    data = FolderPairs({"low_light": ("lol", tmp_path)}, "train", 4)
    assert [data[0] for _ in range(5)] == [None] * 5
    assert ["low/1.png skipped" in record.getMessage() for record in caplog.records] == [True]


# 16 bits


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_of_16_bits_keeps_them(channels: int, deep: np.ndarray, tmp_path: Path) -> None:
    pixels = deep[..., :channels]
    deep_png(tmp_path / "x.png", pixels)
    values = pixels.astype(np.float64) / 65535
    colors = values[..., : channels - 1] if channels in (2, 4) else values
    if channels in (2, 4):
        colors = values[..., -1:] * colors + 1 - values[..., -1:]
    expected = torch.from_numpy(np.broadcast_to(colors, (5, 7, 3)).copy()).permute(2, 0, 1).float()
    torch.testing.assert_close(read_image(tmp_path / "x.png"), expected, rtol=0, atol=1e-6)


def test_a_transparent_color_of_16_bits_is_white(deep: np.ndarray, tmp_path: Path) -> None:
    pixels = deep[..., :3]
    deep_png(tmp_path / "x.png", pixels, (b"tRNS", struct.pack(">HHH", *map(int, pixels[2, 3]))))
    found = read_image(tmp_path / "x.png")
    assert (found[:, 2, 3] == 1).all()
    assert float(found[0, 0, 0]) == pytest.approx(pixels[0, 0, 0] / 65535, abs=1e-6)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_tiff_of_16_bits_keeps_them(planar: Any, deep: np.ndarray, tmp_path: Path) -> None:
    pixels = deep[..., :3] if planar == "contig" else np.moveaxis(deep[..., :3], -1, 0)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb", planarconfig=planar)
    expected = torch.from_numpy(deep[..., :3].astype(np.float32) / 65535).permute(2, 0, 1)
    torch.testing.assert_close(read_image(tmp_path / "x.tif"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_of_16_bits_is_turned_as_one_of_8(orientation: int, deep: np.ndarray, tmp_path: Path) -> None:
    high = (deep[..., :3] // 256).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(high).save(tmp_path / "8.png", exif=exif)
    deep_png(tmp_path / "16.png", high.astype(np.uint16) * 257, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    eight, sixteen = read_image(tmp_path / "8.png"), read_image(tmp_path / "16.png")
    assert eight.shape == ((3, 7, 5) if orientation > 4 else (3, 5, 7))
    torch.testing.assert_close(sixteen, eight, rtol=0, atol=1e-6)


def test_a_ppm_of_16_bits_says_that_it_is_read_with_8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.ppm").write_bytes(b"P6 2 1 65535\n" + np.full(6, 30000, ">u2").tobytes())
    assert float(read_image(tmp_path / "x.ppm")[0, 0, 0]) == pytest.approx(30000 / 65535, abs=1 / 255)
    assert "8 bits" in caplog.text


# memory


def test_photographs_of_a_folder_are_kept_as_bytes_and_give_the_same_crops(tmp_path: Path) -> None:
    for name in range(5):
        pixels = np.random.default_rng(name).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    train, held_out = photographs(tmp_path, smallest=16)
    assert {image.dtype for image in (*train.values(), *held_out.values())} == {torch.uint8}
    floats = [read_image(tmp_path / name) for name in train]

    def crops(photos: Any) -> Tensor:
        return random_crops(photos, 6, 12, torch.Generator().manual_seed(3))

    assert torch.equal(crops(train.in_order), crops(floats))
    assert torch.equal(grid_crops(next(iter(train.values())), 12, 4), grid_crops(floats[0], 12, 4))
    made = levels(train, smallest=16)
    expected = [level for photo in floats for level in pyramid(photo, 16)]
    assert len(made) == len(expected) and all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_no_more_is_kept_than_was_said() -> None:
    made: list[int] = []

    def make(number: int) -> Tensor:
        made.append(number)
        return torch.full((10,), number, dtype=torch.uint8)

    tensors = LazyTensors([partial(make, number) for number in range(4)], keep=25)
    assert [int(tensors[number][0]) for number in (0, 1, 0, 2, 0, 1, -1)] == [0, 1, 0, 2, 0, 1, 3]
    assert made == [0, 1, 2, 1, 3]
    with pytest.raises(IndexError):
        tensors[4]


# what is restored


def test_a_restored_image_that_is_not_finite_is_named_and_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / "in" / f"{name}.png", value=50 if name == "b" else 100)

    def restore(image: Tensor, _: int) -> Tensor:
        return image if float(image.mean()) > 0.3 else image * float("nan")

    with pytest.raises(FloatingPointError, match="1 restored images are not finite and not written, b.png first"):
        restore_folder(tmp_path / "in", tmp_path / "out", restore)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    assert "b.png is not written: 192 values" in caplog.text
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="`out` should be a folder, found the file .*file"):
            restore_folder(tmp_path / "in", out, restore)


def test_a_folder_of_hidden_files_holds_no_images(tmp_path: Path) -> None:
    write(tmp_path / "._x.png", size=100)
    with pytest.raises(ValueError, match="should hold an image of at least 16x16"):
        load_folder(tmp_path, smallest=16)
