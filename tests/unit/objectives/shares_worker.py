"""Run by two processes: WeightedSum(shares=...) on two halves of a batch against the whole batch."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from restoreloss import WeightedSum
from tests.helpers.processes import in_group


def new() -> WeightedSum:
    return WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3})


def alone() -> Iterator[tuple[Tensor, Tensor, dict[str, float], Tensor]]:
    """Each batch with what one process makes of the whole of it."""
    terms = new()
    for restored, target in torch.rand(5, 2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0)):
        image = restored.clone().requires_grad_()
        terms(image, target).backward()
        yield restored, target, terms.current_weights(), image.grad


def check(expected: list[tuple[Tensor, Tensor, dict[str, float], Tensor]]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, together = slice(2 * rank, 2 * rank + 2), new()
    for restored, target, weights, gradient in expected:
        image = restored[mine].clone().requires_grad_()
        together(image, target[mine]).backward()
        assert abs(together.current_weights()["other"] / weights["other"] - 1) < 1e-5
        torch.testing.assert_close(image.grad / world, gradient[mine])
    check_other_passes(rank)
    print("equal", flush=True)


def check_other_passes(rank: int) -> None:
    """What one process alone leaves out of its backward pass counts alike in all."""
    loss = new()
    for call in range(6):
        image = torch.rand(2, 3, 6, 6, requires_grad=True)
        terms = loss.terms(image, torch.zeros(2, 3, 6, 6))
        (terms["pixel"] if rank and call else terms["pixel"] + terms["other"]).backward()
    loss.norms.take_in()
    weights = torch.tensor(loss.current_weights()["other"])
    both = [torch.zeros(()), torch.zeros(())]
    dist.all_gather(both, weights)
    assert torch.equal(*both) and int(loss.norms.get_buffer("calls_other")) == 6


if __name__ == "__main__":
    expected = list(alone())  # before there is a group
    in_group(lambda: check(expected))
