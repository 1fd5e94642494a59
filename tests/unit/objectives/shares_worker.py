"""Run by two processes: WeightedSum(shares=...) on two halves of a batch against the whole batch."""

import torch
import torch.distributed as dist
from torch import nn

from restoreloss import WeightedSum


def new() -> WeightedSum:
    return WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3})


def main() -> None:
    batches = torch.rand(5, 2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    alone = new()
    expected = []
    for restored, target in batches:
        image = restored.clone().requires_grad_()
        alone(image, target).backward()
        expected.append((alone.current_weights(), image.grad))
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == 2, world
    mine, together = slice(2 * rank, 2 * rank + 2), new()
    for (restored, target), (weights, gradient) in zip(batches, expected, strict=True):
        image = restored[mine].clone().requires_grad_()
        together(image, target[mine]).backward()
        assert abs(together.current_weights()["other"] / weights["other"] - 1) < 1e-5
        torch.testing.assert_close(image.grad / world, gradient[mine])
    print("equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
