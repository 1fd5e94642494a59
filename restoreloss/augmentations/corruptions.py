"""The nineteen corruptions of ImageNet-C, of five severities each, on batches of tensors."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss.augmentations.imagenet_c import APPLY, WITH_LENGTHS
from restoreloss.checks import check_integer, check_number
from restoreloss.generators import Generators, check_generators, uniform
from restoreloss.images import RangeWatch, at_least_float32, check_images, check_range, into_range, warn_if_out_of_range

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),
)
"""The fifteen of ImageNet-C, and the four that its authors keep for validation."""

CLEAN = "clean"
"""A name that :class:`Corruptions` may draw: the image stays as it is."""

_SMALLEST = 8
T = TypeVar("T")


@torch.no_grad()
def corrupt(
    image: Tensor,
    name: str | Sequence[str],
    severity: int | Sequence[int],
    *,
    extent: float = 1.0,
    generator: Generators = None,
) -> Tensor:
    r"""A corruption of ImageNet-C, of every image with randomness of its own.

    ===================== ================================================================= ==========================
    name                  what it does to :math:`x`, with :math:`n` standard normal         for severity 1, 2, 3, 4, 5
    ===================== ================================================================= ==========================
    ``gaussian_noise``    :math:`x + c n`                                                   c .08, .12, .18, .26, .38
    ``shot_noise``        :math:`\text{Poisson}(c x) / c`                                   c 60, 25, 12, 5, 3
    ``impulse_noise``     a share c of all values becomes 0 or 1, at random                 c .03, .06, .09, .17, .27
    ``defocus_blur``      mean over a disk, its edge softened                               radius 3, 4, 6, 8, 10
    ``glass_blur``        blur, pixels copied from near by in one to three passes, blur     within 1, 2, 2, 3, 4
    ``motion_blur``       half a Gaussian along a line within 45 degrees of the horizontal  sigma 3, 5, 8, 12, 15
    ``zoom_blur``         mean of enlargements of the middle                                to 1.11, 1.15, 1.2, 1.24,
                                                                                            1.3
    ``snow``              flakes that fall aslant, the image below them whiter              flakes of 3, 2, 4, 4.5, 2.5
    ``frost``             :math:`a x + b \cdot \text{ice}`                                  a 1, .8, .7, .65, .6 and
                                                                                            b .4, .6, .7, .7, .75
    ``fog``               :math:`(x + c f) m / (m + c)`, f a plasma fractal, m the maximum  c 1.5, 2, 2.5, 2.5, 3
    ``brightness``        value of HSV plus c                                               c .1, .2, .3, .4, .5
    ``contrast``          :math:`c (x - \bar x) + \bar x`, with the mean of each channel    c .4, .3, .2, .1, .05
    ``elastic_transform`` pixels moved by c times a smooth random field                     c 12.5, 16.25, 21.25, 25,
                                                                                            30
    ``pixelate``          cells of one color                                                .6, .5, .4, .3, .25 of the
                                                                                            pixels of a side
    ``jpeg_compression``  through the codec                                                 quality 25, 18, 15, 10, 7
    ``speckle_noise``     :math:`x + c x n`                                                 c .15, .2, .35, .45, .6
    ``gaussian_blur``                                                                       sigma 1, 2, 3, 4, 6
    ``spatter``           drops of water, from severity 4 splashes of mud                   blobs of sigma 4, 3, 2, 1, 1
    ``saturate``          saturation of HSV times c plus d                                  c .3, .1, 2, 5, 20 and
                                                                                            d 0, 0, 0, .1, .2
    ===================== ================================================================= ==========================

    Args:
        image: float (N, 3, H, W) in [0, 1], what is outside is clipped; sides of 8 pixels or more. Half precision is
            computed in single. On the CPU images that are clearly of another range, 0..255 or -1..1, warn;
            :class:`Corruptions` looks once, on any device.
        name: one of :data:`CORRUPTIONS`, or one for each sample.
        severity: 1 to 5, or one for each sample. Lengths are pixels of images of 224 and stay what they are on larger
            and smaller ones, but for ``zoom_blur``, ``fog`` and ``elastic_transform``, which follow the size.
        extent: factor of these lengths, above 0: 48 / 224 does to images of 48 pixels what is done to those of 224.
            It acts on the blurs but ``zoom_blur``, and on ``snow`` and ``spatter``; what moves pixels or smears along
            a line does so by at least one pixel.
        generator: for all randomness, on any device; one, or one for each sample, so that what happens to an image does
            not depend on the others.

    Returns:
        Shape, dtype and device of ``image``, within [0, 1] and not rounded to 8 bits; without gradient.

    Raises:
        ValueError: For a name or severity that does not exist, images of another kind, and sequences of another length
            than the batch.

    Example:
        >>> foggy = corrupt(clean, "fog", 3, generator=torch.Generator().manual_seed(0))
        >>> foggy.shape == clean.shape, bool(foggy.std() < clean.std())
        (True, True)
        >>> corrupt(torch.rand(2, 3, 8, 8), ["snow", "pixelate"], [1, 5]).shape
        torch.Size([2, 3, 8, 8])
        >>> corrupt(clean, "rain", 1)
        Traceback (most recent call last):
        ValueError: `name` should be one of gaussian_noise, shot_noise, impulse_noise, ..., found 'rain'.

    Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations".
    Parameters and formulas are those of the package ``imagecorruptions`` (Michaelis et al., "Benchmarking Robustness in
    Object Detection"), which takes images of any size; they are those of the authors but for ``elastic_transform``,
    which does not turn the image here, and for ``motion_blur`` and ``snow``, whose lines ImageMagick draws there.
    Ours alone: ``frost`` cuts its window from one modeled pane of ice in the colors of the photographs that the others
    have; distances to the edge of a drop of ``spatter`` are exact; lines go on at the edge of an image smaller than
    they are; JPEG alone rounds to 8 bits.
    """
    _check_image(image)
    extent = check_number("extent", extent, low=0, above=True)
    if image.device.type == "cpu":  # Elsewhere it would synchronize with the device.
        warn_if_out_of_range({"image": image}, (0.0, 1.0))
    return _corrupted(image, name, severity, generator, extent)


def _corrupted(
    image: Tensor, name: str | Sequence[str], severity: int | Sequence[int], generator: Generators, extent: float
) -> Tensor:
    check_generators(generator, len(image))
    names, severities, generators = (
        _one_for_each(argument, value, len(image))
        for argument, value in (("name", name), ("severity", severity), ("generator", generator))
    )
    _check_kinds(names, severities)
    unit = at_least_float32(image).clamp(0, 1)
    if isinstance(name, str) and not isinstance(severity, Sequence) and not isinstance(generator, Sequence):
        corrupted = _apply(name, unit, severity, generator, extent)
    else:
        samples = zip(unit.split(1), names, severities, generators, strict=True)
        corrupted = torch.cat([_apply(kind, x, level, one, extent) for x, kind, level, one in samples])
    return corrupted.clamp_(0, 1).to(image.dtype)


def _apply(name: str, unit: Tensor, severity: int, generator: torch.Generator | None, extent: float) -> Tensor:
    if extent != 1 and name in WITH_LENGTHS:
        return WITH_LENGTHS[name](unit, severity - 1, generator, extent)
    return APPLY[name](unit, severity - 1, generator)


class Corruption(NamedTuple):
    """What :class:`Corruptions` does to one image."""

    name: str
    severity: int
    scale: float = 1.0
    """By which the image is reduced before, and enlarged again after."""
    extent: float = 1.0
    """Factor of the lengths."""


class Corruptions(nn.Module):
    """:func:`corrupt` with a name and a severity that are drawn for each image.

    Args:
        names: of :data:`CORRUPTIONS`, or "clean", which leaves the image as it is; all equally likely, or each with its
            weight in a mapping. Default: the fifteen of ImageNet-C.
        severities: from 1 to 5; all equally likely, or each with its weight in a mapping.
        side: corrupt an image at a reduced size, whose shorter side is drawn uniformly from (lowest, highest) pixels,
            and enlarge it again (bilinear, both times). An image that is smaller than what was drawn keeps its size.
        extent: factor of the corruptions' lengths, as of :func:`corrupt`.
        input_range: what YOUR images span.

    Raises:
        ValueError: At construction for no names or severities, or such as do not exist, at a call as :func:`corrupt`.

    Example:
        >>> corruptions = Corruptions(severities=(1, 2, 3))
        >>> again = [corruptions(clean, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        >>> torch.equal(*again), again[0].shape == clean.shape
        (True, True)
        >>> of_unirestore = Corruptions(
        ...     [*CORRUPTIONS[:15], "clean"], {1: 0.05, 2: 0.25, 3: 0.4, 4: 0.25, 5: 0.05}, side=(128, 512)
        ... )

    The second example is what the authors of UniRestore train with (Chen et al., arXiv 2501.13134, their code).
    """

    def __init__(
        self,
        names: Sequence[str] | Mapping[str, float] = CORRUPTIONS[:15],
        severities: Sequence[int] | Mapping[int, float] = (1, 2, 3, 4, 5),
        *,
        side: tuple[int, int] | None = None,
        extent: float = 1.0,
        input_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.names, self._name_weights = _weighted("names", names)
        self.severities, self._severity_weights = _weighted("severities", severities)
        _check_kinds([name for name in self.names if name != CLEAN], self.severities, ("names", "severities"))
        self.side = None if side is None else _check_side(side)
        self.extent = check_number("extent", extent, low=0, above=True)
        self.input_range = check_range(input_range)
        self._range = RangeWatch(self.input_range)

    @torch.no_grad()
    def forward(self, image: Tensor, *, generator: Generators = None) -> Tensor:
        """The corrupted images.

        Args:
            image: float (N, 3, H, W) in ``input_range``; what is outside is clipped.
            generator: for all randomness, on any device; one, or one for each sample.

        Returns:
            Shape, dtype, device and range of ``image``; without gradient.
        """
        _check_image(image)
        check_generators(generator, len(image))
        self._range.look({"image": image})
        drawn = self.draw(len(image), generator=generator, side=min(image.shape[2:]))
        unit = into_range(image, self.input_range, (0.0, 1.0))
        if all(what.name != CLEAN and what.scale == 1 for what in drawn):
            names, severities, *_ = zip(*drawn, strict=True)
            corrupted = _corrupted(unit, names, severities, generator, self.extent)
        else:
            generators = _one_for_each("generator", generator, len(image))
            samples = zip(unit.split(1), drawn, generators, strict=True)
            corrupted = torch.cat([apply_corruption(x, what, generator=one) for x, what, one in samples])
        corrupted = into_range(corrupted, (0.0, 1.0), self.input_range).to(image.dtype)
        clean = torch.tensor([what.name == CLEAN for what in drawn], device=image.device).view(-1, 1, 1, 1)
        return torch.where(clean, image.clamp(*self.input_range), corrupted)

    def draw(self, count: int, *, generator: Generators = None, side: int | None = None) -> list[Corruption]:
        """What to do to ``count`` images, whose shorter side has ``side`` pixels; without it none is reduced."""
        check_integer("count", count, low=0)
        drawn = []
        for one in _one_for_each("generator", generator, count):
            numbers = uniform(torch.empty(2 if self.side is None else 3, dtype=torch.float64), one).tolist()
            name = _choice(self.names, self._name_weights, numbers[0])
            severity = _choice(self.severities, self._severity_weights, numbers[1])
            scale = 1.0
            if self.side is not None and side is not None:
                low, high = self.side
                scale = max(1.0, side / (low + int(numbers[2] * (high - low + 1))))
            drawn.append(Corruption(name, severity, scale, self.extent))
        return drawn

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"names={self.names}, severities={self.severities}, side={self.side}, extent={self.extent}"


def apply_corruption(
    unit: Tensor, what: Corruption, *, generator: torch.Generator | None = None, clip: bool = True
) -> Tensor:
    """One corruption of images in [0, 1], at its reduced size; "clean" leaves them as they are.

    Without ``clip`` they are known to be float32 or float64 within [0, 1], as what has been 8 bits is.
    """
    if what.name == CLEAN:
        return unit
    if what.scale == 1 and not clip:
        return _apply(what.name, unit, what.severity, generator, what.extent).clamp_(0, 1)
    if what.scale == 1:
        return _corrupted(unit, what.name, what.severity, generator, what.extent)
    size = [max(_SMALLEST, round(side / what.scale)) for side in unit.shape[2:]]
    wide = at_least_float32(unit)
    small = F.interpolate(wide, size=size, mode="bilinear", antialias=True)
    corrupted = _corrupted(small, what.name, what.severity, generator, what.extent)
    return F.interpolate(corrupted, size=unit.shape[2:], mode="bilinear").to(unit.dtype)


def _weighted(argument: str, values: Sequence[T] | Mapping[T, float]) -> tuple[tuple[T, ...], tuple[float, ...]]:
    """The values, and the upper ends of their parts of [0, 1]."""
    if isinstance(values, str) or not isinstance(values, Sequence | Mapping) or not values:
        raise ValueError(
            f"`{argument}` should be a sequence of at least one, or weights by what they weigh, found {values!r}."
        )
    weights = list(values.values()) if isinstance(values, Mapping) else [1.0] * len(values)
    for value, weight in zip(values, weights, strict=True):
        check_number(f"{argument}[{value!r}]", weight, low=0)
    if not sum(weights) > 0:
        raise ValueError(f"`{argument}` should have a weight above 0, found {values!r}.")
    return tuple(values), tuple(end / sum(weights) for end in accumulate(weights))


def _choice(values: Sequence[T], ends: Sequence[float], number: float) -> T:
    return values[min(bisect_right(ends, number), len(values) - 1)]


def _check_side(side: Any) -> tuple[int, int]:
    if isinstance(side, str) or not isinstance(side, Sequence) or len(side) != 2:
        raise ValueError(f"`side` should be pixels (lowest, highest), found {side!r}.")
    low, high = (check_integer("side", pixels, low=_SMALLEST) for pixels in side)
    if low > high:
        raise ValueError(f"`side` should rise from lowest to highest, found {side!r}.")
    return low, high


def _one_for_each(argument: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"`{argument}` should be one, or one for each of {count}, found {len(value)}.")
    return list(value)


def _check_kinds(
    names: Sequence[str], severities: Sequence[int], arguments: tuple[str, str] = ("name", "severity")
) -> None:
    for name in names:
        if name not in CORRUPTIONS:
            raise ValueError(f"`{arguments[0]}` should be one of {', '.join(CORRUPTIONS)}, found {name!r}.")
    for severity in severities:
        check_integer(arguments[1], severity, high=5)


def _check_image(image: Tensor) -> None:
    check_images("image", image)
    check_corruptible(image)


def check_corruptible(image: Tensor) -> None:
    """Raise ``ValueError`` unless the image has three channels and sides that the corruptions can work with."""
    if image.shape[-3] != 3:
        raise ValueError(f"`image` should have three channels, found {image.shape[-3]}.")
    if min(image.shape[-2:]) < _SMALLEST:
        raise ValueError(f"`image` should have sides of at least {_SMALLEST} pixels, found {tuple(image.shape[-2:])}.")
