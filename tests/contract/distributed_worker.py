"""Run by two processes: a restorer under DDP with each objective, against one process on the whole batch."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from restoreloss import DiffLoss, Objective, WeightedSum
from restoreloss.objectives import diffloss
from tests.contract.objectives import CASES, images
from tests.helpers.processes import in_group


def fix_chance(objective: Objective, rows: slice) -> None:
    """Give every DiffLoss the timesteps and noise of these rows of the whole batch."""
    parts = objective.objectives.values() if isinstance(objective, WeightedSum) else [objective]
    for part in parts:
        if isinstance(part, DiffLoss):
            # what a training script would draw with one generator for the whole batch
            part.timesteps = lambda n, generator: torch.tensor([10, 100, 300, 700])[rows]
    diffloss.standard_normal = lambda z, generator: torch.randn(
        (4, *z.shape[1:]), generator=torch.Generator().manual_seed(7)
    )[rows]


def main() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    degraded, clean = (u.detach() for u in images())
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 3, padding=1)
    mine = slice(2 * rank, 2 * rank + 2)
    for case in CASES:
        if case.part < 1:
            continue  # each process looks at a part of its own: equal on average only
        single, parallel = copy.deepcopy(net), DistributedDataParallel(copy.deepcopy(net))
        objective = case.build()
        fix_chance(objective, slice(None))
        whole = objective(single(degraded), clean)
        whole.backward()
        fix_chance(objective, mine)
        part = objective(parallel(degraded[mine]), clean[mine])
        part.backward()
        mean = part.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / world, whole.detach(), rtol=1e-5, atol=1e-8)
        for p, q in zip(parallel.module.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)
        if rank == 0:
            print(case.name, "equal", flush=True)


if __name__ == "__main__":
    in_group(main)
