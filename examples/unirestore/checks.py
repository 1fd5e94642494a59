"""Checks of the options of a stage, before anything is read."""

import math
from pathlib import Path
from typing import get_args

from examples.common.data.task_data import check_data_sets
from examples.common.engine.options import check_numbers
from examples.common.engine.run_directory import settings_of
from examples.unirestore.config import TASKS, Config, StageName


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that do not go together."""
    check_numbers(config)
    if config.stage not in get_args(StageName):
        raise ValueError(f"`stage` should be one of {', '.join(get_args(StageName))}, found {config.stage!r}.")
    if (config.stage == "add-task") != (config.name is not None):
        raise ValueError(f"`name` should be given for 'add-task' and no other stage, found {config.name!r}.")
    for task in [config.name] if config.name is not None else config.tasks:
        if task not in TASKS:
            option = "tasks" if config.name is None else "name"
            raise ValueError(f"`{option}` should be one of {', '.join(TASKS)}, found {task!r}.")
    check_data(config)
    for name in ("train_tasks", "network", "restored_too"):
        if config.stage == "add-task" and getattr(config, name):
            raise ValueError(f"`{name}` should be left out of 'add-task', found {getattr(config, name)!r}.")
    if unknown := sorted(set(config.train_tasks or ()) - set(config.tasks)):
        raise ValueError(f"`train_tasks` should be of `tasks` {config.tasks}, found {unknown[0]!r}.")
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ValueError(f"`tasks` should be at least one, each once, found {config.tasks}.")
    tasks = config.tasks if config.name is None else TASKS  # one file of options serves all stages
    if unknown := sorted(set(config.task_weights) - set(tasks)):
        raise ValueError(f"`task_weights` should be for tasks of this run, {', '.join(tasks)}, found {unknown[0]!r}.")
    if wrong := [weight for weight in config.task_weights.values() if not 0 <= weight < math.inf]:
        raise ValueError(f"`task_weights` should be at least 0 and finite, found {wrong[0]}.")
    if config.scale != 1:
        raise ValueError(f"`scale` should be 1: images are restored at their own size, found {config.scale}.")
    if config.stage == "stage1":
        if "restoration" not in config.tasks:
            raise ValueError(f"`tasks` should have 'restoration', which stage 1 trains on, found {config.tasks}.")
        if config.train_tasks is not None and len(config.train_tasks) != 1:
            raise ValueError(f"`train_tasks` should be one in stage 1, found {config.train_tasks}.")
        if config.train_tasks == ["detection"]:
            raise ValueError("`train_tasks` should not be detection in stage 1, whose images are of one size.")
        return
    tested = {config.name} if config.name is not None else set(config.tasks)
    if config.prepared is None and tested != {"restoration"}:
        raise ValueError("`prepared` should be a folder of examples.unirestore.prepare, found None.")
    if config.restored_too and "restoration" not in config.tasks:
        raise ValueError(f"`restored_too` needs the task 'restoration', found {config.tasks}.")
    if config.network is not None:
        if config.after is not None:
            raise ValueError(f"`after` should be left out for `network` {config.network}, found {config.after}.")
        return
    if config.adapter is None:
        raise ValueError("`adapter` should be there after stage 1, which has nothing else to train, found None.")
    if config.after is None:
        raise ValueError(f"`after` should be a run of the stage before {config.stage}, found None.")
    _check_before(config, config.after)


def check_data(config: Config) -> None:
    """Raise ``ValueError`` for data that no task of a run reads, also of one that is evaluated."""
    tasks = [config.name] if config.name is not None else config.tasks
    check_data_sets(config, tasks)
    if config.unseen and config.degradation == "unseen_corruptions":
        raise ValueError("`unseen` should be false where `degradation` is unseen_corruptions: these are seen then.")
    if config.unseen and (config.lq or config.images_lq):
        raise ValueError("`unseen` should be false where degraded images are on disk, `lq` or `images_lq`.")
    restores = config.name is not None or ("restoration" in tasks and config.data != "words")
    if config.paired_tests and not restores:
        raise ValueError(f"`paired_tests` should be given for the task restoration, found {', '.join(tasks)}.")
    if taken := [name for name in config.paired_tests if name in TASKS]:
        raise ValueError(f"`paired_tests` should have names that are no tasks, found {taken[0]!r}.")
    if "restoration" in config.data_sets:
        raise ValueError("`data_sets` should be for tasks of a reader; images to restore are those of `images`.")
    if config.images_lq is not None and ("restoration" not in tasks or config.images is None or config.data == "words"):
        raise ValueError("`images_lq` should be beside `images`, for the task restoration, found it alone.")
    if config.images is not None and not restores:
        raise ValueError(f"`images` should be given for the task restoration, found {', '.join(tasks)}.")


def _check_before(config: Config, before: Path) -> None:
    """Raise ``ValueError`` for a run that the stage cannot begin with; what its weights cannot tell."""
    wanted = ("stage1",) if config.stage == "stage2" else ("stage2", "add-task")
    settings = settings_of(before) if (before / "results.json").is_file() else {}
    if (found := settings.get("stage", "none")) not in wanted:
        raise ValueError(
            f"`after` should be a finished run of {' or '.join(wanted)}, found {before}, which is {found}."
        )
    if config.stage == "add-task":
        for name in ("adapter", "gate", "steps_of_diffusion", "smallest"):
            if settings[name] != getattr(config, name):
                raise ValueError(
                    f"`{name}` should be {settings[name]!r}, as in {before}, found {getattr(config, name)!r}."
                )
