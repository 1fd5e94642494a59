"""A LightningModule with a loss, and a regularizer as a callback; then a second run goes on from its checkpoint."""

import lightning  # or: import pytorch_lightning as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from restoreloss import DiffLoss, ParameterImportance, Subsampled, WeightedSum, small_prior
from restoreloss.integrations.lightning import ImportanceCallback, ObjectivesCallback, log_terms


class Restorer(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Conv2d(3, 3, 3, padding=1)  # your network
        diff = Subsampled(DiffLoss(small_prior(), timesteps=(100, 600)), every=2)
        self.loss = WeightedSum({"pixel": nn.L1Loss(), "diff": diff}, shares={"diff": 0.5})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)  # the network's: the prior is hidden

    def training_step(self, batch, batch_idx):
        degraded, clean = batch
        return log_terms(self, self.loss.terms(self.network(degraded), clean))  # train/pixel, train/diff/noise, ...


clean = torch.rand(4, 3, 32, 32)
pairs = DataLoader(TensorDataset((clean + 0.1 * torch.randn_like(clean)).clamp(0, 1), clean), batch_size=2)

module = Restorer()
importance = ParameterImportance(module.network)  # what an earlier training taught it, to be kept
importance.accumulate(lambda net, batch: nn.functional.l1_loss(net(batch[0]), batch[1]), pairs)

trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[ImportanceCallback(importance), ObjectivesCallback()],
)
trainer.fit(module, pairs)
trainer.save_checkpoint("last.ckpt")

# A later run goes on from there with a network, an importance and a trainer of its own.
module = Restorer()
importance = ParameterImportance(module.network)  # of this network; the checkpoint fills it
trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=2,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[ImportanceCallback(importance), ObjectivesCallback()],
)
trainer.fit(module, pairs, ckpt_path="last.ckpt")
