"""Checks of arguments that all modules share: numbers, whole numbers, choices, and how a message describes a value."""

import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from operator import index
from typing import Any, get_args

import torch
from torch import Tensor, nn


def describe(value: Any) -> str:
    """What an error message says was found: the value where it is short, else what kind of thing it is."""
    if isinstance(value, type):
        return f"the class {value.__name__} (an instance is needed)"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if type(value).__name__ == "ndarray":
        return f"a numpy array of shape {value.shape} (torch.from_numpy makes a tensor of it)"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    if value is None or isinstance(value, str | Real):
        return repr(value)
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__} (is the call missing?)"
    return type(value).__name__


def check_number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> float:
    """The value as a float, or ``ValueError`` unless it is a finite number within [low, high].

    Args:
        name: of the argument.
        value: text is no number (YAML reads 1e-3 as text), and neither is a bool.
        low: the least that is allowed.
        high: the most that is allowed.
        above: exclude ``low`` itself.
    """
    # not by `math.isfinite`, which breaks the graph of torch.compile
    fits = isinstance(value, Real) and not isinstance(value, bool) and -math.inf < float(value) < math.inf
    if fits and low <= value <= high and not (above and value == low):
        return float(value)
    least = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
    most = "" if high == math.inf else f"{' and' if least else ' of'} at most {high:g}"
    hint = " (YAML reads 1e-3 as text, and 1.0e-3 as a number)" if isinstance(value, str) else ""
    raise ValueError(f"`{name}` should be a finite number{least}{most}, found {describe(value)}{hint}.")


def check_integer(name: str, value: Any, *, low: int = 1, high: float = math.inf) -> int:
    """The value as an int, or ``ValueError`` unless it is a whole number within [low, high]."""
    try:
        number = index(value)
        if not isinstance(value, bool) and low <= number <= high:
            return number
    except TypeError:
        pass
    most = "" if high == math.inf else f" and at most {high:g}"
    raise ValueError(f"`{name}` should be a whole number of at least {low}{most}, found {describe(value)}.")


def check_choice(name: str, value: Any, choices: object) -> None:
    """Raise ``ValueError`` unless ``value`` is one of a ``Literal``'s."""
    if value not in get_args(choices):
        raise ValueError(f"`{name}` should be one of {get_args(choices)}, found {value!r}.")


def check_callable(name: str, function: Any, *arguments: str, where: str = "") -> None:
    """Raise ``ValueError`` unless ``function`` can be called with these arguments, by position; a class is no function.

    Args:
        name: of what is to be called.
        function: it is not called. A builtin that does not tell what it takes is accepted.
        arguments: their names, for the message.
        where: what it belongs to, for the message, as " of phase 'fit'".
    """
    takes = f"`{name}`{where} should be callable as {name}({', '.join(arguments)})"
    if isinstance(function, type) or not callable(function):
        raise ValueError(f"{takes}, found {describe(function)}.")
    signature = signature_of(function)
    try:
        if signature is not None:
            signature.bind(*arguments)
    except TypeError:
        raise ValueError(f"{takes}, found one that takes {signature}.") from None


def signature_of(function: Any) -> inspect.Signature | None:
    """What a module or function takes; None where it does not tell, as some compiled code."""
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return None


@contextmanager
def named(theirs: str, ours: str) -> Iterator[None]:
    """Let an error within the ``with`` block name the argument that the caller wrote, not the one that it became."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if f"`{theirs}`" not in str(error):
            raise
        raise type(error)(str(error).replace(f"`{theirs}`", f"`{ours}`")) from error


def check_map(name: str, value: Any, channels: int) -> None:
    """Raise ``ValueError`` unless ``value`` is a float tensor (N, channels, H, W)."""
    if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == channels and value.is_floating_point():
        return
    hint = ""
    if isinstance(value, Tensor) and value.ndim > 2 and value.shape[-1] == channels:
        way = ".permute(0, 3, 1, 2)" if value.ndim == 4 else ".transpose(1, 2).unflatten(2, (height, width))"
        hint = f" (if its channels are last: `{way}`)"
    raise ValueError(f"`{name}` should be float (N, {channels}, H, W), found {describe(value)}{hint}.")


def check_time(name: str, t: Any, last: float = math.inf) -> None:
    """Raise ``ValueError`` for a timestep outside [0, last], NaN, or no number. What cannot be read for free passes."""
    if not isinstance(t, Tensor):
        check_number(name, t, low=0, high=last)
        return
    if t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"`{name}` should be numbers, found {describe(t)}.")
    if t.device.type != "cpu" or torch.compiler.is_compiling() or t.numel() == 0:
        return
    try:
        low, high = float(t.detach().min()), float(t.detach().max())
    except RuntimeError:  # A transform of torch.func has no values to read.
        return
    if not (low >= 0 and high <= last and high < math.inf):
        most = "" if last == math.inf else f" and at most {last}"
        raise ValueError(f"`{name}` should be at least 0{most}, found {high if low >= 0 else low:g}.")


def check_embedding(embedding: Any, count: int, time_dim: int) -> None:
    """Raise ``ValueError`` unless this is a time embedding of each of ``count`` samples, or one for all."""
    if not isinstance(embedding, Tensor) or embedding.shape not in ((count, time_dim), (1, time_dim)):
        raise ValueError(
            f"`embedding` should be of the timestep, ({count}, {time_dim}), as `TimeConditioned` makes it, found "
            f"{describe(embedding)}."
        )


def caller_level() -> int:
    """The ``stacklevel`` of a warning that shall name the first line outside of this package and of torch's modules."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("restoreloss.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level
