"""Losses, regularizers and phases under Lightning.

A loss is called in your ``training_step`` and may be an attribute of the module: its networks are hidden from the
checkpoint and the optimizer. The rest is here: :class:`ImportanceCallback` for a regularizer,
:class:`LightningAlternation` for networks that learn in turn, :class:`ObjectivesCallback` for losses with shares.

Written for ``lightning`` (``import lightning``) and ``pytorch_lightning``, 2.4 or newer. Each has classes of its own:
the module and its Trainer are of one of them.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from restoreloss._optional import extra, require
from restoreloss.checks import describe
from restoreloss.integrations.processes import check_equal_batches
from restoreloss.objectives.base import total
from restoreloss.objectives.shares import take_in_norms
from restoreloss.regularizers.importance import ParameterImportance
from restoreloss.training.phases import Alternation, NonFinite, Phase

Batch = TypeVar("Batch")
_PACKAGES = {"lightning": "lightning.pytorch", "pytorch-lightning": "pytorch_lightning"}
_OLDEST = (2, 4)
_COMPROMISED = ("2.6.2", "2.6.3")  # GHSA-w37p-236h-pfx3: they steal credentials when they are imported


def _installed() -> tuple[str, str] | None:
    """The package that is installed, of the two, and its version."""
    for package in _PACKAGES:
        try:
            return package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _lightning() -> Any:
    """``lightning.pytorch`` or ``pytorch_lightning``, or an error that says what to install."""
    purpose, install = "restoreloss.integrations.lightning", extra("integrations")
    found = _installed()
    if found is None:
        return require("lightning.pytorch", purpose=purpose, install=install)
    package, version = found
    if version in _COMPROMISED:
        raise ImportError(
            f"`{package}` {version} is malware (advisory GHSA-w37p-236h-pfx3): take it off this machine, renew the "
            f"credentials if it was ever imported, then pip install {install}"
        )
    if tuple(int(number) for number in version.split(".")[:2]) < _OLDEST:
        raise ImportError(
            f"{purpose} needs `{package}` {_OLDEST[0]}.{_OLDEST[1]} or newer, found {version}: pip install {install}"
        )
    return require(_PACKAGES[package], purpose=purpose, install=install)


def _package_of(module: Any) -> Any:
    """The package, of the two, that a LightningModule is of."""
    _lightning()
    for name in _PACKAGES.values():
        package = sys.modules.get(name)
        if package is not None and isinstance(module, package.LightningModule):
            return package
    raise ValueError(
        f"`module` should be a LightningModule of `lightning.pytorch` or `pytorch_lightning`, found {describe(module)}."
    )


# Without Lightning this file can be imported, and its classes say what is missing when they are made.
_Callback: Any = object if _installed() is None else _lightning().Callback


class ImportanceCallback(_Callback):  # type: ignore[misc]
    """Charge parameters for moving (:class:`~restoreloss.ParameterImportance`) in a Lightning run.

    The gradient of the penalty is added once per optimizer step: after the last backward pass of an accumulation, after
    the loss scale of ``16-mixed`` was taken out, after DDP has averaged, and before ``gradient_clip_val`` clips. So the
    numbers are those of a loss to which the penalty was added. (``ParameterImportance.attach`` cannot do that here:
    Lightning computes the gradients in a closure, within the step.)

    The importance is saved with the checkpoint, and moves to the device of the module.

    Args:
        importance: measured before ``fit``, or filled by ``ckpt_path``. Not an attribute of the module as well, which
            would save it twice.
        name: of its state in the checkpoint. Two callbacks need two names.

    Raises:
        ValueError: At construction for something else than a ParameterImportance; when fitting begins for one that is
            not measured, that charges nothing which an optimizer steps (it may hold a copy of the network), or that two
            callbacks share; and for a fused optimizer under ``16-mixed``, which is given scaled gradients.
        ImportError: If Lightning is absent, too old or compromised.
    """

    def __init__(self, importance: ParameterImportance, *, name: str = "importance") -> None:
        _lightning()
        super().__init__()
        if not isinstance(importance, ParameterImportance):
            raise ValueError(f"`importance` should be a ParameterImportance, found {describe(importance)}.")
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` should be text, found {describe(name)}.")
        self.importance, self.name = importance, name

    @property
    def state_key(self) -> str:
        """The name of the state in the checkpoint."""
        return f"{type(self).__qualname__}[{self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a state or a penalty that two callbacks would write."""
        for other in trainer.callbacks:
            if other is self or not isinstance(other, ImportanceCallback):
                continue
            if other.state_key == self.state_key:
                raise ValueError(f"`name` should be another for each ImportanceCallback, found {self.name!r} twice.")
            if other.importance is self.importance:
                raise ValueError(f"`importance` should be in one callback, found in {other.name!r} and {self.name!r}.")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Move the importance to the device and see that it charges something that is trained."""
        self.importance.to(pl_module.device)
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            fused = [o for o in trainer.optimizers if getattr(o, "_step_supports_amp_scaling", False)]
            if fused:
                raise ValueError(
                    f"{type(fused[0]).__name__} should have fused=False under 16-mixed: it takes the loss scale out by "
                    "itself, after the penalty was added."
                )
        penalty = self.importance()
        stepped = [p for optimizer in trainer.optimizers for p in _stepped(optimizer) if p.requires_grad]
        charged: Sequence[Tensor | None] = []
        if penalty.requires_grad and stepped:
            charged = torch.autograd.grad(penalty, stepped, allow_unused=True)
        if all(gradient is None for gradient in charged):
            raise ValueError(
                "`importance` should charge parameters that an optimizer of the trainer steps, found none: does it "
                "hold a copy of the network?"
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty to those of the parameters that this optimizer steps."""
        # This runs for every optimizer: the parameters of the others are left out, or they would be charged twice.
        stepped = set(_stepped(optimizer))
        others = [p for p in pl_module.parameters() if p.requires_grad and p not in stepped]
        try:
            for parameter in others:
                parameter.requires_grad_(False)
            self.importance.apply_()
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """The importances and anchors."""
        return dict(self.importance.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave."""
        self.importance.load_state_dict(state_dict)


class ObjectivesCallback(_Callback):  # type: ignore[misc]
    """What the losses of a module need in a Lightning run. Their state is in the module's own, as they are its parts.

    - After each batch the norms behind the shares of a ``WeightedSum`` are taken in, over all processes, so that a
      checkpoint has those of the last batch too.
    - The first batch must be of one size on all processes (:func:`check_equal_batches`).

    Args:
        check_batches: whether to compare the sizes.

    Raises:
        ValueError: For unequal batches.
        ImportError: If Lightning is absent, too old or compromised.
    """

    def __init__(self, *, check_batches: bool = True) -> None:
        _lightning()
        super().__init__()
        if not isinstance(check_batches, bool):
            raise ValueError(f"`check_batches` should be True or False, found {describe(check_batches)}.")
        self._unchecked = check_batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Compare the sizes of the first batch."""
        if self._unchecked:
            self._unchecked = False
            check_equal_batches(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the norms in; callbacks that save checkpoints run after all others."""
        take_in_norms(pl_module)


class LightningAlternation(Alternation[Batch]):
    """Phases (:class:`~restoreloss.Alternation`) whose backward passes and steps are Lightning's.

    Its precision (also the loss scale of ``16-mixed``), its DDP and its optimizers are used. In each phase all other
    networks rest: frozen AND in eval mode. ``toggle_optimizer`` freezes only, and a batch normalization that is run on
    in train mode goes on learning.

    Make it in ``on_fit_start`` and call ``step(batch)`` in ``training_step``. Optimizers come from
    ``self.optimizers()``, schedulers from ``self.lr_schedulers()``: Lightning saves both, so there is no state to save.

    Args:
        module: the LightningModule, with ``automatic_optimization = False``, in a Trainer on one device or with the
            strategy ``ddp_find_unused_parameters_true``: a phase leaves the other networks' parameters unused.
        phases: in order.
        on_non_finite: as for :class:`~restoreloss.Alternation`.

    Raises:
        ValueError: For a module, a strategy or optimizers that are not as said; under ``16-mixed`` also for a phase of
            several optimizers, between which Lightning would change the loss scale.
        ImportError: If Lightning is absent, too old or compromised.
    """

    def __init__(self, module: Any, phases: Sequence[Phase[Batch]], *, on_non_finite: NonFinite = "raise") -> None:
        lightning = _package_of(module)
        if module.automatic_optimization:
            raise ValueError("`module` should have `automatic_optimization = False`, found True.")
        if module._trainer is None:
            raise ValueError("`module` should be in a Trainer: make its phases in `on_fit_start`, found none.")
        super().__init__(phases, accelerator=_Lightning(module), on_non_finite=on_non_finite)
        _check_strategy(lightning, module.trainer.strategy)
        self._scale = getattr(module.trainer.precision_plugin, "scaler", None)
        wrapper = lightning.core.optimizer.LightningOptimizer
        for phase in phases:
            optimizers = phase.optimizers if isinstance(phase.optimizers, Sequence) else [phase.optimizers]
            if not all(isinstance(optimizer, wrapper) for optimizer in optimizers):
                raise ValueError(
                    f"`optimizers` of phase {phase.name!r} should be those of `self.optimizers()`, which step as the "
                    f"Trainer wants, found {[type(optimizer).__name__ for optimizer in optimizers]}."
                )
            if self._scale is not None and len(optimizers) > 1:
                raise ValueError(
                    f"`optimizers` of phase {phase.name!r} should be one under 16-mixed, found {len(optimizers)}: "
                    "Lightning may change the loss scale after each."
                )

    def state_dict(self) -> NoReturn:
        """Refused: Lightning saves optimizers, schedulers and scaler."""
        raise ValueError("A LightningAlternation has no state of its own: the Trainer's checkpoint holds it all.")

    def load_state_dict(self, state: Mapping[str, Any]) -> NoReturn:
        """Refused likewise."""
        self.state_dict()


class _Lightning:
    """What an Alternation leaves to accelerate, done by Lightning."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()  # `training_step` runs under that of the Trainer.

    def backward(self, loss: Tensor) -> None:
        self._module.manual_backward(loss)

    def clip_grad_norm_(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        # Lightning divides by the loss scale within the step, and not twice: clip what is still scaled.
        scaler = getattr(self._module.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        return nn.utils.clip_grad_norm_(parameters, max_norm * scale) / scale


def log_terms(module: Any, terms: Mapping[str, Tensor], *, prefix: str = "train/", sync_dist: bool = False) -> Tensor:
    """Log each term and the sum by ``log_dict``, and return the sum, for ``training_step`` to return.

    The sum is logged as "loss", so that ``monitor="train/loss"`` finds it; a term of that name keeps it.

    Args:
        module: the LightningModule.
        terms: of an objective, ``loss.terms(restored, clean)``.
        prefix: of the logged names.
        sync_dist: average what is logged over the processes, which costs them a wait.

    Returns:
        The sum, with its gradient.

    Raises:
        ValueError: For terms that are no scalars.
    """
    if not isinstance(terms, Mapping):
        raise ValueError(f"`terms` should be scalar tensors by name, as `loss.terms(...)`, found {describe(terms)}.")
    found = {
        name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for name, value in terms.items()
        if not isinstance(value, Tensor) or value.ndim
    }
    if found or not terms:
        raise ValueError(f"`terms` should be scalar tensors by name (reduction='mean'), found {found or 'none'}.")
    if not hasattr(module, "log_dict"):
        raise ValueError(f"`module` should be a LightningModule, found {describe(module)}.")
    if not isinstance(prefix, str):
        raise ValueError(f"`prefix` should be text, found {describe(prefix)}.")
    loss = total(dict(terms))
    logged = {"loss": loss.detach(), **terms}
    module.log_dict({f"{prefix}{name}": value for name, value in logged.items()}, sync_dist=sync_dist)
    return loss


def _check_strategy(lightning: Any, strategy: Any) -> None:
    network = strategy.model
    if isinstance(network, DistributedDataParallel):
        if not network.find_unused_parameters or network.static_graph:
            raise ValueError(
                "`strategy` should be 'ddp_find_unused_parameters_true' (and no static graph): a phase leaves the "
                "other networks' parameters unused, found DDP that waits for all."
            )
    elif not isinstance(strategy, lightning.strategies.SingleDeviceStrategy):
        raise ValueError(f"`strategy` should be one device or DDP, found {type(strategy).__name__}.")


def _stepped(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
