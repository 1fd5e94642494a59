"""Weights from a file into a network of the recipes."""

import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from examples.common.networks.edsr import EDSR, named_as_here
from restoreloss.weights import load_state, read_weights

logger = logging.getLogger(__name__)


def load_weights(network: nn.Module, path: Path) -> None:
    """A file of weights, as :func:`restoreloss.weights.read_weights` reads it, into a network.

    An :class:`EDSR` also takes the files of other repositories, whose tensors have other names and the same order.

    Raises:
        ValueError: If the file is not there, cannot be read, or is of another network.
    """
    if not path.is_file():
        raise ValueError(f"The weights of {type(network).__name__} should be in {path}, found no such file.")
    state = read_weights(path)
    if isinstance(network, EDSR) and not set(state) <= set(network.state_dict()):
        state = named_as_here(network, state, path)
    _freeze_norms(network, state)
    load_state(network, state, path)


def load_saved(network: nn.Module, path: Path) -> None:
    """The weights that ``RunDirectory.save_weights`` wrote, into a network that may share some between its parts.

    Raises:
        ValueError: If the file is not there, cannot be read, or is of another network.
    """
    what = f"{path} should hold the weights of this {type(network).__name__}"
    if not path.is_file():
        raise ValueError(f"{what}, found no such file.")
    try:
        _freeze_norms(network, load_file(path))
        load_model(network, path)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{what}, found {' '.join(str(error).split())[:300]}") from error


def _freeze_norms(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Frozen normalization where the weights come from it: torchvision's detectors have it if they began with ImageNet.

    Batch normalization would load such weights without a word, and then count on.
    """
    for name, module in list(network.named_modules()):
        counts = f"{name}.num_batches_tracked" in state or f"{name}.running_mean" not in state
        if isinstance(module, nn.BatchNorm2d) and not counts:
            network.set_submodule(name, FrozenBatchNorm2d(module.num_features, eps=module.eps))
