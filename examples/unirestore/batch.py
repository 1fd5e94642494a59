"""The images of a step: of each task, clean and degraded, with a generator for each."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """The images of one task in a batch."""

    task: str
    clean: Any
    """(N, 3, H, W), or a list of (3, H, W) for detection."""
    degraded: Any
    targets: Any
    generators: list[torch.Generator]
    """One for each image."""


@dataclass(frozen=True)
class Batch:
    """Images of all tasks."""

    parts: list[Part]

    @property
    def tasks(self) -> list[str]:
        """The task of each image."""
        return [part.task for part in self.parts for _ in part.degraded]

    @property
    def generators(self) -> list[torch.Generator]:
        """The generator of each image."""
        return [generator for part in self.parts for generator in part.generators]
