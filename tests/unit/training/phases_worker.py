"""Run by two processes: phases of networks under DDP, against one process on the whole batch."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from restoreloss import Alternation, CQMix, Phase, TDPLoss
from tests.helpers.networks import Classifier
from tests.helpers.processes import in_group

STEPS, BATCH, RANKS = 3, 8, 2
MAX_NORM = 0.1  # less than the gradient of the restorer
CASES = {  # micro-batches, DDP's options
    "one batch": (1, {}),
    "two micro-batches": (2, {}),
    "four micro-batches": (4, {"gradient_as_bucket_view": True}),
    "unused parameters": (2, {"find_unused_parameters": True}),
}


class Run:
    """Networks, their alternation, and what was seen of DDP in it."""

    def __init__(self, restorer, classifier, wrap=None, **options):
        self.restorer = restorer if wrap is None else wrap(restorer, **options)
        self.classifier = classifier if wrap is None else wrap(classifier, **options)
        self.tdp, self.mix = TDPLoss(self.classifier, ["features"], normalize=None), CQMix((2, 2))
        self.averaging = {"restorer": [], "classifier": []}  # was DDP to average after this micro-batch?
        self.averaged = {"restorer": 0, "classifier": 0}  # how often it did
        first = torch.optim.SGD(restorer.parameters(), lr=0.5, momentum=0.9)
        second = torch.optim.SGD(classifier.parameters(), lr=1.0, momentum=0.9)
        self.training = Alternation(
            [
                Phase("restorer", [self.restorer], self.restore, first, max_norm=MAX_NORM),
                Phase(
                    "classifier",
                    [self.classifier],
                    self.recognise,
                    second,
                    schedulers=torch.optim.lr_scheduler.StepLR(second, 1, gamma=0.5),
                ),
            ]
        )
        for name, network in (("restorer", self.restorer), ("classifier", self.classifier)):
            if isinstance(network, DistributedDataParallel):
                network.register_comm_hook(name, self.average)

    def average(self, name, bucket):
        self.averaged[name] += 1
        return allreduce_hook(None, bucket)

    def restore(self, batch):
        degraded, clean, label, _ = batch
        self.look("restorer", self.restorer)
        restored = self.restorer(degraded)
        # the task network is seen through its wrapper and, in TDPLoss, through the network inside
        task = F.cross_entropy(self.classifier(restored), label)
        return {"pixel": F.l1_loss(restored, clean), "tdp": self.tdp(restored, clean), "task": task}

    def recognise(self, batch):
        degraded, clean, label, number = batch
        self.look("classifier", self.classifier)
        restored = self.restorer(degraded)  # without no_grad: the phase has frozen it
        assert not restored.requires_grad
        mixed = [  # every picture has coins of its own, whoever holds it
            self.mix(z[None], x[None], generator=torch.Generator().manual_seed(int(n)))
            for z, x, n in zip(restored, clean, number, strict=True)
        ]
        return F.cross_entropy(self.classifier(torch.cat([restored, clean, *mixed])), label.repeat(3))

    def look(self, name, network):
        if isinstance(network, DistributedDataParallel):
            self.averaging[name].append(network.require_backward_grad_sync)


def batches():
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        clean = torch.rand(BATCH, 3, 9, 10, generator=generator)
        degraded = (clean + 0.3 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
        label = torch.randint(0, 2, (BATCH,), generator=generator)
        yield degraded, clean, label, torch.arange(BATCH) + BATCH * step


def check_that_an_exception_leaves_ddp_averaging(run, batch):
    def fail(batch):
        raise RuntimeError("out of memory, say")

    phase = run.training.phases[0]
    broken = Alternation([Phase("broken", phase.trains, fail, phase.optimizers)])
    try:
        broken.step(batch, batch)
    except RuntimeError:
        pass
    else:
        raise AssertionError
    assert run.restorer.require_backward_grad_sync


def main():
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    restorer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))
    classifier = Classifier()
    for name, (micro, options) in CASES.items():
        single = Run(copy.deepcopy(restorer), copy.deepcopy(classifier))
        parallel = Run(copy.deepcopy(restorer), copy.deepcopy(classifier), DistributedDataParallel, **options)
        for batch in batches():
            expected = single.training.step(batch)
            mine = [part.chunk(world)[rank].chunk(micro) for part in batch]
            found = parallel.training.step(*zip(*mine, strict=True))
            assert list(found) == list(expected)
            assert expected["restorer/grad_norm"] > MAX_NORM
            for key, value in expected.items():
                mean = found[key].clone()
                dist.all_reduce(mean)
                torch.testing.assert_close(mean / world, value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
        for one, many, fresh in (
            (single.restorer, parallel.restorer, restorer),
            (single.classifier, parallel.classifier, classifier),
        ):
            for p, q, start in zip(one.parameters(), many.module.parameters(), fresh.parameters(), strict=True):
                assert (p - start).abs().max() > 1e-3  # it did learn
                torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)
                others = [torch.empty_like(q) for _ in range(world)]
                dist.all_gather(others, q.detach())
                assert all(torch.equal(others[0], other) for other in others)
        wanted = ([False] * (micro - 1) + [True]) * STEPS
        assert parallel.averaging == {"restorer": wanted, "classifier": wanted}, parallel.averaging
        once = parallel.averaged == {"restorer": STEPS, "classifier": STEPS}  # one bucket each
        check_that_an_exception_leaves_ddp_averaging(parallel, batch)
        if rank == 0:
            print(f"{name}: equal", flush=True)
            print(f"{name}: averaged {'once a step' if once else parallel.averaged}", flush=True)


if __name__ == "__main__":
    in_group(main)
