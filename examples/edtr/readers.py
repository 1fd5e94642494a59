"""The tasks of a run: their networks, their data, and the steps in which they take turns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.common.data.tasks import Task, TaskData
from examples.common.engine.recognition import Recognition
from restoreloss import Alternation, FeatureExtractor, FeatureMatchingLoss, Objective
from restoreloss.restorers.edtr import Hint

TASKS: tuple[Task, ...] = ("classification", "segmentation", "detection")
ALPHA: dict[Task, float] = {"classification": 1.0, "segmentation": 0.5, "detection": 0.2, "reading": 1.0}
"""Weight of the FM loss (Section S2, which has no reading)."""


@dataclass(frozen=True)
class Batch:
    """HQ images in two halves, and what became of the first one.

    Attributes:
        task: whose turn it is.
        first: (N/2, 3, H, W), or a list of (3, H, W) for detection: what the restorer trains on, and H reads restored.
        second: the others, which H reads as they are.
        targets: of the first half, then of the second.
        hint: of the first half, padded to one size; with ``whole_batch`` of the second too.
        generators: one for each image of the hint.
    """

    task: Task
    first: Any
    second: Any
    targets: Any
    hint: Hint
    generators: list[torch.Generator]


@dataclass(frozen=True)
class Reader:
    """A task and its networks: in training (H), as it was on HQ images (H_HQ), and one that only evaluates.

    Where a run is evaluated on data of other classes, H does not know them, and the other two read.
    """

    recognition: Recognition
    network: nn.Module
    reference: FeatureExtractor
    judge: nn.Module | None
    hlf: Objective | None
    matching: FeatureMatchingLoss
    alpha: float
    train_data: TaskData
    test_data: TaskData
    knows: bool


class InTurn:
    """The alternations of several tasks: each batch goes to that of its task."""

    def __init__(self, alternations: dict[Task, Alternation[Batch]], readers: dict[Task, Reader]) -> None:
        self.alternations, self.readers = alternations, readers

    def step(self, batch: Batch) -> dict[str, Tensor]:
        with self.readers[batch.task].reference.shared():  # H_HQ sees every image once
            return self.alternations[batch.task].step(batch)

    def state_dict(self) -> dict[str, Any]:
        return {task: alternation.state_dict() for task, alternation in self.alternations.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for task, alternation in self.alternations.items():
            alternation.load_state_dict(state[task])
