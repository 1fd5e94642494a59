"""The command that restores a folder of images with the networks of a finished run.

    python -m examples.RECIPE.restore RUN IMAGES OUT

Every image below the folder IMAGES is written to OUT under its name, as PNG; a second one of a name, ``a.png`` beside
``a.jpg``, as ``a.png.png``. What cannot be read is named and skipped. Images with a side above ``--tile`` are restored
in overlapping tiles. Each recipe adds options of its own.
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

from examples.common.data.folder import check_folder, restore_folder
from examples.common.data.tiles import tiled
from examples.common.engine.batches import chance
from examples.common.engine.command_line import device
from examples.common.engine.run_directory import read_json

Restore = Callable[[Tensor, torch.Generator], Tensor]
"""(image (1, 3, H, W) on the device, generator of the image) -> restored image in [0, 1]."""


def restore_command(
    doc: str | None,
    load: Callable[[argparse.Namespace], Restore],
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Read the command line, load the networks of a run, and restore a folder of images.

    Args:
        doc: of the recipe's module, which becomes the help text.
        load: from the arguments ``run``, ``device``, ``tile``, ``overlap`` and those of ``options`` to what restores
            an image. Its ``ValueError`` is the parser's error (exit code 2).
        options: of this recipe, each with what ``add_argument`` is given for it.
        arguments: of the command line; the default is that of the process.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a finished training")
    parser.add_argument("images", type=Path, help="folder of images to restore")
    parser.add_argument("out", type=Path, help="folder that the restored images are written to")
    for name, option in (options or {}).items():
        parser.add_argument(name, **option)
    parser.add_argument(
        "--tile", type=int, default=512, help="side of the tiles of larger images (%(default)s); 0: none"
    )
    parser.add_argument("--overlap", type=int, default=64, help="pixels that neighboring tiles share (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (%(default)s)")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _check(given)
        restore = load(given)

        @torch.no_grad()
        def restored(image: Tensor, number: int) -> Tensor:
            generator = torch.Generator().manual_seed(chance(given.seed, number))
            return restore(image.to(given.device), generator)

        restore_folder(given.images, given.out, restored)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def _check(given: argparse.Namespace) -> None:
    """Raise ``ValueError`` for options out of their range."""
    check_folder(given.out)
    for name in ("tile", "seed", "smallest", "steps", "n"):
        lowest = 1 if name in ("steps", "n") else 0
        if (value := getattr(given, name, None)) is not None and value < lowest:
            raise ValueError(f"`{name}` should be at least {lowest}, found {value}.")
    if 0 < given.tile < 32:
        raise ValueError(f"`tile` should be at least 32, or 0 for no tiles, found {given.tile}.")
    if given.tile and not 0 <= given.overlap <= given.tile // 2:
        raise ValueError(f"`overlap` should be from 0 to half of `tile` ({given.tile // 2}), found {given.overlap}.")


def in_tiles(function: Callable[[Tensor], Tensor], image: Tensor, given: argparse.Namespace, scale: int = 1) -> Tensor:
    """A function of an image, by the tiles that the command line asks for."""
    return (
        tiled(function, image, tile=given.tile, overlap=given.overlap, scale=scale) if given.tile else function(image)
    )


def plain_network(network: nn.Module, given: argparse.Namespace, scale: int = 1) -> Restore:
    """What restores an image with a network that has no randomness and enlarges by ``scale``."""
    network = network.to(given.device).eval().requires_grad_(False)

    def restore(image: Tensor, _: torch.Generator) -> Tensor:
        return in_tiles(network, image, given, scale).clamp(0, 1)

    return restore


def finished_run(run: Path, module: str, *files: str, option: str = "run") -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and results of a finished run.

    Args:
        run: its directory.
        module: that trains such runs, for the message.
        files: that the directory should hold as well.
        option: that the run was given as, for the message.

    Raises:
        ValueError: If it is no such directory.
    """
    for name in ("config.yaml", "results.json", *files):
        if not (run / name).is_file():
            raise ValueError(f"`{option}` should be a finished run of {module}, found no {name} in {run}.")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return settings, read_json((run / "results.json").read_text(encoding="utf-8"))
