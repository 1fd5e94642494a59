"""Two networks that learn in turn: a restorer, and the network that reads its images."""

import lightning  # or: import pytorch_lightning as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from restoreloss import CQMix, Phase, TDPLoss, WeightedSum
from restoreloss.integrations.lightning import LightningAlternation


class TaskDriven(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.restorer, self.classifier = nn.Conv2d(3, 3, 3, padding=1), resnet18(num_classes=2)
        self.task, self.mix = nn.CrossEntropyLoss(), CQMix()
        self.loss = WeightedSum({"pixel": nn.L1Loss(), "tdp": TDPLoss(self.classifier)}, shares={"tdp": 0.5})

    def configure_optimizers(self):
        restorer = torch.optim.AdamW(self.restorer.parameters(), lr=1e-4)
        classifier = torch.optim.SGD(self.classifier.parameters(), lr=3e-2, momentum=0.9)
        return [restorer, classifier], [torch.optim.lr_scheduler.CosineAnnealingLR(classifier, T_max=1000)]

    def on_fit_start(self):
        restorer, classifier = self.optimizers()
        phases = [
            Phase("restorer", [self.restorer], self.restore, restorer, max_norm=1.0),
            Phase("classifier", [self.classifier], self.recognize, classifier, schedulers=self.lr_schedulers()),
        ]
        self.turns = LightningAlternation(self, phases)

    def restore(self, batch):
        degraded, clean, label = batch
        return self.loss.terms(self.restorer(degraded), clean)

    def recognize(self, batch):
        degraded, clean, label = batch
        restored = self.restorer(degraded)
        images = torch.cat([restored, clean, self.mix(restored, clean)])
        return self.task(self.classifier(images), label.repeat(3))

    def training_step(self, batch, batch_idx):
        self.log_dict(self.turns.step(batch))  # restorer/pixel, restorer/tdp/layer4, classifier/loss


clean = torch.rand(4, 3, 32, 32)
degraded = (clean + 0.1 * torch.randn_like(clean)).clamp(0, 1)
labelled = DataLoader(TensorDataset(degraded, clean, torch.tensor([0, 1, 0, 1])), batch_size=2)
trainer = lightning.Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(TaskDriven(), labelled)
