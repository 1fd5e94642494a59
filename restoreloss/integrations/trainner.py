"""Losses for traiNNer-redux, which weights them itself and logs each term by its name.

``python -m restoreloss.integrations.trainner PATH_TO_REPOSITORY`` writes the file that registers them;
docs/integrations/trainner-neosr.md has the YAML. traiNNer-redux multiplies what a loss returns by its
``loss_weight``, drops a term that is not above 0, and where the weight is below 0 compares with the enlarged input.
"""

import logging
from typing import Any, cast

from torch import Tensor

from restoreloss.integrations import options
from restoreloss.integrations.drop_in import Framework, register_all
from restoreloss.objectives.base import Objective

_log = logging.getLogger(__name__)

FRAMEWORK = Framework("traiNNer-redux", "traiNNer", "trainner")


class _ByTerm(options.Criterion):
    """A loss that returns its terms, and leaves its weight to the trainer."""

    def forward(self, restored: Tensor, target: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """The unweighted terms by name, from two float (N, C, H, W)."""
        if target.is_inference():  # It is the enlarged input, which autograd may not keep.
            target = target.clone()
        terms = cast(Objective, self.objective).terms(restored, target)
        return {name: self._countable(name, value) for name, value in terms.items()}

    def _countable(self, name: str, value: Tensor) -> Tensor:
        """The term; infinity for NaN, which the trainer would drop as not above 0 and never count or mention."""
        if not bool(value.isnan()):
            return value
        _log.warning("%s: the term %r is NaN.", type(self).__name__, name)
        return value.new_full((), float("inf"))


class DiffLoss(_ByTerm, options.DiffLoss):
    """:class:`restoreloss.integrations.options.DiffLoss`, logged as ``l_g_diff_noise`` and ``l_g_diff_h_space``."""


class TDPLoss(_ByTerm, options.TDPLoss):
    """:class:`restoreloss.integrations.options.TDPLoss`, logged as ``l_g_tdp_LAYER``."""


class WeightedSum(_ByTerm, options.WeightedSum):
    """:class:`restoreloss.integrations.options.WeightedSum`, for two of one type: the trainer keeps only the last.

    Raises:
        ValueError: For an objective of a weight below 0, whose terms the trainer would drop.
    """

    def build(self) -> Objective:
        """The sum."""
        found = super().build()
        weights = {
            name: part.loss_weight for name, part in found.named_modules() if isinstance(part, options.Criterion)
        }
        for name, weight in weights.items():
            if weight < 0:
                inner = name.replace("objective_", "").replace(".objective.", "/")
                raise ValueError(
                    f"`loss_weight` of {inner!r} should be at least 0, found {weight}: it would be dropped."
                )
        return found


def register(registry: Any) -> None:
    """Add ``DiffLoss``, ``TDPLoss`` and ``WeightedSum`` to ``traiNNer.utils.registry.LOSS_REGISTRY``.

    Raises:
        ValueError: If one of the names is taken.
    """
    register_all(registry, (DiffLoss, TDPLoss, WeightedSum))


if __name__ == "__main__":
    FRAMEWORK.main()
