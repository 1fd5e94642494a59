"""How is a network kept from being trained by accident?

Two answers, for two owners. A :class:`FrozenNetwork` belongs to a loss: it is frozen for good and hidden from whoever
owns the loss. A network that somebody else is training is only borrowed: :func:`frozen` freezes it for the length of a
``with`` block and puts everything back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class FrozenNetwork(nn.Module, Generic[Network]):
    """Hold a network so that it is used, moved and copied, but never trained or saved.

    - Its parameters need no gradient and it is in eval mode, also after a parent's ``.train()`` or
      ``.requires_grad_()``, and also where the caller keeps the network registered elsewhere.
    - It follows ``.to()``, ``.cuda()`` and ``.half()`` of a parent.
    - ``parameters()``, ``modules()`` and ``state_dict()`` of a parent do not see it, so it reaches no optimiser, no
      checkpoint and no DDP bucket.

    Args:
        network: taken over as it is, not copied: the caller's object is frozen.

    Example:
        >>> held = FrozenNetwork(nn.Linear(2, 1))
        >>> parent = nn.Sequential(held).train()
        >>> held.network.training, list(parent.parameters()), parent.state_dict()
        (False, [], OrderedDict())
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        # nn.Module registers the modules it is given as attributes, but does not look into a tuple
        self._held = (network,)
        self._lock()

    @property
    def network(self) -> Network:
        """The network, in eval mode and without gradients, whatever was done to it since the last use."""
        self._lock()
        return self._held[0]

    def _lock(self) -> None:
        network = self._held[0]
        if any(module.training for module in network.modules()):
            network.eval()
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenNetwork[Network]":
        self._held[0]._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        count = sum(parameter.numel() for parameter in self._held[0].parameters())
        return f"{type(self._held[0]).__name__}, {count:,} parameters, hidden"


def bare(network: nn.Module) -> nn.Module:
    """The network inside the wrappers of DDP, DataParallel and ``torch.compile``."""
    while True:
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):
            network = network._orig_mod  # type: ignore[assignment]
        else:
            return network


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Freeze networks for the length of a ``with`` block: no gradient into them, eval mode, statistics at rest.

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
    for network in networks:
        if not isinstance(network, nn.Module):
            raise ValueError(f"`networks` should be modules, one argument each, found {type(network).__name__}.")
    modes = {module: module.training for network in networks for module in network.modules()}
    flags = {parameter: parameter.requires_grad for network in networks for parameter in network.parameters()}
    try:
        for network in networks:
            network.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
