"""How the restorers of words are trained: batches of lines degraded anew, one loop, and equal time for every loss."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from examples.common.networks.text_readers import TDP_LAYERS, EnglishG2, to_english_g2
from restoreloss import TDPLoss, WeightedSum, calibrate

BATCH, TDP_BATCH = 16, 4
"""Words of a step, with L1 alone and where a network looks at the images."""
LR, FURTHER_LR = 2e-3, 1e-3
"""From the start, and for both branches."""


LEAST = {"steps": 1, "tdp_steps": 1, "l1_steps": 1, "pool": 1, "test_words": 8, "seed": 0}
"""The smallest values of options."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for those of ``LEAST`` that are smaller, and for a share outside of (0, 1)."""
    for name, value in options.items():
        if value is not None and name in LEAST and value < LEAST[name]:
            raise ValueError(f"--{name.replace('_', '-')} should be at least {LEAST[name]}, found {value}.")
    if not 0 < options["share"] < 1:
        raise ValueError(f"--share should be between 0 and 1, found {options['share']}.")


@dataclass(frozen=True)
class Training:
    """Clean lines in memory, degraded anew for each batch."""

    pool: Tensor
    degrade: Callable[[Tensor, int], Tensor]
    device: torch.device
    clock: Callable[[], float] = time.perf_counter

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean and degraded lines."""
        chosen = torch.randint(len(self.pool), (size,), generator=generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        clean = self.pool[chosen]
        return clean.to(self.device), self.degrade(clean, seed).to(self.device)

    def run(
        self, net: nn.Module, objective: nn.Module, *, steps: int, size: int, lr: float, seed: int, title: str = ""
    ) -> float:
        """Train with a learning rate that falls to 0, and return the seconds of a step, their median.

        The loop is the usual one: ``TDPLoss`` is a term of ``objective``, and nothing else knows of it.

        Raises:
            FloatingPointError: If the loss becomes NaN or infinite.
        """
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for losses that draw something
        seconds = []
        for step in tqdm(range(steps), desc=title, unit="step", disable=not title):
            started = self.clock()
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            clean, degraded = self.batch(size, generator)
            loss = objective(net(degraded), clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"{title}, step {step + 1}: the loss is {loss.item()}")
            seconds.append(self.clock() - started)
        return statistics.median(seconds)

    def seconds(self, net: nn.Module, objective: nn.Module, *, size: int) -> float:
        """The seconds of a step, from three of them on a copy."""
        return self.run(copy.deepcopy(net), objective, steps=3, size=size, lr=FURTHER_LR, seed=0)

    def with_share(
        self, net: nn.Module, objective: nn.Module, *, share: float, seed: int, name: str = "tdp"
    ) -> WeightedSum:
        """L1 and another objective, of a weight that gives it a share of the gradient in the images."""
        objectives: Mapping[str, nn.Module] = {"pixel": nn.L1Loss(), name: objective}
        clean, degraded = self.batch(BATCH, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            restored = net(degraded)
        return WeightedSum(objectives, calibrate(objectives, restored, clean, shares={name: share}))


def by_turns(measures: Mapping[str, Callable[[], float]], *, rounds: int = 6) -> dict[str, float]:
    """The median of what each measures, by turns, so that a machine that is busy for a while is so for all."""
    found = [{name: measure() for name, measure in measures.items()} for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in found) for name in measures}


@torch.no_grad()
def restore(net: nn.Module, degraded: Tensor, device: torch.device) -> Tensor:
    """Restored images, clipped to [0, 1], on the CPU."""
    return torch.cat([net(part.to(device)).clamp(0, 1).cpu() for part in degraded.split(BATCH)])


def enlarged(degraded: Tensor, scale: int = 4) -> Tensor:
    """Degraded images as they are read without restoration: bicubic, clipped to [0, 1]."""
    return F.interpolate(degraded, scale_factor=float(scale), mode="bicubic").clamp(0, 1)


def tdp_loss(reader: EnglishG2) -> TDPLoss:
    """The loss that looks through the reader."""
    return TDPLoss(reader, TDP_LAYERS, normalize=to_english_g2)
