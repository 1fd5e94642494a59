"""Checks of what a training step is given: parts that step by themselves, and micro-batches that are alike."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def needed_argument(part: Any) -> str | None:
    """The name of the first argument that ``part.step`` cannot do without."""
    try:
        # The class is asked: a scheduler puts a function into the optimizer whose signature has `self`.
        _, *parameters = inspect.signature(type(part).step).parameters.values()
    except (AttributeError, TypeError, ValueError):  # It does not tell.
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = (one.name for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty)
    return next(needed, None)


def check_micro_batches(micro_batches: Sequence[Any]) -> None:
    """Raise for the parts of one batch in the place of micro-batches."""
    if len(micro_batches) < 2:
        return
    kinds = [_kind(batch) for batch in micro_batches]
    if len(set(kinds)) > 1:
        raise ValueError(
            f"`micro_batches` should be alike, found {', '.join(kinds)}: one batch of several parts is one argument, "
            "as `step((degraded, clean))`."
        )
    if any(type(batch).__name__ == "ndarray" or (isinstance(batch, Tensor) and batch.ndim) for batch in micro_batches):
        raise ValueError(
            f"`micro_batches` should be one batch or several, found {len(kinds)} single tensors: one batch of several "
            "parts is one argument, as `step((degraded, clean))`; for micro-batches that are single tensors say "
            "`step(first, second, accumulate=True)`."
        )


def _kind(batch: Any) -> str:
    """The type of a batch, and of the first thing in it."""
    if isinstance(batch, list | tuple):
        first = next((type(part).__name__ for part in batch if part is not None), "nothing")
        return f"{type(batch).__name__} of {first}"
    return type(batch).__name__
