"""Gradients of single losses, and their mean over processes: what projections and aggregators begin with."""

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


def reached_anywhere(reached: Sequence[bool], device: torch.device) -> list[bool]:
    """What any of all processes has reached. One process alone does not wait for its device."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(reached)
    counts = torch.tensor(reached, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]


def average_(gradients: Sequence[Tensor]) -> None:
    """Replace each by its mean over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
