"""Gradients of single losses: what projections and aggregators begin with."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients_of(
    name: str,
    loss: Tensor,
    tensors: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> list[Tensor]:
    """The gradient of a loss with respect to each tensor, zeros where it does not depend on it.

    Raises:
        ValueError: For a loss that depends on none of them, by the name of its argument.
    """
    found = torch.autograd.grad(
        loss, tensors, create_graph=create_graph, retain_graph=create_graph or retain_graph, allow_unused=True
    )
    if all(gradient is None for gradient in found):
        raise ValueError(f"`{name}` should depend on the parameters, found a loss that depends on none of them.")
    pairs = zip(found, tensors, strict=True)
    return [torch.zeros_like(tensor) if gradient is None else gradient for gradient, tensor in pairs]
