"""Filters of the corruptions: Gaussian blur, smear along a line, enlargement, and drops lit from the side."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from restoreloss.generators import uniform
from restoreloss.images import continued

Generator: TypeAlias = torch.Generator | None


def relief(liquid: Tensor, limit: int = 20) -> Tensor:
    """Drops lit from the upper left: the distance to the nearest edge, up to ``limit``, equalized and embossed."""
    edge = _edges(liquid)
    squared = torch.where(edge, 0, limit**2).to(liquid.dtype)
    for _ in range(2):  # First along the rows, then along the columns.
        padded, width = F.pad(squared, (limit, limit), value=limit**2), squared.shape[3]
        steps = (padded[..., limit + k : limit + k + width] + k**2 for k in range(-limit, limit + 1))
        squared = functools.reduce(torch.minimum, steps).transpose(2, 3)
    distance = (_filter(squared.sqrt(), _MEAN) + 1e-3).long().flatten(1)
    at_most = (distance[:, None] <= torch.arange(limit + 1, device=liquid.device)[:, None]).to(liquid.dtype).mean(dim=2)
    share = at_most.gather(1, distance)
    least = share.amin(dim=1, keepdim=True)
    height = ((share - least) / (1 - least).clamp(min=1e-6)).view_as(squared)
    return _filter(_filter(height, _EMBOSS).clamp(0, 1), _MEAN)


def _edges(x: Tensor, least: float = 50) -> Tensor:
    """Canny's thin edges: ridges of the gradient, looked for across them, of a steepness above ``least``."""
    right, down = _filter(x, _SOBEL), _filter(x, tuple(zip(*_SOBEL, strict=True)))
    steep = F.pad(right.abs() + down.abs(), (1, 1, 1, 1))

    def ridge(row: int, column: int) -> Tensor:
        before, after = (steep.roll((k * row, k * column), (2, 3)) for k in (1, -1))
        beyond = steep > after if row and column else steep >= after
        return ((steep > before) & beyond)[..., 1:-1, 1:-1]

    slope = math.tan(math.pi / 8)
    ridges = torch.where(right * down < 0, ridge(1, -1), ridge(1, 1))
    ridges = torch.where(right.abs() < slope * down.abs(), ridge(1, 0), ridges)
    ridges = torch.where(down.abs() < slope * right.abs(), ridge(0, 1), ridges)
    return ridges & (steep > least)[..., 1:-1, 1:-1]


_SOBEL = ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))
_MEAN = ((1 / 9,) * 3,) * 3
_EMBOSS = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))


def _filter(x: Tensor, kernel: Sequence[Sequence[float]]) -> Tensor:
    """Correlation with 3 x 3 weights, edges mirrored."""
    taps = [(row, column, weight) for row, line in enumerate(kernel) for column, weight in enumerate(line)]
    return _weigh(F.pad(x, (1, 1, 1, 1), mode="reflect"), x.shape, taps)


def smooth(x: Tensor, sigma: tuple[float, float], *, truncate: float = 4, mirror: bool = False) -> Tensor:
    """Gaussian blur, down and right, up to ``truncate`` sigmas; beyond the edge is its pixel, or the mirrored image."""
    for dim, width in ((2, sigma[0]), (3, sigma[1])):
        reach, side = int(truncate * width + 0.5), x.shape[dim]
        place = torch.arange(-reach, side + reach, device=x.device)
        if mirror:
            place = place.remainder(2 * side)
            place = torch.minimum(place, 2 * side - 1 - place)
        weights = [math.exp(-0.5 * (k / width) ** 2) for k in range(-reach, reach + 1)]
        taps = [(k, 0, w / sum(weights)) if dim == 2 else (0, k, w / sum(weights)) for k, w in enumerate(weights)]
        x = _weigh(continued(x, dim, place.clamp(0, side - 1), reach), x.shape, taps)
    return x


def drag(x: Tensor, radius: int, sigma: float, degrees: tuple[float, float], generator: Generator) -> Tensor:
    """Every image smeared along a line of its own: half a Gaussian over 2 radius + 1 pixels, the edge goes on."""
    reach = 2 * radius
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(reach + 1)]
    low, high = degrees
    angles = torch.deg2rad(low + (high - low) * uniform(x[:, 0, 0, 0], generator)).tolist()
    smeared = []
    for image, angle in zip(F.pad(x, (reach,) * 4, mode="replicate"), angles, strict=True):
        line = [[reach + math.ceil(k * side(angle) - 0.5) for k in range(reach + 1)] for side in (math.sin, math.cos)]
        taps = zip(*line, [weight / sum(weights) for weight in weights], strict=True)
        smeared.append(_weigh(image, x.shape, taps))
    return torch.stack(smeared)


def _weigh(padded: Tensor, size: Sequence[int], taps: Iterable[tuple[int, int, float]]) -> Tensor:
    """Weighted sum of windows of ``size``, each given by the row and the column where it begins."""
    height, width = size[-2:]
    taps = list(taps)
    total = padded.new_zeros(*padded.shape[:-2], height, width)
    block = 64 if total.device.type == "cpu" else height  # So many rows stay in the cache of a processor.
    for top in range(0, height, block):
        part = total[..., top : top + block, :]
        for row, column, weight in taps:
            window = padded[..., top + row : top + row + part.shape[-2], column : column + width]
            part.add_(window, alpha=weight)
    return total


def zoom(x: Tensor, factor: float) -> Tensor:
    """The middle of images, enlarged to their size or a little more, corners onto corners."""
    kept = [math.ceil(side / factor) for side in x.shape[2:]]
    top, left = ((side - part) // 2 for side, part in zip(x.shape[2:], kept, strict=True))
    middle = x[..., top : top + kept[0], left : left + kept[1]]
    size = [round(part * factor) for part in kept]
    return F.interpolate(middle, size=size, mode="bilinear", align_corners=True)
