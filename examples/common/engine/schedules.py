"""The learning rate of all recipes: half a cosine, which falls from its value to a lowest one."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(step: int, steps: int, *, lowest: float = 0.0) -> float:
    """The factor of the learning rate at a step: from 1 to ``lowest``, where it stays.

    It is a function of the step alone. ``CosineAnnealingLR`` multiplies on from its latest value instead, and its
    checkpoint holds the number of steps: a training that goes on for more steps than it was begun with would stay at 0.
    """
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def cosine_schedule(optimizer: Optimizer, steps: int, *, lowest: float = 0.0) -> LambdaLR:
    """The schedule that multiplies the learning rate by :func:`cosine`."""
    return LambdaLR(optimizer, lambda step: cosine(step, steps, lowest=lowest))
