"""How does a network restore a picture that is too large for it at once?"""

from collections.abc import Callable

import torch
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
