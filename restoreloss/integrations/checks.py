"""Checks of an options file: unknown and missing names, and numbers that YAML reads as text."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

Result = TypeVar("Result")


def check_options(where: str, given: Any, known: Mapping[str, inspect.Parameter]) -> None:
    """Raise ``ValueError`` for options that are no mapping, unknown or missing, naming similar ones."""
    if not isinstance(given, Mapping):
        raise ValueError(f"`{where}` should be a mapping of options, found {given!r}.")
    for option in given:
        if option not in known:
            raise ValueError(f"`{where}` has no option {option!r}; {did_you_mean(option, list(known))}")
    missing = [name for name, one in known.items() if one.default is inspect.Parameter.empty and name not in given]
    if missing:
        raise ValueError(f"`{where}` should be given {missing}, found {list(given)}.")


def build_from(function: Callable[..., Result], where: str, given: Any) -> Result:
    """Call a function or class with options by name; numbers that are text are told from the others.

    Raises:
        ValueError: As :func:`check_options`.
    """
    known = inspect.signature(function).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        check_options(where, given, known)
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
    """Raise ``ValueError`` for text where numbers belong, and what is no text or no truth value where those do.

    Args:
        name: of the option.
        value: everything else is left to the class that takes it, which says more.
        kind: what the argument is annotated with.
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
    if str not in kinds:
        check_numbers(name, value)
    for plain, wanted in ((bool, "true or false"), (str, "text")):
        if set(kinds) <= {plain, type(None)} and not isinstance(value, kinds):
            raise ValueError(f"`{name}` should be {wanted}, found {value!r}.")


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
