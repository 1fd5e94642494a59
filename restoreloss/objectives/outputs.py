"""Objectives for other outputs than one image: MultiOutput for several, NoReference for one without a target."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss.checks import check_callable, check_number, describe
from restoreloss.generators import Generators
from restoreloss.objectives.base import Objective, check_objective, check_sign, higher_is_better, named_terms, total


class MultiOutput(Objective):
    r"""One objective on each output of a network that returns several: of its stages, or at several sizes.

    .. math:: L = \sum_i w_i\, L_i(z_i, x_i)

    where :math:`z_i` are the outputs and :math:`x_i` the target, reduced to the size of :math:`z_i` by averaging over
    the pixels' areas where that is smaller.

    Args:
        objective: anything called with (restored, target): a loss, an objective, a function.
        weights: one for each output, in their order; an output of weight 0 is not looked at. Default: 1 for all.

    Raises:
        ValueError: At construction for what is no objective and weights that are no numbers; at a call for outputs
            that are no list of images, of another number than ``weights`` or of the targets, or larger than the target.

    Example:
        >>> outputs = [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)]  # as MIMO-UNet returns them
        >>> MultiOutput(nn.L1Loss(), [1.0, 0.5]).terms(outputs, torch.ones(1, 3, 8, 8))
        {'0': tensor(1.), '1': tensor(0.5000)}
    """

    def __init__(self, objective: Callable[[Tensor, Tensor], Tensor], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        check_objective("objective", objective)
        if isinstance(weights, str) or not (weights is None or isinstance(weights, Sequence)):
            raise ValueError(f"`weights` should be a number for each output, found {describe(weights)}.")
        self.weights = None if weights is None else [check_number(f"weights[{n}]", w) for n, w in enumerate(weights)]
        if self.weights is not None and not any(self.weights):
            raise ValueError(f"`weights` should leave at least one output a weight other than 0, found {weights}.")
        for weight in [1.0] if self.weights is None else self.weights:
            check_sign("objective", objective, weight)
        self.objective = objective

    def terms(  # type: ignore[override]
        self, restored: Sequence[Tensor], target: Tensor | Sequence[Tensor], *, generator: Generators = None
    ) -> dict[str, Tensor]:
        """The weighted terms, "0", or "0/noise" where the objective has terms. Arguments as in :meth:`forward`."""
        if not isinstance(restored, list | tuple) or not restored:
            raise ValueError(f"`restored` should be a list of images (N, C, H, W), found {describe(restored)}.")
        targets = [target] * len(restored) if isinstance(target, Tensor) else target
        weights = [1.0] * len(restored) if self.weights is None else self.weights
        for argument, others in (("target", targets), ("weights", weights)):
            if not isinstance(others, list | tuple) or len(others) != len(restored):
                count = len(others) if isinstance(others, list | tuple) else describe(others)
                raise ValueError(f"`{argument}` should be one for each of the {len(restored)} outputs, found {count}.")
        terms: dict[str, Tensor] = {}
        for number, (one, other, weight) in enumerate(zip(restored, targets, weights, strict=True)):
            if weight == 0:
                continue
            found = named_terms(str(number), self.objective, one, _reduced(other, one), generator)
            terms |= {name: weight * value for name, value in found.items()}
        return terms

    def forward(  # type: ignore[override]
        self, restored: Sequence[Tensor], target: Tensor | Sequence[Tensor], *, generator: Generators = None
    ) -> Tensor:
        """The loss.

        Args:
            restored: what the network returned, a list of float (N, C, H, W), of any sizes.
            target: the clean image, of the largest size, or one for each output.
            generator: handed to an objective that takes one.

        Returns:
            A scalar, or (N,) where the objective has ``reduction="none"``.
        """
        return total(self.terms(restored, target, generator=generator))


class NoReference(Objective):
    r"""A loss of the restored image alone, as an objective: total variation, or a quality without a reference.

    .. math:: L(z, x) = L(z)

    Args:
        function: called with (restored,), as ``piq.TVLoss()`` or ``pyiqa.create_metric("niqe", as_loss=True)``.
        sign: -1 for a quality, of which more is better.

    Raises:
        ValueError: For something else than a function or module of one argument, another sign, and a metric that says
            of itself that it needs the other sign.

    Example:
        >>> def variation(image):
        ...     return image.diff(dim=2).abs().mean() + image.diff(dim=3).abs().mean()
        >>> loss = WeightedSum({"pixel": nn.L1Loss(), "smooth": NoReference(variation)}, weights={"smooth": 0.01})
        >>> sorted(loss.terms(restored, clean))
        ['pixel', 'smooth/loss']
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *, sign: int = 1) -> None:
        super().__init__()
        check_callable("function", function, "restored")
        if sign not in (1, -1):
            raise ValueError(f"`sign` should be 1 or -1, found {sign!r}.")
        check_sign("function", function, sign)
        self.function, self.sign = function, sign
        # for a `WeightedSum`, whose weight below 0 would turn the sign once more
        self.higher_is_better = False if sign < 0 else higher_is_better(function)

    def terms(self, restored: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of ``restored``, as "loss"; ``target`` is not looked at."""
        value: Any = self.function(restored)
        if not isinstance(value, Tensor):
            raise ValueError(f"`function` should return a tensor, found {describe(value)}.")
        return {"loss": self.sign * (value.squeeze() if value.numel() == 1 and value.ndim > 1 else value)}

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"sign={self.sign}" if isinstance(self.function, nn.Module) else f"{self.function}, sign={self.sign}"


def _reduced(target: Tensor, output: Tensor) -> Tensor:
    """The target at the size of an output that is smaller."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.ndim != 4 or target.ndim != 4:
        return target  # The objective says what is wrong.
    wanted, size = output.shape[2:], target.shape[2:]
    if wanted == size:
        return target
    if any(short > long for short, long in zip(wanted, size, strict=True)):
        raise ValueError(
            f"`target` should be at least as large as each output, found {tuple(size)} for {tuple(wanted)}."
        )
    return F.interpolate(target, wanted, mode="area")
