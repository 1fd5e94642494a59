"""Losses for traiNNer-redux, which weights them itself and logs each term by its name.

``python -m restoreloss.integrations.trainner PATH_TO_REPOSITORY`` writes the file that registers them;
docs/integrations/trainner-neosr.md has the YAML. traiNNer-redux multiplies what a loss returns by its
``loss_weight``, drops a term that is not above 0, and where the weight is below 0 compares with the enlarged input.
"""

import logging
import math
from typing import Any, cast

from torch import Tensor

from restoreloss.integrations.drop_in import Framework, register_all
from restoreloss.integrations.options import OPTIONS, Criterion, registrable
from restoreloss.objectives.base import Objective
from restoreloss.objectives.weighted_sum import WeightedSum

_log = logging.getLogger(__name__)

FRAMEWORK = Framework("traiNNer-redux", "traiNNer", "trainner")


class ByTerm(Criterion):
    """A loss that returns its terms, and leaves its weight to the trainer.

    Raises:
        ValueError: At construction for a part of weight below 0, whose terms the trainer would drop.

    It warns once of each term that is below 0, for the same reason.
    """

    def __init__(self, objective: Objective, loss_weight: float = 1.0) -> None:
        super().__init__(objective, loss_weight)
        self._negative: set[str] = set()
        for name, part in objective.named_modules():
            inner = name.replace("objective_", "").replace(".objective.", "/")
            weights = {inner: part.loss_weight} if isinstance(part, Criterion) else {}
            if isinstance(part, WeightedSum):
                weights = {f"{inner}/{key}".strip("/"): weight for key, weight in part.weights.items()}
            for which, weight in weights.items():
                if weight < 0:
                    raise ValueError(
                        f"The weight of {which!r} should be at least 0, found {weight}: the trainer would drop it."
                    )

    def forward(self, restored: Tensor, target: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """The unweighted terms by name, from two float (N, C, H, W)."""
        if target.is_inference():  # It is the enlarged input, which autograd may not keep.
            target = target.clone()
        terms = cast(Objective, self.objective).terms(restored, target)
        return {name: self._countable(name, value) for name, value in terms.items()}

    def _countable(self, name: str, value: Tensor) -> Tensor:
        """The term; infinity for NaN, which the trainer would drop as not above 0 and never count or mention."""
        number = float(value.detach())
        if number < 0 and name not in self._negative:
            self._negative.add(name)
            _log.warning("%s: the term %r is below 0, and traiNNer-redux drops it.", type(self).__name__, name)
        if not math.isnan(number):
            return value
        _log.warning("%s: the term %r is NaN.", type(self).__name__, name)
        return value.new_full((), float("inf"))


def register(registry: Any) -> None:
    """Add ``DiffLoss``, ``TDPLoss``, ``HLFLoss`` and ``WeightedSum`` to the trainer's registry of losses.

    Args:
        registry: ``traiNNer.utils.registry.LOSS_REGISTRY``.

    Raises:
        ValueError: If one of the names is taken.
    """
    register_all(registry, [registrable(kind, own=registry, base=ByTerm) for kind in OPTIONS])


if __name__ == "__main__":
    FRAMEWORK.main()
