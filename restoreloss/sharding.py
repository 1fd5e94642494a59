"""What has FSDP2 left of a parameter in this process, and where is the rest?

``torch.distributed.fsdp.fully_shard`` makes every parameter a ``DTensor``: in shape the whole, in memory this process's
part of it. Its gradient is such a part too, averaged over the processes.
"""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    # by what it has: to import the class takes a tenth of a second, and a torch built without `distributed` lacks it
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All of a tensor, gathered where it is in parts: every process must call this. Differentiable."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def cut_like(tensor: Tensor, parameter: Any) -> Tensor:
    """The part of a whole tensor that a parameter has here; nothing is sent."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, parameter.placements)
