"""Are these two batches of images fit to be compared, and how do they reach the range of a network?"""

import math
import warnings

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def check_pair(restored: Tensor, target: Tensor, *, names: tuple[str, str] = ("restored", "target")) -> None:
    """Raise ``ValueError`` unless both are float (N, C, H, W) of one shape and device, and not empty.

    Half and single precision may meet (under autocast the network's output is half); float64 meets float64 only.
    """
    one, other = names
    for name, image in ((one, restored), (other, target)):
        if not isinstance(image, Tensor):
            raise ValueError(f"`{name}` should be a tensor, found {type(image).__name__}.")
        if image.ndim != 4:
            raise ValueError(f"`{name}` should have shape (N, C, H, W), found {tuple(image.shape)}.")
        if not image.is_floating_point():
            raise ValueError(
                f"`{name}` should be floating point, found {image.dtype}: convert it with `.float()`, and divide by "
                "255 or say `input_range=(0, 255)`."
            )
        if image.numel() == 0:
            raise ValueError(f"`{name}` should hold at least one image and one pixel, found {tuple(image.shape)}.")
    if restored.shape != target.shape:
        raise ValueError(
            f"`{other}` should have the shape of `{one}` {tuple(restored.shape)}, found {tuple(target.shape)}."
        )
    if restored.device != target.device:
        raise ValueError(f"`{other}` should be on the device of `{one}` {restored.device}, found {target.device}.")
    if restored.dtype != target.dtype and torch.float64 in (restored.dtype, target.dtype):
        raise ValueError(f"`{other}` should have the dtype of `{one}` {restored.dtype}, found {target.dtype}.")


def check_range(input_range: tuple[float, float]) -> tuple[float, float]:
    """The range as two floats, or ``ValueError``."""
    try:
        low, high = map(float, input_range)
    except (TypeError, ValueError):
        raise ValueError(f"`input_range` should be two numbers (low, high), found {input_range!r}.") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"`input_range` should rise from low to high, both finite, found {input_range!r}.")
    return low, high


def to_unit_range(image: Tensor, input_range: tuple[float, float]) -> Tensor:
    """Map ``input_range`` to [-1, 1], in float32 or higher; overshoot stays overshoot."""
    low, high = input_range
    image = image.float() if image.dtype in _HALF else image
    return (image - (low + high) / 2) * (2 / (high - low))


def into_range(image: Tensor, source: tuple[float, float], target: tuple[float, float]) -> Tensor:
    """Map one range onto another, in float32 or higher unless they are the same; overshoot stays overshoot."""
    if source == target:
        return image
    low, high = target
    return to_unit_range(image, source) * ((high - low) / 2) + (low + high) / 2


def warn_if_out_of_range(target: Tensor, input_range: tuple[float, float], *, name: str = "target") -> None:
    """Warn where ``target`` can hardly span ``input_range``. Reads two numbers from the device: call it once."""
    low, high = input_range
    span = high - low
    darkest, brightest = (float(value) for value in target.detach().aminmax())
    outside = darkest < low - span / 4 or brightest > high + span / 4
    # a batch of photographs without one pixel in the lower half of a signed range, or in the upper 99 % of a wide one
    inside = darkest < brightest and (low < 0 <= darkest or (span > 2 and brightest - low <= span / 100))
    if outside or inside:
        warnings.warn(
            f"`{name}` spans [{darkest:.4g}, {brightest:.4g}] while `input_range` says ({low:g}, {high:g}). If your "
            "images have another range, give it as `input_range`; this is said once.",
            stacklevel=2,
        )
