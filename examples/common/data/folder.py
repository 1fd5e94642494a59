"""Image files: which files of a folder are images, how one is read, and what is told of those that cannot be used."""

import functools
import logging
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.utils import save_image
from tqdm import tqdm

logger = logging.getLogger(__name__)

UNREADABLE = (
    UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError, LookupError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""The errors of Pillow and ElementTree for a damaged file."""


def image_files(folder: Path, pattern: str = "**/*") -> list[Path]:
    """The image files of a folder that match a pattern, sorted.

    Hidden files and folders (``._x.png``, ``.thumbnails/``) and directories are no images. Of a file whose suffix says
    nothing the first bytes are looked at; what is no image is named in a warning.

    Args:
        folder: where the pattern begins.
        pattern: as of :meth:`pathlib.Path.glob`; the default is everything below the folder.
    """
    found = []
    for path in sorted(folder.glob(pattern)):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or path.is_dir():
            continue
        if path.suffix.lower() in _suffixes() and path.exists():
            found.append(path)
            continue
        try:
            with Image.open(path):
                found.append(path)
        except UNREADABLE as error:
            logger.warning("%s skipped: %s", name, _reason(error, path))
    return found


def a_tenth(files: Collection[Path], root: Path) -> set[Path]:
    """A tenth of these files, rounded up, for the test, of one file none: by a checksum of their places below ``root``,
    so that hardly any change sides where files are added.
    """
    ranked = sorted(set(files), key=lambda path: (zlib.crc32(os.path.relpath(path, root).encode()), path))
    return set(ranked[: -(-len(ranked) // 10)]) if len(ranked) > 1 else set()


class Skipped:
    """Files that cannot be used, each named in one warning however often it is asked for (of each worker)."""

    def __init__(self) -> None:
        self._named: set[Path] = set()

    def __call__(self, path: Path, reason: str | BaseException) -> None:
        if path not in self._named:
            self._named.add(path)
            reason = _reason(reason, path) if isinstance(reason, BaseException) else reason
            logger.warning("%s skipped: %s", path, reason)


class LazyTensors(Sequence[Tensor]):
    """Tensors that are made when they are asked for; the latest ones are kept, up to a number of bytes.

    Args:
        makers: of each tensor; they give the same one at every call.
        keep: bytes.
    """

    def __init__(self, makers: Sequence[Callable[[], Tensor]], *, keep: int = 2**30) -> None:
        self._makers, self._keep, self._used = list(makers), keep, 0
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyTensors": ...
    def __getitem__(self, index: int | slice) -> "Tensor | LazyTensors":
        if isinstance(index, slice):
            return LazyTensors(self._makers[index], keep=self._keep)
        index = range(len(self))[index]
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        tensor = self._makers[index]()
        self._kept[index] = tensor
        self._used += tensor.nbytes
        while self._used > self._keep:
            self._used -= self._kept.popitem(last=False)[1].nbytes
        return tensor


class Images(Mapping[str, Tensor]):
    """Images by name, made when they are asked for: (3, H, W), uint8 in 0..255, or float in [0, 1] of deeper files.

    Args:
        makers: by name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)
        self._numbers = {name: number for number, name in enumerate(makers)}
        self.in_order = LazyTensors(list(makers.values()))

    def __getitem__(self, name: str) -> Tensor:
        return self.in_order[self._numbers[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def subset(self, names: Iterable[str]) -> "Images":
        """Some of them."""
        return Images({name: self._makers[name] for name in names})


def load_folder(folder: Path, *, smallest: int, files: Sequence[Path] | None = None) -> Images:
    """Every image below ``folder``, or these files of it, by its path relative to the folder; each has been read once,
    and will be again.

    Gray, palette, 16-bit, CMYK and transparent files are converted (transparency onto white, EXIF turned upright). What
    cannot be read, is no image, or has a side shorter than ``smallest`` is named in a warning and left out.

    Raises:
        ValueError: If the folder does not exist or nothing in it can be used.
    """
    if not folder.is_dir():
        raise ValueError(f"There should be a folder of images, found none at {folder}.")
    makers = {}
    for name, pixels in read_folder(folder, files):
        if min(pixels.shape[1:]) < smallest:
            logger.warning(
                "%s skipped: %dx%d pixels, at least %d wanted on each side",
                name, pixels.shape[2], pixels.shape[1], smallest,
            )  # fmt: skip
            continue
        makers[name] = partial(read_pixels, folder / name)
    if not makers:
        raise ValueError(
            f"The folder should hold an image of at least {smallest}x{smallest} pixels, found none in {folder}."
        )
    return Images(makers)


def read_folder(
    folder: Path, files: Sequence[Path] | None = None, *, progress: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Path relative to the folder, and pixels, of its images or of these files, one after the other; what cannot be
    read is named in a warning.
    """
    for path in tqdm(image_files(folder) if files is None else files, unit="image", disable=not progress):
        name = str(path.relative_to(folder))
        try:
            pixels = read_pixels(path)
        except UNREADABLE as error:
            logger.warning("%s skipped: %s", name, _reason(error, path))
        else:
            yield name, pixels


def restore_folder(images: Path, out: Path, restore: Callable[[Tensor, int], Tensor]) -> int:
    """Every image below a folder, restored, under its name as PNG; ``a.png`` beside ``a.jpg`` as ``a.png.png``.

    Args:
        images: the folder; what cannot be read in it is named in a warning.
        out: where they go, outside of it.
        restore: (image (1, 3, H, W), a number) -> restored; the number comes from the path in the folder alone.

    Returns:
        How many there are.

    Raises:
        ValueError: If there is no such folder, no image in it, or ``out`` is in it or no folder.
        FloatingPointError: At the end, if a restored image was not finite; it is named in a warning and not written.
    """
    if not images.is_dir():
        raise ValueError(f"`images` should be a folder, found {images}.")
    if out.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"`out` should be outside of the images that are read, found {out} in {images}.")
    check_folder(out)
    written: set[Path] = set()
    broken: list[str] = []
    for name, pixels in read_folder(images, progress=True):
        restored = restore(unit(pixels)[None], zlib.crc32(Path(name).as_posix().encode()))
        if wrong := int((~restored.isfinite()).sum()):
            logger.warning("%s is not written: %d values of the restored image are not finite", name, wrong)
            broken.append(name)
            continue
        file = (out / name).with_suffix(".png")
        if file in written:
            file = out / f"{name}.png"
        written.add(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_image(restored, file)
    if not written and not broken:
        raise ValueError(f"`images` should hold an image that can be read, found none in {images}.")
    logger.info("%d images restored, in %s", len(written), out)
    if broken:
        raise FloatingPointError(f"{len(broken)} restored images are not finite and not written, {broken[0]} first.")
    return len(written)


def check_folder(path: Path, name: str = "out") -> None:
    """Raise ``ValueError`` unless a path is a folder or can become one."""
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ValueError(f"`{name}` should be a folder, found the file {there}.")


def read_image(path: Path) -> Tensor:
    """One file as a (3, H, W) float tensor in [0, 1]."""
    return unit(read_pixels(path))


def image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) as the file says, without reading its pixels; None if it cannot be read."""
    try:
        with Image.open(path) as header:
            width, height = header.size
            return width, height
    except UNREADABLE:
        return None


def with_degraded(clean: Tensor, degraded: Path) -> Tensor:
    """A clean image and, from a file, its degraded one as (6, H, W)."""
    other = read_image(degraded)
    if other.shape != clean.shape:
        sizes = f"{other.shape[2]}x{other.shape[1]} pixels, its clean image has {clean.shape[2]}x{clean.shape[1]}"
        raise ValueError(sizes)
    return torch.cat([clean, other])


def unit(pixels: Tensor) -> Tensor:
    """Pixels as :func:`read_pixels` gives them, or a part of them, as float in [0, 1]."""
    return pixels if pixels.is_floating_point() else pixels.float() / 255


def read_pixels(path: Path) -> Tensor:
    """One file as a (3, H, W) tensor: uint8 in 0..255, or float in [0, 1] of a file of more than 8 bits."""
    with Image.open(path) as file:
        if file.mode in ("RGB", "RGBA") and _bits(file) == 16:
            if file.format in ("PNG", "TIFF"):
                return _deep(path, file)
            logger.warning("%s is read with 8 bits for each color, of 16: only PNG and TIFF are read with all", path)
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I") or image.mode == "F":  # deeper than 8 bits; Pillow's own convert would clip
            values = np.asarray(image, dtype=np.float32)
            full = 65535 if image.mode.startswith("I") else 1
            if not (values.min() >= 0 and values.max() <= full):
                raise ValueError(f"mode {image.mode} with values from {values.min():g} to {values.max():g}")
            return torch.from_numpy(values / full).expand(3, -1, -1).clone()
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _deep(path: Path, file: Image.Image) -> Tensor:
    """A file of 16 bits for each color, of which Pillow would read 8: as float in [0, 1], transparency onto white."""
    values: NDArray[Any]
    if file.format == "PNG":
        values = decode_image(read_file(str(path)), ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    else:
        import tifffile

        with tifffile.TiffFile(path) as tiff:
            values = tiff.pages[0].asarray()
        if values.shape[:2] != (file.height, file.width):  # a plane for each color
            values = np.moveaxis(values, 0, -1)
    colors = values[..., :3].astype(np.float32) / 65535
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:].astype(np.float32) / 65535
        colors = colors[..., : values.shape[2] - 1]
        colors = alpha * colors + (1 - alpha)
    elif "transparency" in file.info:
        colors[(values == np.array(file.info["transparency"])).all(-1)] = 1
    turned = file.getexif().get(0x0112, 1)  # orientation
    if turned in (5, 6, 7, 8):
        colors = colors.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        colors = colors[::-1]
    if turned in (2, 3, 6, 7):
        colors = colors[:, ::-1]
    return torch.from_numpy(colors.copy()).permute(2, 0, 1).expand(3, -1, -1).contiguous()


def _bits(file: Any) -> int:
    """The bits of each color in the file, of which Pillow reads 8."""
    if file.format == "TIFF":
        return int(max(file.tag_v2.get(258, (8,))))
    args: Any = file.tile[0].args if file.tile else ""
    if file.format == "PPM":
        return 16 if isinstance(args, tuple) and args[1] > 255 else 8
    return 16 if file.format == "PNG" and ";16" in args else 8


@functools.cache
def _suffixes() -> frozenset[str]:
    """The suffixes of the formats that Pillow reads."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def _reason(error: BaseException, path: Path) -> str:
    return str(error).replace(repr(str(path)), "it").replace(str(path), "it") or type(error).__name__
