"""A check that all processes hold equally many samples, without which their average is not that of the samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from restoreloss.distributed import world_size


def check_equal_batches(batch: Any) -> None:
    r"""Compare the numbers of samples over all processes; with one process there is nothing to compare.

    DDP averages the gradients of the processes' means, :math:`\tfrac1P \sum_p \tfrac1{n_p} \sum_i g_{p,i}`. It is the
    mean over all samples where every :math:`n_p` is the same. Otherwise a sample of a small batch counts for more.

    Every process must call this, and it waits for all: once, at the first step, rather than at each.

    Args:
        batch: tensors, or tuples, lists or mappings of them; the first one tells how many samples there are. A list of
            images (C, H, W), as detectors take, is as many samples.

    Raises:
        ValueError: If they differ, and for a batch without a tensor.

    Example:
        >>> check_equal_batches({"degraded": torch.rand(4, 3, 8, 8), "clean": torch.rand(4, 3, 8, 8)})
    """
    if (count := world_size()) == 1:
        return
    found: list[Any] = [None] * count
    torch.distributed.all_gather_object(found, _size(batch))
    if None in found:
        raise ValueError(f"`batch` should hold tensors of several samples, found {type(batch).__name__}.")
    if len(set(found)) > 1:
        raise ValueError(
            f"`batch` should hold equally many samples on all processes, found {found}: the mean of their means is "
            "not the mean over the samples."
        )


def _size(batch: Any) -> int | None:
    """The number of samples, or None where nothing tells."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        parts = list(batch)
        if parts and all(isinstance(part, Tensor) and part.ndim == 3 for part in parts):
            return len(parts)
    else:
        return None
    return next((size for size in map(_size, parts) if size is not None), None)
