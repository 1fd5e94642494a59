"""How are a folder's pictures restored by a trained EDTR?

    python -m examples.edtr.restore --run runs/edtr PICTURES OUT
    python -m examples.edtr.restore --run runs/edtr --n 4 --tile 512 --seed 7 PICTURES OUT

Every picture below the folder is written to OUT under its name, as PNG; a second one of a name, ``a.png`` beside
``a.jpg``, as ``a.png.png``. What cannot be read is named and skipped.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from examples.common.data.folder import check_folder, restore_folder
from examples.common.engine.batches import chance
from examples.common.engine.command_line import device
from examples.common.engine.run_directory import file_in
from examples.common.networks.latent_diffusion import load_latent_diffusion
from examples.common.networks.restorers import restorer
from examples.edtr.methods import METHODS
from examples.edtr.no_prior import NoPrior
from restoreloss.restorers.edtr import EDTR


def load_run(run: Path) -> tuple[EDTR, int]:
    """The restorer of a finished run of examples.edtr.train, in eval mode, and the side that pictures are padded to.

    Raises:
        ValueError: If the folder is none.
    """
    for name in ("config.yaml", "edtr.safetensors"):
        if not (run / name).is_file():
            raise ValueError(f"{run} should be a finished run of examples.edtr.train, found no {name} in it.")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    method = METHODS[settings["method"]]
    build = EDTR if method.prior else NoPrior
    edtr = build(
        restorer(settings["restorer"], 1, file_in(Path(settings["pre"]), "restorer.safetensors"))
        if method.pre
        else nn.Identity(),
        load_latent_diffusion(settings["prior"]),
        t_p=settings["t_p"] if method.partial else None,
        n=settings["long_steps"] if method.long else settings["n"],
        color_fix=method.color_fix,
    )
    try:
        load_model(edtr, run / "edtr.safetensors")
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{run / 'edtr.safetensors'} should hold the weights of this run: {error}") from error
    return edtr.eval().requires_grad_(False), int(settings["smallest"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="of examples.edtr.train")
    parser.add_argument("--n", type=int, help="denoising steps; the default is what it was trained for")
    parser.add_argument("--tile", type=int, default=512, help="side above which pictures are restored in tiles")
    parser.add_argument("--smallest", type=int, help="pad smaller sides; the default is that of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name, lowest in (("tile", 32), ("seed", 0), ("smallest", 0)):
        if getattr(options, name) is not None and getattr(options, name) < lowest:
            parser.error(f"`{name}` should be at least {lowest}, found {getattr(options, name)}.")
    try:
        check_folder(options.out)
        edtr, smallest = load_run(options.run)
        edtr = edtr.to(options.device)
        edtr.timesteps(options.n)
    except ValueError as error:
        parser.error(str(error))
    if options.smallest is not None:
        smallest = options.smallest

    def restore(picture: Tensor, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(chance(options.seed, number))
        restored: Tensor = edtr.restore(
            picture.to(options.device), n=options.n, generator=generator, smallest=smallest, tile=options.tile
        )
        return restored

    try:
        restore_folder(options.pictures, options.out, restore)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
