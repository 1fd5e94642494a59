"""Do all processes hold equally many samples? Else what they average is no average of the samples."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def check_equal_batches(batch: Any) -> None:
    r"""Compare the numbers of samples over all processes; with one process there is nothing to compare.

    DDP averages the gradients of the processes' means, :math:`\tfrac1P \sum_p \tfrac1{n_p} \sum_i g_{p,i}`. It is the
    mean over all samples where every :math:`n_p` is the same. Otherwise a sample of a small batch counts for more.

    Every process must call this, and it waits for all: once, at the first step, rather than at each.

    Args:
        batch: tensors, or tuples, lists or dicts of them; the first one tells how many samples there are.

    Raises:
        ValueError: If they differ, and for a batch without a tensor.

    Example:
        >>> check_equal_batches({"degraded": torch.rand(4, 3, 8, 8), "clean": torch.rand(4, 3, 8, 8)})
    """
    sizes = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not sizes:
        raise ValueError(f"`batch` should hold tensors of several samples, found {type(batch).__name__}.")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, sizes[0])
    if len(set(found)) > 1:
        raise ValueError(
            f"`batch` should hold equally many samples on all processes, found {found}: the mean of their means is "
            "not the mean over the samples."
        )
