"""Run by two processes: a restoration network cut by FSDP2, against a whole one that sees the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from restoreloss import (
    Alternation,
    DiffLoss,
    GradientOrthogonality,
    ParameterImportance,
    Phase,
    TDPLoss,
    WeightedSum,
    audit,
    frozen,
)
from tests.helpers.networks import tiny_unet
from tests.helpers.processes import in_group

BATCH, RANKS, MAX_NORM = 4, 2, 0.05


def restorer() -> nn.Sequential:
    """3, 5 and 3 channels: two processes have unlike parts."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 3, padding=1))


def cut(network: nn.Sequential) -> nn.Sequential:
    """Each layer by itself, as a large network would be."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for layer in (*network, network):
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    return network


def classifier() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )


def pictures(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(BATCH, 3, 9, 10, generator=generator)
    return (clean + 0.3 * torch.randn(clean.shape, generator=generator)).clamp(0, 1), clean


def chance(step: int) -> list[torch.Generator]:
    """Of each picture of the whole batch."""
    return [torch.Generator().manual_seed(BATCH * step + number) for number in range(BATCH)]


def same(cut: nn.Module, whole: nn.Module, of: Callable[[Any], Any]) -> None:
    for p, q in zip(cut.parameters(), whole.parameters(), strict=True):
        assert of(p).to_local().numel() < of(q).numel()  # a part of it, in fact
        torch.testing.assert_close(of(p).full_tensor(), of(q), rtol=1e-4, atol=1e-6)


def mean(value: Tensor) -> Tensor:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / RANKS


def check_losses(mine: slice) -> None:
    """Frozen networks stay outside of FSDP; each picture has chance of its own."""
    for objective in (
        DiffLoss(tiny_unet(), timesteps=(100, 900)),
        TDPLoss(classifier(), ["0"], normalize=None),
        WeightedSum({"pixel": nn.L1Loss(), "diff": DiffLoss(tiny_unet(), crop=8), "tdp": TDPLoss(classifier(), ["0"])}),
    ):
        options: Any = {} if isinstance(objective, TDPLoss) else {"generator": chance(1)}
        whole, parts = restorer(), cut(restorer())
        degraded, clean = pictures(1)
        expected = objective(whole(degraded), clean, **options)
        expected.backward()
        if options:
            options = {"generator": chance(1)[mine]}
        found = objective(parts(degraded[mine]), clean[mine], **options)
        found.backward()
        torch.testing.assert_close(mean(found), expected.detach(), rtol=1e-5, atol=1e-8)
        same(parts, whole, lambda p: p.grad)


def check_alternation(mine: slice) -> None:
    """Micro-batches, clipping, a task network in turn; flags are put back; the norm is a plain number."""
    logs: list[dict[str, Tensor]] = []
    trained = []
    for wrap_restorer, wrap_task, rows, micro in (
        (lambda network: network, lambda network: network, slice(None), 1),
        (cut, DistributedDataParallel, mine, 2),
    ):
        network, task = wrap_restorer(restorer()), wrap_task(classifier())
        tdp = TDPLoss(task, ["0"], normalize=None)

        def restore(batch: Any, network: Any = network, tdp: Any = tdp) -> dict[str, Tensor]:
            restored = network(batch[0])
            return {"pixel": F.mse_loss(restored, batch[1]), "tdp": tdp(restored, batch[1])}

        def recognise(batch: Any, network: Any = network, task: Any = task) -> Tensor:
            restored = network(batch[0])
            assert not restored.requires_grad  # the phase has frozen it
            return F.cross_entropy(task(restored), batch[2])

        training = Alternation(
            [
                Phase("restorer", [network], restore, torch.optim.SGD(network.parameters(), lr=0.5), max_norm=MAX_NORM),
                Phase("task", [task], recognise, torch.optim.SGD(task.parameters(), lr=0.5)),
            ]
        )
        for step in range(3):
            parts = [tensor[rows].chunk(micro) for tensor in (*pictures(step), torch.arange(BATCH) % 2)]
            logs.append(training.step(*zip(*parts, strict=True)))
        assert all(p.requires_grad for p in network.parameters())
        trained.append((network, getattr(task, "module", task)))
    for expected, found in zip(logs[:3], logs[3:], strict=True):
        assert expected["restorer/grad_norm"] > MAX_NORM
        for key, value in expected.items():
            assert type(found[key]) is Tensor, key
            torch.testing.assert_close(mean(found[key]), value, rtol=1e-4, atol=1e-6, msg=key)
    (whole, task), (parts, other) = trained
    same(parts, whole, lambda p: p.detach())
    for p, q in zip(task.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def check_freezing(mine: slice) -> None:
    """The gradient passes through a frozen network to its input, and trains it again afterwards."""
    parts = cut(restorer())
    degraded, clean = (u[mine] for u in pictures(1))
    for _ in range(2):
        with frozen(parts):
            image = degraded.clone().requires_grad_()
            F.mse_loss(parts(image), clean).backward()
        assert image.grad is not None and image.grad.abs().sum() > 0
        assert all(p.grad is None and p.requires_grad for p in parts.parameters())
    F.mse_loss(parts(degraded), clean).backward()
    assert all(p.grad is not None for p in parts.parameters())


def measured(network: nn.Module, estimator: Any) -> ParameterImportance:
    importance = ParameterImportance(network, estimator=estimator, strength=3.0, layer_weights={"2": 0.5})
    squared = estimator != "mas"
    importance.accumulate(
        lambda model, batch: F.mse_loss(model(batch[0]), batch[1]) if squared else model(batch[0]), [pictures(1)]
    )
    return importance


def check_importance(mine: slice) -> None:
    """Measured on the whole network, then charged by parts: as a loss, by hand, in the optimiser; twice over."""
    del mine  # the same data everywhere
    for estimator in ("taylor2", "fisher", "mas"):
        whole, parts = restorer(), restorer()
        kept = measured(whole, estimator), measured(parts, estimator)
        cut(parts)
        loaded = ParameterImportance(parts, estimator=estimator, strength=3.0, layer_weights={"2": 0.5})
        loaded.load_state_dict(kept[0].state_dict())
        with torch.no_grad():
            for network in (whole, parts):
                for p in network.parameters():
                    p.mul_(1.1).add_(0.1)
        kept[0]().backward()
        gradients = [p.grad for p in whole.parameters()]
        for importance in (kept[1], loaded):
            for way in ("loss", "apply_", "attach"):
                optimizer = torch.optim.SGD(parts.parameters(), lr=0.0)
                optimizer.zero_grad()
                if way == "loss":
                    penalty = importance()
                    torch.testing.assert_close(penalty, kept[0](), rtol=1e-5, atol=0)
                    assert type(penalty) is Tensor
                    penalty.backward()
                elif way == "apply_":
                    importance.apply_()
                else:
                    for p in parts.parameters():
                        p.grad = torch.zeros_like(p)
                    importance.attach(optimizer)
                    optimizer.step()
                for p, gradient in zip(parts.parameters(), gradients, strict=True):
                    torch.testing.assert_close(p.grad.full_tensor(), gradient, rtol=1e-4, atol=1e-7)
        kept[1].begin_task()  # where the parameters are now, whole
        anchors = [value for name, value in kept[1].state_dict().items() if name.startswith("1/anchor/")]
        assert len(anchors) == 4
        for anchor, p in zip(anchors, whole.parameters(), strict=True):
            assert type(anchor) is Tensor
            torch.testing.assert_close(anchor, p.detach())


def check_refusals(mine: slice) -> None:
    parts = cut(restorer())
    refused: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: measured(parts, "taylor2"),
            "`model` should be whole while its importance is measured, found '0.weight' cut",
        ),
        (
            lambda: GradientOrthogonality(parts.parameters()),
            "`parameters` should be whole, found some that `fully_shard` has cut",
        ),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


def check_audit(mine: slice) -> None:
    """It looks at pictures, and does not mind where they come from."""
    whole, parts = restorer(), cut(restorer())
    degraded, clean = (u[mine] for u in pictures(1))
    objective = WeightedSum({"pixel": nn.MSELoss(), "diff": DiffLoss(tiny_unet())})
    expected, found = (audit(objective, network(degraded), clean) for network in (whole, parts))
    for one, other in zip(expected, found, strict=True):
        assert one.flags == other.flags
        for name in ("value", "gradient_norm", "share"):
            assert abs(getattr(one, name) - getattr(other, name)) < 1e-4 * abs(getattr(one, name)), name


CASES: dict[str, Callable[[slice], None]] = {
    "losses": check_losses, "alternation": check_alternation, "freezing": check_freezing,
    "importance": check_importance, "refusals": check_refusals, "audit": check_audit,
}  # fmt: skip
"""What FSDP2 must leave as it is."""
UNSUPPORTED = "FSDP2 does not run on this torch's CPU"


def works() -> bool:
    """Older torch asks the CPU for a stream of events, which it has not."""
    try:
        cut(restorer())(pictures(1)[0])
    except AttributeError as error:
        if "record_event" in str(error):
            return False
        raise
    return True


def main() -> None:
    if not works():
        print(UNSUPPORTED, flush=True)
        return
    rank = dist.get_rank()
    for name, check in CASES.items():
        check(slice(2 * rank, 2 * rank + 2))
        if rank == 0:
            print(f"{name}: equal", flush=True)


if __name__ == "__main__":
    in_group(main)
