"""Tiny runs of DTP that several test files begin with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.dtp.finetune import FineTuning
from examples.dtp.train import trainer as build
from tests.recipes import cases

TINY = replace(cases.DTP, steps=2, save_every=1)


def trainer(out: Path, pretrained: Path, **changes: Any) -> FineTuning:
    run = build(replace(TINY, out=out, pretrained=pretrained, **changes))
    assert isinstance(run, FineTuning)
    return run


def first_batch(run: Any) -> Any:
    return run.batch(*next(run.read(0, 1)), 0, run.options.steps)
