"""Task networks trained on HQ images: those that EDTR and UniRestore begin with, and others that evaluate alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from examples.common.data.folder import check_folder
from examples.common.data.options import DataOptions
from examples.common.data.task_data import check_data_sets, of_task
from examples.common.engine.options import check_numbers
from examples.sr4ir.config import Config
from examples.sr4ir.train import Trainer


def train_oracles(config: Config, tasks: Sequence[Any], *, judge: str | None = None) -> None:
    """Train two networks for each task in folders of ``config.out``, which go on after a stop.

    TASK_hq is what the recipe begins with; TASK_judge is trained twice as long with another seed, and so on other
    images where these are generated.

    Args:
        config: of every run, but for the task, its data, the method and the folder.
        tasks: a network of each kind for each of them.
        judge: the architecture of TASK_judge; the default is that of TASK_hq.
    """
    for task in tasks:
        # the authors begin their cosine anew for TDP alone
        oracle = replace(of_task(config, task), method="oracle", out=config.out / f"{task}_hq", restart=0.0)
        Trainer(oracle).run()
        others = None if oracle.data_seed is None else oracle.data_seed + 1000
        other = replace(
            oracle, out=config.out / f"{task}_judge", seed=config.seed + 1000, data_seed=others, steps=2 * config.steps
        )
        Trainer(replace(other, recognizer=judge or config.recognizer)).run()


def check_preparation(config: Any) -> None:
    """Raise ``ValueError`` for numbers out of range, no task, for ``task``, which ``tasks`` lists instead, and for data
    of a task that is not in it.
    """
    check_numbers(config)
    check_folder(config.out)
    if not config.tasks or config.task != DataOptions.task:
        raise ValueError(f"`tasks` should list at least one task, found {config.tasks}, and `task` {config.task!r}.")
    check_data_sets(config, config.tasks)
