"""Masked: any objective on a part of the image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from restoreloss.checks import describe
from restoreloss.generators import Generators
from restoreloss.images import check_pair
from restoreloss.objectives.base import Objective, check_objective, check_sign, named_terms, total


class Masked(Objective):
    r"""Any objective on a part of the image: the hole of an inpainting, what is valid, what counts more.

    .. math:: L_m(z, x) = \frac{1}{\bar m}\, L\big(m z + (1 - m)\, x,\; x\big)

    where m is the mask and :math:`\bar m` its mean: over the batch or, for an objective with one value for each image,
    over each, so that those are no longer parts of one mean. Outside of the mask the objective is shown the target
    twice, so that it sees no difference there, and has no gradient. Unlike a weight for each pixel of its result this
    is right for what is seen through a network, as long as it is a mean over pixels; it is wrong for the logarithm of
    a PSNR, a root or a sum. For L1 and squared error with :math:`m \in \{0, 1\}` it is their mean over the masked
    pixels. The shares of a `WeightedSum` within are of the gradient at what it is shown, some of which, of losses that
    see a neighborhood, is outside of the mask.

    Args:
        objective: anything called with (restored, target): a loss, a :class:`WeightedSum`, a function. It should be a
            mean over pixels, and over samples or of each.

    Raises:
        ValueError: At construction for what is no objective, and what says that it is no mean: ``reduction="sum"``, and
            the distances "rms" and "l2"; at a call for a mask that is not (N, 1, H, W) or
            (N, C, H, W), or has values outside [0, 1]: on an accelerator the values of the first mask alone are
            looked at, as this waits for the device, and under ``torch.compile`` none.

    Example:
        >>> mask = torch.zeros(1, 1, 16, 16)
        >>> mask[..., 4:12, 4:12] = 1
        >>> loss = Masked(WeightedSum({"pixel": nn.L1Loss(), "diff": DiffLoss(small_prior())}, shares={"diff": 0.5}))
        >>> list(loss.terms(restored, clean, mask=mask))
        ['objective/pixel', 'objective/diff/noise', 'objective/diff/h_space']
    """

    def __init__(self, objective: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        check_objective("objective", objective)
        check_sign("objective", objective)
        _check_mean(objective)
        self.objective = objective
        self._looked = False

    def terms(  # type: ignore[override]
        self, restored: Tensor, target: Tensor, *, mask: Tensor, generator: Generators = None
    ) -> dict[str, Tensor]:
        """The objective's terms, as "objective/term" or "objective". Arguments as in :meth:`forward`."""
        check_pair(restored, target)
        shape = tuple(restored.shape)
        if not isinstance(mask, Tensor) or mask.shape not in (shape, (shape[0], 1, *shape[2:])):
            raise ValueError(
                f"`mask` should be of shape {(shape[0], 1, *shape[2:])} or {shape}, found {describe(mask)}."
            )
        if mask.device != restored.device:
            raise ValueError(f"`mask` should be on {restored.device}, found {mask.device}.")
        self._check_range(mask)
        target, mask = target.detach(), mask.detach().to(restored.dtype)
        # chosen where nothing is looked at, because 0 times NaN is NaN
        seen = torch.where(mask == 0, target, target + mask * (restored - target))
        of_each = mask.float().flatten(1).mean(dim=1)
        mean = of_each.mean().clamp(min=1 / mask.numel())  # An empty mask has the loss 0.
        of_each = of_each.clamp(min=1 / mask[0].numel())
        terms = named_terms("objective", self.objective, seen, target, generator)
        if wrong := [value for value in terms.values() if value.ndim > 1]:
            raise ValueError(f"`objective` should return a mean over pixels, found {describe(wrong[0])}.")
        return {name: value / (of_each if value.shape == of_each.shape else mean) for name, value in terms.items()}

    def _check_range(self, mask: Tensor) -> None:
        """Every mask on the CPU; elsewhere, where it waits for the device, the first one, outside of compiled code."""
        if mask.is_meta or torch.compiler.is_compiling() or (self._looked and mask.device.type != "cpu"):
            return
        low, high = (float(value) for value in mask.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"`mask` should have values in [0, 1], found {low:g} to {high:g}.")
        self._looked = True

    def forward(  # type: ignore[override]
        self, restored: Tensor, target: Tensor, *, mask: Tensor, generator: Generators = None
    ) -> Tensor:
        """The loss.

        Args:
            restored: output of the restoration network, float (N, C, H, W).
            target: the same shape.
            mask: (N, 1, H, W) or (N, C, H, W) in [0, 1]: 1 where the objective looks, 0 where it does not.
            generator: handed to an objective that takes one.

        Returns:
            A scalar, or (N,) where the objective has one value for each image; 0 for a mask of zeros.
        """
        return total(self.terms(restored, target, mask=mask, generator=generator))


def _check_mean(objective: Any) -> None:
    """Raise ``ValueError`` for what says of itself that it is no mean over pixels, also within ours."""
    if isinstance(objective, _Loss) and objective.reduction == "sum":
        raise ValueError("`objective` should be a mean over pixels, found reduction='sum'.")
    if not type(objective).__module__.startswith("restoreloss."):
        return
    if (distance := getattr(objective, "distance", None)) in ("rms", "l2"):
        raise ValueError(f"`objective` should be a mean over pixels, found distance={distance!r}.")
    for part in [*getattr(objective, "objectives", {}).values(), getattr(objective, "objective", None)]:
        _check_mean(part)
