"""The normalization of a task network: how images in [0, 1] become its input."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from restoreloss.checks import caller_level, check_callable

Images: TypeAlias = Tensor | Sequence[Tensor]
"""Float (N, C, H, W), or a list of (C, H, W) for networks that take lists (torchvision's detectors)."""
Normalize: TypeAlias = Any
"""How images in [0, 1] are normalized for a network; see :class:`~restoreloss.FeatureExtractor`."""
Statistics: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalization(network: nn.Module, normalize: Normalize) -> Statistics | Callable[[Images], Any] | None:
    """What ``normalize`` means for a network: mean and standard deviation, a function, or None for nothing.

    Args:
        network: the task network.
        normalize: "auto" | "model" | "imagenet" | torchvision weights | ((mean, ...), (std, ...)) | a callable | None.

    Raises:
        ValueError: For anything else, and for "model" where the network states nothing.
    """
    by_itself = normalizes_itself(network)
    named = normalize if isinstance(normalize, str) else None
    if normalize is None or (by_itself and named in ("auto", "imagenet", "model")):
        return None
    own = stated_by(network)
    known = any(kind.__module__.startswith("torchvision.") for kind in type(network).__mro__)
    if named == "auto" and own is None and not known:
        warnings.warn(
            f"`normalize` should be said for {type(network).__name__}, which states none and is taken for a network of "
            "ImageNet's mean and standard deviation: 'imagenet' if it is one, None if it reads images in [0, 1], else "
            "((mean, ...), (std, ...)) or a function.",
            stacklevel=caller_level(),
        )
    if named == "imagenet" or (named == "auto" and own is None):
        return IMAGENET
    if named in ("auto", "model"):
        if own is None:
            raise ValueError(
                f"`normalize` should be 'imagenet', (mean, std) or torchvision weights for {type(network).__name__}, "
                "which does not state its own; found 'model'."
            )
        return own
    if callable(normalize) and not isinstance(normalize, type):
        check_callable("normalize", normalize, "images")
        function: Callable[[Images], Any] = normalize
        return function
    if by_itself:
        raise ValueError(
            f"`normalize` should be None for {type(network).__name__}, whose `transform` normalizes, found "
            f"{normalize!r}."
        )
    if hasattr(normalize, "transforms") and not isinstance(normalize, type):  # These are weights of torchvision.
        preset = normalize.transforms()
        if not hasattr(preset, "mean"):
            raise ValueError(f"`normalize` should be weights that state their mean and std, found {normalize}.")
        return preset.mean, preset.std
    try:
        mean, std = (tuple(float(value) for value in values) for values in normalize)
    except (TypeError, ValueError):
        raise ValueError(
            "`normalize` should be 'auto', 'model', 'imagenet', None, torchvision weights, ((mean, ...), (std, ...)) "
            f"or a callable, found {normalize!r}."
        ) from None
    if any(abs(value) > 2 for value in (*mean, *std)):
        warnings.warn(
            f"`normalize` should be of images in [0, 1], found {normalize!r}, which looks like that of 0..255.",
            stacklevel=caller_level(),
        )
    if len(mean) != len(std) or not all(value > 0 for value in std) or not all(map(math.isfinite, (*mean, *std))):
        raise ValueError(f"`normalize` should have as many positive std as mean, all finite, found {normalize!r}.")
    return mean, std


def normalizes_itself(network: nn.Module) -> bool:
    """Whether this is a detector of torchvision."""
    return hasattr(getattr(network, "transform", None), "image_mean")


def stated_by(network: nn.Module) -> Statistics | None:
    """What a timm model states in its ``pretrained_cfg``; None of other networks."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    if "mean" in config and "std" in config:
        return config["mean"], config["std"]
    return None
