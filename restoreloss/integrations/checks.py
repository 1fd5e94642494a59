"""Is an options file right? What people get wrong in one: names, and numbers that YAML reads as text."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


def call(function: Callable[..., Result], where: str, given: Any) -> Result:
    """What a function or class makes of the options that it is given.

    Raises:
        ValueError: For options that are no mapping, unknown or missing, naming those that come near.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"`{where}` should be a mapping of options, found {given!r}.")
    known = inspect.signature(function).parameters
    for option in given:
        if option not in known:
            raise ValueError(f"`{where}` has no option {option!r}; {near(option, list(known))}")
    missing = [name for name, each in known.items() if each.default is inspect.Parameter.empty and name not in given]
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


def near(option: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown option."""
    found = difflib.get_close_matches(option, known, n=1)
    return f"did you mean {found[0]!r}?" if found else f"there is {', '.join(known)}."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
