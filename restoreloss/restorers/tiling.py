"""Images of any size: too large at once, in overlapping tiles; of many sizes, in one batch."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from restoreloss.checks import check_integer


def tiled(
    function: Callable[..., Tensor],
    image: Tensor,
    *,
    tile: int | None,
    overlap: int | None = None,
    multiple: int = 1,
    fields: Sequence[Tensor] = (),
    step: int = 1,
    scale: int = 1,
) -> Tensor:
    """A function of images, applied to overlapping tiles and faded from each into the next.

    Args:
        function: (N, C, h, w), and the part of each of ``fields`` -> (N, C', scale h, scale w).
        image: (N, C, H, W); sides below ``tile`` are one tile.
        tile: side of the tiles in pixels, brought to a multiple; None for the whole image at once.
        overlap: pixels that neighbors share at least, from 0 to half a tile; a quarter by default.
        multiple: of the sides that the function takes.
        fields: maps of the whole image at a ``step`` times lower resolution, (N, c, H / step, W / step). Noise that is
            drawn once for the whole image lets neighbors agree where they overlap.
        step: tiles begin at multiples of it; ``tile`` and the sides should be multiples too.
        scale: by which the function enlarges.

    Raises:
        ValueError: For an overlap out of these bounds, and sizes that are no multiples of ``step``.
    """
    if tile is None:
        return function(image, *fields)
    check_integer("step", step)
    tile = -(-check_integer("tile", tile) // multiple) * multiple
    overlap = tile // 4 if overlap is None else check_integer("overlap", overlap, low=0)
    if overlap > tile // 2:
        raise ValueError(f"`overlap` should be from 0 to half a tile ({tile // 2}), found {overlap}.")
    height, width = image.shape[2:]
    if height % step or width % step or tile % step:
        raise ValueError(f"`tile` and the sides should be multiples of {step}, found {tile} and {height}x{width}.")
    if max(height, width) <= tile:
        return function(image, *fields)
    total: Tensor | None = None
    weights = image.new_zeros(1, 1, scale * height, scale * width)
    for top in _starts(height, tile, overlap, step):
        for left in _starts(width, tile, overlap, step):
            rows, columns = slice(top, min(top + tile, height)), slice(left, min(left + tile, width))
            coarse = [slice(side.start // step, side.stop // step) for side in (rows, columns)]
            part = function(image[..., rows, columns], *(field[..., coarse[0], coarse[1]] for field in fields))
            if total is None:
                total = part.new_zeros(*part.shape[:2], scale * height, scale * width)
            fade = _fade(part.shape[2], scale * overlap, part)[:, None] * _fade(part.shape[3], scale * overlap, part)
            large = [slice(scale * side.start, scale * side.stop) for side in (rows, columns)]
            total[..., large[0], large[1]] += fade * part
            weights[..., large[0], large[1]] += fade
    assert total is not None
    return total / weights


def tile_if_larger(images: Tensor, tile: int | None) -> int | None:
    """The side of the tiles, None for images that fit into one, which stay whole however much they are enlarged."""
    return tile if tile is None or max(images.shape[2:]) > check_integer("tile", tile) else None


def _starts(size: int, tile: int, overlap: int, step: int) -> list[int]:
    """The first pixels of tiles that cover ``size``, evenly apart, at multiples of ``step``."""
    if size <= tile:
        return [0]
    starts: list[int] = []
    for shared in (overlap, min(overlap + step - 1, tile - step)):  # Rounding moves a start by less than a step.
        count = -(-(size - shared) // (tile - shared))
        starts = [step * round(k * (size - tile) / (count - 1) / step) for k in range(count)]
        if all(after - before <= tile - overlap for before, after in pairwise(starts)):
            break
    return starts


def _fade(size: int, overlap: int, like: Tensor) -> Tensor:
    """1, falling linearly towards both ends over the overlap; never 0."""
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    edge = torch.minimum(place, size - 1 - place) + 1
    return (edge / (overlap + 1)).clamp(max=1)


def pad_to_batch(images: Tensor | Sequence[Tensor], multiple: int, smallest: int = 0) -> Tensor:
    """Images as one batch: continued by their last pixels, to the right and below, to one size.

    Args:
        images: (N, 3, H, W), or (3, H, W) of any sizes.
        multiple: what the sides should be multiples of.
        smallest: the least that the sides should be.
    """
    height, width = (
        -(-max(smallest, *(image.shape[dim] for image in images)) // multiple) * multiple for dim in (1, 2)
    )
    return torch.cat(
        [
            F.pad(image[None], (0, width - image.shape[2], 0, height - image.shape[1]), mode="replicate")
            for image in images
        ]
    )


def crop_to(images: Tensor, like: Any) -> Any:
    """One batch cut to the sizes, and in the form, of what :func:`pad_to_batch` was given."""
    if isinstance(like, Tensor):
        return images[..., : like.shape[2], : like.shape[3]]
    return [image[:, : one.shape[1], : one.shape[2]] for image, one in zip(images, like, strict=True)]


def upscale_to_side(images: Tensor, smallest: int) -> Tensor:
    """Images enlarged (bicubic) until the shorter side is at least ``smallest``."""
    height, width = images.shape[2:]
    factor = smallest / min(height, width)
    if factor <= 1:
        return images
    size = (round(height * factor), round(width * factor))
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False)


def resize_to(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images of this size, (height, width), by bicubic interpolation with antialiasing where they have another."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bicubic", align_corners=False, antialias=True)
