"""Tiny runs of UniRestore that several test files begin with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.unirestore.train import Batch, Trainer
from tests.recipes import cases

SMALL = {**cases.UNIRESTORE_DATA, "cpu": True}
TINY = replace(cases.UNIRESTORE, steps=2, save_every=1)
STAGES: dict[str, dict[str, Any]] = {
    "stage1": {"stage": "stage1"}, "stage2": {"stage": "stage2"}, "add-task": {"stage": "add-task", "name": "detection"}
}  # fmt: skip


def trainer(out: Path, folder: Path, stage: str = "stage2", /, **changes: Any) -> Trainer:
    before = {"stage1": None, "stage2": folder / "stage1", "add-task": folder / "stage2"}
    start = {"prepared": folder / "prepared", "after": before[stage]}
    return Trainer(replace(TINY, **{"out": out, **start, **STAGES[stage], **changes}))


def first_batch(run: Trainer) -> Batch:
    return run.batch(*next(run.read(0, 1)), 0, run.config.steps)


def logged(out: Path) -> dict[str, float]:
    return dict(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]))
