"""The command line of a trainer: its config from YAML and options, and the figures that came out."""

import argparse
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]

from examples.common.engine.options import plain_values

logger = logging.getLogger(__name__)

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

    With ``--evaluate RUN`` the options that are not given are those of that run, but for data in whose place others are
    given.

    Args:
        config_class: a dataclass with a field ``out``.
        train: what is done with it. Figures that it returns are printed. Its ``ValueError`` is the parser's error (exit
            code 2), its ``FloatingPointError`` the end of a training that became NaN (one line, exit code 1).
        doc: of the module; the first line is the description.
        positional: fields that are given by their place, each with what ``add_argument`` is told of it.
    """
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        """A parser whose errors are one line."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = Parser(description=(doc or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of these options")
    for name, options in (positional or {}).items():
        parser.add_argument(name, **options)
    parser.add_class_arguments(config_class, skip=set(positional or ()))
    known = {option.name for option in fields(config_class)}  # type: ignore[arg-type]
    if "evaluate" in known:
        parser.set_defaults(_of_the_run_to_evaluate(known - {"out", *(positional or ())}))
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


_PAIRS = ("lq", "gt", "test_lq", "test_gt", "pairs")
_INSTEAD: Mapping[str, tuple[str, ...]] = {
    "pairs": _PAIRS, "lq": _PAIRS, "root": ("lq",), "degradation": ("lq",), "images": ("images_lq",),
    "data": (*_PAIRS, "shifted_pairs", "clean", "root", "data_sets"),
}  # fmt: skip
"""What an evaluation does not take from the run, by what is given and differs from what the run has."""


def _of_the_run_to_evaluate(options: set[str]) -> dict[str, Any]:
    """The options of the run that ``--evaluate`` names, where there is one; the recipe says what is wrong with it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--evaluate", type=Path)
    for option in _INSTEAD:
        first.add_argument(f"--{option}")
    first.add_argument("--config", type=Path, action="append", default=[])
    given = vars(first.parse_known_args()[0])
    run = given["evaluate"]
    file = None if run is None else run / "config.yaml"
    if file is None or not file.is_file():
        return {}
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    said: dict[str, Any] = {}
    for also in filter(Path.is_file, given["config"]):
        with contextlib.suppress(yaml.YAMLError):  # of which the parser itself will tell
            found = yaml.safe_load(also.read_text(encoding="utf-8"))
            said |= found if isinstance(found, dict) else {}
    left = set[str]()
    for name, others in _INSTEAD.items():
        value = said.get(name) if given[name] is None else given[name]
        if value is not None and settings.get(name) not in (value, str(value), plain_values(Path(str(value)))):
            left.update(others)
    if told := sorted(name for name in left & options if settings.get(name)):
        logger.info("Of %s is left out, as other data are given: %s", run, ", ".join(f"`{name}`" for name in told))
    return {name: value for name, value in settings.items() if name in options - left}
