"""Which networks does EDTR begin with? All that a small run needs, trained one after the other on the same pictures.

    python -m examples.edtr.prepare --out runs/prepared

In the folder, each a run directory that goes on after a stop:

========== ==============================================================================================
TASK_hq    the task network, trained on HQ pictures (H_HQ, and what H begins as)
TASK_judge another of other pictures and chance, for the evaluation alone
pre        the pre-restoration network, trained on pixels
prior      an autoencoder and a diffusion model in its latents, in the layout of Stable Diffusion
========== ==============================================================================================

On large pictures the prior is Stable Diffusion: ``--train_prior false`` here, and ``--prior`` for examples.edtr.train.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from examples.common.data.folder import check_folder
from examples.common.data.tasks import Task
from examples.common.engine import command_line
from examples.common.engine.options import DataOptions, Degradation, RunOptions, check_numbers, shared
from examples.common.networks.train_prior import PriorConfig, PriorTrainer
from examples.sr4ir.config import Config as TaskConfig
from examples.sr4ir.train import Trainer as TaskTrainer


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions, RunOptions):
    """All networks of the tasks.

    Attributes:
        tasks: that EDTR will be trained for.
        train_prior: also a small latent diffusion model.
        prior_steps: of its autoencoder; the diffusion model takes twice as many.
        recogniser: "small", "paper" or, for classification, "timm/NAME".
        h_optimizer: of the task networks, "sgd" (momentum 0.9, weight decay 1e-4) or "adamw".
        h_lr: their learning rate.
        restorer: "edsr-small", "swinir", ...: the pre-restoration network.
        pre_lr: its learning rate (AdamW).
        pre_patch: side of the squares it trains on; the default is whole pictures.
        pre_batch: pictures a step; the default is ``batch``.
        pre_steps: the default is ``steps``.
    """

    tasks: list[Task] = field(default_factory=lambda: ["classification"])
    train_prior: bool = True
    prior_steps: int = 1000
    degradation: Degradation = "mixture_b"
    scale: int = 1
    recogniser: str = "small"
    h_optimizer: Literal["sgd", "adamw"] = "adamw"
    h_lr: float = 2e-3
    restorer: str = "edsr-small"
    pre_lr: float = 1e-3
    pre_patch: int | None = None
    pre_batch: int | None = None
    pre_steps: int | None = None


def prepare(config: Config) -> None:
    """Train what is not there yet.

    Raises:
        ValueError: Without a task, or for ``task``, of which ``tasks`` is the list.
    """
    check_numbers(config)
    check_folder(config.out)
    if not config.tasks or config.task != Config.task:
        raise ValueError(f"`tasks` should list at least one task, found {config.tasks}, and `task` {config.task!r}.")
    options = shared(config)
    for task in config.tasks:
        settings = TaskConfig(
            **{**options, "task": task}, recogniser=config.recogniser, restorer=config.restorer,
            h_optimizer=config.h_optimizer, h_lr=config.h_lr, s_lr=config.pre_lr,
        )  # fmt: skip
        TaskTrainer(replace(settings, method="oracle", out=config.out / f"{task}_hq")).run()
        judge = replace(settings, method="oracle", out=config.out / f"{task}_judge", seed=config.seed + 1000)
        TaskTrainer(replace(judge, steps=2 * config.steps)).run()
    first = replace(
        settings, task=config.tasks[0], method="pretrain", out=config.out / "pre", patch=config.pre_patch,
        batch=config.pre_batch or config.batch, steps=config.pre_steps or config.steps,
    )  # fmt: skip
    TaskTrainer(first).run()
    if config.train_prior and not (config.out / "prior" / "prompt.safetensors").exists():
        prior = PriorTrainer(
            PriorConfig(
                **{**options, "task": config.tasks[0], "out": config.out / "prior", "steps": config.prior_steps}
            )
        )
        prior.run()
        if prior.main:
            prior.save_pretrained()


def main() -> None:
    command_line.run(Config, prepare, __doc__)


if __name__ == "__main__":
    main()
