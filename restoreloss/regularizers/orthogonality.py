"""GradientOrthogonality: generation and reconstruction share parameters without working against each other.

Both train the same shallow layers; where their gradients conflict, one undoes the other. :class:`GradientOrthogonality`
is a loss that makes the gradients orthogonal, and, for a fraction of its cost, a projection that removes the conflict
from the gradients of a step.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from restoreloss.checks import caller_level, check_choice, check_number, describe
from restoreloss.distributed import average_
from restoreloss.regularizers.gradients import gradients_of
from restoreloss.sharding import is_sharded

Losses = Tensor | Sequence[Tensor]
Mode = Literal["orthogonal", "align"]
Policy = Literal["conflict", "full"]


class GradientOrthogonality(nn.Module):
    r"""Make the gradients of generation and reconstruction agree within each objective and be orthogonal across.

    .. math:: L = (1 - s) + \gamma |d|

    s is the mean cosine of two gradients of the same objective, over all pairs of micro-batches, and d that of a
    gradient of one and a gradient of the other. A gradient that is zero drops out; s = 1 if there is no pair (one
    micro-batch each), d = 0 likewise. The loss has a gradient of its own, by differentiating twice: four times a plain
    step. :meth:`project` costs one more backward pass and changes the gradients only.

    A function of the network's own (``torch.autograd.Function``) that saves what it computed on the way, as NAFNet's
    LayerNorm does, has a second derivative that is wrong without an error: there is a warning of these, where they save
    by ``save_for_backward``.

    Args:
        parameters: shared by both objectives, usually the shallow ones (:func:`restoreloss.regularizers.layer_decay.
            shallow`). Those that require no gradient or are empty are left out.
        gamma: weight of the orthogonality across objectives; 1 in the paper.
        mode: "orthogonal"; or "align", in which s and d change places: the authors' published statement.

    Raises:
        ValueError: Without a parameter that requires a gradient, for one that FSDP2 has cut, for an unknown mode, or
            for a ``gamma`` that is negative or no number.

    Example:
        >>> network = nn.Conv2d(3, 3, 3, padding=1)
        >>> clean = torch.rand(4, 3, 8, 8)
        >>> noise = 0.1 * torch.randn_like(clean)
        >>> def loss(degraded, clean):
        ...     return (network(degraded) - clean).square().mean()
        >>> orthogonality = GradientOrthogonality(network.parameters())
        >>> generation = [loss(clean[:2] + noise[:2], clean[:2]), loss(clean[2:] + noise[2:], clean[2:])]
        >>> reconstruction = [loss(0.5 * clean[:2], clean[:2]), loss(0.5 * clean[2:], clean[2:])]
        >>> penalty = orthogonality(generation, reconstruction)
        >>> (sum(reconstruction) / 2 + 0.1 * penalty).backward()

    Source: DTP, Eqs. (6) to (9), (17) to (20). The equations are lost in the text that we have; this is the form of
    Orthogonal Projection Loss (Ranasinghe et al. 2021), which their wording repeats, on gradients instead of features.
    The authors' code takes the gradients without a graph, so that their term is a constant. The projection is that of
    PCGrad (Yu et al. 2020), of one objective against the other.
    """

    _looked = False

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        gamma: float = 1.0,
        mode: Mode = "orthogonal",
    ) -> None:
        super().__init__()
        unique = {id(p): p for p in as_parameters(parameters, "parameters") if p.requires_grad and p.numel()}
        if not unique:
            raise ValueError("`parameters` should hold at least one that requires a gradient, found none.")
        if any(map(is_sharded, unique.values())):
            raise ValueError(
                "`parameters` should be whole, found some that `fully_shard` has cut: `torch.autograd.grad` finds no "
                "gradient of these. Train under DDP."
            )
        check_choice("mode", mode, Mode)
        self._parameters_shared = tuple(unique.values())  # The tuple keeps them from being registered.
        self.gamma, self.mode = check_number("gamma", gamma, low=0), mode
        self._twice = False

    def forward(
        self,
        generation: Losses,
        reconstruction: Losses,
        *,
        at: tuple[Losses, Losses] | None = None,
    ) -> Tensor:
        """The penalty from the losses of micro-batches, whose graphs are kept.

        Args:
            generation: one scalar loss for each micro-batch; two or more for s.
            reconstruction: likewise.
            at: take the gradients with respect to these tensors, one for each loss, instead of the parameters: the
                activations of a layer, or the outputs of the network, of shape (N, ...). Every sample then counts as a
                micro-batch, which one loss for each objective suffices for. The loss must not be L1 where they are
                outputs: its gradient is constant.

        Returns:
            A scalar in float32 or higher, with a gradient to all that the losses depend on.

        Raises:
            ValueError: For losses that are no scalars or have no graph, and where the network cannot be differentiated
                twice, found out at the first call.
        """
        sides = [_as_list(generation, "generation"), _as_list(reconstruction, "reconstruction")]
        if at is None:
            gradients = [
                [gradients_of(name, loss, self._parameters_shared, create_graph=True) for loss in side]
                for name, side in zip(("generation", "reconstruction"), sides, strict=True)
            ]
        else:
            if not isinstance(at, tuple | list) or len(at) != 2:
                raise ValueError(
                    "`at` should be (tensors of generation, tensors of reconstruction), found "
                    f"{len(at) if isinstance(at, tuple | list) else describe(at)}."
                )
            points = [_as_list(at[0], "at", scalar=False), _as_list(at[1], "at", scalar=False)]
            gradients = [_by_sample(losses, tensors) for losses, tensors in zip(sides, points, strict=True)]
        penalty = self.from_gradients(*gradients)
        if not self._twice and penalty.requires_grad:
            _check_twice(penalty, self._parameters_shared)
            self._twice = True
        return penalty

    def from_gradients(
        self, generation: Sequence[Sequence[Tensor]], reconstruction: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """The penalty from gradients: for each micro-batch a list of tensors, the same shapes for all.

        Example:
            >>> orthogonality = GradientOrthogonality(nn.Linear(1, 1).parameters())
            >>> e1, e2 = [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]
            >>> orthogonality.from_gradients([e1, e2], [e1, e2]).item()
            1.5
        """
        for name, given in (("generation", generation), ("reconstruction", reconstruction)):
            fits = isinstance(given, Sequence) and all(isinstance(row, Sequence) for row in given) and len(given) > 0
            if not fits or not all(isinstance(part, Tensor) for row in given for part in row):
                raise ValueError(
                    f"`{name}` should be a list of tensors for each micro-batch, at least one, found {describe(given)}."
                )
        rows = [*generation, *reconstruction]
        cosines, there = _cosines(rows)
        side = torch.arange(len(rows), device=cosines.device) < len(generation)
        pairs = (there[:, None] & there[None, :]).triu(diagonal=1)
        same = pairs & (side[:, None] == side[None, :])
        within = _mean(cosines, same, default=1.0)
        across = _mean(cosines, pairs & ~same, default=0.0)
        if self.mode == "align":
            within, across = across, within
        return (1 - within) + self.gamma * across.abs()

    def project(
        self,
        generation: Tensor,
        reconstruction: Tensor,
        *,
        policy: Policy = "conflict",
        weight: float | Sequence[float] = 1.0,
        others: Iterable[nn.Parameter] = (),
    ) -> Tensor:
        r"""Add to ``.grad`` the gradient of both losses, that of generation freed of what opposes reconstruction.

        .. math:: g = g_{rec} + g - \frac{g \cdot g_{rec}}{\lVert g_{rec} \rVert^2} g_{rec}, \qquad g = w\, g_{gen}

        The dot product runs over all shared parameters together. Parameters in ``others`` get that of reconstruction,
        and nothing of that of generation.

        Over several processes both gradients are averaged first and projected then, as one process would on the whole
        batch. DDP must not average as well: run the forward passes on the network inside it, or under ``no_sync()``.

        Args:
            generation: scalar loss of the generative batch. Its graph is released, as by ``backward()``.
            reconstruction: scalar loss of the degraded batch, likewise.
            policy: "conflict" projects if the dot product is negative, "full" always.
            weight: of the generative gradient: one, or one for each shared parameter in their order (w_l).
            others: parameters that only reconstruction trains, usually the deep ones. The first call warns of those in
                its graph that are neither here nor shared, for they get no gradient.

        Returns:
            The cosine of the two gradients before the projection, a scalar (0 if one of them is zero).

        Raises:
            ValueError: For losses that are no scalars or have no graph, an unknown policy, or a weight that is negative
                or no number.
        """
        check_choice("policy", policy, Policy)
        generation, reconstruction = _one(generation, "generation"), _one(reconstruction, "reconstruction")
        shared = self._parameters_shared
        known = {id(p) for p in shared}
        rest = [p for p in as_parameters(others, "others") if p.requires_grad and id(p) not in known]
        weights = [weight] * len(shared) if not isinstance(weight, Sequence) or isinstance(weight, str) else weight
        weights = [check_number("weight", one, low=0) for one in weights]
        if len(weights) != len(shared):
            raise ValueError(f"`weight` should be one, or {len(shared)}, found {len(weights)}.")
        if not self._looked:
            self._looked = True
            _warn_of_left_out(reconstruction, [*shared, *rest])
        # The graph is retained, because the two may share a part.
        of_generation = gradients_of("generation", generation, shared, retain_graph=True)
        of_generation = [w * gradient for w, gradient in zip(weights, of_generation, strict=True)]
        of_both = gradients_of("reconstruction", reconstruction, [*shared, *rest])
        average_([*of_generation, *of_both])
        of_reconstruction = of_both[: len(shared)]
        exact = torch.promote_types(shared[0].dtype, torch.float32)
        rows = [[gradient.to(exact) for gradient in side] for side in (of_generation, of_reconstruction)]
        cosines, _ = _cosines(rows)
        cosine = cosines[0, 1]
        factor = cosine * _length_ratio(*rows)
        if policy == "conflict":
            factor = factor.clamp(max=0)
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(zip([*shared, *rest], of_both, strict=True)):
                if number < len(shared):
                    freed = of_generation[number].to(exact) - factor * gradient.to(exact)
                    gradient = (gradient.to(exact) + freed).to(parameter.dtype)
                # It is copied, because autograd may give one tensor to two parameters.
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
        return cosine

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{len(self._parameters_shared)} parameters, gamma={self.gamma:g}, mode={self.mode!r}"


def as_parameters(given: Any, name: str) -> list[nn.Parameter]:
    """The parameters in an iterable, or an error that says how to get them from what was given."""
    if isinstance(given, nn.Module):
        raise ValueError(f"`{name}` should be parameters, found {describe(given)}: give its `.parameters()`.")
    if isinstance(given, Tensor | str) or not isinstance(given, Iterable):
        raise ValueError(f"`{name}` should be several parameters, as `network.parameters()`, found {describe(given)}.")
    found = list(given)
    for one in found:
        if not isinstance(one, Tensor):
            raise ValueError(f"`{name}` should hold parameters, as `network.parameters()`, found {describe(one)}.")
    return found


def _as_list(losses: Losses, name: str, *, scalar: bool = True) -> list[Tensor]:
    kind = "scalar losses" if scalar else "tensors"
    if not isinstance(losses, Tensor | Sequence) or isinstance(losses, str):
        raise ValueError(f"`{name}` should be {kind} that depend on parameters, found {describe(losses)}.")
    found = [losses] if isinstance(losses, Tensor) else list(losses)
    for loss in found:
        if not isinstance(loss, Tensor) or not loss.requires_grad or (scalar and loss.numel() != 1):
            graph = "" if not isinstance(loss, Tensor) or loss.requires_grad else " without a graph"
            raise ValueError(f"`{name}` should be {kind} that depend on parameters, found {describe(loss)}{graph}.")
    if not found:
        raise ValueError(f"`{name}` should hold at least one {'loss' if scalar else 'tensor'}, found none.")
    return found


def _one(loss: Tensor, name: str) -> Tensor:
    found = _as_list(loss, name)
    if len(found) != 1:
        raise ValueError(f"`{name}` should be one scalar loss, found {len(found)}: take their mean.")
    return found[0]


def _by_sample(losses: list[Tensor], tensors: list[Tensor]) -> list[list[Tensor]]:
    """The gradients of every sample, as micro-batches of one."""
    if len(losses) != len(tensors):
        raise ValueError(f"`at` should hold one tensor for each loss ({len(losses)}), found {len(tensors)}.")
    gradients = [
        gradients_of("at", loss, [tensor], create_graph=True)[0] for loss, tensor in zip(losses, tensors, strict=True)
    ]
    return [[sample] for gradient in gradients for sample in gradient]


def _cosines(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """(K, K) cosines of K gradients, and which of these are not zero."""
    if len({tuple(tensor.shape for tensor in row) for row in rows}) != 1:
        found = [[tuple(tensor.shape) for tensor in row] for row in rows]
        raise ValueError(f"The gradients should be of the same shapes in all micro-batches, found {found}.")
    columns = [column for column in zip(*rows, strict=True) if column[0].numel()]
    if not columns:
        raise ValueError("The gradients should hold numbers, found empty ones only.")
    parts = [torch.stack([tensor.flatten() for tensor in column]) for column in columns]
    parts = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    # The gradients of long runs are tiny, and their squares would leave float32.
    scale = torch.stack([part.detach().abs().amax(dim=1) for part in parts]).amax(dim=0)
    there = scale > 0
    scale = torch.where(there, scale, 1)
    with torch.autocast(scale.device.type, enabled=False):
        gram = torch.stack([(part / scale[:, None]) @ (part / scale[:, None]).T for part in parts]).sum(dim=0)
    norms = torch.where(there, gram.diagonal(), 1).sqrt()
    return gram / (norms[:, None] * norms[None, :]), there


def _length_ratio(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The norm of one gradient over that of another, 0 if the latter is zero; squares stay within float32."""
    lengths, scales = [], []
    for row in (one, other):
        scale = torch.stack([part.abs().max() for part in row]).max()
        safe = torch.where(scale > 0, scale, 1)
        lengths.append(torch.stack([(part / safe).square().sum() for part in row]).sum().sqrt())
        scales.append(scale)
    there = scales[1] > 0
    return torch.where(
        there, lengths[0] / torch.where(there, lengths[1], 1) * (scales[0] / torch.where(there, scales[1], 1)), 0
    )


def _mean(values: Tensor, chosen: Tensor, *, default: float) -> Tensor:
    count = chosen.sum()
    return torch.where(count > 0, (values * chosen).sum() / count.clamp(min=1), default)


def _warn_of_left_out(reconstruction: Tensor, trained: Sequence[nn.Parameter]) -> None:
    """Warn of parameters in the graph of a loss that are not among those that get its gradient, and have none."""
    known = {id(parameter) for parameter in trained}
    # Nodes that add to `.grad` have a variable. Torch cannot release the deepest graphs once they have been walked.
    leaves = (getattr(node, "variable", None) for node in _nodes(reconstruction, most=20_000))
    left = {id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter) and leaf.grad is None} - known
    if left:
        warnings.warn(
            f"{len(left)} parameters in the graph of `reconstruction` are neither shared nor in `others`: `project` "
            "gives them no gradient. Name those in `others` that it should train; of the rest, as a discriminator's, "
            "nothing is wanted.",
            stacklevel=caller_level(),
        )


def _nodes(loss: Tensor, *, most: float = math.inf) -> Iterator[Any]:
    """The nodes of a graph, from the loss on."""
    nodes, seen = [loss.grad_fn], set[Any]()
    while nodes and len(seen) < most:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes.extend(following for following, _ in node.next_functions)


def _check_twice(penalty: Tensor, parameters: Sequence[Tensor]) -> None:
    constants: set[str] = set()
    try:
        torch.autograd.grad(penalty, parameters, retain_graph=True, allow_unused=True)
        for node in _nodes(penalty):  # Such a node fails where its gradient is wanted, perhaps not on the way here.
            name = node.name()
            if name.endswith("Error"):
                raise RuntimeError("a function is marked with @once_differentiable.")
            if isinstance(node, BackwardCFunction) and _computed(node):
                constants.add(name.removesuffix("Backward"))
    except RuntimeError as error:
        text = str(error)
        if "scaled_dot_product" in text or "attention" in text:
            way = "Run its attention under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`"
        elif "aot_autograd" in text or "compile" in text:
            way = "Take the losses from the network before `torch.compile`"
        else:
            way = "Find the operation that is differentiable only once"
        raise ValueError(
            f"The network cannot be differentiated twice: {text.partition(chr(10))[0]} {way}, or use `project`, which "
            "needs no second derivative."
        ) from error
    if constants:
        warnings.warn(
            f"The gradient of this penalty may be wrong: {', '.join(sorted(constants))} saved tensors that have no "
            "gradient. If it computed them (NAFNet's LayerNorm does), a second derivative takes them for constants: "
            "compute it with plain operations, or use `project`, which needs none.",
            stacklevel=caller_level(),
        )


def _computed(node: Any) -> bool:
    """Whether a function saved more tensors without a gradient than it has inputs without one."""
    saved = [t for t in node.saved_tensors if t is not None and t.is_floating_point() and not t.requires_grad]
    return len(saved) > sum(following is None for following, _ in node.next_functions)
