"""Objective: the base of all losses that compare (restored, target), with named terms."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from restoreloss.checks import check_callable, describe, signature_of
from restoreloss.generators import Generators


class Objective(nn.Module, ABC):
    """Compares a restored image with its target by one or more named terms. Lower is better.

    A subclass writes :meth:`terms`, not ``forward``; calling it returns their sum.

    Example:
        >>> class Gradients(Objective):
        ...     '''L1 between horizontal and vertical differences.'''
        ...     def terms(self, restored, target):
        ...         d = restored - target
        ...         return {"x": d.diff(dim=3).abs().mean(), "y": d.diff(dim=2).abs().mean()}
        >>> image = torch.rand(2, 3, 8, 8)
        >>> float(Gradients()(image, image))
        0.0
    """

    @abstractmethod
    def terms(self, restored: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The weighted, differentiable terms by name, scalars (or (N,) each), from two float (N, C, H, W)."""

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        """The sum of :meth:`terms`."""
        return total(self.terms(restored, target))


def check_objective(name: str, objective: Any) -> None:
    """Raise ``ValueError`` unless it is called with (restored, target)."""
    check_callable(name, objective, "restored", "target")
    if not compares(objective):
        raise ValueError(
            f"`{name}` should take the target in second place, found {describe(objective)}, which takes "
            f"{signature_of(objective)}: `NoReference` makes an objective of a loss of one image."
        )


def check_sign(name: str, function: Any, weight: float = 1.0) -> None:
    """Raise ``ValueError`` for a metric that says of itself that with this weight it is no loss."""
    higher = higher_is_better(function)
    if higher is True and weight > 0:
        raise ValueError(
            f"`{name}` should be less where images are better, found {describe(function)}, of which more is better: a "
            "`WeightedSum` takes it with a weight below 0, `NoReference` with `sign=-1`, and a function may return its "
            "negative."
        )
    if higher is False and weight < 0:
        raise ValueError(
            f"`{name}` should be more where images are better, to be weighed by {weight:g}, found "
            f"{describe(function)}, of which less is better."
        )


def higher_is_better(function: Any) -> bool | None:
    """What a metric says of itself, None where it says nothing."""
    if isinstance(lower := getattr(function, "lower_better", None), bool):  # as pyiqa states it
        return not lower
    return getattr(function, "higher_is_better", None)  # as torchmetrics does


def compares(loss: Any) -> bool:
    """Whether a loss takes the target in second place, and not an option, a weight or a mask that it can do without."""
    signature = signature_of(loss)
    if signature is None:  # some compiled code does not tell
        return True
    try:
        signature.bind("restored", "target")
    except TypeError:
        return False
    second = list(signature.parameters.values())[1:2]
    by_default = second[0].default if second else inspect.Parameter.empty
    if by_default is inspect.Parameter.empty:
        return True
    return by_default is None and second[0].name not in ("weight", "weights", "mask")


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms, left to right."""
    _check_terms(terms)
    first, *others = terms.values()
    for term in others:
        first = first + term
    return first


def named_terms(
    name: str,
    objective: Callable[[Tensor, Tensor], Tensor],
    restored: Tensor,
    target: Tensor,
    generator: Generators = None,
) -> dict[str, Tensor]:
    """The terms of an objective as "name/term", or its value as "name" where it has no terms.

    ``generator`` is handed on where the objective takes one.
    """
    terms = getattr(objective, "terms", None)
    if not callable(terms) or hasattr(objective, "_orig_mod"):
        terms = None  # The wrapper of torch.compile would give the terms uncompiled.
    function: Callable[..., Any] = objective if terms is None else terms
    # The signature is read only where it is needed: reading it costs time, and breaks a compiled graph.
    inner = getattr(function, "_orig_mod", function)
    if generator is not None and _takes_generator(getattr(inner, "forward", inner)):
        result = function(restored, target, generator=generator)
    else:
        result = function(restored, target)
    if terms is None:
        return {name: result}
    _check_terms(result, name)
    return {f"{name}/{key}": value for key, value in result.items()}


def _check_terms(terms: Any, name: str | None = None) -> None:
    """Raise ``ValueError`` unless these are tensors by name, at least one."""
    whose = "`terms`" if name is None else f"`terms` of objective {name!r}"
    if not isinstance(terms, Mapping) or not terms:
        raise ValueError(f"{whose} should return at least one term by name, found {describe(terms)}.")
    for key, value in terms.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{whose} should return tensors by name, found {key!r}: {describe(value)}.")
        if value.ndim > 1:
            raise ValueError(
                f"{whose} should return scalars, or one value for each sample, found {key!r}: {describe(value)}."
            )
    first, *others = terms.values()
    if any(other.numel() != first.numel() for other in others):
        shapes = {key: tuple(value.shape) for key, value in terms.items()}
        raise ValueError(f"{whose} should return terms of one shape (the same `reduction`), found {shapes}.")


def _takes_generator(function: Callable[..., Any]) -> bool:
    try:
        return "generator" in inspect.signature(function).parameters
    except ValueError:  # A builtin does not tell.
        return False
