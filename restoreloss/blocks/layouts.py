"""Where the channels of a feature map are: first (N, C, H, W), last (N, H, W, C), or those of a sequence (N, L, C)."""

from collections.abc import Callable, Sequence
from math import isqrt

from torch import Tensor, nn


def has_channels_last(layer: nn.Module) -> bool:
    """Whether a layer certainly has its channels last; of a subclass that is not known."""
    # a layer normalization over several dimensions is taken for one over (C, H, W)
    return type(layer) is nn.Linear or (type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1)


def channel_dim(shape: Sequence[int], sides: Sequence[int], *, last: bool = False) -> int | None:
    """Which dimension holds the channels of a layer's output, 1 or -1; None of what is no feature map.

    Args:
        shape: of the output. Transformers as SwinIR return (N, L, C), and others (N, H, W, C).
        sides: height and width of the image; a map has sides in the same ratio.
        last: where both fit, whether channels come last. They come first otherwise.
    """
    if len(shape) == 3:
        return -1
    if len(shape) != 4:
        return None
    return -1 if _is_reduced(shape[1:3], sides) and (last or not _is_reduced(shape[2:], sides)) else 1


def as_map(
    value: Tensor, channels: int, sides: Sequence[int], *, spatial: bool, last: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """The output of a layer as (N, C, H, W), and the way back; None where it does not have these channels.

    Args:
        value: (N, C, H, W), (N, H, W, C) or (N, L, C).
        channels: that it should have.
        sides: height and width of the image.
        spatial: whether what is done to it looks at neighbors. A sequence then has to fill a map in the ratio of the
            image; otherwise it is (N, C, L, 1).
        last: as for :func:`channel_dim`.
    """
    dim = channel_dim(value.shape, sides, last=last)
    if value.ndim == 4 and not _is_reduced(value.shape[1:3], sides) and not _is_reduced(value.shape[2:], sides):
        dim = 1 if value.shape[1] == channels else -1  # The sides do not tell, so that the channels have to.
    if dim is None or value.shape[dim] != channels:
        return None
    if dim == 1:
        return value, lambda changed: changed
    if value.ndim == 4:
        return value.permute(0, 3, 1, 2), lambda changed: changed.permute(0, 2, 3, 1)
    size = _sides_of(value.shape[1], sides) if spatial else (value.shape[1], 1)
    if size is None:
        return None
    return value.transpose(1, 2).unflatten(2, size), lambda changed: changed.flatten(2).transpose(1, 2)


def _is_reduced(small: Sequence[int], sides: Sequence[int]) -> bool:
    """Whether these are in the ratio of the sides of the image."""
    return (
        all(side > 0 for side in small) and len({long / short for long, short in zip(sides, small, strict=True)}) == 1
    )


def _sides_of(length: int, sides: Sequence[int]) -> tuple[int, int] | None:
    """Height and width of a sequence that is the image, reduced by a whole number."""
    height, width = sides
    factor = isqrt(height * width // length) if length else 0
    if factor < 1 or height % factor or width % factor or (height // factor) * (width // factor) != length:
        return None
    return height // factor, width // factor
