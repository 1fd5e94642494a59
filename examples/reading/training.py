"""How the restorers of words are trained: batches of lines that are degraded anew, and losses beside L1."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.engine.training import Training
from examples.common.networks.text_readers import TDP_LAYERS, EnglishG2, to_english_g2
from restoreloss import TDPLoss, WeightedSum, calibrate

BATCH, TDP_BATCH = 16, 4
"""Words of a step, with L1 alone and where a network looks at the images."""
LR, FURTHER_LR = 2e-3, 1e-3
"""From the start, and for both branches."""


LEAST = {"steps": 1, "tdp_steps": 1, "l1_steps": 1, "pool": 1, "test_words": 8, "seed": 0}
"""The smallest values of options."""


@dataclass(frozen=True, kw_only=True)
class Lines(Training):
    """Clean lines in memory, degraded anew for each batch."""

    pool: Tensor
    degrade: Callable[[Tensor, int], Tensor]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean and degraded lines."""
        chosen = torch.randint(len(self.pool), (size,), generator=generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        clean = self.pool[chosen]
        return clean.to(self.device), self.degrade(clean, seed).to(self.device)

    def with_share(self, net: nn.Module, objective: nn.Module, *, share: float, seed: int) -> WeightedSum:
        """L1 and another objective, "tdp", of a weight that gives it a share of the gradient in the images."""
        objectives: Mapping[str, nn.Module] = {"pixel": nn.L1Loss(), "tdp": objective}
        clean, degraded = self.batch(BATCH, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            restored = net(degraded)
        return WeightedSum(objectives, calibrate(objectives, restored, clean, shares={"tdp": share}))


def enlarged(degraded: Tensor, scale: int = 4) -> Tensor:
    """Degraded images as they are read without restoration: bicubic, clipped to [0, 1]."""
    return F.interpolate(degraded, scale_factor=float(scale), mode="bicubic").clamp(0, 1)


def tdp_loss(reader: EnglishG2) -> TDPLoss:
    """The loss that looks through the reader."""
    return TDPLoss(reader, TDP_LAYERS, normalize=to_english_g2)
