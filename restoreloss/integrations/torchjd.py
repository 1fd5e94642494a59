"""The aggregators of TorchJD with our losses, and our projection with their losses.

:func:`aggregate` writes the gradient that an aggregator (UPGrad, MGDA, PCGrad, ...) makes of several losses, the same
on one process and on many. :class:`Projection` is :meth:`restoreloss.GradientOrthogonality.project` as an aggregator.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from restoreloss._optional import extra, require
from restoreloss.checks import check_choice, check_number, describe
from restoreloss.distributed import average_, world_size
from restoreloss.regularizers.gradients import gradients_of
from restoreloss.regularizers.orthogonality import Policy, as_parameters
from restoreloss.sharding import is_sharded

try:
    from torchjd.aggregation import GramianWeightedAggregator, Weighting
except ModuleNotFoundError:  # The classes that need it say so when they are used.
    GramianWeightedAggregator = Weighting = nn.Module  # type: ignore[assignment, misc, unused-ignore]


class ProjectionWeighting(Weighting):  # type: ignore[misc, type-arg, unused-ignore]
    r"""The weights of the rows in :class:`Projection`, from their Gramian G: what TorchJD's autogram wants.

    .. math:: \left(w,\; 1 - \min\left(0,\; w\, G_{01} / G_{11}\right)\right)

    Without the minimum for the policy "full". Arguments and errors are those of :class:`Projection`.
    """

    def __init__(self, *, policy: Policy = "conflict", weight: float = 1.0) -> None:
        _torchjd("aggregation", "ProjectionWeighting")
        super().__init__()
        check_choice("policy", policy, Policy)
        self.policy, self.weight = policy, check_number("weight", weight, low=0)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """(2, 2) to (2,)."""
        if gramian.shape != (2, 2):
            raise ValueError(
                "`matrix` should have two rows, the gradients of generation and of reconstruction, found "
                f"{gramian.shape[0]}."
            )
        square = gramian[1, 1]
        factor = torch.where(square > 0, self.weight * gramian[0, 1] / torch.where(square > 0, square, 1), 0)
        if self.policy == "conflict":
            factor = factor.clamp(max=0)
        return torch.stack([torch.full_like(factor, self.weight), 1 - factor])


class Projection(GramianWeightedAggregator):  # type: ignore[misc, unused-ignore]
    """PCGrad of one objective against the other: the first row is freed of what opposes the second, which stays.

    TorchJD's own PCGrad frees each of the other. Two rows, generation first, reconstruction second.

    Args:
        policy: "conflict" projects if the dot product is negative, "full" always.
        weight: of the first row.

    Raises:
        ImportError: If torchjd is not installed.
        ValueError: For an unknown policy, and a weight that is negative or no number; at a call for another number of
            rows than two.

    Source: as :meth:`restoreloss.GradientOrthogonality.project`, whose gradient this is, for one weight.
    """

    def __init__(self, *, policy: Policy = "conflict", weight: float = 1.0) -> None:
        super().__init__(ProjectionWeighting(policy=policy, weight=weight))

    def forward(self, matrix: Tensor, /) -> Tensor:
        """(2, n) to (n,), in float32 or higher."""
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        scale = matrix.abs().max()
        scale = torch.where(scale > 0, scale, 1)
        rows: Any = matrix / scale  # Gradients of long runs are tiny; their squares would leave float32.
        freed: Tensor = scale * super().forward(rows)
        return freed

    def __repr__(self) -> str:
        weighting = self.gramian_weighting
        return f"Projection(policy={weighting.policy!r}, weight={weighting.weight:g})"


def aggregate(
    losses: Mapping[str, Tensor],
    parameters: Iterable[nn.Parameter],
    aggregator: nn.Module,
    *,
    own: Mapping[str, Iterable[nn.Parameter]] | None = None,
    last: bool = True,
) -> dict[str, Tensor]:
    """Add to ``.grad`` what an aggregator makes of the gradients of several losses. It takes the place of ``backward``.

    Each loss is one row of the Jacobian, in the order of the mapping; one backward pass each, and as much memory as one
    gradient each. Over several processes the rows are averaged first and aggregated then, as one process would on the
    whole batch, and all processes get the gradient of the first, so that an aggregator may draw random numbers. DDP
    must not average as well: run the forward passes on the network inside it, or under ``no_sync()``.

    Args:
        losses: scalars by name, e.g. ``WeightedSum(...).terms(restored, clean)``. Their graphs are released.
        parameters: that all losses share. Those that require no gradient are left out.
        aggregator: one of ``torchjd.aggregation``, or :class:`Projection`.
        own: parameters that one loss trains alone, by the name of the loss; they get its plain gradient.
        last: False for every micro-batch but the last: the rows are kept in ``.jac``, as TorchJD does, and aggregated
            with those of the last, which gives what one large batch would. Divide the losses by the number of
            micro-batches.

    Returns:
        The weight of each row by the name of its loss. Empty where the aggregator has none, where ``last`` is False,
        and where a gradient is not finite: ``.grad`` is then not finite either, and ``GradScaler`` skips the step.

    Raises:
        ImportError: If torchjd is not installed.
        ValueError: For losses that are no scalars or have no graph, an aggregator that is none, an unknown name in
            ``own``, and micro-batches of different numbers of losses; from the aggregator, for a number of rows that it
            does not take.
    """
    autojac, aggregation = _torchjd("autojac", "aggregate"), _torchjd("aggregation", "aggregate")
    if not isinstance(aggregator, aggregation.Aggregator):
        raise ValueError(
            f"`aggregator` should be an instance of one of torchjd.aggregation, found {describe(aggregator)}."
        )
    _check(losses)
    shared = list({id(p): p for p in as_parameters(parameters, "parameters") if p.requires_grad}.values())
    if not shared:
        raise ValueError("`parameters` should hold at least one that requires a gradient, found none.")
    if any(map(is_sharded, shared)):
        raise ValueError("`parameters` should be whole, found some that `fully_shard` has cut. Train under DDP.")
    known, own = {id(p) for p in shared}, {} if own is None else own
    if not isinstance(own, Mapping):
        raise ValueError(f"`own` should be a mapping of losses to their parameters, found {describe(own)}.")
    if unknown := [name for name in own if name not in losses]:
        raise ValueError(f"`own` should be named after losses {list(losses)}, found {unknown}.")
    own = {name: as_parameters(given, f"own[{name!r}]") for name, given in own.items()}
    rows: list[list[Tensor]] = []
    for name, loss in losses.items():
        alone = [p for p in own.get(name, ()) if p.requires_grad and id(p) not in known]
        gradients = gradients_of(f"losses[{name!r}]", loss, [*shared, *alone], retain_graph=len(rows) + 1 < len(losses))
        rows.append(gradients[: len(shared)])
        average_(gradients[len(shared) :])
        for parameter, gradient in zip(alone, gradients[len(shared) :], strict=True):
            _add(parameter, gradient)
    with torch.no_grad(), torch.autocast(shared[0].device.type, enabled=False):
        jacobians = [torch.stack(column) for column in zip(*rows, strict=True)]
        for parameter, jacobian in zip(shared, jacobians, strict=True):
            before = vars(parameter).pop("jac", None)
            if before is not None and before.shape != jacobian.shape:
                raise ValueError(
                    f"`losses` should be as many in every micro-batch, found {len(before)} before and {len(jacobian)}."
                )
            if before is not None:
                jacobian += before
            if not last:
                vars(parameter)["jac"] = jacobian
        weights = _write(jacobians, shared, aggregator, autojac) if last else None
    return {} if weights is None else dict(zip(losses, weights, strict=True))


def _write(jacobians: list[Tensor], shared: list[nn.Parameter], aggregator: nn.Module, autojac: Any) -> Tensor | None:
    """The aggregate of all columns together into ``.grad``; the weights, if there are any."""
    exact = torch.promote_types(shared[0].dtype, torch.float32)
    matrix = torch.cat([jacobian.flatten(1).to(exact) for jacobian in jacobians], dim=1)
    average_([matrix])
    weights: Tensor | None = None
    if matrix.isfinite().all():
        flat: Any = torch.zeros_like(matrix[0], requires_grad=True)  # TorchJD sees one parameter.
        flat.jac = matrix
        weights = autojac.jac_to_grad([flat], aggregator)
        gradient = flat.grad
    else:  # A solver would raise, and the scaler would not see it.
        gradient = matrix.sum(dim=0)
    if world_size() > 1:
        for drawn in [gradient] if weights is None else [gradient, weights]:
            torch.distributed.broadcast(drawn, 0)
    for parameter, part in zip(shared, gradient.split([p.numel() for p in shared]), strict=True):
        _add(parameter, part.view_as(parameter).to(parameter.dtype))
    return weights


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    # It is copied, because the parts of one long gradient must not share memory.
    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient


def _check(losses: Mapping[str, Tensor]) -> None:
    if not isinstance(losses, Mapping) or not losses:
        found = "an empty one" if isinstance(losses, Mapping) else describe(losses)
        raise ValueError(f"`losses` should be a mapping of names to scalars, found {found}.")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            graph = " without a graph" if isinstance(loss, Tensor) and not loss.requires_grad else ""
            raise ValueError(
                f"`losses` should be scalars that depend on the parameters, found {name!r}: {describe(loss)}{graph}."
            )


def _torchjd(module: str, purpose: str) -> Any:
    return require(f"torchjd.{module}", purpose=purpose, install=extra("integrations"))
