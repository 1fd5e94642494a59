"""The photographs that are available without a download, and crops of photographs.

Those in the wheels of scikit-image and scikit-learn. They are split once and for all: the prior that ships was trained
on ``TRAIN``, and nothing in this project trains on ``HELD_OUT``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common.data.folder import Images, LazyTensors, a_tenth, image_files, load_folder, unit

TRAIN = (
    "astronaut",
    "brick",
    "china",
    "clock",
    "coins",
    "flower",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "motorcycle_left",
    "motorcycle_right",
    "retina",
)
HELD_OUT = ("camera", "chelsea", "coffee", "rocket")
SCALES = (1.0, 0.75, 0.5)
"""The sizes of :func:`pyramid`."""


def load_photo(name: str) -> Tensor:
    """One photograph as a (3, H, W) float tensor in [0, 1]; gray ones have three equal channels."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    if name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
    elif name.startswith("motorcycle_"):
        pixels = skimage.data.stereo_motorcycle()[("left", "right").index(name.removeprefix("motorcycle_"))]
    else:
        pixels = getattr(skimage.data, name)()
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def photographs(folder: Path | None, *, smallest: int) -> tuple[Images, Images]:
    """Photographs to train on and held-out ones, by name: the built-in split, or that of a folder of images.

    Of a folder the tenth that is tested in pairs is kept from the training, and more up to a quarter or four images;
    the first four of these are held out. Of a single image the right third is.

    Raises:
        ValueError: If the folder holds nothing to train on that is large enough (:func:`load_folder`).
    """
    if folder is None:
        train, held_out = ({name: partial(load_photo, name) for name in names} for names in (TRAIN, HELD_OUT))
        return Images(train), Images(held_out)
    files = image_files(folder)
    images = load_folder(folder, smallest=smallest, files=files)
    if len(files) == 1:
        ((name, image),) = images.items()
        cut = image.shape[2] * 2 // 3
        if image.shape[2] - cut < smallest:
            raise ValueError(f"{folder} holds one image; to be split it should be {3 * smallest} wide, or add another.")
        return Images({name: lambda: image[:, :, :cut]}), Images({name: lambda: image[:, :, cut:]})
    tenth = {str(path.relative_to(folder)) for path in a_tenth(files, folder)}
    kept, others = ([name for name in images if (name in tenth) == side] for side in (True, False))
    more = max(0, min(4, max(1, len(images) // 4)) - len(kept))
    kept, others = kept + others[:more], others[more:]
    if not others:
        raise ValueError(f"{folder} should hold two images of at least {smallest} pixels, found {len(images)}.")
    return images.subset(others), images.subset(kept[:4])


def pyramid(photo: Tensor, smallest: int, scales: Sequence[float] = SCALES) -> list[Tensor]:
    """The photograph at several sizes (antialiased), as far as its short side stays at least ``smallest``.

    Shrunk photographs are sharper: they hold the fine detail that the camera's optics took from the full size.
    """
    return [_resized(photo, size) for size in _sizes(photo, smallest, scales)]


def levels(photos: Images, smallest: int) -> LazyTensors:
    """The :func:`pyramid` of every photograph, one after the other, each level made when it is asked for."""
    makers: list[Callable[[], Tensor]] = []
    for name, photo in photos.items():
        makers += [partial(_level, photos, name, size) for size in _sizes(photo, smallest, SCALES)]
    return LazyTensors(makers)


def _level(photos: Images, name: str, size: tuple[int, int]) -> Tensor:
    return _resized(photos[name], size)


def _sizes(photo: Tensor, smallest: int, scales: Sequence[float]) -> list[tuple[int, int]]:
    sizes = [(round(photo.shape[1] * s), round(photo.shape[2] * s)) for s in scales]
    return [size for size in sizes if min(size) >= smallest]


def _resized(photo: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(unit(photo)[None], size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)


def random_crops(photos: Sequence[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """``count`` square crops, each from a random photograph, turned and mirrored at random: (count, 3, size, size)."""

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    crops = []
    for _ in range(count):
        photo = photos[draw(len(photos))]
        top, left = draw(photo.shape[1] - size + 1), draw(photo.shape[2] - size + 1)
        crop = photo[:, top : top + size, left : left + size].rot90(draw(4), dims=(1, 2))
        crops.append(unit(crop.flip(2) if draw(2) else crop))
    return torch.stack(crops)


def grid_crops(photo: Tensor, size: int, count: int) -> Tensor:
    """``count`` crops spread evenly over the photograph, the same at every call: (count, 3, size, size)."""
    height, width = photo.shape[1] - size, photo.shape[2] - size
    rows = max(1, round((count * photo.shape[1] / photo.shape[2]) ** 0.5))
    columns = -(-count // rows)
    centers = [((r + 0.5) / rows, (c + 0.5) / columns) for r in range(rows) for c in range(columns)]
    chosen = [centers[i * len(centers) // count] for i in range(count)]
    corners = [(round(y * height), round(x * width)) for y, x in chosen]
    return torch.stack([unit(photo[:, top : top + size, left : left + size]) for top, left in corners])
