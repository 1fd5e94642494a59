"""CallCounts: the state of losses that are computed at every k-th call, to be saved beside the networks."""

import logging
from collections.abc import Mapping

from torch import nn

from restoreloss.checks import check_integer, describe
from restoreloss.objectives.subsampled import Subsampled

_log = logging.getLogger(__name__)


class CallCounts:
    """How often each :class:`~restoreloss.Subsampled` within a module was called, as a state to save.

    A loss is no part of a checkpoint of its own accord: its networks are hidden. With ``every=k`` the number of calls
    so far decides which call is the next to be looked at.

    Args:
        module: a loss, a :class:`~restoreloss.WeightedSum`, or anything that holds some.

    Example:
        >>> loss = WeightedSum({"pixel": nn.L1Loss(), "other": Subsampled(nn.MSELoss(), every=4)})
        >>> CallCounts(loss).state_dict()
        {'objective_other': 0}
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(f"`module` should be a module, found {describe(module)}.")
        self.module = module

    def state_dict(self) -> dict[str, int]:
        """The counts by the names of the losses within the module."""
        return {name: loss.calls for name, loss in self._losses().items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load what :meth:`state_dict` gave. A loss that is new begins at 0; one that no longer exists is ignored."""
        if not isinstance(state, Mapping):
            raise ValueError(f"`state` should be counts by the names of losses, found {describe(state)}.")
        losses = self._losses()
        if set(losses) != set(state):
            _log.info("Calls were counted of %s; there is %s now.", sorted(state), sorted(losses))
        for name, loss in losses.items():
            loss.calls = check_integer(f"state[{name!r}]", state.get(name, 0), low=0)

    def _losses(self) -> dict[str, Subsampled]:
        found = self.module.named_modules()
        return {name.replace("_orig_mod.", ""): module for name, module in found if isinstance(module, Subsampled)}
