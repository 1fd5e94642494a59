"""The quickstart: what a restoration network gains from a loss of this library, in minutes on two cores.

python -m examples.quickstart                     # textures, for a classifier that stays as it is: TDPLoss
python -m examples.quickstart --on words          # words, for EasyOCR's recognizer: TDPLoss
python -m examples.quickstart --on photographs    # photographs: DiffLoss
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from examples.common.engine import command_line

RUNS = {
    "textures": "examples.sr4ir.textures_run",
    "words": "examples.reading.words_run",
    "photographs": "examples.diffloss.photos_run",
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if arguments is None else arguments
    on = argparse.ArgumentParser("quickstart", add_help=False, allow_abbrev=False)
    on.add_argument("--on", choices=RUNS, default="textures", help="(default: %(default)s)")
    run = import_module(RUNS[on.parse_known_args(arguments)[0].on])
    parser = argparse.ArgumentParser(
        "quickstart", parents=[on], description=run.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path("runs/quickstart") / on.parse_known_args(arguments)[0].on
    parser.add_argument("--out", type=Path, default=folder, help="(default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=command_line.device, default=device, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    run.add_arguments(parser)
    args, others = parser.parse_known_args(arguments)
    if others:
        parser.error(f"unrecognized arguments with --on {args.on}: {' '.join(others)}")
    logging.basicConfig(format="%(message)s")
    try:
        return dict(run.compare(args))
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"quickstart: {error}\n")


if __name__ == "__main__":
    main()
