"""Helpers for parameters sharded by FSDP2: detect, gather, shard.

``torch.distributed.fsdp.fully_shard`` makes every parameter a ``DTensor``, which has the shape of the whole and
holds the part of this process. Its gradient is such a part too, averaged over the processes.
"""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    # The class is not imported: that takes a tenth of a second, and a torch built without `distributed` lacks it.
    return hasattr(tensor, "full_tensor")


def gather(tensor: Any) -> Tensor:
    """The whole tensor, gathered where it is sharded; then every process must call this. Differentiable."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def shard_like(tensor: Tensor, parameter: Any) -> Tensor:
    """The part of a whole tensor that a parameter has in this process; nothing is sent."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, parameter.placements)
