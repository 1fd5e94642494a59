"""Checks of an options file: unknown and missing names, and numbers that YAML reads as text."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from restoreloss.checks import describe

Result = TypeVar("Result")


def build_from(function: Callable[..., Result], where: str, given: Any) -> Result:
    """Call a function or class with options by name.

    Raises:
        ValueError: For options that are no mapping, unknown or missing, naming similar ones.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"`{where}` should be a mapping of options, found {given!r}.")
    known = inspect.signature(function).parameters
    for option in given:
        if option not in known:
            raise ValueError(f"`{where}` has no option {option!r}; {did_you_mean(option, list(known))}")
    missing = [name for name, one in known.items() if one.default is inspect.Parameter.empty and name not in given]
    if missing:
        raise ValueError(f"`{where}` should be given {missing}, found {list(given)}.")
    return function(**given)


def check_numbers(name: str, value: Any) -> None:
    """Raise ``ValueError`` for a number that is text, also within a list or among the values of a mapping."""
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        for part in value.values() if isinstance(value, Mapping) else value:
            check_numbers(name, part)
    elif isinstance(value, str) and _is_number(value):
        raise ValueError(
            f"`{name}` should be a number, found the text {value!r} (YAML reads 1e-3 as text, and 1.0e-3 as a number)."
        )


def check_kind(name: str, value: Any, kind: Any) -> None:
    """Raise ``ValueError`` unless a plain value is of the kind that its option is annotated with.

    Args:
        name: of the option.
        value: text passes for a list, and everything passes for choices: who takes these says more.
        kind: str, bool, int, float, a sequence or mapping of them, or a union of one or both numbers and None.
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return
    if float in kinds or int in kinds:
        check_numbers(name, value)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (float not in kinds and not isinstance(value, int)):
            wanted = "finite" if float in kinds else "whole"
            raise ValueError(f"`{name}` should be a {wanted} number, found {value!r}.")
    elif bool in kinds and not isinstance(value, bool):
        raise ValueError(f"`{name}` should be true or false, found {value!r}.")
    elif str in kinds and not isinstance(value, str):
        raise ValueError(f"`{name}` should be text, found {value!r}.")
    for origin, plural in ((Mapping, "a mapping"), (Sequence, "a list")):
        for one in kinds:
            if get_origin(one) is origin:
                if not isinstance(value, origin):
                    raise ValueError(f"`{name}` should be {plural}, found {describe(value)}.")
                parts = value.values() if isinstance(value, Mapping) else () if isinstance(value, str) else value
                for part in parts:
                    check_kind(name, part, get_args(one)[-1])


def did_you_mean(option: Any, known: Sequence[str]) -> str:
    """The end of a message about an unknown option."""
    found = difflib.get_close_matches(str(option), known, n=1)
    return f"did you mean {found[0]!r}?" if found else f"there is {', '.join(known)}."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
