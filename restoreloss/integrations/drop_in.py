"""A small file for frameworks that import every file of their losses folder: it registers our losses.

traiNNer-redux and neosr work like this: a registry, and every ``*_loss.py`` of one folder imported at the start.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from restoreloss.checks import describe

FILE = "restoreloss_loss.py"


@dataclass(frozen=True)
class Framework:
    """A framework, and the file that it is given.

    Attributes:
        name: as people call it.
        package: of Python; the folder of that name in a checkout.
        adapter: the module of restoreloss.integrations with its ``register``.
    """

    name: str
    package: str
    adapter: str

    @property
    def source(self) -> str:
        """What the file says."""
        return (
            f'"""The losses of restoreloss, registered where {self.name} looks for its own."""\n\n'
            f"from {self.package}.utils.registry import LOSS_REGISTRY\n\n"
            f"from restoreloss.integrations.{self.adapter} import register\n\n"
            "register(LOSS_REGISTRY)\n"
        )

    def write(self, repository: str | Path) -> Path:
        """Write the file into the losses folder; where it is already there, leave it.

        Args:
            repository: the checkout, with the folder ``package``.

        Returns:
            The file.

        Raises:
            ValueError: If this is no checkout of the framework, or its losses are found in another way.
            FileExistsError: If another file of that name is there.
        """
        if not isinstance(repository, str | Path):
            raise ValueError(f"`repository` should be a folder, found {describe(repository)}.")
        package = Path(repository).expanduser() / self.package
        for name, sign in (("losses/__init__.py", "_loss.py"), ("utils/registry.py", "LOSS_REGISTRY")):
            if not (package / name).is_file() or sign not in (package / name).read_text(encoding="utf-8"):
                raise ValueError(
                    f"`repository` should be a checkout of {self.name}, with {sign!r} in {self.package}/{name}, found "
                    f"none in {Path(repository)}."
                )
        path = package / "losses" / FILE
        if path.exists() and path.read_text(encoding="utf-8") != self.source:
            raise FileExistsError(f"{path} should be absent or what this command writes, found another file.")
        path.write_text(self.source, encoding="utf-8")
        return path

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command line: one argument, the checkout."""
        parser = argparse.ArgumentParser(
            prog=f"python -m restoreloss.integrations.{self.adapter}",
            description=f"Add the losses of restoreloss to a checkout of {self.name}: one file, {FILE}.",
        )
        parser.add_argument("repository", type=Path, help=f"the folder that holds {self.package}/")
        try:
            path = self.write(parser.parse_args(arguments).repository)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        parser.exit(message=f"{path}\n")


def register_all(registry: Any, classes: Sequence[type]) -> None:
    """Register classes under their own names, all or none; those of ours that are there already stay.

    Args:
        registry: with ``register(cls)``, ``get(name)`` and ``name in registry``.
        classes: what to register.

    Raises:
        ValueError: If a name is taken by something else.
    """
    methods = ("register", "get", "__contains__")
    if isinstance(registry, type) or not all(callable(getattr(registry, name, None)) for name in methods):
        raise ValueError(
            "`registry` should be the framework's registry, with `register`, `get` and `in`, found "
            f"{describe(registry)}."
        )
    found = {one.__name__: registry.get(one.__name__) for one in classes if one.__name__ in registry}
    _check_free(found, classes, "")
    for one in classes:
        if one.__name__ not in found:
            registry.register(one)


def install_all(module: ModuleType, classes: Sequence[type]) -> None:
    """Make classes attributes of a module, all or none; those of ours that are there already stay.

    Args:
        module: in which a framework looks for its losses by ``getattr``.
        classes: what to add.

    Raises:
        ValueError: If this is no module of losses, or one of the names is taken by something else.
    """
    if not isinstance(module, ModuleType) or not hasattr(module, "L1Loss") or hasattr(module, "build_loss"):
        raise ValueError(
            "`where` should be the module with the framework's losses (with `L1Loss` and without a registry), found "
            f"{module!r}."
        )
    found = {one.__name__: getattr(module, one.__name__) for one in classes if hasattr(module, one.__name__)}
    _check_free(found, classes, f" in {module.__name__}")
    for one in classes:
        if one.__name__ not in found:
            setattr(module, one.__name__, one)


def _check_free(found: Mapping[str, Any], classes: Sequence[type], where: str) -> None:
    ours = {one.__name__: one.__module__ for one in classes}
    for name, one in found.items():
        if getattr(one, "__module__", None) != ours[name]:
            raise ValueError(f"The name {name!r} should be free{where}, found {one!r}.")
