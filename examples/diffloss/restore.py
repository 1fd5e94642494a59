"""Restore a folder of images with the network of a finished run of examples.diffloss.train.

python -m examples.diffloss.restore runs/diff IMAGES OUT
python -m examples.diffloss.restore runs/diff IMAGES OUT --weights best
"""

import argparse
from collections.abc import Sequence

from examples.common.engine.restoring import Restore, plain_network, restore_command
from examples.common.engine.run_directory import finished_run
from examples.common.networks.restorers import restorer


def load(given: argparse.Namespace) -> Restore:
    """Load the run, as a function that restores an image.

    Raises:
        ValueError: If the run is none.
    """
    file = f"{given.weights}.safetensors"
    settings, _ = finished_run(given.run, "examples.diffloss.train", file)
    network = restorer(settings["network"], 1, given.run / file)
    return plain_network(network.to(given.device).eval(), given)


def main(arguments: Sequence[str] | None = None) -> None:
    weights = {"choices": ("last", "best"), "default": "last", "help": "last step, or best PSNR on the way (last)"}
    restore_command(__doc__, load, options={"--weights": weights}, arguments=arguments)


if __name__ == "__main__":
    main()
