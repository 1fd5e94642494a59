"""The depth of layers, and weights for the gradient of generation that decay with it.

Depth is the order in which layers run, found by running the network once. The order of ``named_parameters()`` is that
in which they were written, which need not be the same.
"""

import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from restoreloss.checks import check_choice, check_number, describe
from restoreloss.distributed import average_, reached_anywhere
from restoreloss.frozen import RunMode, in_mode, unwrap
from restoreloss.regularizers.parameter_names import plain_name

logger = logging.getLogger(__name__)


def execution_order(
    model: nn.Module, *inputs: Any, blocks: Iterable[str] | None = None, mode: RunMode = "eval"
) -> list[str]:
    """The names of the blocks of a network in the order in which they first run, shallowest first.

    Args:
        model: the network; it runs once on ``inputs``, without gradient, and is left as it was.
        inputs: what ``model`` is called with.
        blocks: names of submodules to be put in order. The default is every module with parameters of its own.
        mode: that the network runs in: "eval", "train" for one that runs other modules in eval mode than those that
            train (SPAN and other networks that are re-parameterized), or "keep" for the modes that its parts are in.

    Returns:
        The names. Blocks that did not run are left out, and named in a log entry.

    Raises:
        ValueError: For a name that is no submodule, an unknown mode, or if no block ran.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.last, self.first = nn.Linear(2, 2), nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.last(self.first(x))
        >>> execution_order(Net(), torch.zeros(1, 2))
        ['first', 'last']
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` should be a module, found {describe(model)}.")
    if blocks is not None and (isinstance(blocks, str) or not isinstance(blocks, Iterable)):
        raise ValueError(f"`blocks` should be a list of names, found {describe(blocks)}.")
    check_choice("mode", mode, RunMode)
    network = unwrap(model)
    fits = not any(isinstance(one, type) or type(one).__name__ == "ndarray" for one in inputs)
    try:
        inspect.signature(network.forward).bind(*inputs)
    except TypeError:
        fits = False
    if not fits:
        found = ", ".join(map(describe, inputs)) or "none"
        raise ValueError(f"`inputs` should be what {type(network).__name__} is called with, as tensors, found {found}.")
    modules = {plain_name(f"{name}.").removesuffix("."): module for name, module in network.named_modules()}
    if blocks is None:
        chosen = [name for name, module in modules.items() if any(True for _ in module.parameters(recurse=False))]
    else:
        chosen = [plain_name(f"{name}.").removesuffix(".") if isinstance(name, str) else name for name in blocks]
        unknown = [name for name in chosen if name not in modules]
        if unknown:
            raise ValueError(f"`blocks` should name submodules, found {unknown}; there are {list(modules)[1:21]}, ...")
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    handles = [modules[name].register_forward_pre_hook(note(name)) for name in chosen]
    try:
        with torch.no_grad(), in_mode(network, mode):
            network(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise ValueError(f"`blocks` should name some that run in mode {mode!r}, found {chosen[:20]}, which do not.")
    # A module within a block that ran belongs to it, though it may not be called by itself.
    idle = [name for name in chosen if layer_of(name, order) is None]
    if idle:
        logger.warning("These blocks did not run, and have no depth: %s (mode %r)", ", ".join(idle), mode)
    return list(order)


def layer_weights(
    order: Sequence[str], timestep: float, *, rate: float = 0.05, share: float | int = 1.0
) -> dict[str, float]:
    r"""How much generation counts in each layer of a task with matching timestep t*.

    .. math:: w_l = \exp\bigl(-a\, t^* \tfrac{l}{L - 1}\bigr), \qquad l = 0 \dots L - 1

    1 in the shallowest layer and :math:`\exp(-a t^*)` (Eq. 10) in the deepest.

    Args:
        order: names of layers, shallowest first, as :func:`execution_order` finds them.
        timestep: :math:`t^*`, of :func:`restoreloss.match_timestep`, of T = 50.
        rate: a; 0.05 in the paper.
        share: of the layers, as for :func:`shallow`; deeper ones have weight 0.

    Returns:
        The weights by name, for :class:`restoreloss.ParameterImportance` and :func:`add_gradients`.

    Raises:
        ValueError: For an empty order, a negative timestep or rate, or a share that is out of range.

    Example:
        >>> layer_weights(["stem", "body", "head"], 20)
        {'stem': 1.0, 'body': 0.6065306597126334, 'head': 0.36787944117144233}

    Source: DTP, Eqs. (10), (21); the exponent over depth is that of the authors' code, which defines it and never calls
    it. That the regularization weight decays likewise is the paper's Section 2.2.
    """
    _check_order(order)
    timestep, rate = check_number("timestep", timestep, low=0), check_number("rate", rate, low=0)
    last, count = max(1, len(order) - 1), _count(share, order)
    return {
        name: math.exp(-rate * timestep * number / last) if number < count else 0.0 for number, name in enumerate(order)
    }


def shallow(model: nn.Module, order: Sequence[str], share: float | int = 0.5) -> list[nn.Parameter]:
    """The trainable parameters of the first layers.

    Args:
        model: the network.
        order: names of layers, shallowest first.
        share: how many: a whole number of layers, or a fraction of them (rounded up).

    Returns:
        The parameters, each once. A layer that is part of another belongs to it.

    Raises:
        ValueError: For a share outside (0, 1], a number of layers that there are not, or layers without parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> [tuple(p.shape) for p in shallow(model, ["0", "2"], 1)]
        [(2, 2), (2,)]
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` should be a module, found {describe(model)}.")
    _check_order(order)
    chosen, layers = set(order[: _count(share, order)]), set(order)
    named = unwrap(model).named_parameters()
    parameters = [p for name, p in named if p.requires_grad and layer_of(plain_name(name), layers) in chosen]
    if not parameters:
        raise ValueError(f"The layers {sorted(chosen)} should have parameters that require a gradient, found none.")
    return parameters


def add_gradients(loss: Tensor, model: nn.Module, weights: Mapping[str, float], *, retain_graph: bool = False) -> None:
    r"""A ``backward()`` of the generative loss that weighs layers, and leaves those out that are not named.

    .. math:: \nabla_l \mathrel{+}= w_l \, \partial L / \partial \theta_l

    A layer of weight 0, or without one, gets exactly nothing, whatever the depth of the network that the loss saw:
    ``layer_weights(order, t, share=0.5)`` confines generation to the first half. Keep the names of the other layers in
    ``weights``: without them a layer inside a shallow one would belong to that.

    Over several processes of ``torch.distributed`` the mean is added, and each of them has to call; the loss is that of
    the network inside DDP.

    Args:
        loss: a scalar.
        model: the network.
        weights: by name of layer; the longest name that fits a parameter counts.
        retain_graph: as for ``backward()``.

    Raises:
        ValueError: If no parameter that requires a gradient has a weight, for weights that are no numbers, and for a
            loss that is no scalar or has no graph.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> add_gradients(model(torch.ones(1, 2)).sum(), model, {"0": 0.5})
        >>> model[0].bias.grad is None, model[1].bias.grad is None
        (False, True)
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        graph = " without a graph" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise ValueError(f"`loss` should be a scalar that depends on parameters, found {describe(loss)}{graph}.")
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` should be a module, found {describe(model)}.")
    if not isinstance(weights, Mapping):
        raise ValueError(f"`weights` should be a mapping of layers to numbers, found {describe(weights)}.")
    weights = {name: check_number(f"weights[{name!r}]", weight) for name, weight in weights.items()}
    chosen, factors = [], []
    for name, parameter in unwrap(model).named_parameters():
        owner = layer_of(plain_name(name), weights)
        if parameter.requires_grad and owner is not None and weights[owner] != 0:
            chosen.append(parameter)
            factors.append(weights[owner])
    if not chosen:
        raise ValueError(
            f"`weights` should name layers with parameters that require a gradient, found {list(weights)}."
        )
    gradients = torch.autograd.grad(loss, chosen, retain_graph=retain_graph, allow_unused=True)
    # replicas would drift apart if each changed only what its own loss reached
    reached = reached_anywhere([gradient is not None for gradient in gradients], loss.device)
    if not any(reached):
        raise ValueError("`loss` should depend on parameters that `weights` name, found that it depends on none.")
    added = [torch.zeros_like(p) if g is None else f * g for p, g, f in zip(chosen, gradients, factors, strict=True)]
    average_(added)
    for parameter, gradient, changes in zip(chosen, added, reached, strict=True):
        if changes:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _check_order(order: Any) -> None:
    if isinstance(order, str) or not isinstance(order, Sequence) or not all(isinstance(name, str) for name in order):
        raise ValueError(f"`order` should be a list of names, as of `execution_order`, found {describe(order)}.")
    if not order:
        raise ValueError("`order` should name at least one layer, found none.")


def _count(share: float | int, order: Sequence[str]) -> int:
    """How many layers are shallow."""
    fits = isinstance(share, int | float) and not isinstance(share, bool)
    count = (
        0 if not fits else share if isinstance(share, int) else math.ceil(share * len(order)) if 0 < share <= 1 else 0
    )
    if not 1 <= count <= len(order):
        raise ValueError(f"`share` should be within (0, 1] or 1 to {len(order)} layers, found {describe(share)}.")
    return count


def layer_of(name: str, layers: Collection[str]) -> str | None:
    """The layer that a parameter belongs to: the longest of the names that fit. Sets and mappings are fast."""
    if not isinstance(name, str):
        raise ValueError(f"`name` should be the name of a parameter, found {describe(name)}.")
    if isinstance(layers, str):
        raise ValueError(f"`layers` should be names, found one, {layers!r}.")
    while name not in layers and name:
        name = name.rpartition(".")[0]
    return name if name in layers else None
