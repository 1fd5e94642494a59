"""Train the networks that EDTR begins with, all that a small run needs, one after the other on the same images.

    python -m examples.edtr.prepare --out runs/prepared

In the folder, each a run directory that goes on after a stop:

========== ==============================================================================================
TASK_hq    the task network, trained on HQ images (H_HQ, and what H begins as)
TASK_judge another on other images, with another seed, for the evaluation alone
pre        the pre-restoration network, trained on pixels
prior      an autoencoder and a diffusion model in its latents, in the layout of Stable Diffusion
========== ==============================================================================================

On large images the prior is Stable Diffusion: ``--train_prior false`` here, and ``--prior`` for examples.edtr.train.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from examples.common.data.options import DataOptions, Degradation
from examples.common.data.task_data import of_task
from examples.common.data.tasks import Task
from examples.common.engine import command_line
from examples.common.engine.options import RunOptions, shared_options
from examples.common.engine.train_prior import PriorConfig, train_prior
from examples.sr4ir.config import Config as TaskConfig
from examples.sr4ir.oracles import check_preparation, train_oracles
from examples.sr4ir.train import Trainer as TaskTrainer


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions, RunOptions):
    """All networks of the tasks.

    Attributes:
        tasks: tasks that EDTR will be trained for.
        train_prior: also train a small latent diffusion model.
        prior_steps: steps of its autoencoder; the diffusion model takes twice as many.
        recognizer: "small", "paper" or, for classification, "timm/NAME".
        h_optimizer: optimizer of the task networks, "sgd" (momentum 0.9, weight decay 1e-4) or "adamw".
        h_lr: learning rate of the task networks.
        restorer: pre-restoration network: "edsr-small", "swinir", ...
        h_lr_min: where the cosines of all learning rates end.
        pre_lr: learning rate of the pre-restoration network (AdamW).
        pre_batch: images in a step of its training; the default is ``batch``.
        pre_steps: of its training; the default is ``steps``, which the task networks take.
    """

    tasks: list[Task] = field(default_factory=lambda: ["classification"])
    train_prior: bool = True
    prior_steps: int = 1000
    degradation: Degradation = "mixture_b"
    scale: int = 1
    recognizer: str = "small"
    h_optimizer: Literal["sgd", "adamw"] = "adamw"
    h_lr: float = 2e-3
    restorer: str = "edsr-small"
    h_lr_min: float = 0.0
    pre_lr: float = 1e-3
    pre_batch: int | None = None
    pre_steps: int | None = None


def prepare(config: Config) -> None:
    """Train what is not there yet.

    Raises:
        ValueError: Without a task, or for ``task``, of which ``tasks`` is the list.
    """
    check_preparation(config)
    settings = prepare_readers(config)
    pre = replace(
        of_task(settings, config.tasks[0]), method="pretrain", out=config.out / "pre",
        batch=config.pre_batch or config.batch, steps=config.pre_steps or config.steps,
    )  # fmt: skip
    TaskTrainer(pre).run()
    if config.train_prior:
        options = {"out": config.out / "prior", "steps": config.prior_steps}
        train_prior(PriorConfig(**{**shared_options(of_task(config, config.tasks[0])), **options}))


def prepare_readers(config: Config) -> TaskConfig:
    """Train the task networks and the judges alone; the options that they were trained with."""
    settings = TaskConfig(
        **shared_options(config), recognizer=config.recognizer, restorer=config.restorer,
        h_optimizer=config.h_optimizer, h_lr=config.h_lr, h_lr_min=config.h_lr_min, s_lr=config.pre_lr,
        s_lr_min=config.h_lr_min, restart=0.0,
    )  # fmt: skip
    train_oracles(settings, [task for task in config.tasks if task != "reading"])  # whose network is trained already
    return settings


def main() -> None:
    command_line.run(Config, prepare, __doc__)


if __name__ == "__main__":
    main()
