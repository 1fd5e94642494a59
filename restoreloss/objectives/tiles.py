"""Tiles: one random tile of each image, chosen and weighted so that its average over the choices is the whole."""

from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from restoreloss.checks import describe
from restoreloss.generators import Generators, integers


@dataclass(frozen=True)
class Tiles:
    """One tile of each image, drawn from those that cover it.

    Attributes:
        size: height and width of a tile.
        starts: where tiles begin, by row and by column; neighbors may overlap.
        valid: height and width of the image; what lies beyond was padded and has no weight.
        chosen: for rows and for columns, the number of the tile of each sample, (N,) each.
    """

    size: tuple[int, int]
    starts: tuple[list[int], list[int]]
    valid: tuple[int, int]
    chosen: tuple[Tensor, Tensor]

    @classmethod
    def draw(
        cls, image: Tensor, crop: int | float, *, valid: tuple[int, int], multiple: int, square: bool = False,
        generator: Generators = None,
    ) -> "Tiles":  # fmt: skip
        """One of the tiles for each sample, all equally likely.

        Args:
            image: padded to a multiple, (N, C, H, W).
            crop: side of a tile in pixels, an integer, or its share of each side, a float; brought to a multiple.
            valid: height and width before it was padded.
            multiple: what sizes and positions of tiles must be multiples of.
            square: make tiles as high as wide.
            generator: for the choice, on its own device; one, or one for each sample.

        Raises:
            ValueError: If the image is smaller than the tile.
        """
        if isinstance(crop, int) and crop > min(valid):
            raise ValueError(f"`crop` should be at most the size of the images {valid[0]}x{valid[1]}, found {crop}.")
        sides: list[int] = []
        for padded, length in zip(image.shape[-2:], valid, strict=True):
            wanted = crop if isinstance(crop, int) else crop * length
            rounded = round(wanted / multiple) if isinstance(crop, float) else -(-wanted // multiple)
            sides.append(min(padded, multiple * max(1, int(rounded))))
        sides = [min(sides)] * 2 if square else sides
        starts = [_starts(padded, side, multiple) for padded, side in zip(image.shape[-2:], sides, strict=True)]
        rows, columns = (
            integers(0, len(firsts), len(image), generator, image.device).to(image.device) for firsts in starts
        )
        return cls((sides[0], sides[1]), (starts[0], starts[1]), valid, (rows, columns))

    def cut(self, image: Tensor) -> Tensor:
        """The tile of each image, (N, C, h, w)."""
        for dim, size, starts, chosen in zip((2, 3), self.size, self.starts, self.chosen, strict=True):
            if len(starts) == 1:
                continue
            pixels = _positions(tuple(starts), size, image.device)[chosen]
            shape = [len(image), 1, 1, 1]
            shape[dim] = size
            target = list(image.shape)
            target[dim] = size
            image = image.gather(dim, pixels.view(shape).expand(target))
        return image

    def check_steps(self, latents: Tensor) -> None:
        """Raise ``ValueError`` where tiles do not begin at a step of what an encoder made of them."""
        for cells, size, starts in zip(latents.shape[-2:], self.size, self.starts, strict=True):
            if any(start * cells % size for start in starts):
                raise ValueError(
                    f"`crop` should give tiles at multiples of the encoder's step, {size / cells:g} pixels, found "
                    f"tiles of {size} at {starts}."
                )

    def weights(self, features: Tensor) -> Tensor | None:
        """The weight of each cell of a map of the tiles, (N, 1, h, w); None where all are alike, or for what is no map.

        The mean over all choices of the weighted mean of a tile is the mean over the map of the image.
        """
        if features.ndim != 4:
            return None
        sides = []
        for cells, size, starts, valid, chosen in zip(
            features.shape[-2:], self.size, self.starts, self.valid, self.chosen, strict=True
        ):
            pixels, rest = divmod(size, cells)
            if rest or any(start % pixels for start in starts):
                return None
            firsts = tuple(start // pixels for start in starts)
            sides.append((firsts, cells, -(-valid // pixels), chosen))
        if all(_alike(*side[:3]) for side in sides):
            return None
        rows, columns = (_table(*side[:3], features.device)[side[3]] for side in sides)
        return rows[:, None, :, None] * columns[:, None, None, :]


# What does not depend on the draw is put on the device once: to copy it there waits for the device. It may serve inside
# of inference mode first and in training later, which refuses tensors made there.


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _positions(firsts: tuple[int, ...], cells: int, device: torch.device) -> Tensor:
    """The cells of each tile along a side, (tiles, cells)."""
    return torch.tensor(firsts, device=device)[:, None] + torch.arange(cells, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _table(firsts: tuple[int, ...], cells: int, length: int, device: torch.device) -> Tensor:
    """The weight of each cell of each tile along a side, (tiles, cells); cells beyond ``length`` have 0."""
    position = _positions(firsts, cells, torch.device("cpu"))
    coverage = torch.bincount(position.flatten())
    table = torch.where(position < length, len(firsts) * cells / (length * coverage[position].double()), 0.0)
    return table.float().to(device)


@lru_cache(maxsize=64)
def _alike(firsts: tuple[int, ...], cells: int, length: int) -> bool:
    """Whether all cells of all tiles have the weight 1."""
    return bool((_table(firsts, cells, length, torch.device("cpu")) == 1).all())


def _starts(length: int, size: int, multiple: int) -> list[int]:
    """The fewest tiles that cover a length, evenly spread."""
    count = -(-length // size)
    if count == 1:
        return [0]
    return [multiple * round(number * (length - size) / (count - 1) / multiple) for number in range(count)]


def check_share(name: str, value: Any) -> int | float:
    """The value as an integer above 0 or a share in (0, 1], or ``ValueError``."""
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < float(value) <= 1:
        return float(value)
    raise ValueError(f"`{name}` should be an integer above 0 or a share in (0, 1], found {describe(value)}.")
