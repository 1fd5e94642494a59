"""The reader of weight files: safetensors or ``torch.save``, the usual containers and prefixes, into a network.

All that loads weights goes through it: :func:`load_prior`, the task networks of options files, and the recipes.
"""

import argparse
import hashlib
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from restoreloss._optional import require

logger = logging.getLogger(__name__)

CONTAINERS = (
    "params_ema", "params-ema", "state_dict_ema", "model_ema", "ema_state_dict", "g_ema", "ema", "shadow",
    "params", "state_dict", "model_state_dict", "model", "network", "net", "generator", "net_g", "netG", "g", "module",
)  # fmt: skip
"""The names under which training code keeps a state dict, averaged weights first: the order of preference."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into the names of weights, at any depth."""

_FOREIGN = {b"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` fetches the file)", b"<": "a web page"}

Value = TypeVar("Value")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, by their names in the network.

    Args:
        path: a file of safetensors, or of ``torch.save``, which is read with ``weights_only=True``.

    Returns:
        The tensors, on the CPU. Of several containers the first of :data:`CONTAINERS` is taken, which the log says.
        Containers may be nested. The prefixes ``module.`` and ``_orig_mod.``, repeated or in any order, are removed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file that is truncated, of another kind, without tensors, or with code in its pickle. The
            message names the file.
    """
    return weights_in(read_file(path), path)


def read_file(path: str | Path) -> Any:
    """What a file of safetensors or of ``torch.save`` holds, with all that lies beside the weights.

    ``argparse.Namespace`` is the one class that is let through beside tensors and plain Python: torchvision and timm
    save their arguments as one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As :func:`read_weights`.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(32)
    for start, what in _FOREIGN.items():
        if head.startswith(start):
            raise ValueError(f"{path} should be a file of weights, found {what}.")
    # Such a file begins with a length and a header of JSON; its name may be another.
    if head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.startswith(b"PK")):
        safetensors = require("safetensors.torch", purpose=f"reading {path.name}", install="safetensors")
        try:
            return safetensors.load_file(path)
        except Exception as error:  # The class of safetensors is not public in all versions.
            raise ValueError(f"{path} should be a whole safetensors file, found: {error}") from error
    if not head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} should be a whole file of torch.save, found one that begins with {head[:8]!r}.")
    try:
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = "a pickle that runs code or is broken" if named is None else f"a pickle that wants {named[1]}"
        raise ValueError(
            f"{path} should hold tensors only, found {what}, which is not loaded. If you trust it, save its state dict "
            "with safetensors where you do."
        ) from error
    except Exception as error:  # Of a damaged file torch raises nearly anything.
        cause = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} should be a whole file of torch.save, found: {cause}") from error


def weights_in(contents: Any, path: str | Path) -> dict[str, Tensor]:
    """The weights in what :func:`read_file` returned.

    Raises:
        ValueError: If there are none, or more than one set of them under names that are not known.
    """
    found, taken = contents, ""
    while isinstance(found, Mapping):
        held = [name for name, value in found.items() if isinstance(value, Mapping) and _has_tensors(value)]
        inside = [name for name in held if isinstance(name, str)]
        names = [name for name in CONTAINERS if name in inside]
        if not names and len(inside) == 1 and not any(isinstance(value, Tensor) for value in found.values()):
            names = inside
        if not names:
            break
        taken += f"{'/' if taken else ''}{names[0]}"
        if len(names) > 1:
            logger.info("%s: the weights under %r are taken; it also holds %s", path, taken, ", ".join(names[1:]))
        found = found[names[0]]
    where = f"under {taken!r} in {path}" if taken else str(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} should hold a state dict, found a {type(found).__name__}.")
    weights = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"{path} should hold a state dict, found no tensors: {where} has the keys {_some(found)}.")
    return _unwrapped(weights, path)


def load_state(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy weights into a network that has exactly these.

    Args:
        network: of any wrapping by torch.compile or data parallelism, which does not change the names that are wanted.
        weights: by the names of :func:`read_weights`.
        path: where they were read, for the message.

    Raises:
        ValueError: If weights are missing, unknown, or of another shape; the first of each are named.
    """
    own = network.state_dict()
    wanted = _unwrapped({name: name for name, value in own.items() if isinstance(value, Tensor)}, path)
    shapes = {name: (own[wanted[name]].shape, weights[name].shape) for name in wanted if name in weights}
    wrong = {
        # Old files do not have this count, and torch does not miss it.
        "lacks": [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")],
        "has besides": [name for name in weights if name not in wanted],
        "has in another shape": [
            f"{name} {tuple(found)} instead of {tuple(expected)}"
            for name, (expected, found) in shapes.items()
            if expected != found
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{what} {_some(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{path} should hold the weights of this {type(network).__name__}, found that it {found}.")
    network.load_state_dict({wanted[name]: value for name, value in weights.items()}, strict=len(weights) == len(own))


def hash_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values, to the digit, in any order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    return isinstance(value, Tensor)


def _unwrapped(named: Mapping[str, Value], path: str | Path) -> dict[str, Value]:
    """The entries without what data parallelism, averaging and torch.compile add to their names."""
    found = dict(named)
    if len(found) > 1 and all(name.startswith("module.") for name in found if name != "n_averaged"):
        found.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel adds it.
    for wrapper in _WRAPPERS:
        found = {name.replace(wrapper, ""): value for name, value in found.items()}
    while found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    if len(found) < len({*named} - {"n_averaged"}):
        raise ValueError(f"{path} should hold each weight once, found the same names with and without a wrapper's.")
    return found


def _some(names: Any) -> str:
    words = [str(name) for name in names]
    return f"{', '.join(words[:3])}{f' and {len(words) - 3} more' if len(words) > 3 else ''}" or "none"
