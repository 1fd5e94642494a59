"""Which pictures in this folder can be trained on, and why not the others?"""

import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

logger = logging.getLogger(__name__)

UNREADABLE = (
    UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError, LookupError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow and ElementTree raise for a damaged file."""


def load_folder(folder: Path, *, smallest: int) -> dict[str, Tensor]:
    """Every picture below ``folder`` as a (3, H, W) float tensor in [0, 1], by its path relative to the folder.

    Grey, palette, 16-bit, CMYK and transparent files are converted (transparency onto white, EXIF turned upright). What
    cannot be read, is no picture, or has a side shorter than ``smallest`` is named in a warning and left out.

    Raises:
        ValueError: If the folder does not exist or nothing in it can be used.
    """
    if not folder.is_dir():
        raise ValueError(f"There should be a folder of pictures, found none at {folder}.")
    pictures = {}
    for name, picture in read_folder(folder):
        if min(picture.shape[1:]) < smallest:
            logger.warning(
                "%s skipped: %dx%d pixels, at least %d wanted on each side",
                name, picture.shape[2], picture.shape[1], smallest,
            )  # fmt: skip
            continue
        pictures[name] = picture
    if not pictures:
        raise ValueError(
            f"The folder should hold a picture of at least {smallest}x{smallest} pixels, found none in {folder}."
        )
    return pictures


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Path relative to the folder, and picture, one after the other; what cannot be read is named in a warning."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        name = str(path.relative_to(folder))
        try:
            picture = read_picture(path)
        except UNREADABLE as error:
            logger.warning("%s skipped: %s", name, str(error).replace(str(path), "it") or type(error).__name__)
        else:
            yield name, picture


def restore_folder(pictures: Path, out: Path, restore: Callable[[Tensor, int], Tensor]) -> int:
    """Every picture below a folder, restored, under its name as PNG; ``a.png`` beside ``a.jpg`` as ``a.png.png``.

    Args:
        pictures: the folder; what cannot be read in it is named in a warning.
        out: where they go, outside of it.
        restore: (picture (1, 3, H, W), a number) -> restored; the number comes from the path in the folder alone.

    Returns:
        How many there are.

    Raises:
        ValueError: If there is no such folder, no picture in it, or ``out`` is in it.
    """
    if not pictures.is_dir():
        raise ValueError(f"`pictures` should be a folder, found {pictures}.")
    if out.resolve().is_relative_to(pictures.resolve()):
        raise ValueError(f"`out` should be outside of the pictures that are read, found {out} in {pictures}.")
    written: set[Path] = set()
    for name, picture in tqdm(read_folder(pictures), unit="picture"):
        file = (out / name).with_suffix(".png")
        if file in written:
            file = out / f"{name}.png"
        written.add(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_image(restore(picture[None], zlib.crc32(Path(name).as_posix().encode())), file)
    if not written:
        raise ValueError(f"`pictures` should hold a picture that can be read, found none in {pictures}.")
    logger.info("%d pictures restored, in %s", len(written), out)
    return len(written)


def read_picture(path: Path) -> Tensor:
    """One file as a (3, H, W) float tensor in [0, 1]."""
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I") or picture.mode == "F":  # deeper than 8 bits; Pillow's own convert would clip
            values = np.asarray(picture, dtype=np.float32)
            full = 65535 if picture.mode.startswith("I") else 1
            if not (values.min() >= 0 and values.max() <= full):
                raise ValueError(f"mode {picture.mode} with values from {values.min():g} to {values.max():g}")
            return torch.from_numpy(values / full).expand(3, -1, -1).clone()
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
