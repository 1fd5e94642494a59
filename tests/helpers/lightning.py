"""Modules of Lightning for its tests."""

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning")

from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from restoreloss import DiffLoss, Subsampled, WeightedSum  # noqa: E402
from restoreloss.integrations.lightning import log_terms  # noqa: E402


def prior():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))


class Seen(nn.Module):
    """A denoiser that counts."""

    def __init__(self):
        super().__init__()
        self.network, self.count = prior(), 0

    def forward(self, x, t):
        self.count += 1
        return self.network(x)


class Restorer(lightning.LightningModule):
    """One network, automatic optimisation; ``penalty`` is what is added to the loss by hand."""

    def __init__(self, penalty=None, dtype=torch.float32, optimizer=None, every=1):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).to(dtype)
        self.denoiser = (Seen(),)
        self.loss = WeightedSum(
            {"pixel": nn.L1Loss(), "diff": Subsampled(DiffLoss(self.denoiser[0], h_space_weight=0), every=every)},
            weights={"diff": 0.3},
        )
        self.denoiser[0].count = 0  # it was tried
        self.penalty, self.optimizer = (
            penalty,
            optimizer or (lambda network: torch.optim.SGD(network.parameters(), 0.5)),
        )

    def configure_optimizers(self):
        return self.optimizer(self.network)

    def training_step(self, batch, batch_idx):
        degraded, clean, _, number = batch
        generator = torch.Generator().manual_seed(int(number[0]))
        terms = self.loss.terms(self.network(degraded).to(clean.dtype), clean, generator=generator)
        if self.penalty is not None:
            terms["penalty"] = self.penalty()
        return log_terms(self, terms)


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def scaled(scale=2.0**10):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
