"""Losses and a model for BasicSR and its forks, where each of them looks for its own.

``python -m restoreloss.integrations.basicsr -opt train.yml [--auto_resume] [--import PACKAGE]`` is the ``train.py`` of
BasicSR with two lines above its imports, to which your own ``train.py`` may be added as well::

    from restoreloss.integrations.basicsr import register
    register()

A ``train.py`` that should stay as it is has :mod:`restoreloss.integrations.launch`. docs/integrations/basicsr.md has
the YAML. BasicSR is imported when ``register`` is called and not before.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from restoreloss._optional import require
from restoreloss.integrations.basicsr_model import restoreloss_model
from restoreloss.integrations.drop_in import install_all, register_all
from restoreloss.integrations.options import OPTIONS, Criterion, registrable

_GONE = "torchvision.transforms.functional_tensor"


class Pair(Criterion):
    """A loss for a slot that takes two, ``perceptual_opt``: it returns (loss, None)."""

    def forward(self, restored: Tensor, target: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The weighted loss, from two float (N, C, H, W), and no style loss."""
        return super().forward(restored, target), None


def losses(own: Any) -> list[type[Criterion]]:
    """Our losses, each for a slot of one and, with "Perceptual" before its name, for a slot of two.

    Args:
        own: the registry or the module with the framework's own losses, which a ``WeightedSum`` may name.
    """
    kinds = [registrable(kind, own=own) for kind in OPTIONS]
    return kinds + [registrable(kind, own=own, base=Pair, prefix="Perceptual") for kind in OPTIONS]


def register(where: Any = None) -> None:
    """Add our losses where BasicSR or a fork of it looks for its own (idempotent).

    ``DiffLoss``, ``TDPLoss``, ``HLFLoss`` and ``WeightedSum`` are for ``pixel_opt``, which takes one loss; the same
    with "Perceptual" before their names are for ``perceptual_opt``, which takes two.

    Args:
        where: a registry, with ``register``, ``get`` and ``name in registry``; or the module whose attributes the
            losses are, as ``basicsr.models.losses`` of Restormer and NAFNet. Default: of the ``basicsr`` that Python
            finds, whatever its version, which of both it has; a registry of models is given ``RestorelossModel``.

    Raises:
        ImportError: If there is no ``basicsr``.
        ValueError: If it has neither, or one of the names is taken.
    """
    if isinstance(where, ModuleType):
        install_all(where, losses(where))
        return
    if where is not None:
        register_all(where, losses(where))
        return
    found = import_basicsr()
    if _exists("basicsr.utils.registry"):
        registries = import_module("basicsr.utils.registry")
        register_all(registries.LOSS_REGISTRY, losses(registries.LOSS_REGISTRY))
        if _exists("basicsr.models.sr_model"):
            register_all(registries.MODEL_REGISTRY, [restoreloss_model()])
    elif _exists("basicsr.models.losses"):
        register(import_module("basicsr.models.losses"))
    else:
        raise ValueError(
            "`basicsr` should have a registry of losses (basicsr.utils.registry) or a module of them "
            f"(basicsr.models.losses), found neither in {list(getattr(found, '__path__', []))}: give `register` the "
            "one that it builds losses from."
        )


def import_basicsr() -> ModuleType:
    """Import BasicSR, or the fork of its name, next to a torchvision of today.

    It imports ``rgb_to_grayscale`` from a module that torchvision has removed. Where that is missing, a module of its
    name with this one function is put in its place.

    Raises:
        ImportError: If there is none.
    """
    if _GONE not in sys.modules and find_spec(_GONE) is None:
        module: Any = ModuleType(_GONE, "rgb_to_grayscale where BasicSR looks for it.")
        module.rgb_to_grayscale = import_module("torchvision.transforms.functional").rgb_to_grayscale
        sys.modules[_GONE] = module
    found: ModuleType = require(
        "basicsr",
        purpose="restoreloss.integrations.basicsr (run a fork in the folder that holds its `basicsr/`)",
        install="--no-build-isolation basicsr, of the version that your code asks for",
    )
    return found


def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """``basicsr.train.load_resume_state`` for any device: the optimizers move what they load to their parameters.

    Args:
        opt: the options, in which the networks to be loaded are noted.

    Returns:
        The training state, or None where training begins.
    """
    path: str | None = opt["path"].get("resume_state")
    if opt["auto_resume"]:
        states = sorted(Path(opt["path"]["training_states"]).glob("*.state"), key=lambda file: int(file.stem))
        path = str(states[-1]) if states else None
    opt["path"]["resume_state"] = path
    if path is None:
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    import_module("basicsr.utils").check_resume(opt, state["iter"])
    return state


def prepare(packages: Sequence[str] = ()) -> None:
    """What both launchers do first: register ours, import own architectures, and let a run be resumed on a CPU.

    Args:
        packages: modules to import, which register what they have.
    """
    register()
    if _exists("basicsr.utils.registry") and _exists("basicsr.train"):
        train: Any = import_module("basicsr.train")
        train.load_resume_state = load_resume_state  # That of BasicSR needs a CUDA device.
    for package in packages:
        import_module(package)


def main(arguments: Sequence[str] | None = None) -> None:
    """``train.py`` of BasicSR: its options, experiments below the working directory; resumes on a CPU as well."""
    parser = argparse.ArgumentParser(prog="python -m restoreloss.integrations.basicsr", add_help=False)
    add_import(parser)
    given, rest = parser.parse_known_args(arguments)
    prepare(given.packages)
    sys.argv[1:] = rest
    train: Any = import_module("basicsr.train")
    train.train_pipeline(str(Path.cwd()))


def add_import(parser: argparse.ArgumentParser) -> None:
    """The option ``--import``."""
    parser.allow_abbrev = False
    parser.add_argument(
        "--import", dest="packages", action="append", default=[], metavar="PACKAGE",
        help="a module of your own to import first, whose networks, data sets or models register themselves",
    )  # fmt: skip


def _exists(name: str) -> bool:
    try:
        return name in sys.modules or find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    # The module that others import has classes of its own, unlike this `__main__`.
    import_module("restoreloss.integrations.basicsr").main()
