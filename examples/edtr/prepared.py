"""The folder that examples.edtr.prepare wrote, as the options of a run."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from examples.common.data.options import DataOptions
from examples.common.data.task_data import of_task
from examples.common.engine.options import plain_values
from examples.common.engine.run_directory import settings_of
from examples.edtr.config import Config


def with_prepared(config: Config, tasks: Sequence[str]) -> Config:
    """The config with what ``prepared`` holds, where it names nothing else.

    Raises:
        ValueError: If it is not what examples.edtr.prepare leaves behind, or was trained on other data than those of
            this run. A finished run may be evaluated on any.
    """
    if config.prepared is None:
        return config
    folder = config.prepared
    if config.task == "reading":  # which nothing has to be trained for
        config = replace(
            config, references=config.references or [Path("english_g2")], judges=config.judges or [Path("pp_ocr")]
        )
    found: dict[str, Any] = {
        "prior": config.prior or folder / "prior",
        "pre": config.pre or folder / "pre",
        "references": config.references or [folder / f"{task}_hq" for task in tasks],
        "judges": config.judges or [folder / f"{task}_judge" for task in tasks if config.evaluate is None],
    }
    for path in (found["prior"], found["pre"], *found["references"], *found["judges"]):
        if folder in path.parents and not path.is_dir():
            raise ValueError(f"`prepared` should be what examples.edtr.prepare wrote, found no {path}.")
    if config.evaluate is not None:
        return replace(config, **found)
    for path in (found["pre"], *found["references"]):
        if folder in path.parents:
            _check_data(config, path)
    return replace(config, **found)


def _check_data(config: Config, run: Path) -> None:
    if not (settings := settings_of(run)):
        raise ValueError(f"`prepared` should be what examples.edtr.prepare wrote, found no config.yaml in {run}.")
    before = plain_values(asdict(DataOptions())) | settings  # a run may be older than an option
    now = plain_values(asdict(of_task(config, before["task"])))
    for option in (field.name for field in fields(DataOptions)):
        if before[option] != now[option]:
            raise ValueError(
                f"`{option}` should be {before[option]!r}, as {run} was trained with, found {now[option]!r}."
            )
