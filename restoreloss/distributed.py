"""What processes that train together agree on: how many they are, and means of what each has."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each by its mean over all processes."""
    if (count := world_size()) > 1:
        for tensor in tensors:
            tensor /= count  # first: a sum may be beyond float16
            dist.all_reduce(tensor)


def reached_anywhere(reached: Sequence[bool], device: torch.device) -> list[bool]:
    """What any of all processes has reached. One process alone does not wait for its device."""
    if world_size() == 1:
        return list(reached)
    counts = torch.tensor(reached, dtype=torch.float32, device=device)
    dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]
