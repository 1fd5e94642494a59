"""Import a package that is not needed for ``import restoreloss``, or say which one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def extra(name: str) -> str:
    """What follows ``pip install`` for the packages of an extra: the library is in no package index."""
    return f'-e ".[{name}]" in a clone of restoreloss'


@contextmanager
def needed_by(purpose: str, *, install: str) -> Iterator[None]:
    """For the imports of a module that is nothing without other packages.

    Raises:
        ImportError: Naming the first package that is missing, ``purpose`` and what to ``install``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{purpose} needs `{error.name}`, which is not installed: pip install {install}") from error


def require(module: str, *, purpose: str, install: str) -> Any:
    """Import ``module``.

    Raises:
        ImportError: Naming the module, what needed it (``purpose``) and what to ``install``.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # The package is installed; something that it needs itself is not.
        raise ImportError(f"{purpose} needs `{error.name}`, which is not installed: pip install {install}") from error
