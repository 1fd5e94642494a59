"""Run by two processes: do aggregators see what one process sees on the whole batch?"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchjd.aggregation import MGDA, GradDrop, PCGrad

from restoreloss.integrations.torchjd import Projection, aggregate
from tests.helpers.processes import in_group


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1))


def batches():
    return [torch.randn(8, 2, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]


def losses(model, images):
    x, y, z = images
    return {"x": -model(x).square().mean(), "y": model(y).square().mean(), "z": (model(z) - z).square().mean()}


def step(model, inside, images, aggregator, names, micro_batches):
    for p in inside.parameters():
        p.grad = torch.full_like(p, 0.5)
    for number in range(micro_batches):
        found = losses(model, [image.chunk(micro_batches)[number] for image in images])
        weights = aggregate(
            {name: found[name] / micro_batches for name in names}, inside[0].parameters(), aggregator,
            own={names[-1]: inside[2].parameters()}, last=number + 1 == micro_batches,
        )  # fmt: skip
    return weights


def alone(call):
    """As if there were no other process."""
    initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        return call()
    finally:
        dist.is_initialized = initialized


def main():
    rank = dist.get_rank()
    for aggregator in (Projection(), MGDA(), PCGrad(), GradDrop()):
        names = "xy" if isinstance(aggregator, Projection) else "xyz"
        for micro_batches in (1, 2):
            one, many = network(), DistributedDataParallel(network())
            torch.manual_seed(7)
            expected = alone(lambda o=one, a=aggregator, n=names, m=micro_batches: step(o, o, batches(), a, n, m))
            torch.manual_seed(7 + rank)  # the second process draws other numbers
            mine = [image.chunk(2)[rank] for image in batches()]
            with many.no_sync():
                found = step(many, many.module, mine, aggregator, names, micro_batches)
            if rank == 0:
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
            for p, q in zip(one.parameters(), many.module.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6)
                other = q.grad.clone()
                dist.broadcast(other, 1)
                assert torch.equal(other, q.grad)
        if rank == 0:
            print(f"{type(aggregator).__name__}: equal", flush=True)


if __name__ == "__main__":
    in_group(main)
