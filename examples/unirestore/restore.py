"""Restore a folder of images with a trained UniRestore, for people or for a task network.

python -m examples.unirestore.restore runs/stage2 IMAGES OUT --task restoration
python -m examples.unirestore.restore runs/stage2 IMAGES OUT --prompts runs/det/prompts.safetensors --task detection
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.common.engine.restoring import Restore, restore_command
from examples.common.engine.run_directory import finished_run
from examples.common.networks.latent_diffusion import load_latent_diffusion
from examples.unirestore.adapters import build_adapters
from examples.unirestore.config import FILE
from restoreloss.restorers import UniRestore


def load_run(run: Path, prior: Path | str | None = None) -> tuple[UniRestore, int]:
    """The restorer of a finished run of examples.unirestore.train, in eval mode, and the side that smaller images are
    enlarged to.

    Args:
        run: its directory.
        prior: the latent diffusion model, where it is no longer where the run found it.

    Raises:
        ValueError: If the folder is none.
    """
    settings, _ = finished_run(run, "examples.unirestore.train", f"{FILE}.safetensors")
    if settings["network"] is not None:
        raise ValueError(f"{run} should be a run of UniRestore, found one of {settings['network']}.")
    if prior is None:
        prior = settings["prior"] or Path(settings["prepared"]) / "prior"
    # a file brings its prompts, and no other adapter
    model = build_unirestore(settings, prior, () if settings["adapter"] == "prompts" else settings["tasks"])
    model.load_trained(run / f"{FILE}.safetensors")
    return model.eval().requires_grad_(False), int(settings["smallest"])


def build_unirestore(options: Mapping[str, Any], prior: Path | str, tasks: Sequence[str]) -> UniRestore:
    """UniRestore or one of its ablations, not yet trained.

    Args:
        options: of :class:`examples.unirestore.config.Config`, by name.
        prior: the latent diffusion model.
        tasks: that the adapters know, if the stage has some.
    """
    model = UniRestore(
        load_latent_diffusion(prior), steps=options["steps_of_diffusion"], cfrm=options["cfrm"], adapters=False,
        cfrm_blocks=options["cfrm_blocks"], gate=options["gate"], control_channels=options["control_channels"],
    )  # fmt: skip
    if options["stage"] != "stage1" and options["adapter"] is not None:
        model.tfa = build_adapters(options["adapter"], *model.adapter_channels, tasks, options["gate"])
    return model


def load(given: argparse.Namespace) -> Restore:
    """Load the run, as a function that restores an image for the task."""
    model, smallest = load_run(given.run, given.prior)
    for file in given.prompts:
        model.load_prompts(file)
    known = model.tasks or ("restoration",)
    if given.task not in known:
        raise ValueError(f"`task` should be one of {', '.join(known)}, found {given.task!r}.")
    model.timesteps(given.steps)
    model.to(given.device)
    if given.smallest is not None:
        smallest = given.smallest

    def restore(image: Tensor, generator: torch.Generator) -> Tensor:
        return model.restore(
            image, given.task, steps=given.steps, smallest=smallest, generator=generator, tile=given.tile or None,
            overlap=given.overlap,
        )  # fmt: skip

    return restore


OPTIONS: dict[str, dict[str, Any]] = {
    "--task": {"default": "restoration", "help": "what the images are for (restoration)"},
    "--prompts": {
        "type": Path, "action": "append", "default": [], "help": "prompts.safetensors of a task that was added"
    },
    "--prior": {"help": "the latent diffusion model, if it has moved"},
    "--steps": {"type": int, "help": "denoising steps; the default is that of the run"},
    "--smallest": {"type": int, "help": "enlarge smaller sides to this; the default is that of the run"},
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    restore_command(__doc__, load, options=OPTIONS, arguments=arguments)


if __name__ == "__main__":
    main()
