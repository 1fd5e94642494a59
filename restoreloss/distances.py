"""Distances of two predictions, one number for each sample, and their reduction over samples."""

from typing import Literal

import torch
from torch import Tensor

from restoreloss.images import at_least_float32

Distance = Literal["mse", "rms", "l2", "l1"]
Reduction = Literal["mean", "sum", "none"]


def distance_per_sample(
    prediction: Tensor, reference: Tensor, distance: Distance, *, weights: Tensor | None = None
) -> Tensor:
    r"""The distance over all dimensions but the first, in float32 or higher: shape (N,).

    With :math:`d` the difference of a sample and :math:`n` its number of elements:

    ===== =================================== ========================================
    mse   :math:`\sum d^2 / n`                the "L2 loss"
    rms   :math:`\sqrt{\sum d^2 / n}`         does not grow with the image
    l2    :math:`\sqrt{\sum d^2}`             the Frobenius norm
    l1    :math:`\sum |d| / n`
    ===== =================================== ========================================

    The roots are taken of :math:`u + \delta` with :math:`\delta` the smallest normal number of the dtype, less
    :math:`\sqrt\delta`: exactly 0, with gradient 0, where the two are equal. ``weights``, which broadcast over the
    prediction, multiply :math:`d^2` or :math:`|d|`.
    """
    prediction = at_least_float32(prediction)
    difference = prediction - reference.to(prediction.dtype)
    sizes = difference.abs() if distance == "l1" else difference.square()
    if weights is not None:
        sizes = weights * sizes
    # Not flattened: compiled code would take the memory format for granted. The last dimension is there for (N,).
    sizes = sizes.unsqueeze(-1)
    dimensions = tuple(range(1, sizes.ndim))
    if distance in ("l1", "mse"):
        return sizes.mean(dim=dimensions)
    total = sizes.sum(dim=dimensions) if distance == "l2" else sizes.mean(dim=dimensions)
    tiny = torch.finfo(total.dtype).tiny
    root: Tensor = (total + tiny).sqrt() - tiny**0.5
    return root


def reduce_samples(values: Tensor, reduction: Reduction) -> Tensor:
    """(N,) to its mean, its sum, or itself."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()
