"""Train the networks that UniRestore begins with, all that a small run needs, one after the other.

    python -m examples.unirestore.prepare --out runs/prepared

In the folder, each a run directory that goes on after a stop:

========== ==============================================================================================
TASK_hq    the task network, trained on clean images: what UniRestore is trained for
TASK_judge another, twice as long, with another seed and (where they are generated) other images: a
           recognizer for the evaluation alone, which nothing was trained with
prior      an autoencoder and a diffusion model in its latents, in the layout of Stable Diffusion
========== ==============================================================================================

On large images the prior is Stable Diffusion: ``--train_prior false`` here, and ``--prior`` for
examples.unirestore.train.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from examples.common.data.options import DataOptions, Degradation
from examples.common.engine import command_line
from examples.common.engine.options import RunOptions, plain_values, shared_options
from examples.common.engine.train_prior import PriorConfig, autoencoder_of, train_prior
from examples.common.networks.latent_diffusion import Prediction
from examples.common.networks.recognizers import recognizer
from examples.sr4ir.config import Config as TaskConfig
from examples.sr4ir.oracles import check_preparation, train_oracles
from examples.unirestore.data import data_of, mixed


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions, RunOptions):
    """All networks of the tasks.

    Attributes:
        tasks: tasks with a recognizer.
        images: folder of clean images for restoration.
        train_prior: also train a small latent diffusion model.
        prior_steps: steps of its autoencoder; the diffusion model takes twice as many.
        prediction: what the diffusion model predicts; "epsilon" is too far from clean latents in a single step.
        autoencoder: finished run of another prior, whose autoencoder is taken.
        recognizer: "small", "paper" or, for classification, "timm/NAME".
        judge: architecture of the recognizers for the evaluation.
        h_optimizer: optimizer of the task networks, "sgd" (momentum 0.9, weight decay 1e-4) or "adamw".
        h_lr: learning rate of the task networks.
    """

    tasks: list[str] = field(default_factory=lambda: ["classification", "segmentation", "detection"])
    images: Path | None = None
    train_prior: bool = True
    prior_steps: int = 1000
    prediction: Prediction = "v_prediction"
    autoencoder: Path | None = None
    degradation: Degradation = "corruptions"
    scale: int = 1
    recognizer: str = "small"
    judge: str = "small"
    h_optimizer: Literal["sgd", "adamw"] = "adamw"
    h_lr: float = 2e-3


def prepare(config: Config) -> None:
    """Train what is not there yet.

    Raises:
        ValueError: Without a task, or for ``task``, of which ``tasks`` is the list.
    """
    check_preparation(config)
    if config.images is not None:
        data_of("restoration", config)  # what is wrong with it is said now, not after hours
    if config.train_prior and config.autoencoder is not None:
        autoencoder_of(_prior_options(config, config.out / "prior"))
    trained = [task for task in config.tasks if task != "reading"]  # whose networks are trained already
    for task in trained:
        known: Any = task
        try:
            recognizer(config.judge, known, 2, pretrained=False)
        except ValueError as error:
            raise ValueError(f"`judge`: {error}") from error
    settings = TaskConfig(
        **shared_options(config), recognizer=config.recognizer, h_optimizer=config.h_optimizer, h_lr=config.h_lr
    )
    train_oracles(settings, trained, judge=config.judge)
    if config.train_prior:
        train_prior_of_all(config, config.out / "prior")


def train_prior_of_all(config: Config, out: Path) -> None:
    """A small latent diffusion model of the images of all tasks, with two levels of features to restore."""
    train_prior(_prior_options(config, out), mixed(["restoration", *config.tasks], config))


def _prior_options(config: Config, out: Path) -> PriorConfig:
    options = {
        **shared_options(config), "out": out, "steps": config.prior_steps, "prediction": config.prediction,
        "autoencoder": config.autoencoder,
    }  # fmt: skip
    of = ["restoration", *config.tasks, *([] if config.images is None else [plain_values(config.images)])]
    return PriorConfig(**options, levels=3, of=of)


def main() -> None:
    command_line.run(Config, prepare, __doc__)


if __name__ == "__main__":
    main()
