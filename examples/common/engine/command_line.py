"""The command line of a trainer: its config from YAML and options, and the figures that came out."""

import argparse
import logging
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import torch

Config = TypeVar("Config")


def device(name: str) -> torch.device:
    """A device that is there: the ``type`` of an argument."""
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's words for one that is not there
        raise argparse.ArgumentTypeError(f"no such device: {str(error).splitlines()[0]}") from error
    return found


def run(
    config_class: type[Config],
    train: Callable[[Config], Mapping[str, Any] | None],
    doc: str | None,
    *,
    positional: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Every option of the config, and ``--config`` for a YAML file of them, which the command line overrules.

    Args:
        config_class: a dataclass with a field ``out``.
        train: what is done with it. Figures that it returns are printed. Its ``ValueError`` is the parser's error (exit
            code 2), its ``FloatingPointError`` the end of a training that became NaN (one line, exit code 1).
        doc: of the module; the first line is the description.
        positional: fields that are given by their place, each with what ``add_argument`` is told of it.
    """
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        """Whose errors are one line."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            super().error(" ".join(message.split()), ex)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = Parser(description=(doc or "").split("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file of these options")
    for name, options in (positional or {}).items():
        parser.add_argument(name, **options)
    parser.add_class_arguments(config_class, skip=set(positional or ()))
    arguments = parser.instantiate(parser.parse_args())
    arguments.pop("config", None)
    try:
        results = train(config_class(**vars(arguments)))
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if results:  # of the main process
        width = max([15, *map(len, results)])
        for name, value in results.items():
            print(f"{name:{width}} {value:.3f}")
        print(f"in {arguments.out}")
