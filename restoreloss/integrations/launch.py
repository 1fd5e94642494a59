"""Run the train.py of a fork of BasicSR, unchanged, with our losses in it.

    python -m restoreloss.integrations.launch basicsr/train.py -opt OPTIONS.yml

Run it in the folder of the checkout. What comes before the script is for this module, what comes after it for the
script. It does what :func:`restoreloss.integrations.basicsr.register` does before the script begins.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    integration = import_module("restoreloss.integrations.basicsr")
    parser = argparse.ArgumentParser(
        prog="python -m restoreloss.integrations.launch",
        description="Run the train.py of BasicSR or of a fork, with the losses of restoreloss.",
    )
    integration.add_import(parser)
    parser.add_argument("script", type=Path, help="train.py of the checkout, as in basicsr/train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what it is given")
    given = parser.parse_args(arguments)
    if not given.script.is_file():
        parser.error(f"`script` should be a file, found none at {given.script}.")
    use_checkout(Path.cwd())
    sys.path.insert(1, str(given.script.resolve().parent))
    integration.prepare(given.packages)
    sys.argv = [str(given.script), *given.arguments]
    runpy.run_path(str(given.script), run_name="__main__")


def use_checkout(folder: Path) -> None:
    """Let ``import basicsr`` find the folder of that name in a checkout.

    The old forks have no ``__init__.py`` in it, so that an installed BasicSR would be found instead.

    Args:
        folder: the checkout. One without ``basicsr/`` uses what is installed.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    own = folder / "basicsr"
    if own.is_dir() and not (own / "__init__.py").exists():
        module = ModuleType("basicsr", f"The folder {own}.")
        module.__path__ = [str(own)]
        sys.modules["basicsr"] = module


if __name__ == "__main__":
    main()
