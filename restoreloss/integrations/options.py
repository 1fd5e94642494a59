"""Objectives in an options file: a type and plain values, which become a module.

::

    type: DiffLoss
    prior: small             # or a folder, a file or a hub name, as load_prior reads them
    timesteps: [100, 600]
    loss_weight: 0.1

The options are the arguments of the classes themselves, with their defaults; a network is given by its name. Frameworks
that build their losses from YAML or TOML register the classes of :func:`registrable`, each in its own way.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import restoreloss
from restoreloss.checks import check_number, describe, named
from restoreloss.diffusion.checkpoints import FILES, load_prior, null_text
from restoreloss.diffusion.prior import small_prior
from restoreloss.frozen import FrozenNetwork
from restoreloss.generators import Generators
from restoreloss.integrations.checks import build_from, check_kind, check_options, did_you_mean
from restoreloss.integrations.task_networks import normalization, task_network
from restoreloss.objectives.base import Objective, compares, named_terms, total
from restoreloss.weights import read_weights

PIXELS = ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss")
"""Losses of torch.nn that need no package before their names."""


class Criterion(Objective):
    """An objective that was built from plain values, times its weight.

    Args:
        objective: anything called with (restored, target).
        loss_weight: multiplies it.
    """

    def __init__(self, objective: Callable[[Tensor, Tensor], Tensor], loss_weight: float = 1.0) -> None:
        super().__init__()
        self.objective, self.loss_weight = objective, check_number("loss_weight", loss_weight)

    @property
    def reduction(self) -> str:
        """What the objective does over samples, "mean" where it does not say."""
        return getattr(self.objective, "reduction", "mean")

    def terms(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> dict[str, Tensor]:
        """The weighted terms of the objective, from two float (N, C, H, W); ``generator`` for one that draws."""
        terms = named_terms("loss", self.objective, restored, target, generator)
        return {name.removeprefix("loss/"): self.loss_weight * value for name, value in terms.items()}

    def forward(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> Tensor:
        """The sum of :meth:`terms`."""
        return total(self.terms(restored, target, generator=generator))


def criterion(options: Mapping[str, Any], *, own: Any = None) -> Criterion:
    """The objective that options describe.

    Args:
        options: "type" and the options of that type, which is

            - "DiffLoss", "TDPLoss", "HLFLoss" or "WeightedSum": the arguments of the class, ``every`` and ``subset`` of
              :class:`~restoreloss.Subsampled`, ``loss_weight``, and instead of a network its name
              (:data:`OPTIONS` lists them all);
            - a name in ``own``; "L1Loss", "MSELoss", "SmoothL1Loss" or "HuberLoss" of torch; or "package.module.Class",
              which is imported: the arguments of that class, and ``loss_weight``. One that is called with the restored
              image alone is a :class:`~restoreloss.NoReference`.
        own: the registry of a framework, or the module with its losses.

    Returns:
        A module called with (restored, target).

    Raises:
        ValueError: For an unknown type or option, naming similar ones, and a value that the class refuses.

    Example:
        >>> criterion({"type": "DiffLoss", "prior": "small", "timestep": [100, 600]})
        Traceback (most recent call last):
        ValueError: `DiffLoss` has no option 'timestep'; did you mean 'timesteps'?
        >>> parts = {"pixel": {"type": "torch.nn.L1Loss"}, "diff": {"type": "DiffLoss", "loss_weight": 0.1}}
        >>> loss = criterion({"type": "WeightedSum", "objectives": parts})
        >>> sorted(loss.terms(restored, clean))
        ['diff/h_space', 'diff/noise', 'pixel/loss']
    """
    if not isinstance(options, Mapping) or "type" not in options:
        raise ValueError(f"An objective should be a mapping with a `type`, found {options!r}.")
    given = dict(options)
    kind = given.pop("type")
    if not isinstance(kind, str):
        raise ValueError(f"`type` should be the name of one of {[*OPTIONS, *PIXELS]}, found {kind!r}.")
    build = build_ours if kind in OPTIONS else _build_other
    return Criterion(*build(kind, given, own))


def registrable(kind: str, *, own: Any = None, base: type[Criterion] = Criterion, prefix: str = "") -> type[Criterion]:
    """One of our objectives as a class that a framework calls with the options, by name.

    Args:
        kind: one of :data:`OPTIONS`.
        own: the registry of the framework, or the module with its losses, in which a ``WeightedSum`` finds others.
        base: what the framework's slot wants of a :class:`Criterion`.
        prefix: of the name of the class.
    """

    def __init__(self: Criterion, **options: Any) -> None:  # noqa: N807
        base.__init__(self, *build_ours(kind, options, own))

    members = {
        "__init__": __init__,
        "__doc__": f":class:`restoreloss.{kind}`, built from options.",
        "__module__": __name__,
    }
    made = type(prefix + kind, (base,), members)
    made.__signature__ = inspect.Signature(list(OPTIONS[kind].values()))  # type: ignore[attr-defined]
    return made


def build_ours(kind: str, options: Mapping[str, Any], own: Any = None) -> tuple[Objective, float]:
    """An objective of this library and its ``loss_weight``."""
    given, known = dict(options), OPTIONS[kind]
    check_options(kind, given, known)
    for name, value in given.items():
        if name != "objectives":  # Its parts are checked when they are built.
            check_kind(name, value, known[name].annotation)
    _check_reduction(given)
    weight = given.pop("loss_weight", 1.0)
    less = {name: given.pop(name) for name in ("every", "subset") if name in given}
    objective = _KINDS[kind].build(given, own)
    return restoreloss.Subsampled(objective, **less) if less else objective, weight


def _build_other(kind: str, given: dict[str, Any], own: Any) -> tuple[Callable[..., Any], float]:
    """An objective that is not of this library and its ``loss_weight``, which is always applied outside of it."""
    make = _loss_class(kind, own)
    _check_reduction(given)
    weight = given.pop("loss_weight", 1.0)
    if "loss_weight" in inspect.signature(make).parameters:
        given["loss_weight"] = 1.0
    loss = build_from(make, kind, given)
    return (_ForeignLoss(loss) if compares(loss) else restoreloss.NoReference(loss)), weight


def _check_reduction(given: Mapping[str, Any]) -> None:
    """A framework wants one number."""
    if (reduction := given.get("reduction", "mean")) not in ("mean", "sum"):
        raise ValueError(f"`reduction` should be 'mean' or 'sum', which give one number, found {reduction!r}.")


class _ForeignLoss(Objective):
    """A loss that is not of this library, whose result may be several."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.loss, self.reduction = loss, getattr(loss, "reduction", "mean")

    def terms(self, restored: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The result as "loss"; of a mapping and of several, all that are tensors."""
        found = self.loss(restored, target)
        if isinstance(found, Mapping | tuple | list):
            items = found.items() if isinstance(found, Mapping) else enumerate(found)
            return {str(name): value for name, value in items if value is not None}
        return {"loss": found}


def _loss_class(kind: str, own: Any) -> Callable[..., Any]:
    """The class of this name: the framework's own, torch's, or what is imported."""
    names: list[str] = [*OPTIONS, *PIXELS]
    if isinstance(own, ModuleType):
        mine = {name: one for name, one in vars(own).items() if isinstance(one, type) and issubclass(one, nn.Module)}
        if kind in mine:
            return mine[kind]
        names += mine
    elif own is not None:
        if kind in own:
            found: Callable[..., Any] = own.get(kind)
            return found
        names += map(str, getattr(own, "keys", list)())
    if kind in PIXELS:
        return getattr(nn, kind)  # type: ignore[no-any-return]
    module, _, name = kind.rpartition(".")
    if not module:
        raise ValueError(
            f"`type` should be one of {names} or package.module.Class, found {kind!r}; {did_you_mean(kind, names)}"
        )
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`type` should be something to import, found {kind!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"`type` should be a class or function that makes a loss, found {kind!r}: {describe(found)}.")
    return found


# --- one for each type: from the options to the objective


def _diff_loss(given: dict[str, Any], _: Any) -> Objective:
    naming, reading = (_pop_arguments_of(given, function) for function in (_named_prior, load_prior))
    return restoreloss.DiffLoss(_named_prior(**naming, reading=reading), **given)


def _named_prior(
    *, reading: Mapping[str, Any], prior: str = "small", conditioning: str | None = None, dtype: str | None = None
) -> Any:
    """A prior by its name, and what :func:`restoreloss.load_prior` should know to read it."""
    if prior == "small":
        for name, value in (*reading.items(), ("conditioning", conditioning)):
            if value is not None and name != "local_files_only":
                raise ValueError(f"`{name}` should be left out for the prior 'small', found {value!r}.")
        loaded: Any = small_prior()
    else:
        named_alike = isinstance(prior, str) and "/" not in prior and difflib.get_close_matches(prior, ["small"])
        if named_alike and not Path(prior).expanduser().exists():
            raise ValueError(f"`prior` should be 'small', a file, a folder or a name on the hub, found {prior!r}.")
        fixed = {} if conditioning is None else {"conditioning": _named_conditioning(conditioning)}
        with named("source", "prior"):
            loaded = load_prior(prior, **fixed, **reading)
    if dtype is None:
        return loaded
    kind = getattr(torch, dtype.removeprefix("torch."), None)
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"`dtype` should be a floating-point dtype of torch, as 'bfloat16', found {dtype!r}.")
    return loaded.to(kind)


def _named_conditioning(source: str) -> Any:
    """A conditioning by its name: a file with a tensor or a mapping of tensors, or the empty prompt of a pipeline."""
    path = Path(source).expanduser()
    if path.suffix not in FILES:
        with named("source", "conditioning"):
            return null_text(source)
    if not path.is_file():
        raise FileNotFoundError(f"`conditioning` should be a file or a pipeline, found none at {path}.")
    if path.suffix == ".safetensors":
        return read_weights(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _tdp_loss(given: dict[str, Any], _: Any) -> Objective:
    found = _pop_arguments_of(given, task_network)
    network = _named_task(found)
    if "normalize" not in given:
        given["normalize"] = normalization(found["task"])
    return _WithTaskNetwork(restoreloss.TDPLoss(network, **given), network)


def _hlf_loss(given: dict[str, Any], _: Any) -> Objective:
    found = _pop_arguments_of(given, task_network)
    reference = given.pop("reference")
    network = _named_task(found)
    with named("weights", "reference"):
        other = _named_task({**found, "weights": reference})
    if "normalize" not in given:
        given["normalize"] = normalization(found["task"])
    return _WithTaskNetwork(restoreloss.HLFLoss(network, other, **given), network)


def _named_task(given: Mapping[str, Any]) -> nn.Module:
    with named("name", "task"):
        return task_network(given["task"], **{k: v for k, v in given.items() if k != "task"}).requires_grad_(False)


class _WithTaskNetwork(Objective):
    """A loss and its task network, frozen, so that ``.to()`` of the loss moves the network too."""

    def __init__(self, loss: restoreloss.TDPLoss | restoreloss.HLFLoss, network: nn.Module) -> None:
        super().__init__()
        self.loss, self.task, self.reduction = loss, FrozenNetwork(network), loss.reduction

    def terms(self, restored: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Those of the loss."""
        return self.loss.terms(restored, target)


def _weighted_sum(given: dict[str, Any], own: Any) -> Objective:
    reduction = given.pop("reduction", None)
    objectives, weights, shares = given.pop("objectives"), given.pop("weights", None), given.pop("shares", None)
    if not isinstance(objectives, Mapping) or not objectives:
        raise ValueError(f"`objectives` should be a mapping of names to options, found {objectives!r}.")
    for name, one in (("weights", weights), ("shares", shares)):
        if not isinstance(one, Mapping | None):
            raise ValueError(f"`{name}` should be a mapping by name, found {one!r}.")
    parts = {name: criterion(options, own=own) for name, options in objectives.items()}
    if all(part.loss_weight == 0 for part in parts.values()):
        raise ValueError("`objectives` should leave at least one a `loss_weight` other than 0, found all 0.")
    elsewhere = {**(weights or {}), **(shares or {})}
    if twice := [name for name in elsewhere if name in parts and parts[name].loss_weight != 1]:
        raise ValueError(f"`loss_weight` should be left out of what has a weight or share, found one for {twice}.")
    # An objective of weight 0 is not computed.
    without = {name: 0.0 for name, part in parts.items() if part.loss_weight == 0}
    made = restoreloss.WeightedSum(parts, {**(weights or {}), **without}, shares=shares)
    if reduction is not None and reduction != made.reduction:
        raise ValueError(
            f"`reduction` should be given to each of `objectives`, whose is {made.reduction!r}, found "
            f"{reduction!r} for their sum."
        )
    return made


@dataclass(frozen=True)
class _Kind:
    """How a type is built, and whose arguments its options are."""

    build: Callable[[dict[str, Any], Any], Objective]
    signatures: Sequence[Callable[..., Any]]
    excluded: Sequence[str]
    """Arguments that are no options: the networks, which have names instead."""


def _pop_arguments_of(given: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """The options that are arguments of a function, out of the others."""
    names = [_NAMES.get(name, name) for name in inspect.signature(function).parameters]
    return {name: given.pop(name) for name in names if name in given}


def _every(*, every: int = 1, subset: int | float | None = None, loss_weight: float = 1.0) -> None:
    """Only the signature is read: the options that every type has."""


def _reducing(*, reduction: str = "mean") -> None:
    """Only the signature is read: an option of a WeightedSum, which it has from its parts."""


_NAMES = {"name": "task"}
"""Arguments whose options have another name."""
_KINDS = {
    "DiffLoss": _Kind(
        _diff_loss, (_named_prior, load_prior, restoreloss.DiffLoss),
        ("reading", "source", "schedule", "denoiser", "encoder"),
    ),
    "TDPLoss": _Kind(_tdp_loss, (task_network, restoreloss.TDPLoss), ()),
    "HLFLoss": _Kind(_hlf_loss, (task_network, restoreloss.HLFLoss), ()),
    "WeightedSum": _Kind(_weighted_sum, (restoreloss.WeightedSum, _reducing), ()),
}  # fmt: skip


def _options_of(kind: _Kind) -> dict[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for function in (*kind.signatures, _every):
        for parameter in inspect.signature(function).parameters.values():
            name = _NAMES.get(parameter.name, parameter.name)
            if name not in kind.excluded and name not in found:
                found[name] = parameter.replace(name=name, kind=inspect.Parameter.KEYWORD_ONLY)
    return found


OPTIONS: Mapping[str, Mapping[str, inspect.Parameter]] = {name: _options_of(kind) for name, kind in _KINDS.items()}
"""The options of each type: its arguments, with their defaults."""
