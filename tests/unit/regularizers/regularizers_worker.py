"""Run by two processes: do regularisers see what one process sees on all of the data?"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from restoreloss import GradientOrthogonality, ParameterImportance
from restoreloss.regularizers.layer_decay import add_gradients
from tests.helpers.processes import in_group


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1))


def batch(size, seed):
    return torch.randn(size, 2, 5, 4, generator=torch.Generator().manual_seed(seed))


def squared(model, x):
    return model(x).square().mean()


def answers(model, x):
    return model(x)


def check_importance(rank):
    data, more = batch(7, 1), batch(4, 2)
    for estimator, function in (("taylor2", squared), ("fisher", squared), ("mas", answers)):
        whole = ParameterImportance(network(), estimator=estimator)
        parallel = ParameterImportance(DistributedDataParallel(network()), estimator=estimator)
        # unlike numbers of samples on the two; the second call refines the first, and one process has none for it
        mine = [(data[:5], data[5:])[rank].split(2), ([more], [])[rank]]
        counts = [parallel.accumulate(function, batches) for batches in mine]
        assert counts == [7, 11], counts
        alone([lambda whole=whole, b=b, f=function: whole.accumulate(f, [b]) for b in (data, more)])
        for name, value in whole.importance().items():
            torch.testing.assert_close(parallel.importance()[name], value, rtol=1e-4, atol=1e-8)
        for one in (whole, parallel):
            one.begin_task(decay=0.5)
        parallel.accumulate(function, mine[0])
        alone([lambda whole=whole, f=function: whole.accumulate(f, [data])])
        for name, value in whole.importance().items():
            torch.testing.assert_close(parallel.importance()[name], value, rtol=1e-4, atol=1e-8)
        if rank == 0:
            print(f"{estimator}: equal", flush=True)


def alone(calls):
    """As if there were no other process."""
    initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        for call in calls:
            call()
    finally:
        dist.is_initialized = initialized


def check_orthogonality(rank):
    clean, degraded = batch(8, 1), batch(8, 2)
    for policy in ("conflict", "full"):
        for sign in (1, -1):  # of the same direction, and in conflict
            one, many = network(), network()
            cosines = []

            def step(model, x, y, inside, policy=policy, sign=sign, cosines=cosines):
                for p in inside.parameters():
                    p.grad = torch.full_like(p, 0.5)
                orthogonality = GradientOrthogonality(inside[0].parameters())
                losses = sign * model(x).square().mean(), model(y).square().mean()
                cosines.append(orthogonality.project(*losses, policy=policy, others=inside.parameters(), weight=0.3))

            alone([lambda one=one, step=step: step(one, clean, degraded, one)])
            wrapped = DistributedDataParallel(copy.deepcopy(many))
            with wrapped.no_sync():
                step(wrapped, clean.chunk(2)[rank], degraded.chunk(2)[rank], wrapped.module)
            assert cosines[0] * sign > 0.05, cosines
            torch.testing.assert_close(*cosines, rtol=1e-4, atol=1e-6)
            for p, q in zip(one.parameters(), wrapped.module.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
        if rank == 0:
            print(f"{policy}: equal", flush=True)


def check_layers(rank):
    data, weights = batch(8, 1), {"0": 0.5, "2": 1.0}
    whole, parallel = network(), DistributedDataParallel(network())
    for model in (whole, parallel.module):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    alone([lambda: add_gradients(squared(whole, data), whole, weights)])
    add_gradients(squared(parallel.module, data.chunk(2)[rank]), parallel, weights)
    for p, q in zip(whole.parameters(), parallel.module.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
    heads = nn.ModuleDict({name: nn.Conv2d(1, 1, 1) for name in "abc"})  # of which each process reaches one
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.fill_(0.5)
    add_gradients(heads["ab"[rank]](data[:, :1]).square().mean(), heads, {"": 1.0})
    one = heads["a"](data[:, :1]).square().mean()
    wanted = torch.autograd.grad(one / 2, heads["a"].weight)[0]
    for name in "ab":
        torch.testing.assert_close(heads[name].weight.grad, wanted)
    assert heads["c"].weight.grad is None
    print("layers: equal", flush=True)


def main():
    checks = {"importance": check_importance, "orthogonality": check_orthogonality, "layers": check_layers}
    checks[sys.argv[1]](dist.get_rank())


if __name__ == "__main__":
    in_group(main)
