"""Checks of image batches (shape, dtype, device, range) and maps between ranges."""

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from restoreloss.checks import caller_level, describe

HALF = (torch.float16, torch.bfloat16)


def check_pair(restored: Tensor, target: Tensor, *, names: tuple[str, str] = ("restored", "target")) -> None:
    """Raise ``ValueError`` unless both are float (N, C, H, W) of one shape and device, not empty and not exchanged.

    Half and single precision may meet (under autocast the network's output is half); float64 meets float64 only. With
    gradients enabled, a target that requires one beside a restored image that does not means that the two arguments
    were exchanged: the loss would train nothing.
    """
    one, other = names
    for name, image in ((one, restored), (other, target)):
        check_images(name, image)
    if restored.shape != target.shape:
        raise ValueError(
            f"`{other}` should have the shape of `{one}` {tuple(restored.shape)}, found {tuple(target.shape)}."
        )
    if restored.device != target.device:
        raise ValueError(f"`{other}` should be on the device of `{one}` {restored.device}, found {target.device}.")
    if restored.dtype != target.dtype and torch.float64 in (restored.dtype, target.dtype):
        raise ValueError(f"`{other}` should have the dtype of `{one}` {restored.dtype}, found {target.dtype}.")
    if target.requires_grad and not restored.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"`{one}` should require a gradient where `{other}` does, found the opposite: were the two exchanged? "
            f"`{one}` comes first. Detach `{other}` if this is meant, or evaluate under torch.no_grad()."
        )


def checked_pairs(
    restored: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    names: tuple[str, str] = ("restored", "target"),
) -> list[tuple[Tensor, Tensor]]:
    """The images as batches to be checked: one of (N, C, H, W), or N of (1, C, H, W)."""
    if isinstance(restored, Tensor) or isinstance(target, Tensor):
        check_pair(restored, target, names=names)  # type: ignore[arg-type]
        return [(restored, target)]  # type: ignore[list-item]
    for name, images in zip(names, (restored, target), strict=True):
        if not isinstance(images, list | tuple):
            raise ValueError(f"`{name}` should be a tensor or a list of tensors, found {describe(images)}.")
        for image in images:
            if not isinstance(image, Tensor):
                raise ValueError(f"`{name}` should hold tensors (C, H, W), found {describe(image)}.")
    if len(restored) != len(target) or not restored:
        raise ValueError(
            f"`{names[1]}` should be as many images as `{names[0]}`, at least 1, found {len(target)} and "
            f"{len(restored)}."
        )
    pairs = [(z[None], x[None]) for z, x in zip(restored, target, strict=True)]
    for z, x in pairs:
        check_pair(z, x, names=names)
    return pairs


def check_images(name: str, images: Tensor) -> None:
    """Raise ``ValueError`` unless ``images`` is a float tensor (N, C, H, W) with at least one pixel."""
    if not isinstance(images, Tensor):
        raise ValueError(f"`{name}` should be a tensor, found {describe(images)}.")
    if images.ndim != 4:
        raise ValueError(f"`{name}` should have shape (N, C, H, W), found {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ValueError(
            f"`{name}` should be floating point, found {images.dtype}: convert it with `.float()`, and divide by "
            "255 or say `input_range=(0, 255)`."
        )
    if images.numel() == 0:
        raise ValueError(f"`{name}` should hold at least one image and one pixel, found {tuple(images.shape)}.")


def check_range(input_range: tuple[float, float]) -> tuple[float, float]:
    """The range as two floats, or ``ValueError``."""
    fits = isinstance(input_range, Sequence) and not isinstance(input_range, str) and len(input_range) == 2
    if not fits or not all(isinstance(end, Real) and not isinstance(end, bool) for end in input_range):
        raise ValueError(f"`input_range` should be two numbers (low, high), found {input_range!r}.")
    low, high = map(float, input_range)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"`input_range` should rise from low to high, both finite, found {input_range!r}.")
    return low, high


def at_least_float32(image: Tensor) -> Tensor:
    """The image, in float32 where it is in half precision."""
    return image.float() if image.dtype in HALF else image


def to_signed_range(image: Tensor, input_range: tuple[float, float]) -> Tensor:
    """Map ``input_range`` to [-1, 1], in float32 or higher; overshoot stays overshoot."""
    low, high = input_range
    return (at_least_float32(image) - (low + high) / 2) * (2 / (high - low))


def into_range(image: Tensor, source: tuple[float, float], target: tuple[float, float]) -> Tensor:
    """Map one range onto another, in float32 or higher unless they are the same; overshoot stays overshoot."""
    if source == target:
        return image
    (low, high), (first, last) = source, target
    unit = (at_least_float32(image) - low) / (high - low)
    return unit if target == (0.0, 1.0) else unit * (last - first) + first


_MIN_VALUES = 192
"""8 x 8 pixels of three channels: an image of fewer says nothing about a range that it does not fill."""


class RangeWatch:
    """Warns once where images can hardly span the range that the caller promised.

    It looks at the first, the hundredth and the thousandth call, outside of compiled code, as reading the lowest and
    the highest value synchronizes with the device. What a network made may be anything at first, so that before
    the hundredth call it warns only of what looks like images of another range.

    Args:
        input_range: what the images should span.
        fixed: whether the caller cannot say another one. Images that were degraded may overshoot it by more.

    Example:
        >>> watch = RangeWatch((0.0, 255.0))
        >>> watch.look({"target": torch.linspace(0, 255, 12).view(1, 3, 2, 2)})
    """

    def __init__(self, input_range: tuple[float, float], *, fixed: bool = False) -> None:
        self.input_range, self.fixed = input_range, fixed
        self.warned = False
        self._calls = 0

    def look(self, images: Mapping[str, Tensor]) -> None:
        """Warn if any of these images is clearly out of range; arguments as of :func:`warn_if_out_of_range`."""
        if self.warned or torch.compiler.is_compiling() or any(image.is_meta for image in images.values()):
            return
        self._calls += 1
        if self._calls in (1, 100, 1000):
            settled = self._calls > 1
            self.warned = warn_if_out_of_range(images, self.input_range, settled=settled, fixed=self.fixed)


def warn_if_out_of_range(
    images: Mapping[str, Tensor], input_range: tuple[float, float], *, settled: bool = False, fixed: bool = False
) -> bool:
    """Warn where images can hardly span ``input_range``, and return whether any did not.

    Args:
        images: by the name of the argument. They may overshoot by a quarter of the range; what a network made,
            "restored" and "student_images", by more.
        input_range: what they should span.
        settled: whether the network has been trained for a while. One that has not may overshoot by fifty times the
            range, but not end where a signed range does, as the output of a tanh.
        fixed: as for :class:`RangeWatch`.
    """
    low, high = input_range
    span = high - low
    found = []
    for name, image in images.items():
        made = name in ("restored", "student_images")
        slack = span * (1 if fixed else 0.25 if not made else 0.75 if settled else 50)
        darkest, brightest = (float(value) for value in image.detach().aminmax())
        outside = -math.inf < darkest < low - slack or math.inf > brightest > high + slack
        if (made or fixed) and low == 0:
            outside |= -1.005 * high <= darkest <= -0.9 * high and 0.75 * high <= brightest <= 1.005 * high
        # No photograph lacks a pixel in the lower half of a signed range, or in the upper 99 % of a wide one.
        narrow = image.numel() >= _MIN_VALUES and darkest < brightest and (not made or settled)
        inside = narrow and (low < 0 <= darkest or (span > 2 and brightest - low <= span / 100))
        if outside or inside:
            found.append(f"`{name}` spans [{darkest:.4g}, {brightest:.4g}]")
    if found:
        said = f"where [{low:g}, {high:g}] is expected" if fixed else f"while `input_range` says ({low:g}, {high:g})"
        remedy = "map them to this one" if fixed else "give it as `input_range`"
        warnings.warn(
            f"{' and '.join(found)} {said}. If your images have another range, {remedy}; this is said once.",
            stacklevel=caller_level(),
        )
    return bool(found)


def mirrored(length: int, before: int, after: int) -> Tensor:
    """Indices that continue ``length`` pixels on either side, mirrored at the middle of the first and the last.

    Images of few pixels are mirrored as often as it takes. ``index_select`` with them has a deterministic backward on
    every device, which padding by reflection lacks on CUDA.
    """
    period = max(1, 2 * (length - 1))
    place = torch.arange(-before, length + after).remainder(period)
    return torch.minimum(place, period - place) if length > 1 else torch.zeros_like(place)


def continued(image: Tensor, dim: int, place: Tensor, reach: int) -> Tensor:
    """``image.index_select(dim, place)`` for indices that continue an image by ``reach`` pixels on either side.

    Only these are looked up, which takes a tenth of the time along rows.
    """
    before, after = (image.index_select(dim, part) for part in (place[:reach], place[len(place) - reach :]))
    return torch.cat([before, image, after], dim)
