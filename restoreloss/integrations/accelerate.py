"""Losses, regularizers and phases under Hugging Face accelerate.

Your loop stays as it is. Modules that train go through ``prepare``, others are moved to the device, and what must
survive a restart is registered by name. ``Alternation(phases, accelerator=accelerator)`` needs nothing else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from restoreloss._optional import extra, require
from restoreloss.checks import check_callable, describe
from restoreloss.objectives.shares import take_in_norms
from restoreloss.regularizers.orthogonality import GradientOrthogonality
from restoreloss.sharding import is_sharded
from restoreloss.training.phases import Alternation, as_list


def prepare(accelerator: Any, *objects: Any) -> Any:
    """``accelerator.prepare`` for what trains; a module that does not is moved to the device and comes back as it is.

    accelerate wraps every module that it is given in DDP, which refuses one without parameters to train, and saves it
    with each ``save_state``. A loss and a frozen network want neither.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        objects: networks, optimizers, loaders, schedulers, and also losses and frozen networks.

    Returns:
        One object, or a tuple in the order given, as ``accelerator.prepare``.

    Raises:
        ValueError: For no object, or something else than an accelerator.
        ImportError: If accelerate is absent or too old.
    """
    _check(accelerator)
    if not objects:
        raise ValueError("`objects` should be at least one, found none.")
    rests = [isinstance(one, nn.Module) and not any(p.requires_grad for p in one.parameters()) for one in objects]
    training = [one for one, at_rest in zip(objects, rests, strict=True) if not at_rest]
    prepared = accelerator.prepare(*training) if training else ()
    prepared = iter(prepared if len(training) > 1 else [prepared])
    results = []
    for one, at_rest in zip(objects, rests, strict=True):
        if not at_rest:
            results.append(next(prepared))
        else:
            results.append(one.to(accelerator.device) if accelerator.device_placement else one)
    return results[0] if len(results) == 1 else tuple(results)


def register(accelerator: Any, parts: Mapping[str, Any]) -> None:
    """Have ``save_state`` and ``load_state`` keep what is not prepared, by name.

    accelerate numbers what is registered and cannot tell if a later run registers it in another order. Here each part
    has a name, and a checkpoint with other names is refused.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        parts: by name, anything with ``state_dict`` and ``load_state_dict``: a ``ParameterImportance``, an
            ``Alternation`` (its schedulers: accelerate saves the optimizers that it prepared), or a loss (the norms
            behind its shares, and the calls that ``Subsampled(every=k)`` counts).

    Raises:
        ValueError: For a name or a part that was registered before, a part without a state, an ``Alternation`` whose
            optimizers are not prepared, or no part; at ``save_state`` for a part with tensors that FSDP2 has cut.
        ImportError: If accelerate is absent or too old.
    """
    _check(accelerator)
    if not isinstance(parts, Mapping) or not parts:
        found = "an empty one" if isinstance(parts, Mapping) else describe(parts)
        raise ValueError(f"`parts` should be a mapping of names to what is saved, found {found}.")
    earlier = [one for one in accelerator._custom_objects if isinstance(one, _Named)]
    known = {name: part for one in earlier for name, part in one.parts.items()}
    for name, part in parts.items():
        if not hasattr(part, "state_dict") or not hasattr(part, "load_state_dict"):
            raise ValueError(
                f"`parts` should have `state_dict` and `load_state_dict`, found {name!r}: {describe(part)}."
            )
        if name in known:
            raise ValueError(f"`parts` should have names of their own, found {name!r} registered before.")
        twin = [other for other, one in known.items() if one is part]
        if twin:
            raise ValueError(f"`parts` should be registered once, found {twin[0]!r} again as {name!r}.")
        known[name] = part
        if isinstance(part, Alternation):
            _check_prepared(name, part)
    accelerator.register_for_checkpointing(_Named(parts))
    losses = [part for part in parts.values() if isinstance(part, nn.Module)]
    # by all processes: the first alone saves them
    accelerator.register_save_state_pre_hook(lambda *_: take_in_norms(nn.ModuleList(losses)))


def project(
    accelerator: Any,
    orthogonality: GradientOrthogonality,
    network: nn.Module,
    generation: Callable[[], Tensor],
    reconstruction: Callable[[], Tensor],
    *,
    policy: Literal["conflict", "full"] = "conflict",
    weight: float | Sequence[float] = 1.0,
    others: Iterable[nn.Parameter] = (),
) -> Tensor:
    """:meth:`GradientOrthogonality.project` under accelerate: its autocast and loss scale, and one averaging.

    The two gradients are averaged over the processes first and projected then, as one process would on the whole
    batch. DDP must not average as well, so the losses are computed in here, under ``no_sync``. Step the optimizer
    next; ``accelerator.clip_grad_norm_`` may come between.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        orthogonality: made with parameters of the network.
        network: as ``prepare`` gave it, which both losses run.
        generation: returns the scalar loss of the generative batch.
        reconstruction: returns the scalar loss of the degraded batch.
        policy: as in :meth:`GradientOrthogonality.project`.
        weight: likewise.
        others: likewise.

    Returns:
        The cosine of the two gradients before the projection.

    Raises:
        ValueError: Where parameters are sharded (FSDP, DeepSpeed, Megatron-LM), with ``gradient_accumulation_steps``
            above 1, and for losses that are no scalars.
        ImportError: If accelerate is absent or too old.
    """
    _check(accelerator)
    for name, function in (("generation", generation), ("reconstruction", reconstruction)):
        check_callable(name, function)
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"`accelerator` should run one process or DDP, whose parameters are whole, found {kind}.")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "`accelerator` should have gradient_accumulation_steps=1, found "
            f"{accelerator.gradient_accumulation_steps}: a sum of projected gradients is not the projected sum."
        )
    if not isinstance(orthogonality, GradientOrthogonality):
        raise ValueError(f"`orthogonality` should be a GradientOrthogonality, found {describe(orthogonality)}.")
    if not isinstance(network, nn.Module):
        raise ValueError(f"`network` should be a module, found {describe(network)}.")
    with accelerator.no_sync(network), accelerator.autocast():
        losses = [generation(), reconstruction()]
    for name, loss in zip(("generation", "reconstruction"), losses, strict=True):
        if not isinstance(loss, Tensor):  # The scaler would take a list.
            raise ValueError(f"`{name}` should return a scalar loss, found {describe(loss)}.")
    if accelerator.scaler is not None:
        losses = [accelerator.scaler.scale(loss) for loss in losses]
    return orthogonality.project(*losses, policy=policy, weight=weight, others=others)


class _Schedules:
    """What accelerate does not save of an Alternation: the schedulers of its phases."""

    def __init__(self, alternation: Alternation[Any]) -> None:
        self.phases = {phase.name: as_list(phase.schedulers) for phase in alternation.phases}

    def state_dict(self) -> dict[str, Any]:
        return {name: [schedule.state_dict() for schedule in each] for name, each in self.phases.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expected, found = ({name: len(each) for name, each in phases.items()} for phases in (self.phases, state))
        if expected != found:
            raise ValueError(f"The checkpoint should be of phases with schedulers {expected}, found {found}.")
        for name, schedules in self.phases.items():
            for schedule, values in zip(schedules, state[name], strict=True):
                schedule.load_state_dict(values)


class _Named:
    """Parts by name, as one object that accelerate saves."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)
        self._saved = {n: _Schedules(part) if isinstance(part, Alternation) else part for n, part in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        state = {name: part.state_dict() for name, part in self._saved.items()}
        # accelerate writes the state of the first process, which all would read.
        cut = [name for name, each in state.items() if any(map(is_sharded, tree_leaves(each)))]
        if cut:
            raise ValueError(f"`parts` should be whole, found {cut} with tensors that `fully_shard` has cut.")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self.parts):
            raise ValueError(f"The checkpoint should hold {sorted(self.parts)}, as registered, found {sorted(state)}.")
        for name, part in self._saved.items():
            part.load_state_dict(state[name])


def _check_prepared(name: str, alternation: Alternation[Any]) -> None:
    prepared = require("accelerate.optimizer", purpose="register", install=extra("integrations"))
    for phase in alternation.phases:
        for optimizer in as_list(phase.optimizers):
            if not isinstance(optimizer, prepared.AcceleratedOptimizer):
                raise ValueError(
                    f"The optimizers of {name!r} should be prepared, which saves them, found "
                    f"{type(optimizer).__name__} in phase {phase.name!r}."
                )


def _check(accelerator: Any) -> None:
    accelerate = require("accelerate", purpose="restoreloss.integrations.accelerate", install=extra("integrations"))
    if int(accelerate.__version__.partition(".")[0]) < 1:
        raise ImportError(
            f"restoreloss.integrations.accelerate needs `accelerate` 1.0 or newer, found {accelerate.__version__}: "
            f"pip install {extra('integrations')}"
        )
    if not isinstance(accelerator, accelerate.Accelerator):
        raise ValueError(f"`accelerator` should be an accelerate.Accelerator, found {describe(accelerator)}.")
