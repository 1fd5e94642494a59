"""Restore a folder of images with the network of a finished fine-tuning of examples.dtp.train.

    python -m examples.dtp.restore runs/gef IMAGES OUT
    python -m examples.dtp.restore runs/all IMAGES OUT --degradation hazy

The network is conditioned on the timestep t* that the run found for the degradation.
"""

import argparse
from collections.abc import Sequence

from torch import Tensor

from examples.common.engine.restoring import Restore, plain_network, restore_command
from examples.common.engine.run_directory import finished_run
from examples.common.networks.weights import load_weights
from examples.dtp.networks import timed_network
from examples.dtp.testing import experts, over_flips


def load(given: argparse.Namespace) -> Restore:
    """Load the run, as a function that restores an image.

    Raises:
        ValueError: If the run is none, or does not restore the degradation.
    """
    settings, results = finished_run(given.run, "examples.dtp.train", "network.safetensors")
    if settings["method"] == "pretrain":
        raise ValueError(f"`run` should be one that learns to restore, found the method 'pretrain' in {given.run}.")
    known, name = settings["degradations"], given.degradation
    if name is None and len(known) == 1:
        name = known[0]
    if name not in known:
        raise ValueError(f"`degradation` should be one of {', '.join(known)}, found {name!r}.")
    network = timed_network(
        settings["network"],
        num_timesteps=settings["num_timesteps"],
        time_layers=settings["time_layers"],
        **experts(settings, results),
    )
    load_weights(network, given.run / "network.safetensors")
    network = network.to(given.device).eval()
    t = int(results[f"t_{name}"])

    def restored(image: Tensor) -> Tensor:
        return over_flips(lambda one: network(one, t), image) if settings["flips"] else network(image, t)

    return plain_network(restored, given)


def main(arguments: Sequence[str] | None = None) -> None:
    degradation = {"help": "what the images suffer from; may be left out where the run restores one alone"}
    restore_command(__doc__, load, options={"--degradation": degradation}, arguments=arguments)


if __name__ == "__main__":
    main()
