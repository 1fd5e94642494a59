"""A network of one's own, named on the command line as module:Class."""

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn


def own_network(name: str, option: str, **arguments: Any) -> nn.Module:
    """The network that ``module:Class``, or a function in the place of the class, makes.

    Args:
        name: the module as Python imports it, from the current folder too, and what to call in it.
        option: that the name was given as, for messages.
        arguments: what it is called with.

    Raises:
        ValueError: If there is no such thing, it cannot be called so, or what it makes is no module.
    """
    module, _, made_by = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        build: Any = importlib.import_module(module)
        for part in made_by.split("."):
            build = getattr(build, part)
        network = build(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ValueError(
            f"`{option}` should be module:Class to be called as Class({given}), found {name!r}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"`{option}` should make a module, found {type(network).__name__} from {name!r}.")
    return network
