"""The terms of the losses of a run: means for its log, and the first that is not finite."""

from collections.abc import Mapping

import torch
from accelerate.utils import gather_object
from torch import Tensor

LOWER = "A lower learning rate, or `max_norm`, may prevent it."


class TermLog:
    """Terms since the last line of the log. None is looked at before :meth:`check`: that waits for the device."""

    def __init__(self) -> None:
        self._unseen: list[tuple[int, str, Tensor]] = []
        self._sums: dict[str, tuple[float | Tensor, int]] = {}

    def add(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Take in the terms of a step."""
        for name, value in terms.items():
            self._unseen.append((step, name, value.detach()))
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.detach().double(), count + 1)

    def check(self, *, norms: bool = True) -> None:
        """Look at the terms since the last check.

        Args:
            norms: whether a gradient norm has to be finite; a scaler skips a step whose gradient overflows.

        Raises:
            FloatingPointError: It names the first that is not finite.
        """
        named = [entry for entry in self._unseen if norms or not entry[1].endswith("grad_norm")]
        self._unseen.clear()
        if not named:
            return
        values = torch.stack([value.float().reshape(()).to(named[0][2].device) for *_, value in named])
        if not (finite := values.isfinite()).all():
            step, name, value = named[int(finite.int().argmin())]
            raise FloatingPointError(f"Step {step}: {name} is {float(value)}. {LOWER}")

    def means(self) -> dict[str, float]:
        """The means over steps and processes (a term that a process lacks, over the others); then it begins anew."""
        every = gather_object([{name: float(total) / count for name, (total, count) in self._sums.items()}])
        self._sums.clear()
        found = {name: [each[name] for each in every if name in each] for each in every for name in each}
        return {name: sum(numbers) / len(numbers) for name, numbers in found.items()}

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """The sums since the last line of the log."""
        return {name: (float(total), count) for name, (total, count) in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Go on with the sums of a state."""
        self._sums = {name: (total, count) for name, (total, count) in state.items()}
