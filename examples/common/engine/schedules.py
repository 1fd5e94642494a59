"""The optimizers of task networks, and the learning rates of all recipes: functions of the step alone."""

import math
from typing import Any, Literal

from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def task_optimizer(name: Literal["sgd", "adamw"], parameters: Any, lr: float, weight_decay: float = 1e-4) -> Optimizer:
    """AdamW with the weight decay that torch gives it, or SGD with a momentum of 0.9, as SR4IR and EDTR have it."""
    if name == "adamw":
        return AdamW(parameters, lr=lr)
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)


class StepSchedule(LambdaLR):
    """A factor of the learning rate for each step, also right after a checkpoint that was trained for fewer steps.

    torch's schedulers take the learning rate of the next step from the checkpoint. ``CosineAnnealingLR`` also has its
    length there and multiplies on from the latest value: a training that goes on for more steps would stay at 0.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the step of the checkpoint."""
        super().load_state_dict(state_dict)
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.last_epoch)


def cosine(step: int, steps: int, *, lowest: float = 0.0) -> float:
    """The factor at a step of a cosine from 1 to ``lowest``, where it stays."""
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def cosine_schedule(optimizer: Optimizer, steps: int, *, lowest: float = 0.0) -> StepSchedule:
    """The schedule that multiplies the learning rate by :func:`cosine`."""
    return StepSchedule(optimizer, lambda step: cosine(step, steps, lowest=lowest))
