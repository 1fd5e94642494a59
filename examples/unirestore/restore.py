"""How are a folder's pictures restored by a trained UniRestore, for people or for a task network?

    python -m examples.unirestore.restore --run runs/stage2 --task restoration PICTURES OUT
    python -m examples.unirestore.restore --run runs/stage2 --prompts runs/det/prompts.safetensors --task detection ...

Every picture below the folder is written to OUT under its name, as PNG; a second one of a name, ``a.png`` beside
``a.jpg``, as ``a.png.png``. What cannot be read is named and skipped.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from examples.common.data.folder import check_folder, restore_folder
from examples.common.engine.batches import chance
from examples.common.engine.command_line import device
from examples.common.networks.latent_diffusion import load_latent_diffusion
from examples.unirestore.adapters import build_adapters
from examples.unirestore.train import FILE
from restoreloss.restorers import UniRestore


def load_run(run: Path, prior: Path | str | None = None) -> tuple[UniRestore, int]:
    """The restorer of a finished run of examples.unirestore.train, in eval mode, and the side that smaller pictures are
    enlarged to.

    Args:
        run: its directory.
        prior: the latent diffusion model, where it is no longer where the run found it.

    Raises:
        ValueError: If the folder is none.
    """
    for name in ("config.yaml", f"{FILE}.safetensors", "results.json"):
        if not (run / name).is_file():
            raise ValueError(f"{run} should be a finished run of examples.unirestore.train, found no {name} in it.")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if settings["network"] is not None:
        raise ValueError(f"{run} should be a run of UniRestore, found one of {settings['network']}.")
    if prior is None:
        prior = settings["prior"] or Path(settings["prepared"]) / "prior"
    first = settings["stage"] == "stage1"
    model = UniRestore(
        load_latent_diffusion(prior), steps=settings["steps_of_diffusion"], cfrm=settings["cfrm"], adapters=False,
        cfrm_blocks=settings["cfrm_blocks"], gate=settings["gate"], control_channels=settings["control_channels"],
    )  # fmt: skip
    if not first and settings["adapter"] is not None:
        tasks = () if settings["adapter"] == "prompts" else settings["tasks"]
        model.tfa = build_adapters(settings["adapter"], *model.adapter_channels, tasks, settings["gate"])
    model.load_trained(run / f"{FILE}.safetensors")
    return model.eval().requires_grad_(False), int(settings["smallest"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="of examples.unirestore.train")
    parser.add_argument("--task", default="restoration", help="what the pictures are for")
    parser.add_argument("--prompts", type=Path, action="append", default=[], help="of a task that was added")
    parser.add_argument("--prior", help="the latent diffusion model, if it has moved")
    parser.add_argument("--steps", type=int, help="of the diffusion, 1 to 4")
    parser.add_argument("--smallest", type=int, help="enlarge smaller pictures; the default is that of the run")
    parser.add_argument(
        "--tile", type=int, default=512, help="side above which pictures are restored in tiles; 0 never"
    )
    parser.add_argument("--overlap", type=int, default=64, help="pixels that tiles share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check_folder(options.out)
        for name, lowest in (("seed", 0), ("smallest", 0)):
            if getattr(options, name) is not None and getattr(options, name) < lowest:
                raise ValueError(f"`{name}` should be at least {lowest}, found {getattr(options, name)}.")
        model, smallest = load_run(options.run, options.prior)
        for file in options.prompts:
            model.load_prompts(file)
        known = model.tasks or ("restoration",)
        if options.task not in known:
            raise ValueError(f"`task` should be one of {', '.join(known)}, found {options.task!r}.")
        if options.tile < 0 or not 0 <= options.overlap <= options.tile // 2:
            raise ValueError(
                f"`overlap` should be from 0 to half of `tile`, found {options.overlap} of {options.tile}."
            )
        model.timesteps(options.steps)
    except ValueError as error:
        parser.error(str(error))
    model.to(options.device)
    if options.smallest is not None:
        smallest = options.smallest

    def restore(picture: Tensor, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(chance(options.seed, number))

        restored: Tensor = model.restore(
            picture.to(options.device), options.task, steps=options.steps, smallest=smallest, generator=generator,
            tile=options.tile or None, overlap=options.overlap,
        )  # fmt: skip
        return restored

    try:
        restore_folder(options.pictures, options.out, restore)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
