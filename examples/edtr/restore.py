"""Restore a folder of images with a trained EDTR.

python -m examples.edtr.restore runs/edtr IMAGES OUT
python -m examples.edtr.restore runs/edtr IMAGES OUT --n 4 --seed 7
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.common.engine.restoring import Restore, restore_command
from examples.common.engine.run_directory import finished_run
from examples.common.networks.weights import load_saved
from examples.edtr.model import build_edtr
from restoreloss.restorers.edtr import EDTR


def load_run(run: Path) -> tuple[EDTR, int]:
    """The restorer of a finished run of examples.edtr.train, in eval mode, and the side that images are padded to.

    Raises:
        ValueError: If the folder is none.
    """
    settings, _ = finished_run(run, "examples.edtr.train", "edtr.safetensors")
    edtr = build_edtr(settings | {"pre": Path(settings["pre"])})
    load_saved(edtr, run / "edtr.safetensors")
    return edtr.eval().requires_grad_(False), int(settings["smallest"])


def load(given: argparse.Namespace) -> Restore:
    """Load the run, as a function that restores an image."""
    edtr, smallest = load_run(given.run)
    edtr = edtr.to(given.device)
    edtr.timesteps(given.n)  # which refuses an impossible number of steps before the first image is read
    if given.smallest is not None:
        smallest = given.smallest

    def restore(image: Tensor, generator: torch.Generator) -> Tensor:
        return edtr.restore(
            image, n=given.n, generator=generator, smallest=smallest, tile=given.tile or None, overlap=given.overlap
        )

    return restore


OPTIONS: dict[str, dict[str, Any]] = {
    "--n": {"type": int, "help": "denoising steps; the default is what it was trained for"},
    "--smallest": {"type": int, "help": "pad smaller sides to this; the default is that of the run"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    restore_command(__doc__, load, options=OPTIONS, arguments=arguments)


if __name__ == "__main__":
    main()
