"""Enlarge a folder of images with the restorer of a finished run of examples.sr4ir.train.

    python -m examples.sr4ir.restore runs/sr4ir IMAGES OUT

The images are of low resolution: they come out larger by the scale of the run.
"""

import argparse
from collections.abc import Sequence

from examples.common.engine.restoring import Restore, plain_network, restore_command
from examples.common.engine.run_directory import finished_run
from examples.common.networks.restorers import restorer
from examples.sr4ir.methods import METHODS


def load(given: argparse.Namespace) -> Restore:
    """Load the run, as a function that restores an image.

    Raises:
        ValueError: If the run is none, or one that trains no restorer.
    """
    settings, _ = finished_run(given.run, "examples.sr4ir.train", "restorer.safetensors")
    if not METHODS[settings["method"]].restorer_terms:
        raise ValueError(f"`run` should be one that trains a restorer, found the method {settings['method']!r}.")
    network = restorer(settings["restorer"], settings["scale"], given.run / "restorer.safetensors")
    return plain_network(network.to(given.device).eval(), given, settings["scale"])


def main(arguments: Sequence[str] | None = None) -> None:
    restore_command(__doc__, load, arguments=arguments)


if __name__ == "__main__":
    main()
