"""Networks kept from being trained by accident: frozen for good by a loss, or for the length of a ``with`` block.

A :class:`FrozenNetwork` belongs to a loss: it is frozen for good and hidden from whoever owns the loss. A network that
somebody else is training is only borrowed: :func:`frozen` freezes it for a while and puts everything back.

At rest a network is in eval mode, with one exception: an RNN stays in train mode without dropout, which computes the
same, because cuDNN cannot run backward through an RNN in eval mode.
"""

import gc
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from restoreloss.checks import caller_level, describe

Network = TypeVar("Network", bound=nn.Module)
RunMode = Literal["eval", "train", "keep"]


@dataclass
class _Condition:
    """What freezing changes, as it was before."""

    modes: dict[nn.Module, bool]
    flags: dict[nn.Parameter, bool]
    dropouts: dict[nn.RNNBase, float]

    @classmethod
    def of(cls, *networks: nn.Module) -> "_Condition":
        modules = [module for network in networks for module in network.modules()]
        return cls(
            {module: module.training for module in modules},
            {parameter: parameter.requires_grad for network in networks for parameter in network.parameters()},
            {module: module.dropout for module in modules if isinstance(module, nn.RNNBase)},
        )

    def may_train(self) -> list[nn.Module]:
        """The modules that somebody trains, or might: all where a weight needs a gradient, else those in train mode."""
        learns = any(self.flags.values())
        return [module for module, mode in self.modes.items() if mode or learns]

    def restore(self) -> None:
        for module, mode in self.modes.items():
            module.training = mode
        for parameter, flag in self.flags.items():
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for module, dropout in self.dropouts.items():
            module.dropout = dropout


@dataclass
class _Parts:
    """The modules and parameters of a network, kept because walking its tree takes a millisecond in each call."""

    others: list[nn.Module]
    rnns: list[nn.RNNBase]
    parameters: list[nn.Parameter]

    @classmethod
    def of(cls, network: nn.Module) -> "_Parts":
        rnns = [module for module in network.modules() if isinstance(module, nn.RNNBase)]
        others = [module for module in network.modules() if not isinstance(module, nn.RNNBase)]
        return cls(others, rnns, list(network.parameters()))

    def at_rest(self) -> bool:
        return not (
            any(module.training for module in self.others)
            or any(not rnn.training or rnn.dropout for rnn in self.rnns)
            or any(parameter.requires_grad for parameter in self.parameters)
        )

    def rest(self) -> None:
        for module in self.others:
            module.training = False
        for rnn in self.rnns:
            rnn.training, rnn.dropout = True, 0.0
        for parameter in self.parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)


def _rest(network: nn.Module) -> _Parts:
    """Put a network at rest: eval mode, and no gradient into its parameters."""
    parts = _Parts.of(network)
    network.eval()  # by its own method, which may keep more than the flags
    parts.rest()
    return parts


class FrozenNetwork(nn.Module, Generic[Network]):
    """Hold a network so that it is used, moved and copied, but never trained or saved.

    - Its parameters need no gradient and it is in eval mode, also after a parent's ``.train()`` or
      ``.requires_grad_()``, and also where the caller keeps the network registered elsewhere.
    - It follows ``.to()``, ``.cuda()`` and ``.half()`` of a parent.
    - ``parameters()``, ``modules()`` and ``state_dict()`` of a parent do not see it, so it reaches no optimizer, no
      checkpoint and no DDP bucket.

    Args:
        network: taken over as it is, not copied: the caller's object is frozen. Dropout inside of its RNNs is set to 0.

    Example:
        >>> held = FrozenNetwork(nn.Linear(2, 1))
        >>> parent = nn.Sequential(held).train()
        >>> held.network.training, list(parent.parameters()), parent.state_dict()
        (False, [], OrderedDict())
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        # nn.Module registers the modules that are its attributes, but does not look into a tuple.
        self._held = (network,)
        self._before: _Condition | None = _Condition.of(network)
        self._parts = _rest(network)

    @property
    def network(self) -> Network:
        """The network, at rest and without gradients, whatever was done to it since the last use.

        Modules that were put into it later are looked at when it is put into train mode, or moved.
        """
        if not self._parts.at_rest():
            self._parts = _rest(self._held[0])
        return self._held[0]

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenNetwork[Network]":
        self._held[0]._apply(fn, recurse)
        self._parts = _Parts.of(self._held[0])  # some devices want parameters of their own kind
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        count = sum(parameter.numel() for parameter in self._held[0].parameters())
        return f"{type(self._held[0]).__name__}, {count:,} parameters, hidden"


@contextmanager
def without_checkpointing(network: nn.Module) -> Iterator[None]:
    """Leave out the activation checkpointing of timm, transformers and diffusers for the length of a block.

    A borrowed network has its own modes and flags back before the backward pass, in which checkpointed layers would run
    once more, and compute something else.
    """
    switches = [
        (module, name)
        for module in network.modules()
        for name in ("grad_checkpointing", "gradient_checkpointing")
        if vars(module).get(name) is True  # what a module lacks is slow to ask for, at each call
    ]
    try:
        for module, name in switches:
            setattr(module, name, False)
        yield
    finally:
        for module, name in switches:
            setattr(module, name, True)


def serving(*held: FrozenNetwork[Any]) -> AbstractContextManager[None]:
    """A block in which frozen networks serve their owner; if their first use raises, they are given back as found.

    A network that was handed over by mistake should not stay frozen.
    """
    if torch.compiler.is_compiling() or all(one._before is None for one in held):
        return nullcontext()
    return _first_use(held)


@contextmanager
def _first_use(held: Sequence[FrozenNetwork[Any]]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for one in held:
            if one._before is not None:
                one._before.restore()
        raise
    for one in held:
        one._before = None


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside the wrappers of DDP, DataParallel and ``torch.compile``."""
    while True:
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):
            network = network._orig_mod  # type: ignore[assignment]
        else:
            return network


def averages_gradients(network: nn.Module) -> bool:
    """Whether it is in a DDP of several processes, compiled or not."""
    network = getattr(network, "_orig_mod", network)
    return isinstance(network, nn.parallel.DistributedDataParallel) and dist.get_world_size(network.process_group) > 1


@contextmanager
def _copied_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let batch normalization in eval mode read copies of its statistics within a ``with`` block.

    Its backward pass reads them once more. A pass in train mode before that would have changed them, which no error
    tells of, and the gradient would be that of another network.

    Args:
        modules: those that may train on.
    """
    if not torch.is_grad_enabled():
        yield
        return
    held = [
        (module, name, statistic)
        for module in modules if isinstance(module, _NormBase) and not module.training
        for name in ("running_mean", "running_var")
        if isinstance(statistic := getattr(module, name), Tensor) and not is_lazy(statistic)
    ]  # fmt: skip
    copies = [statistic.clone() for _, _, statistic in held]
    try:
        for (module, name, _), copy in zip(held, copies, strict=True):
            setattr(module, name, copy)
        yield
    finally:
        for (module, name, statistic), copy in zip(held, copies, strict=True):
            if getattr(module, name) is copy and copy._version == 0:  # else the block gave it another value or type
                setattr(module, name, statistic)
                if module.training:  # the block put it back to work
                    statistic.copy_(copy)


@contextmanager
def resting(*networks: nn.Module) -> Iterator[_Condition]:
    """As :func:`frozen`, for whoever puts some parts back to work within the block, and ends its backward pass there.

    The statistics are the networks' own, so that those parts learn theirs.

    Yields:
        The modes and flags that the networks had.
    """
    for network in networks:
        if not isinstance(network, nn.Module):
            raise ValueError(f"`networks` should be modules, one argument each, found {describe(network)}.")
    before = _Condition.of(*networks)
    try:
        for network in networks:
            _rest(network)
        yield before
    finally:
        before.restore()


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Freeze networks for the length of a ``with`` block: no gradient into them, eval mode, statistics at rest.

    What passes through a network that learns (in train mode, or with weights that need a gradient) keeps its gradient,
    also where its statistics move on before the backward pass.

    On leaving, also by an exception, every parameter's ``requires_grad`` and every submodule's mode is what it was.

    Args:
        networks: any number of modules that somebody else is training.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
        >>> image = torch.rand(2, 3, 4, 4, requires_grad=True)
        >>> with frozen(network):
        ...     network(image).mean().backward()
        >>> image.grad is not None, network[0].weight.grad is None, network.training
        (True, True, True)
    """
    with resting(*networks) as before, _copied_statistics(before.may_train()):
        yield


def warn_before_freezing(network: nn.Module, name: str) -> None:
    """Warn where a network that is about to be frozen for good seems to be in training, or never to have been.

    The first is known where its parameters hold gradients, or an optimizer that still exists holds them.

    Args:
        network: what will be frozen.
        name: of the argument that it was given as.
    """
    warn_if_untrained(network, name)
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    if not trained:
        return
    reason = None
    if any(parameter.grad is not None for parameter in network.parameters()):
        reason = "its parameters hold gradients"
    else:
        # The exact type is compared, because isinstance would load lazy objects.
        optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
        # An optimizer whose construction failed has no groups.
        groups = [(one, group) for one in optimizers for group in getattr(one, "param_groups", ())]
        holders = [one for one, group in groups if any(id(parameter) in trained for parameter in group["params"])]
        if holders:
            reason = f"an optimizer ({type(holders[0]).__name__}) holds its parameters"
    if reason:
        kind = type(getattr(network, "model", network)).__name__
        warnings.warn(
            f"`{name}` ({kind}) is frozen from now on, and {reason}: is it the network that you "
            f"train, and were two arguments exchanged? If it has been trained and is to rest, `{name}.requires_grad_("
            "False)` beforehand says so.",
            stacklevel=caller_level(),
        )


def warn_if_untrained(network: nn.Module, name: str) -> None:
    """Warn where all normalization layers of a network are as they are made, so that nobody trained or loaded it.

    Nothing is known of a network without such layers.

    Args:
        network: what is looked through.
        name: of the argument that it was given as.
    """
    norms = [module for module in network.modules() if re.search("Norm(?!al)", type(module).__name__)]
    own = [(*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)) for norm in norms]
    states = [dict(state) for state in own if state]
    if states and all(_as_made(state) for state in states):
        warnings.warn(
            f"`{name}` ({type(getattr(network, 'model', network)).__name__}) seems to be untrained, for all of its "
            f"normalization layers ({len(states)}) are as they are made: were its weights not loaded?",
            stacklevel=caller_level(),
        )


def _as_made(state: Mapping[str, Tensor]) -> bool:
    """Whether a normalization layer has statistics of mean 0 and variance 1, no bias, and one weight for all."""
    for name, value in state.items():
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta or not value.numel():  # as of a sharded network
            return False
        first = {"bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.get(name, value.flatten()[0])
        if name != "num_batches_tracked" and not bool((value == first).all()):
            return False
    return True


@contextmanager
def statistics_at_rest(network: nn.Module) -> Iterator[None]:
    """Let batch normalization in train mode use the batch, and remember nothing of it, within a ``with`` block.

    Args:
        network: left as it was.

    Example:
        >>> norm = nn.BatchNorm2d(3).train()
        >>> with statistics_at_rest(norm):
        ...     _ = norm(torch.rand(2, 3, 4, 4))
        >>> norm.running_mean, int(norm.num_batches_tracked)
        (tensor([0., 0., 0.]), 0)
    """
    counting = [m for m in network.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    held = [(module.running_mean, module.running_var) for module in counting]
    try:
        for module in counting:
            module.track_running_stats = False
            module.running_mean = module.running_var = None  # Instance normalization does not ask whether to track.
        yield
    finally:
        for module, (mean, var) in zip(counting, held, strict=True):
            module.track_running_stats = True
            module.running_mean, module.running_var = mean, var


@contextmanager
def in_mode(network: nn.Module, mode: RunMode) -> Iterator[None]:
    """Run a network in "eval" or "train" mode, or "keep" the modes of its parts, for the length of a ``with`` block.

    On leaving, also by an exception, every submodule's mode and every buffer is what it was: batch statistics, and what
    spectral normalization keeps.

    Args:
        network: that somebody else is training.
        mode: "eval", "train" or "keep".

    Example:
        >>> network = nn.Sequential(nn.BatchNorm2d(3)).eval()
        >>> with in_mode(network, "train"):
        ...     _ = network(torch.rand(2, 3, 4, 4))
        >>> network.training, network[0].running_mean
        (False, tensor([0., 0., 0.]))
    """
    before = _Condition.of(network)
    try:
        if mode != "keep":
            network.train(mode == "train")
        with statistics_at_rest(network):
            learning = any(module.training for module in before.modes)
            held = [(buffer, buffer.clone()) for buffer in network.buffers()] if learning else []
            try:
                with _copied_statistics(before.may_train()):
                    yield
            finally:
                with torch.no_grad():
                    for buffer, value in held:
                        buffer.copy_(value)
    finally:
        for module, training in before.modes.items():
            module.training = training
