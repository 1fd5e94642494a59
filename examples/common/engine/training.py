"""The loop of the quickstart and of small experiments: several losses from one start, on the same batches."""

import copy
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class Training(ABC):
    """Images that are degraded anew for each batch; a subclass says how."""

    device: torch.device
    clock: Callable[[], float] = time.perf_counter

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean and degraded images."""

    def run(
        self, net: nn.Module, objective: nn.Module, *, steps: int, size: int, lr: float, seed: int, title: str = ""
    ) -> float:
        """Train with a learning rate that falls to 0, and return the seconds of a step, their median.

        The loop is the usual one: ``TDPLoss`` or ``DiffLoss`` is a term of ``objective``, and nothing else knows of it.

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
        return self.run(copy.deepcopy(net), objective, steps=3, size=size, lr=1e-3, seed=0)


def check_options(options: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Raise ``ValueError`` for options that are smaller than their ``least``, and for a share outside of (0, 1)."""
    for name, value in options.items():
        if value is not None and name in least and value < least[name]:
            raise ValueError(f"--{name.replace('_', '-')} should be at least {least[name]}, found {value}.")
    if not 0 < options["share"] < 1:
        raise ValueError(f"--share should be between 0 and 1, found {options['share']}.")


def by_turns(measures: Mapping[str, Callable[[], float]], *, rounds: int = 6) -> dict[str, float]:
    """The median of what each measures, by turns, so that a machine that is busy for a while is so for all."""
    found = [{name: measure() for name, measure in measures.items()} for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in found) for name in measures}


@torch.no_grad()
def restore(net: nn.Module, degraded: Tensor, device: torch.device, *, batch: int = 16) -> Tensor:
    """Restored images, clipped to [0, 1], on the CPU."""
    return torch.cat([net(part.to(device)).clamp(0, 1).cpu() for part in degraded.split(batch)])
