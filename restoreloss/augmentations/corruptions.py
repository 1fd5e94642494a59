"""The nineteen corruptions of ImageNet-C, of five severities each, on batches of tensors."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss.augmentations.mixtures import blur, gaussian_kernel, jpeg
from restoreloss.checks import check_whole
from restoreloss.generators import Generators, check_generators, standard_normal, uniform
from restoreloss.images import RangeWatch, check_images, check_range, into_range, warn_if_out_of_range

Chance: TypeAlias = torch.Generator | None

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),
)
"""The fifteen of ImageNet-C, and the four that its authors keep for validation."""

_SMALLEST = 8


@torch.no_grad()
def corrupt(
    image: Tensor, name: str | Sequence[str], severity: int | Sequence[int], *, generator: Generators = None
) -> Tensor:
    r"""A corruption of ImageNet-C, of every picture with chance of its own.

    ===================== ================================================================= ==========================
    name                  what it does to :math:`x`, with :math:`n` standard normal         for severity 1, 2, 3, 4, 5
    ===================== ================================================================= ==========================
    ``gaussian_noise``    :math:`x + c n`                                                   c .08, .12, .18, .26, .38
    ``shot_noise``        :math:`\text{Poisson}(c x) / c`                                   c 60, 25, 12, 5, 3
    ``impulse_noise``     a share c of all values becomes 0 or 1, by a coin                 c .03, .06, .09, .17, .27
    ``defocus_blur``      mean over a disk, its edge softened                               radius 3, 4, 6, 8, 10
    ``glass_blur``        blur, pixels copied from near by in one to three passes, blur     within 1, 2, 2, 3, 4
    ``motion_blur``       half a Gaussian along a line within 45 degrees of the horizontal  sigma 3, 5, 8, 12, 15
    ``zoom_blur``         mean of enlargements of the middle                                to 1.11, 1.15, 1.2, 1.24,
                                                                                            1.3
    ``snow``              flakes that fall aslant, the picture below them whiter            flakes of 3, 2, 4, 4.5, 2.5
    ``frost``             :math:`a x + b \cdot \text{ice}`                                  a 1, .8, .7, .65, .6 and
                                                                                            b .4, .6, .7, .7, .75
    ``fog``               :math:`(x + c f) m / (m + c)`, f a plasma fractal, m the maximum  c 1.5, 2, 2.5, 2.5, 3
    ``brightness``        value of HSV plus c                                               c .1, .2, .3, .4, .5
    ``contrast``          :math:`c (x - \bar x) + \bar x`, with the mean of each channel    c .4, .3, .2, .1, .05
    ``elastic_transform`` pixels moved by c times a smooth random field                     c 12.5, 16.25, 21.25, 25,
                                                                                            30
    ``pixelate``          cells of one colour                                               .6, .5, .4, .3, .25 of the
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
        severity: 1 to 5, or one for each sample. Lengths are pixels of pictures of 224 and stay what they are on larger
            and smaller ones, but for ``zoom_blur``, ``fog`` and ``elastic_transform``, which follow the size.
        generator: for all chance, on any device; one, or one for each sample, so that what happens to a picture does
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
    Object Detection"), which takes pictures of any size; they are those of the authors but for ``elastic_transform``,
    which does not turn the picture here, and for ``motion_blur`` and ``snow``, whose lines ImageMagick draws there.
    Ours alone: ``frost`` models the ice that the others have photographs of; distances to the edge of a drop of
    ``spatter`` are exact; lines go on at the edge of a picture smaller than they are; JPEG alone rounds to 8 bits.
    """
    _check_image(image)
    if image.device.type == "cpu":  # elsewhere it would synchronize with the device at every call
        warn_if_out_of_range({"image": image}, (0.0, 1.0))
    return _corrupted(image, name, severity, generator)


def _corrupted(
    image: Tensor, name: str | Sequence[str], severity: int | Sequence[int], generator: Generators
) -> Tensor:
    check_generators(generator, len(image))
    names, severities, generators = (
        _one_for_each(argument, value, len(image))
        for argument, value in (("name", name), ("severity", severity), ("generator", generator))
    )
    _check_kinds(names, severities)
    unit = (image.float() if image.dtype in (torch.float16, torch.bfloat16) else image).clamp(0, 1)
    if isinstance(name, str) and isinstance(severity, int) and not isinstance(generator, Sequence):
        corrupted = _APPLY[name](unit, severity - 1, generator)
    else:
        samples = zip(unit.split(1), names, severities, generators, strict=True)
        corrupted = torch.cat([_APPLY[kind](x, level - 1, chance) for x, kind, level, chance in samples])
    return corrupted.clamp(0, 1).to(image.dtype)


class Corruption(NamedTuple):
    """What :class:`Corruptions` does to one picture."""

    name: str
    severity: int


class Corruptions(nn.Module):
    """:func:`corrupt` with a name and a severity that are drawn for each picture, all equally likely.

    Args:
        names: of :data:`CORRUPTIONS`; by default the fifteen of ImageNet-C.
        severities: from 1 to 5.
        input_range: what YOUR images span.

    Raises:
        ValueError: At construction for no names or severities, or such as do not exist, at a call as :func:`corrupt`.

    Example:
        >>> corruptions = Corruptions(severities=(1, 2, 3))
        >>> again = [corruptions(clean, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        >>> torch.equal(*again), again[0].shape == clean.shape
        (True, True)
    """

    def __init__(
        self,
        names: Sequence[str] = CORRUPTIONS[:15],
        severities: Sequence[int] = (1, 2, 3, 4, 5),
        *,
        input_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        for argument, value in (("names", names), ("severities", severities)):
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise ValueError(f"`{argument}` should be a sequence of at least one, found {value!r}.")
        _check_kinds(names, severities, arguments=("names", "severities"))
        self.names = tuple(names)
        self.severities = tuple(severities)
        self.input_range = check_range(input_range)
        self._range = RangeWatch(self.input_range)

    @torch.no_grad()
    def forward(self, image: Tensor, *, generator: Generators = None) -> Tensor:
        """The corrupted images.

        Args:
            image: float (N, 3, H, W) in ``input_range``; what is outside is clipped.
            generator: for all chance, on any device; one, or one for each sample.

        Returns:
            Shape, dtype, device and range of ``image``; without gradient.
        """
        _check_image(image)
        check_generators(generator, len(image))
        self._range.look({"image": image})
        names, severities = zip(*self.draw(len(image), generator=generator), strict=True)
        unit = into_range(image, self.input_range, (0.0, 1.0))
        corrupted = _corrupted(unit, names, severities, generator)
        return into_range(corrupted, (0.0, 1.0), self.input_range).to(image.dtype)

    def draw(self, count: int, *, generator: Generators = None) -> list[Corruption]:
        """What to do to ``count`` pictures."""
        check_whole("count", count, low=0)
        drawn = []
        for one in _one_for_each("generator", generator, count):
            name, severity = uniform(torch.empty(2, dtype=torch.float64), one).tolist()
            name, severity = int(name * len(self.names)), int(severity * len(self.severities))
            drawn.append(Corruption(self.names[name], self.severities[severity]))
        return drawn

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"names={self.names}, severities={self.severities}"


def _gaussian_noise(x: Tensor, level: int, generator: Chance) -> Tensor:
    scale = (0.08, 0.12, 0.18, 0.26, 0.38)[level]
    return x + scale * standard_normal(x, generator)


def _shot_noise(x: Tensor, level: int, generator: Chance) -> Tensor:
    photons = (60, 25, 12, 5, 3)[level]
    device = x.device if generator is None else generator.device
    return torch.poisson((photons * x).to(device), generator=generator).to(x.device) / photons


def _impulse_noise(x: Tensor, level: int, generator: Chance) -> Tensor:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    chance = uniform(x, generator)
    return x.masked_fill(chance < share / 2, 0).masked_fill(chance >= 1 - share / 2, 1)


def _defocus_blur(x: Tensor, level: int, _: Chance) -> Tensor:
    radius, softness = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    place = torch.arange(-max(radius, 8), max(radius, 8) + 1)
    disk = (place.square() + place.square()[:, None] <= radius**2).double()[None, None]
    soft = blur(disk / disk.sum(), gaussian_kernel(3 if radius <= 8 else 5, (softness, softness)))
    return blur(x, soft[0, 0].to(x.device, x.dtype))


def _glass_blur(x: Tensor, level: int, generator: Chance) -> Tensor:
    sigma, reach, passes = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    seen = _smooth(x, (sigma, sigma))
    for _ in range(passes):
        offsets = (2 * reach * uniform(seen[:, :2], generator)).long() - reach
        origin = _copied_from(offsets, reach).flatten(1)[:, None].expand(-1, 3, -1)
        seen = seen.flatten(2).gather(2, origin).view_as(seen)
    return _smooth(seen, (sigma, sigma))


def _copied_from(offsets: Tensor, reach: int) -> Tensor:
    """Which pixel each one shows after the pixels, from the last to the first, were overwritten by another one each.

    Args:
        offsets: whole (N, 2, H, W), rows and columns from a pixel to the one that overwrites it, from -reach to
            reach - 1. The authors mean to swap the two; their code copies, and so do their pictures.
        reach: the frame of pixels that stay as they are.

    Returns:
        (N, H, W), indices of pixels.
    """
    count, _, height, width = offsets.shape
    here = torch.arange(height * width, device=offsets.device).view(1, height, width)
    row, column = here // width, here % width
    moves = (reach < row) & (row <= height - reach) & (reach < column) & (column <= width - reach)
    source = here + moves * (offsets[:, 0] * width + offsets[:, 1])
    # a later pixel was overwritten before this one: look where it has its own from, until that one is earlier
    done = height * width
    follow = torch.where(source > here, source, source + done).flatten(1)
    final = torch.arange(done, 2 * done, device=offsets.device).expand(count, -1)
    while (follow < done).any():
        follow = torch.cat([follow, final], dim=1).gather(1, follow)
    return (follow - done).view(count, height, width)


def _motion_blur(x: Tensor, level: int, generator: Chance) -> Tensor:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _drag(x, radius, sigma, (-45, 45), generator)


def _zoom_blur(x: Tensor, level: int, _: Chance) -> Tensor:
    step, count = ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))[level]
    height, width = x.shape[2:]
    zoomed = (_zoom(x, 1 + k * step)[..., :height, :width] for k in range(count))
    return sum(zoomed, x) / (count + 1)


def _snow(x: Tensor, level: int, generator: Chance) -> Tensor:
    mean, spread, size, least, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = _zoom(mean + spread * standard_normal(x[:, :1], generator), size)
    flakes = flakes.masked_fill(flakes < least, 0).clamp(0, 1)
    fallen = _drag(flakes, radius, sigma, (-135, -45), generator)[..., : x.shape[2], : x.shape[3]]
    grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    white = keep * x + (1 - keep) * torch.maximum(x, 1.5 * grey + 0.5)
    return white + fallen + fallen.rot90(2, (2, 3))


def _fog(x: Tensor, level: int, generator: Chance) -> Tensor:
    amount, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[level]
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    return (x + amount * _plasma(x[:, :1], decay, generator)) * brightest / (brightest + amount)


def _plasma(like: Tensor, decay: float, generator: Chance) -> Tensor:
    """Random landscapes between 0 and 1, one for each channel, by midpoints of squares and diamonds, ever finer.

    They are cut from a torus whose side is the next power of two, so that any size will do. What is added to a midpoint
    shrinks by the square of ``decay`` from one size to the next.
    """
    height, width = like.shape[2:]
    step = 1 << (max(height, width) - 1).bit_length()
    land = like.new_zeros(*like.shape[:2], step, step)
    wobble = 1.0
    while step > 1:
        half = step // 2
        corners, middles = land[..., ::step, ::step], land[..., half::step, half::step]
        pairs = corners + corners.roll(-1, 2)
        middles[:] = _settled(pairs + pairs.roll(-1, 3), wobble, generator)
        sides = middles + middles.roll(1, 2) + corners + corners.roll(-1, 3)
        land[..., ::step, half::step] = _settled(sides, wobble, generator)
        sides = middles + middles.roll(1, 3) + corners + corners.roll(-1, 2)
        land[..., half::step, ::step] = _settled(sides, wobble, generator)
        step, wobble = half, wobble / decay**2
    land = land - land.amin(dim=(2, 3), keepdim=True)
    return (land / land.amax(dim=(2, 3), keepdim=True))[..., :height, :width]


def _settled(four: Tensor, wobble: float, generator: Chance) -> Tensor:
    return four / 4 + wobble * (2 * uniform(four, generator) - 1)


def _frost(x: Tensor, level: int, generator: Chance) -> Tensor:
    keep, add = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    return keep * x + add * _ice(x, generator)


_PANES = (
    (0.30, 0.58, 0.65, 0.06),
    (0.79, 0.81, 0.84, 0.075),
    (0.79, 0.81, 0.84, 0.075),
    (0.54, 0.60, 0.65, 0.10),
    (0.44, 0.48, 0.53, 0.135),
)
"""Red, green, blue and contrast of the five photographs of ice."""


def _ice(x: Tensor, generator: Chance) -> Tensor:
    """Needles of eight directions, each where a landscape of its own is high, and clouds, in the colours of a pane."""
    noise = standard_normal(x[:, :1].expand(-1, 8, -1, -1), generator)
    kernels = [gaussian_kernel(41, (9, 0.8), k * math.pi / 8).to(x.device, x.dtype) for k in range(8)]
    needles = torch.cat([blur(noise[:, k : k + 1], kernel) for k, kernel in enumerate(kernels)], dim=1)
    crystals = (needles.clamp(min=0) * _plasma(noise, 1.4, generator).square()).amax(dim=1, keepdim=True)
    clouds = _plasma(x[:, :1], 2, generator)
    texture = _standard(_standard(crystals) + 0.7 * _standard(clouds))
    pane = x.new_tensor(_PANES)[(len(_PANES) * uniform(x[:, 0, 0, 0], generator)).long(), :, None, None]
    return (pane[:, :3] + pane[:, 3:] * texture).clamp(0, 1)


def _standard(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 in every picture."""
    deviation, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
    return (x - mean) / (deviation + 1e-6)


def _brightness(x: Tensor, level: int, _: Chance) -> Tensor:
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[level]).clamp(max=1)
    return brighter * torch.where(value > 0, x / value, 1)  # hue and saturation are ratios of the channels


def _contrast(x: Tensor, level: int, _: Chance) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (0.4, 0.3, 0.2, 0.1, 0.05)[level] * (x - mean) + mean


def _elastic_transform(x: Tensor, level: int, generator: Chance) -> Tensor:
    strength = (12.5, 16.25, 21.25, 25, 30)[level]
    height, width = x.shape[2:]
    push = 0.01 * height * (uniform(x[:, :2], generator) - 0.5)
    push = strength * _smooth(push, (0.01 * height, 0.01 * width), truncate=3, mirror=True)
    row = torch.arange(height, device=x.device)[:, None] + push[:, 0]
    column = torch.arange(width, device=x.device) + push[:, 1]
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _pixelate(x: Tensor, level: int, _: Chance) -> Tensor:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    for dim in (2, 3):
        side = x.shape[dim]
        cells = int(side * share)
        middle = 2 * torch.arange(side, device=x.device) + 1  # of a pixel; the cells are 2 side / cells wide
        belongs = (middle * cells - 1) // (2 * side) == torch.arange(cells, device=x.device)[:, None]
        means = x.transpose(dim, 3) @ belongs.T.to(x.dtype) / belongs.sum(dim=1)
        x = means.index_select(3, middle * cells // (2 * side)).transpose(dim, 3)
    return x


def _jpeg_compression(x: Tensor, level: int, _: Chance) -> Tensor:
    return jpeg(x, (25, 18, 15, 10, 7)[level])


def _speckle_noise(x: Tensor, level: int, generator: Chance) -> Tensor:
    scale = (0.15, 0.2, 0.35, 0.45, 0.6)[level]
    return x + scale * x * standard_normal(x, generator)


def _gaussian_blur(x: Tensor, level: int, _: Chance) -> Tensor:
    sigma = (1, 2, 3, 4, 6)[level]
    return _smooth(x, (sigma, sigma))


def _spatter(x: Tensor, level: int, generator: Chance) -> Tensor:
    mean, spread, sigma, least, strength = (
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    )[level]
    liquid = _smooth(mean + spread * standard_normal(x[:, :1], generator), (sigma, sigma))
    wet = liquid >= least
    if level < 3:
        water = x.new_tensor([175, 238, 238]).view(3, 1, 1) / 255
        liquid = (255 * liquid * wet).floor()
        shine = liquid * _relief(liquid)
        return x + strength * shine / shine.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6) * water
    mud = x.new_tensor([63, 42, 20]).view(3, 1, 1) / 255
    cover = _smooth(wet.to(x.dtype), (strength, strength))
    cover = cover.masked_fill(cover < 0.8, 0)
    return (1 - cover) * x + cover * mud


def _saturate(x: Tensor, level: int, _: Chance) -> Tensor:
    factor, add = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[level]
    value, chroma = x.amax(dim=1, keepdim=True), x.amax(dim=1, keepdim=True) - x.amin(dim=1, keepdim=True)
    red = x.new_tensor([0, 1, 1]).view(3, 1, 1)  # what is grey has the hue 0
    hue = torch.where(chroma > 0, (value - x) / chroma, red)
    saturation = torch.where(value > 0, chroma / value, 0)
    return value * (1 - (factor * saturation + add).clamp(max=1) * hue)


def _relief(liquid: Tensor, limit: int = 20) -> Tensor:
    """Drops lit from the upper left: the distance to the nearest edge, up to ``limit``, equalised and embossed."""
    edge = _edges(liquid)
    squared = torch.where(edge, 0, limit**2).to(liquid.dtype)
    for _ in range(2):  # along the rows, then along the columns
        near, width = F.pad(squared, (limit, limit), value=limit**2), squared.shape[3]
        steps = (near[..., limit + k : limit + k + width] + k**2 for k in range(-limit, limit + 1))
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


def _smooth(x: Tensor, sigma: tuple[float, float], *, truncate: float = 4, mirror: bool = False) -> Tensor:
    """Gaussian blur, down and right, up to ``truncate`` sigmas; beyond the edge is its pixel, or the mirrored image."""
    for dim, width in ((2, sigma[0]), (3, sigma[1])):
        reach, side = int(truncate * width + 0.5), x.shape[dim]
        place = torch.arange(-reach, side + reach, device=x.device)
        if mirror:
            place = place.remainder(2 * side)
            place = torch.minimum(place, 2 * side - 1 - place)
        weights = [math.exp(-0.5 * (k / width) ** 2) for k in range(-reach, reach + 1)]
        taps = [(k, 0, w / sum(weights)) if dim == 2 else (0, k, w / sum(weights)) for k, w in enumerate(weights)]
        x = _weigh(x.index_select(dim, place.clamp(0, side - 1)), x.shape, taps)
    return x


def _drag(x: Tensor, radius: int, sigma: float, degrees: tuple[float, float], generator: Chance) -> Tensor:
    """Every picture smeared along a line of its own: half a Gaussian over 2 radius + 1 pixels, the edge goes on."""
    reach = 2 * radius
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(reach + 1)]
    low, high = degrees
    angles = torch.deg2rad(low + (high - low) * uniform(x[:, 0, 0, 0], generator)).tolist()
    smeared = []
    for picture, angle in zip(F.pad(x, (reach,) * 4, mode="replicate"), angles, strict=True):
        line = [[reach + math.ceil(k * side(angle) - 0.5) for k in range(reach + 1)] for side in (math.sin, math.cos)]
        taps = zip(*line, [weight / sum(weights) for weight in weights], strict=True)
        smeared.append(_weigh(picture, x.shape, taps))
    return torch.stack(smeared)


def _weigh(padded: Tensor, size: Sequence[int], taps: Iterable[tuple[int, int, float]]) -> Tensor:
    """Weighted sum of windows of ``size``, each given by the row and the column where it begins."""
    height, width = size[-2:]
    total = padded.new_zeros(*padded.shape[:-2], height, width)
    for row, column, weight in taps:
        total.add_(padded[..., row : row + height, column : column + width], alpha=weight)
    return total


def _zoom(x: Tensor, factor: float) -> Tensor:
    """The middle of pictures, enlarged to their size or a little more, corners onto corners."""
    kept = [math.ceil(side / factor) for side in x.shape[2:]]
    top, left = ((side - part) // 2 for side, part in zip(x.shape[2:], kept, strict=True))
    middle = x[..., top : top + kept[0], left : left + kept[1]]
    size = [round(part * factor) for part in kept]
    return F.interpolate(middle, size=size, mode="bilinear", align_corners=True)


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
        if not isinstance(severity, int) or isinstance(severity, bool) or not 1 <= severity <= 5:
            raise ValueError(f"`{arguments[1]}` should be a whole number from 1 to 5, found {severity!r}.")


def _check_image(image: Tensor) -> None:
    check_images("image", image)
    if image.shape[1] != 3:
        raise ValueError(f"`image` should have three channels, found {image.shape[1]}.")
    if min(image.shape[2:]) < _SMALLEST:
        raise ValueError(f"`image` should have sides of at least {_SMALLEST} pixels, found {tuple(image.shape[2:])}.")


_APPLY: dict[str, Callable[[Tensor, int, Chance], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}
