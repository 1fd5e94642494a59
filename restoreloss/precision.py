"""The dtype of a network's input, buffers that keep theirs, and gradients through frozen networks in float16.

The gradient of a mean over a batch of images is about 1e-7 in each element, which float16 rounds to zero. A pair of
doors around the network multiplies it by a power of two where it enters half precision and divides it by the same
number where it leaves: no digit is lost, no GradScaler is needed, and one that is there does no harm::

    (cast,), door = enter([image], torch.float16, network)
    noise, h = leave(door, *network(cast))
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PEAK_EXPONENT, _SUM_BITS = 6, 7
"""The largest element of a scaled gradient is below 2^7, and the sum of all elements of a sample below 2^14."""


class ExactBuffers(nn.Module):
    """A module whose buffers follow the device of a parent's ``.to()`` or ``.half()``, never its dtype.

    Tables of levels, running means and squares of gradients lose in half precision what they are there for.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> "ExactBuffers":
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def reference_weight(network: nn.Module) -> Tensor | None:
    """The first floating-point parameter, which tells dtype and device of a network's input; None where it has none."""
    for parameter in network.parameters():  # no `next`, which torch 2.6 cannot compile
        if parameter.is_floating_point():
            return parameter
    return None


def enter(images: Sequence[Tensor], dtype: torch.dtype, network: nn.Module) -> tuple[list[Tensor], Tensor | None]:
    """Images in a network's dtype, and the door to :func:`leave` by; None where nothing needs to be scaled.

    Gradients are scaled where a wider image that requires one meets float16, and no parameter of ``network`` would get
    a scaled gradient.
    """
    scaled = (
        dtype == torch.float16
        and torch.is_grad_enabled()
        and any(image.requires_grad for image in images)
        and not any(image.dtype == dtype for image in images)
        and not any(parameter.requires_grad for parameter in network.parameters())
    )
    if not scaled:
        return [image.to(dtype) for image in images], None
    *casts, door = _Enter.apply(dtype, *images)
    return casts, door


def leave(door: Tensor | None, *outputs: Tensor) -> tuple[Tensor, ...]:
    """What a network made of an image that came through :func:`enter`, all of it at once; in float32 after a door."""
    if door is None:
        return outputs
    wide: tuple[Tensor, ...] = _Leave.apply(door, *outputs)
    return wide


class _Enter(torch.autograd.Function):
    """The casts, and a number whose gradient is the factor that the gradients of the casts have to be multiplied by."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dtype: torch.dtype, *images: Tensor) -> tuple[Tensor, ...]:
        return *(image.to(dtype) for image in images), images[0].new_ones(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.dtypes = [image.dtype for image in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *of_casts, factor = gradients
        return None, *(gradient.to(dtype) * factor for gradient, dtype in zip(of_casts, ctx.dtypes, strict=True))


class _Leave(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(door: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.to(door.dtype) for output in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.dtypes = [one.dtype for one in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        sizes = [gradient.abs() for gradient in gradients]
        peak = torch.stack([size.amax() for size in sizes]).amax()
        # This adds up where a network sums over pixels, as global pooling does.
        mass = torch.stack([size.reshape(len(size), -1).sum(dim=1).amax() for size in sizes]).amax()
        size = torch.maximum(peak, mass / 2**_SUM_BITS)
        # Zeros, NaN and infinity pass unchanged.
        scalable = (size > 0) & size.isfinite()
        exponent = _PEAK_EXPONENT - torch.where(scalable, size, 1.0).log2().floor()
        scale = torch.where(scalable, exponent.clamp(max=120).exp2(), 1.0)
        scaled = ((gradient * scale).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        return 1 / scale, *scaled


def same_integers(saved: Tensor, own: Tensor) -> bool:
    """Whether a state has these integers. It holds them as floats, which may be averaged, or cast to bfloat16."""
    as_saved = own.to(saved)
    return saved.shape == own.shape and bool(((saved.double() - as_saved.double()).abs() < 0.5).all())
