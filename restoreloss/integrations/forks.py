"""Losses for Restormer, NAFNet and other forks of the old BasicSR, by name in one of their modules.

They build a loss as ``getattr(basicsr.models.losses, type)(**options)``. Two lines in their train.py, before the model
is made (docs/integrations/forks.md)::

    import basicsr.models.losses
    restoreloss.integrations.forks.install(basicsr.models.losses)
"""

from types import ModuleType

from torch import Tensor

from restoreloss.integrations import options


class _Pair(options.Criterion):
    """Returns (loss, None), as NAFNet's ``perceptual_opt`` wants content and style."""

    def forward(self, restored: Tensor, target: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The weighted loss, from two float (N, C, H, W), and no style loss."""
        return super().forward(restored, target), None


class PerceptualDiffLoss(_Pair, options.DiffLoss):
    """:class:`restoreloss.integrations.options.DiffLoss` for a slot that takes two losses."""


class PerceptualTDPLoss(_Pair, options.TDPLoss):
    """:class:`restoreloss.integrations.options.TDPLoss` for a slot that takes two losses."""


class PerceptualWeightedSum(_Pair, options.WeightedSum):
    """:class:`restoreloss.integrations.options.WeightedSum` for a slot that takes two losses."""


LOSSES: tuple[type[options.Criterion], ...] = (
    *options.TYPES.values(), PerceptualDiffLoss, PerceptualTDPLoss, PerceptualWeightedSum
)  # fmt: skip


def install(losses: ModuleType) -> None:
    """Add our losses to the module in which a fork looks for its own (idempotent).

    Args:
        losses: ``basicsr.models.losses`` of the fork, after its import.

    Raises:
        ValueError: If this is another module, or one of the names is taken.
    """
    if not isinstance(losses, ModuleType) or not hasattr(losses, "L1Loss") or hasattr(losses, "build_loss"):
        raise ValueError(
            "`losses` should be the module `basicsr.models.losses` of Restormer, NAFNet or a fork like them (with "
            f"`L1Loss` and without a registry), found {losses!r}."
        )
    for loss in LOSSES:
        found = getattr(losses, loss.__name__, loss)
        if found is not loss:
            raise ValueError(f"The name {loss.__name__!r} should be free in `losses`, found {found!r}.")
    for loss in LOSSES:
        setattr(losses, loss.__name__, loss)
