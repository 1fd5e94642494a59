"""The gradient of a loss at an image, and its norm: of any size, in any precision."""

import torch
from torch import Tensor

from restoreloss.images import HALF, at_least_float32


def gradient_at(image: Tensor, value: Tensor) -> Tensor | None:
    """The gradient of a scalar at the image, in float32 or higher; None where no graph leads there."""
    if not value.requires_grad:
        return None
    # scaled in half precision, as a GradScaler would: a gradient that it saves must not be called zero
    scale = 2.0**12 if image.dtype in HALF else 1.0
    (gradient,) = torch.autograd.grad(scale * value, image, retain_graph=True, allow_unused=True)
    return None if gradient is None else at_least_float32(gradient) / scale


@torch.no_grad()
def gradient_norm(gradient: Tensor) -> Tensor:
    """The norm in float32 or higher, of a gradient divided by its largest element.

    Squares underflow at 1e-23 and overflow at 1e19.
    """
    gradient = at_least_float32(gradient)
    peak = gradient.abs().amax()
    safe = torch.where((peak > 0) & peak.isfinite(), peak, 1)
    norm: Tensor = safe * torch.linalg.vector_norm(gradient / safe)
    return norm
