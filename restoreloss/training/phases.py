"""Phase and Alternation: which networks train, which are frozen, on which objective and in which order.

A :class:`Phase` says so for one group of networks, an :class:`Alternation` runs its phases one after the other on the
same batch. It does one step of YOUR loop::

    for batch in loader:
        logs = alternation.step(batch)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from restoreloss.checks import check_callable, check_choice, check_number, describe
from restoreloss.frozen import resting, unwrap
from restoreloss.sharding import gather
from restoreloss.training.checks import check_micro_batches, needed_argument

Batch = TypeVar("Batch")
Mode = Literal["train", "eval"]
NonFinite = Literal["raise", "ignore"]
Trainable: TypeAlias = nn.Module | nn.Parameter


@dataclass(frozen=True)
class Phase(Generic[Batch]):
    """One part of a training step: these networks learn from this objective, all others rest.

    Args:
        name: what its logs are called.
        trains: the networks (or single parameters) that learn, in train mode. May be wrapped by DDP.
        objective: ``batch -> loss``, a scalar or a mapping of named scalars that are summed. Lower is better.
        optimizers: one or several; together they hold the parameters of ``trains`` that need a gradient, no others.
            Not one whose ``step`` needs a closure (LBFGS).
        schedulers: stepped after the optimizers, and left as they are where a ``GradScaler`` skipped a step of the
            phase. Not one whose ``step`` needs a metric (ReduceLROnPlateau): step it yourself after validation.
        frozen: networks that rest besides those that the other phases train. May contain what ``trains`` trains.
        modes: "train" or "eval" by network or submodule, where the rule (``trains`` train, all others eval) does not
            fit: torchvision's detectors give their losses in train mode only. A resting network in "train" keeps its
            batch, instance and dropout layers in eval mode; what else draws or counts in train mode will do so.
        max_norm: clip the gradient to this norm, above 0.

    Raises:
        ValueError: For parts of another kind than these.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> phase = Phase("fit", [net], lambda batch: net(batch).square().mean(), optimizer, max_norm=1.0)
    """

    name: str
    trains: Sequence[Trainable]
    objective: Callable[[Batch], Tensor | Mapping[str, Tensor]]
    optimizers: Optimizer | Sequence[Optimizer]
    schedulers: LRScheduler | Sequence[LRScheduler] | None = ()
    frozen: Sequence[nn.Module] = ()
    modes: Mapping[nn.Module, Mode] = field(default_factory=dict)
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"`name` should be text, found {describe(self.name)}.")
        for name, kinds in (("trains", nn.Module | nn.Parameter), ("frozen", nn.Module)):
            given: Any = getattr(self, name)
            # An nn.Sequential could be iterated, but is one network.
            if not isinstance(given, Sequence) or not all(isinstance(item, kinds) for item in given):
                found = [type(item).__name__ for item in given] if isinstance(given, Sequence) else type(given).__name__
                raise ValueError(f"`{name}` of phase {self.name!r} should be a list of networks, found {found}.")
        where = f"of phase {self.name!r}"
        for kind, parts in (("optimizer", as_list(self.optimizers)), ("scheduler", as_list(self.schedulers))):
            for part in parts:
                fits = hasattr(part, "step") and hasattr(part, "param_groups") == (kind == "optimizer")
                if isinstance(part, type) or not fits:
                    raise ValueError(f"`{kind}s` {where} should be {kind}s, found {describe(part)}.")
                inner = _unwrapped(part) if kind == "optimizer" else getattr(part, "scheduler", part)
                if needed := needed_argument(inner):
                    way = (
                        "a phase computes its gradient once a step, so that it takes another optimizer"
                        if kind == "optimizer"
                        else f"leave it out and call its `step({needed})` yourself, after validation for instance"
                    )
                    raise ValueError(
                        f"`{kind}s` {where} should step without an argument, found a {type(part).__name__}, which "
                        f"needs `{needed}`: {way}."
                    )
        if not isinstance(self.modes, Mapping) or not all(isinstance(module, nn.Module) for module in self.modes):
            raise ValueError(f"`modes` {where} should be a mapping of networks to modes, found {describe(self.modes)}.")
        if self.max_norm is not None and self.max_norm != math.inf:  # Infinity measures the norm and clips nothing.
            check_number("max_norm", self.max_norm, low=0, above=True)
        check_callable("objective", self.objective, "batch", where=f" {where}")


class Alternation(Generic[Batch]):
    """Phases that take turns on every batch (alternate training).

    In a phase, every network that any phase mentions is frozen and in eval mode, but those that it trains. Afterwards,
    also after an exception, all flags and modes are what they were.

    Args:
        phases: in order. A later phase sees what an earlier one has learned from the same batch.
        precision: run the objectives under autocast in this dtype.
        scaler: a ``torch.amp.GradScaler``, which float16 needs.
        accelerator: an ``accelerate.Accelerator`` that prepared the networks and optimizers; it then does autocast,
            backward and clipping, and ``precision`` and ``scaler`` are its business.
        on_non_finite: "raise" stops before a NaN or infinity reaches the weights, for which a phase waits for the
            device once a step; "ignore" looks at nothing.

    Raises:
        ValueError: For no phase, names given twice, a network that is trained and frozen by one phase, a parameter that
            an optimizer steps though its phase does not train it, and one that is trained by no optimizer.

    Example:
        SR4IR: the restorer learns from the pixels and from what the classifier sees, then the classifier from the
        restored images.

        >>> from torchvision.models import resnet18
        >>> restorer, classifier = nn.Conv2d(3, 3, 3, padding=1), resnet18(num_classes=2)
        >>> tdp, pixel, task, mix = TDPLoss(classifier), nn.L1Loss(), nn.CrossEntropyLoss(), CQMix()
        >>> def restore(batch):
        ...     restored = restorer(batch["degraded"])
        ...     return {"pixel": pixel(restored, batch["clean"]), "tdp": tdp(restored, batch["clean"])}
        >>> def recognize(batch):
        ...     restored = restorer(batch["degraded"])
        ...     images = torch.cat([restored, batch["clean"], mix(restored, batch["clean"])])
        ...     return task(classifier(images), batch["label"].repeat(3))
        >>> training = Alternation([
        ...     Phase("restorer", [restorer], restore, torch.optim.AdamW(restorer.parameters(), lr=1e-4)),
        ...     Phase("classifier", [classifier], recognize, torch.optim.SGD(classifier.parameters(), lr=3e-2)),
        ... ])
        >>> degraded, clean = torch.rand(2, 2, 3, 32, 32)
        >>> batch = {"degraded": degraded, "clean": clean, "label": torch.tensor([0, 1])}
        >>> list(training.step(batch))
        ['restorer/pixel', 'restorer/tdp', 'classifier/loss']

    Source: Kim et al., "Beyond Image Super-Resolution for Image Recognition with Task-Driven Perceptual Loss", Section
    3.3 and Eq. 3.
    """

    def __init__(
        self,
        phases: Sequence[Phase[Batch]],
        *,
        precision: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accelerator: Any = None,
        on_non_finite: NonFinite = "raise",
    ) -> None:
        if not isinstance(phases, Sequence) or not all(isinstance(phase, Phase) for phase in phases):
            found = [describe(one) for one in phases] if isinstance(phases, Sequence) else describe(phases)
            raise ValueError(f"`phases` should be a list of phases, found {found}.")
        if not phases:
            raise ValueError("`phases` should hold at least one phase, found none.")
        names = [phase.name for phase in phases]
        if len(set(names)) < len(names):
            raise ValueError(f"`phases` should have names of their own, found {names}.")
        if accelerator is not None and (precision is not None or scaler is not None):
            raise ValueError("`precision` and `scaler` should be left to the `accelerator`, found both.")
        if precision is not None and not (isinstance(precision, torch.dtype) and precision.is_floating_point):
            raise ValueError(f"`precision` should be a dtype, as torch.bfloat16, found {precision!r}.")
        if precision == torch.float16 and scaler is None:
            raise ValueError("`scaler` should be given for float16, in which small gradients become 0, found None.")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise ValueError(f"`scaler` should be a torch.amp.GradScaler, found {describe(scaler)}.")
        if accelerator is not None and not hasattr(accelerator, "backward"):
            raise ValueError(f"`accelerator` should be an accelerate.Accelerator, found {describe(accelerator)}.")
        check_choice("on_non_finite", on_non_finite, NonFinite)
        self.phases = tuple(phases)
        self._precision = precision
        # The optimizers of accelerate step its scaler once each, and it should be stepped once a phase.
        self._scaler = scaler if accelerator is None else getattr(accelerator, "scaler", None)
        self._accelerator = accelerator
        # The scale of this one decides which steps are skipped; it need not be stepped here.
        self._scale: torch.amp.GradScaler | None = self._scaler
        self._on_non_finite = on_non_finite
        if getattr(accelerator, "gradient_accumulation_steps", 1) != 1:
            raise ValueError(
                "`accelerator` should have gradient_accumulation_steps=1, found "
                f"{accelerator.gradient_accumulation_steps}: give `step` several micro-batches instead."
            )
        for phase in phases:
            _check(phase)
        mentioned = [item for phase in phases for item in (*phase.trains, *phase.frozen, *phase.modes)]
        self._networks = [item for item in mentioned if isinstance(item, nn.Module)]
        self._loose = {item for item in mentioned if isinstance(item, nn.Parameter)}

    def step(self, *micro_batches: Batch, accumulate: bool = False) -> dict[str, Tensor]:
        """Every phase once: its gradient over the batch, and a step of its optimizers.

        Args:
            micro_batches: one batch, or several of equal size whose gradients are averaged (accumulation). Every phase
                sees all of them before the next begins, so that the result is that of one large batch.
            accumulate: True where each of several micro-batches is a single tensor. Otherwise ``step(degraded, clean)``
                is refused, for it is most often meant to be the one batch ``step((degraded, clean))``.

        Returns:
            Detached scalars "phase/term" ("phase/loss" for an objective without terms), mean over the micro-batches,
            and "phase/grad_norm" before clipping, where the phase clips. Reading them is the only synchronization.

        Raises:
            ValueError: For no batch, micro-batches of different kinds, several single tensors without ``accumulate``,
                and an objective that gives no scalar or no gradient.
            FloatingPointError: With ``on_non_finite="raise"``, for a term or a gradient of a phase that is NaN or
                infinite, by name. No optimizer of the phase has stepped, and its gradients are gone. Of a loss that is
                scaled only the terms are looked at: a gradient that overflows is the scaler's business.
        """
        if not micro_batches:
            raise ValueError("`micro_batches` should be at least one batch, found none.")
        if not accumulate:
            check_micro_batches(micro_batches)
        logs: dict[str, Tensor] = {}
        for phase in self.phases:
            with self.roles(phase):
                logs.update((f"{phase.name}/{key}", value) for key, value in self._run(phase, micro_batches).items())
        return logs

    @contextmanager
    def roles(self, phase: Phase[Batch]) -> Iterator[None]:
        """The flags and modes of one phase, for the length of a ``with`` block; its backward pass should end there."""
        trained = [unwrap(item) if isinstance(item, nn.Module) else item for item in phase.trains]
        flags = {p: p.requires_grad for p in (*_parameters(phase.trains), *self._loose)}
        with ExitStack() as stack:
            for network in self._networks:
                if isinstance(network, DistributedDataParallel) and network not in phase.trains:
                    stack.enter_context(_unsynchronized(network))
            stack.enter_context(resting(*map(unwrap, self._networks)))
            try:
                for parameter in self._loose:
                    parameter.requires_grad_(False)
                for parameter in _parameters(phase.trains):
                    parameter.requires_grad_(flags[parameter])
                for item in trained:
                    if isinstance(item, nn.Module):
                        item.train()
                learning = {m for item in trained if isinstance(item, nn.Module) for m in item.modules()}
                for module, mode in phase.modes.items():
                    for part in unwrap(module).modules():
                        at_rest = part not in learning and isinstance(part, _NormBase | _DropoutNd)
                        part.training = mode == "train" and not at_rest
                yield
            finally:
                for parameter, flag in flags.items():
                    parameter.requires_grad_(flag)

    def state_dict(self) -> dict[str, Any]:
        """The state of all optimizers, schedulers and the scaler; the networks are yours to save."""
        state: dict[str, Any] = {
            phase.name: {
                "optimizers": [optimizer.state_dict() for optimizer in as_list(phase.optimizers)],
                "schedulers": [scheduler.state_dict() for scheduler in as_list(phase.schedulers)],
            }
            for phase in self.phases
        }
        return {"phases": state, "scaler": None if self._scaler is None else self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` gave, into the same phases."""
        if not isinstance(state, Mapping) or not isinstance(state.get("phases"), Mapping):
            found_keys = list(state) if isinstance(state, Mapping) else describe(state)
            raise ValueError(f"`state` should be what `state_dict()` gave, with 'phases', found {found_keys}.")
        expected, found = (
            {name: [len(phase["optimizers"]), len(phase["schedulers"])] for name, phase in saved["phases"].items()}
            for saved in (self.state_dict(), state)
        )
        if expected != found:
            raise ValueError(
                f"`state` should be of these phases, each with optimizers and schedulers, {expected}, found {found}."
            )
        for phase in self.phases:
            saved = state["phases"][phase.name]
            for key, parts in (("optimizers", as_list(phase.optimizers)), ("schedulers", as_list(phase.schedulers))):
                for part, values in zip(parts, saved[key], strict=True):
                    part.load_state_dict(values)
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])

    def _run(self, phase: Phase[Batch], micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        optimizers = as_list(phase.optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad()
        logs: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches, start=1):
            with ExitStack() as stack:
                if number < len(micro_batches):  # DDP need not average before the last one.
                    for item in phase.trains:
                        if isinstance(item, DistributedDataParallel):
                            stack.enter_context(item.no_sync())
                with self._autocast(phase):
                    terms = _terms(phase.name, phase.objective(batch))
                    loss = torch.stack(list(terms.values())).sum() / len(micro_batches)
                if not loss.requires_grad:
                    raise ValueError(
                        f"The objective of phase {phase.name!r} should depend on what the phase trains, found a loss "
                        "without gradient."
                    )
                self._backward(loss)
            for key, value in terms.items():
                logs[key] = logs.get(key, 0) + value.detach() / len(micro_batches)
        scaled = self._scale is not None and self._scale.is_enabled()
        clips = phase.max_norm is not None and self._accelerator is None and not scaled
        norm = _norm(phase.trains) if clips or (self._on_non_finite == "raise" and not scaled) else None
        # This comes before a scaler divides by its scale, which it does once, and before NaN spreads by clipping.
        if self._on_non_finite == "raise":
            self._check_finite(phase, logs, norm)
        if phase.max_norm is not None:
            logs["grad_norm"] = self._clip(phase, phase.max_norm, norm)
        schedulers = as_list(phase.schedulers)
        before = self._scale.get_scale() if self._scale is not None and schedulers else 0.0
        for optimizer in optimizers:
            if self._scaler is None:
                optimizer.step()
            else:
                self._scaler.step(_unwrapped(optimizer))
        if self._scaler is not None:
            self._scaler.update()
        # The scale falls where a step was skipped.
        if self._scale is None or not schedulers or self._scale.get_scale() >= before:
            for scheduler in schedulers:
                scheduler.step()
        for optimizer in optimizers:
            optimizer.zero_grad()  # The next phase needs the memory, not these gradients.
        return logs

    def _check_finite(self, phase: Phase[Batch], terms: Mapping[str, Tensor], norm: Tensor | None) -> None:
        """Raise where a term or the norm of the gradient is not finite: one look at the device."""
        named = {f"term {name!r}": value for name, value in terms.items()}
        if norm is not None:
            named["gradient"] = gather(norm)
        first, *_ = named.values()
        values = torch.stack([value.detach().to(first.device) for value in named.values()]).tolist()
        wrong = {name: value for name, value in zip(named, values, strict=True) if not math.isfinite(value)}
        if not wrong:
            return
        found = ", ".join(f"{name} = {value}" for name, value in wrong.items() if name != "gradient")
        if not found and (names := _broken(phase.trains)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found = f"NaN or infinity in the gradient of {', '.join(names[:3])}{more}"
        elif not found and phase.max_norm is None:
            return  # The squares of huge gradients are infinite, which does no harm.
        elif not found:
            found = f"a gradient whose norm is {values[-1]}, by which clipping divides"
        for optimizer in as_list(phase.optimizers):
            optimizer.zero_grad()
        raise FloatingPointError(
            f"Phase {phase.name!r} should have finite terms and gradients, found {found}: no optimizer of the phase "
            'has stepped. `on_non_finite="ignore"` goes on.'
        )

    def _autocast(self, phase: Phase[Batch]) -> AbstractContextManager[Any]:
        if self._accelerator is not None:
            context: AbstractContextManager[Any] = self._accelerator.autocast()
            return context
        if self._precision is None:
            return nullcontext()
        return torch.autocast(_parameters(phase.trains)[0].device.type, self._precision)

    def _backward(self, loss: Tensor) -> None:
        if self._accelerator is not None:
            self._accelerator.backward(loss)
        elif self._scaler is not None:
            self._scaler.scale(loss).backward()
        else:
            loss.backward()

    def _clip(self, phase: Phase[Batch], max_norm: float, norm: Tensor | None) -> Tensor:
        parameters = [p for p in _parameters(phase.trains) if p.requires_grad]
        if norm is not None and self._accelerator is None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            return gather(norm)
        if self._scaler is not None:
            for optimizer in as_list(phase.optimizers):
                self._scaler.unscale_(_unwrapped(optimizer))
        elif self._accelerator is not None:
            return gather(self._accelerator.clip_grad_norm_(parameters, max_norm))
        return gather(nn.utils.clip_grad_norm_(parameters, max_norm))


@contextmanager
def _unsynchronized(network: DistributedDataParallel) -> Iterator[None]:
    """Let a DDP network run without waiting for a backward pass to its weights."""
    broadcasts = network.require_forward_param_sync
    try:
        with network.no_sync():
            yield
    finally:
        network.require_forward_param_sync = broadcasts


def _check(phase: Phase[Any]) -> None:
    if not phase.trains:
        raise ValueError(f"`trains` of phase {phase.name!r} should name at least one network, found none.")
    learning = {part for item in phase.trains if isinstance(item, nn.Module) for part in item.modules()}
    if any(unwrap(module) in learning for module in phase.frozen):
        raise ValueError(f"`frozen` of phase {phase.name!r} should name nothing that it trains, found a part of it.")
    if any(mode not in ("train", "eval") for mode in phase.modes.values()):
        raise ValueError(
            f"`modes` of phase {phase.name!r} should be 'train' or 'eval', found {[*phase.modes.values()]}."
        )
    if not as_list(phase.optimizers):
        raise ValueError(f"`optimizers` of phase {phase.name!r} should be at least one, found none.")
    stepped = {
        p for optimizer in as_list(phase.optimizers) for group in optimizer.param_groups for p in group["params"]
    }
    trained = set(_parameters(phase.trains))
    if stepped - trained:
        raise ValueError(
            f"`optimizers` of phase {phase.name!r} should hold parameters of `trains` only, found "
            f"{len(stepped - trained)} others."
        )
    forgotten = sum(parameter.requires_grad for parameter in trained - stepped)
    if forgotten:
        raise ValueError(
            f"`optimizers` of phase {phase.name!r} should hold all parameters of `trains` that need a gradient, found "
            f"{forgotten} in none: name the submodules that train, or freeze the rest."
        )


def _norm(trains: Sequence[Trainable]) -> Tensor:
    """The norm of the gradient."""
    gradients = [p.grad for p in _parameters(trains) if p.requires_grad and p.grad is not None]
    return nn.utils.get_total_norm([one.coalesce().values() if one.is_sparse else one for one in gradients])


def _broken(trains: Sequence[Trainable]) -> list[str]:
    """The parameters whose gradient is not finite."""
    named: list[tuple[str, nn.Parameter]] = []
    for number, item in enumerate(trains):
        where = f"trains[{number}]"
        if isinstance(item, nn.Parameter):
            named.append((where, item))
        else:
            prefix = "" if len(trains) == 1 else f"{where}."
            named += [(f"{prefix}{name}", p) for name, p in unwrap(item).named_parameters()]
    gradients = [(name, gather(p.grad)) for name, p in named if p.grad is not None]
    return [
        f"`{name}`"
        for name, grad in gradients
        if not bool((grad.to_dense() if grad.is_sparse else grad).isfinite().all())
    ]


def _terms(name: str, result: Any) -> Mapping[str, Tensor]:
    terms = result if isinstance(result, Mapping) else {"loss": result}
    if not terms or not all(isinstance(value, Tensor) and value.ndim == 0 for value in terms.values()):
        found = {key: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for key, v in terms.items()}
        raise ValueError(f"The objective of phase {name!r} should return a scalar, or scalars by name, found {found}.")
    if "grad_norm" in terms:
        raise ValueError(
            f"The objective of phase {name!r} should leave 'grad_norm' to the norm, found a term of that name."
        )
    return terms


def _parameters(items: Sequence[Trainable]) -> list[nn.Parameter]:
    """The parameters of networks and single ones, each once."""
    found: dict[nn.Parameter, None] = {}
    for item in items:
        found.update(dict.fromkeys(item.parameters() if isinstance(item, nn.Module) else [item]))
    return list(found)


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer in accelerate's wrapper."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def as_list(value: Any) -> list[Any]:
    """One object or several, as a list."""
    if value is None:  # Lightning's `lr_schedulers()` returns None where there is none.
        return []
    return list(value) if isinstance(value, Sequence) else [value]
