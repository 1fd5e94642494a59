"""The networks of the stages: UniRestore with both losses of stage 1, and another restoration network in its place."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.unirestore.config import Config
from restoreloss.generators import standard_normal
from restoreloss.restorers import UniRestore
from restoreloss.restorers.tiling import enlarged, reduced, reflected


class FirstStage(nn.Module):
    """Both losses of stage 1 in one forward pass, as DDP wants it."""

    def __init__(self, model: UniRestore, config: Config) -> None:
        super().__init__()
        self.model = model
        levels = 0 if model.cfrm is None else len(model.cfrm)
        weights = config.cfrm_weights
        self.weights = [*[0.1] * (levels - 1), 0.01][:levels] if weights is None else weights
        if len(self.weights) != levels:
            raise ValueError(f"`cfrm_weights` should be {levels} numbers, found {self.weights}.")

    def forward(
        self, degraded: Tensor, clean: Tensor, t: Tensor, generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        model = self.model
        degraded, clean = (reflected(images, model.multiple) for images in (degraded, clean))
        with torch.no_grad():
            z_0, wanted = model.encode(clean, restored=False)
            z_t = model.schedule.add_noise(z_0, standard_normal(z_0, generators), t)
        condition, features = model.encode(degraded)
        terms = {"control": F.mse_loss(model.predict(z_t, condition, t), z_0)}
        if self.weights:
            levels = zip(self.weights, features, wanted, strict=True)
            terms["cfrm"] = torch.stack([weight * F.mse_loss(found, f) for weight, found, f in levels]).sum()
        return terms


class PlainNetwork(nn.Module):
    """A restoration network that knows no task."""

    tasks = ()

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, tasks: Any, *, generator: Any = None, smallest: int = 0) -> Tensor:
        size = images.shape[2:]
        restored: Tensor = self.network(enlarged(images, smallest))
        return reduced(restored, size)
