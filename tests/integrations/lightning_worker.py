"""Run by two processes, and imported by the test: phases, a regulariser and projected gradients under Lightning."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from restoreloss import CQMix, DiffLoss, GradientOrthogonality, ParameterImportance, Phase, TDPLoss
from restoreloss.integrations.lightning import ImportanceCallback, LightningAlternation, ObjectivesCallback
from tests.helpers.processes import leave_group

lightning = pytest.importorskip("lightning")  # pytest looks into this file for doctests

BATCH, STEPS = 8, 3


class Classifier(nn.Module):
    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), norm(6), nn.Tanh(), nn.Conv2d(6, 6, 3))
        self.head = nn.Linear(6, 2)

    def forward(self, images):
        return self.head(self.features(images).mean(dim=(2, 3)))


class TaskDriven(lightning.LightningModule):
    """SR4IR in small: a restorer and a classifier learn in turn."""

    def __init__(self, norm=nn.Identity, max_norm=0.1):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.restorer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))
        self.classifier = Classifier(norm)
        self.tdp, self.mix = TDPLoss(self.classifier, ["features"], normalize=None), CQMix((2, 2))
        self.max_norm = max_norm
        self.logs = []

    def configure_optimizers(self):
        first = torch.optim.SGD(self.restorer.parameters(), lr=0.5, momentum=0.9)
        second = torch.optim.SGD(self.classifier.parameters(), lr=0.5, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.StepLR(second, 1, gamma=0.5)]

    def on_fit_start(self):
        first, second = self.optimizers()
        self.turns = LightningAlternation(
            self,
            [
                Phase("restorer", [self.restorer], self.restore, first, max_norm=self.max_norm),
                Phase("classifier", [self.classifier], self.recognise, second, schedulers=self.lr_schedulers()),
            ],
        )

    def restore(self, batch):
        degraded, clean, label, _ = batch
        restored = self.restorer(degraded)
        task = F.cross_entropy(self.classifier(restored), label)
        return {"pixel": F.l1_loss(restored, clean), "tdp": self.tdp(restored, clean), "task": task}

    def recognise(self, batch):
        degraded, clean, label, number = batch
        restored = self.restorer(degraded)
        assert not restored.requires_grad and not self.restorer.training
        mixed = [  # every picture has coins of its own, whichever process holds it, also after a restart
            self.mix(z[None], x[None], generator=torch.Generator().manual_seed(int(n)))
            for z, x, n in zip(restored.to(clean.dtype), clean, number, strict=True)
        ]
        return F.cross_entropy(self.classifier(torch.cat([restored.to(clean.dtype), clean, *mixed])), label.repeat(3))

    def training_step(self, batch, batch_idx):
        logs = self.turns.step(batch)
        self.log_dict(logs)
        self.logs.append(logs)


class Projected(lightning.LightningModule):
    """The gradients of two objectives, projected."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))
        self.orthogonality = GradientOrthogonality(self.network[0].parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def training_step(self, batch, batch_idx):
        degraded, clean, _, _ = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        generation, reconstruction = -self.network(clean).square().mean(), F.mse_loss(self.network(degraded), clean)
        self.orthogonality.project(generation, reconstruction, others=self.network.parameters())
        optimizer.step()


def data(steps=STEPS, processes=1, rank=0):
    generator = torch.Generator().manual_seed(3)
    clean = torch.rand(BATCH * steps, 3, 9, 10, generator=generator)
    degraded = (clean + 0.3 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    label = torch.randint(0, 2, (len(clean),), generator=generator)
    parts = (degraded, clean, label, torch.arange(len(clean)))
    mine = [torch.cat([batch.chunk(processes)[rank] for batch in part.split(BATCH)]) for part in parts]
    return DataLoader(TensorDataset(*mine), batch_size=BATCH // processes)


def measured(network, strength=3.0):
    """An importance, and the network a way off from where it was measured."""
    importance = ParameterImportance(network, strength=strength)
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(4, 3, 6, 6, generator=generator, dtype=next(network.parameters()).dtype)
    importance.accumulate(lambda net, batch: net(batch).square().mean(), [images])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return importance


def trainer(tmp_path, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
    }
    return lightning.Trainer(default_root_dir=tmp_path, **{**quiet, **options})


def unequal(rank):
    """The processes' batches differ: every process is told."""
    images = torch.rand(4 - rank, 3, 4, 4)
    module = Plain()
    run = trainer(".", devices=2, strategy="ddp", callbacks=[ObjectivesCallback()])
    with pytest.raises(ValueError, match=r"found \[4, 3\]"):
        run.fit(module, DataLoader(TensorDataset(images), batch_size=4))
    print(f"{rank}: unequal batches refused", flush=True)


class Plain(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Conv2d(3, 3, 1)
        self.loss = DiffLoss(lambda x, t: 0.5 * x, h_space_weight=0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        return self.loss(self.network(batch[0]), batch[0])


def weights_after(folder, processes):
    """What was learned in a few steps, each process from its part of every batch."""
    many = {"devices": processes, "strategy": "ddp_find_unused_parameters_true" if processes > 1 else "auto"}
    module = TaskDriven()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    callbacks = [ImportanceCallback(measured(module.restorer)), ObjectivesCallback()]
    run = trainer(folder, callbacks=callbacks, **many)
    assert run.world_size == processes, run.world_size
    run.fit(module, data(processes=processes, rank=run.global_rank))
    assert run.global_step == 2 * STEPS
    assert float(module.logs[0]["restorer/grad_norm"]) > module.max_norm
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in module.state_dict().items())
    projected = Projected()
    run = trainer(folder, **many)
    run.fit(projected, data(processes=processes, rank=run.global_rank))
    return {"phases": module.state_dict(), "projected": projected.state_dict()}


def main():
    out = Path(sys.argv[1])
    weights = weights_after(out.parent, 2)
    rank = torch.distributed.get_rank()
    torch.save(weights, f"{out}.{rank}")
    unequal(rank)
    leave_group()


if __name__ == "__main__":
    main()
