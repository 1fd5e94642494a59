"""Run by two processes, and imported by the test: phases, regularisers and projection under accelerate."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from restoreloss import (
    Alternation,
    CQMix,
    DiffLoss,
    GradientOrthogonality,
    ParameterImportance,
    Phase,
    Subsampled,
    TDPLoss,
    WeightedSum,
)
from restoreloss.integrations.accelerate import prepare, project, register
from restoreloss.integrations.processes import check_equal_batches
from tests.helpers.networks import Classifier
from tests.helpers.processes import leave_group

accelerate = pytest.importorskip("accelerate")  # pytest looks into this file for doctests

BATCH, STEPS = 8, 3


class Seen(nn.Module):
    """A denoiser that counts its passes."""

    def __init__(self):
        super().__init__()
        self.network, self.count = nn.Conv2d(3, 3, 3, padding=1), 0

    def forward(self, x, t):
        self.count += 1
        return self.network(x)


class Run:
    """Phases of a restorer and a classifier, with a prior and an importance."""

    def __init__(self, accelerator, measure=True):
        torch.manual_seed(0)
        restorer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))
        classifier, self.denoiser = Classifier(), Seen()
        diff = DiffLoss(self.denoiser, h_space_weight=0, timesteps=(300, 301))
        self.denoiser.count = 0  # it was tried
        loss = WeightedSum({"pixel": nn.L1Loss(), "diff": Subsampled(diff, every=2)}, weights={"diff": 0.3})
        self.importance = ParameterImportance(restorer, strength=3.0)
        generator = torch.Generator().manual_seed(5)
        images = torch.rand(4, 3, 6, 6, generator=generator)
        if measure:
            self.importance.accumulate(lambda net, batch: net(batch).square().mean(), [images])
        with torch.no_grad():
            for parameter in restorer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        first = torch.optim.SGD(restorer.parameters(), lr=0.5, momentum=0.9)
        second = torch.optim.SGD(classifier.parameters(), lr=0.5, momentum=0.9)
        self.importance.attach(first)
        resting = nn.Conv2d(3, 3, 1).requires_grad_(False)
        # one call, with what trains and what does not
        prepared = prepare(accelerator, restorer, resting, classifier, loss, first, second)
        self.restorer, same, self.classifier, self.loss, first, second = prepared
        assert same is resting and self.loss is loss
        assert isinstance(self.classifier, DistributedDataParallel) == (accelerator.num_processes > 1)
        self.tdp, self.mix = TDPLoss(self.classifier, ["features"], normalize=None), CQMix((2, 2))
        self.training = Alternation(
            [
                Phase("restorer", [self.restorer], self.restore, first, max_norm=0.1),
                Phase(
                    "classifier", [self.classifier], self.recognise, second,
                    schedulers=torch.optim.lr_scheduler.StepLR(second.optimizer, 1, gamma=0.5),
                ),
            ],
            accelerator=accelerator,
        )  # fmt: skip
        register(accelerator, {"importance": self.importance, "phases": self.training, "loss": loss})

    def restore(self, batch):
        degraded, clean, label, number = batch
        restored = self.restorer(degraded)
        noise = [torch.Generator().manual_seed(int(one)) for one in number]  # else every process draws its own
        diff = self.loss.objectives["diff"](restored, clean, generator=noise)
        terms = {"pixel": F.l1_loss(restored, clean), "diff": diff}
        return {**terms, "tdp": self.tdp(restored, clean), "task": F.cross_entropy(self.classifier(restored), label)}

    def recognise(self, batch):
        degraded, clean, label, number = batch
        restored = self.restorer(degraded)
        mixed = [
            self.mix(z[None], x[None], generator=torch.Generator().manual_seed(int(n)))
            for z, x, n in zip(restored, clean, number, strict=True)
        ]
        return F.cross_entropy(self.classifier(torch.cat([restored, clean, *mixed])), label.repeat(3))

    def weights(self):
        networks = {"restorer": self.restorer, "classifier": self.classifier}
        return {
            f"{name}.{key.removeprefix('module.')}": value.clone()
            for name, network in networks.items()
            for key, value in network.state_dict().items()
        }


def batches(steps=STEPS, processes=1, rank=0):
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        clean = torch.rand(BATCH, 3, 9, 10, generator=generator)
        degraded = (clean + 0.3 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
        label = torch.randint(0, 2, (BATCH,), generator=generator)
        whole = degraded, clean, label, torch.arange(BATCH) + BATCH * step
        yield tuple(part.chunk(processes)[rank] for part in whole)


def accelerator_for(processes):
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == processes, accelerator.num_processes
    return accelerator, {"processes": processes, "rank": accelerator.process_index}


def phases_after(folder, processes):
    """Trained in one go, and saved halfway and loaded into a fresh run."""
    accelerator, mine = accelerator_for(processes)
    run = Run(accelerator)
    start = run.weights()
    for number, batch in enumerate(batches(4, **mine)):
        if number == 2:
            accelerator.save_state(folder / "half")
        logs = run.training.step(batch)
    assert float(logs["restorer/grad_norm"]) > 0.1
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in run.weights().items())
    assert run.denoiser.count == 2 * 2 and run.loss.objective_diff.calls == 4
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    resumed = Run(accelerator, measure=False)
    accelerator.load_state(folder / "half")
    assert resumed.loss.objective_diff.calls == 2
    for batch in list(batches(4, **mine))[2:]:
        resumed.training.step(batch)
    return run.weights(), resumed.weights()


def projected_after(processes, sign=-1.0):
    """Projected steps, and one of the usual kind after them."""
    accelerator, mine = accelerator_for(processes)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))
    orthogonality = GradientOrthogonality(network[0].parameters())
    inside = network
    network, optimizer = prepare(accelerator, network, torch.optim.SGD(network.parameters(), lr=0.5))
    cosines = []
    for degraded, clean, *_ in batches(**mine):
        cosine = project(
            accelerator, orthogonality, network,
            lambda clean=clean: sign * network(clean).square().mean(),
            lambda degraded=degraded, clean=clean: F.mse_loss(network(degraded), clean),
            others=inside.parameters(),
        )  # fmt: skip
        accelerator.clip_grad_norm_(network.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        cosines.append(cosine)
    accelerator.backward(F.mse_loss(network(degraded), clean))
    optimizer.step()
    return {**inside.state_dict(), "cosines": torch.stack(cosines)}


def main():
    out = Path(sys.argv[1])
    weights, resumed = phases_after(out.parent, 2)
    result = {"phases": weights, "resumed": resumed, "projected": projected_after(2)}
    rank = torch.distributed.get_rank()
    torch.save(result, f"{out}.{rank}")
    check_equal_batches(torch.rand(3, 2))
    with pytest.raises(ValueError, match=r"equally many samples on all processes, found \[4, 3\]: the mean of their"):
        check_equal_batches({"name": "a", "images": torch.rand(4 - rank, 2)})
    print(f"{rank}: unequal batches refused", flush=True)
    leave_group()


if __name__ == "__main__":
    main()
