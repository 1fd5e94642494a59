"""How does a network restore pictures of any size: too large for it at once, too small, or of many sizes together?"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def tiled(function: Callable[[Tensor], Tensor], picture: Tensor, *, tile: int, overlap: int) -> Tensor:
    """A function of pictures, applied to overlapping tiles and faded from each into the next.

    Args:
        function: (N, C, h, w) -> (N, C', h, w).
        picture: (N, C, H, W); sides below ``tile`` are one tile.
        tile: side of the tiles in pixels.
        overlap: pixels that neighbours share at least, from 0 to half a tile.

    Raises:
        ValueError: For an overlap out of these bounds.
    """
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"`overlap` should be from 0 to half a tile ({tile // 2}), found {overlap}.")
    height, width = picture.shape[2:]
    total: Tensor | None = None
    weights = picture.new_zeros(1, 1, height, width)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            place = (..., slice(top, min(top + tile, height)), slice(left, min(left + tile, width)))
            part = function(picture[place])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            fade = _fade(part.shape[2], overlap, part)[:, None] * _fade(part.shape[3], overlap, part)
            total[place] += fade * part
            weights[place] += fade
    assert total is not None
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """The first pixels of tiles that cover ``size``, evenly apart."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(k * (size - tile) / (count - 1)) for k in range(count)]


def _fade(size: int, overlap: int, like: Tensor) -> Tensor:
    """1, falling linearly towards both ends over the overlap; never 0."""
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    edge = torch.minimum(place, size - 1 - place) + 1
    return (edge / (overlap + 1)).clamp(max=1)


def together(pictures: Tensor | Sequence[Tensor], multiple: int, smallest: int = 0) -> Tensor:
    """Pictures as one batch: continued by their last pixels, to the right and below, to one size.

    Args:
        pictures: (N, 3, H, W), or (3, H, W) of any sizes.
        multiple: of the sides.
        smallest: side.
    """
    height, width = (
        -(-max(smallest, *(picture.shape[dim] for picture in pictures)) // multiple) * multiple for dim in (1, 2)
    )
    return torch.cat(
        [
            F.pad(picture[None], (0, width - picture.shape[2], 0, height - picture.shape[1]), mode="replicate")
            for picture in pictures
        ]
    )


def apart(pictures: Tensor, like: Any) -> Any:
    """One batch cut to the sizes, and in the form, of what :func:`together` was given."""
    if isinstance(like, Tensor):
        return pictures[..., : like.shape[2], : like.shape[3]]
    return [picture[:, : one.shape[1], : one.shape[2]] for picture, one in zip(pictures, like, strict=True)]
