"""The command that restores a folder of images with the networks of a finished run.

    python -m examples.RECIPE.restore RUN IMAGES OUT

Every image below the folder IMAGES is written to OUT under its name, as PNG; a second one of a name, ``a.png`` beside
``a.jpg``, as ``a.png.png``. What cannot be read is named and skipped. Images with a side above ``--tile`` are restored
in overlapping tiles, by default those that the run was tested with. Each recipe adds options of its own.
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.common.data.folder import check_folder, restore_folder
from examples.common.engine.command_line import device
from examples.common.engine.options import check_tile
from examples.common.engine.run_directory import settings_of
from examples.common.seeds import seeded
from restoreloss.restorers.tiling import tiled

TILE = 512
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
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="run directory of a finished training")
    parser.add_argument("images", type=Path, help="folder of images to restore")
    parser.add_argument("out", type=Path, help="folder that the restored images are written to")
    for name, option in (options or {}).items():
        parser.add_argument(name, **option)
    parser.add_argument(
        "--tile", type=int, help=f"side of the tiles of larger images (that of the run, else {TILE}); 0: none"
    )
    parser.add_argument("--overlap", type=int, help="pixels that neighboring tiles share (a quarter of a tile)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (%(default)s)")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _check(given)
        restore = load(given)

        @torch.no_grad()
        def restored(image: Tensor, number: int) -> Tensor:
            generator = seeded(given.seed, number)
            return restore(image.to(given.device), generator)

        restore_folder(given.images, given.out, restored)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def _check(given: argparse.Namespace) -> None:
    """Raise ``ValueError`` for options out of their range."""
    check_folder(given.out)
    for name in ("tile", "seed", "smallest"):
        if (value := getattr(given, name, None)) is not None and value < 0:
            raise ValueError(f"`{name}` should be at least 0, found {value}.")
    if given.tile is None:
        given.tile = settings_of(given.run).get("tile", TILE)
    check_tile(given.tile)
    if given.tile and given.overlap is not None and not 0 <= given.overlap <= given.tile // 2:
        raise ValueError(f"`overlap` should be from 0 to half of `tile` ({given.tile // 2}), found {given.overlap}.")


def plain_network(network: Callable[[Tensor], Tensor], given: argparse.Namespace, scale: int = 1) -> Restore:
    """A function that restores an image by a network that has no randomness and enlarges by ``scale``."""

    def restore(image: Tensor, _: torch.Generator) -> Tensor:
        return tiled(network, image, tile=given.tile or None, overlap=given.overlap, scale=scale).clamp(0, 1)

    return restore
