"""Tiny runs of all recipes: their options, what they begin with, and helpers to run, stop and compare them."""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from skimage import data as photographs
from torch import Tensor
from torchvision.utils import save_image

from examples.common.engine.recipe import Recipe
from examples.diffloss import config as diffloss
from examples.diffloss import restore as diffloss_restore
from examples.diffloss import train as diffloss_train
from examples.dtp import config as dtp
from examples.dtp import restore as dtp_restore
from examples.dtp import train as dtp_train
from examples.edtr import config as edtr
from examples.edtr import prepare as edtr_prepare
from examples.edtr import restore as edtr_restore
from examples.edtr import train as edtr_train
from examples.sr4ir import config as sr4ir
from examples.sr4ir import restore as sr4ir_restore
from examples.sr4ir import train as sr4ir_train
from examples.unirestore import config as unirestore
from examples.unirestore import prepare as unirestore_prepare
from examples.unirestore import restore as unirestore_restore
from examples.unirestore import train as unirestore_train

TASKS = ("classification", "segmentation", "detection")
RUN: dict[str, Any] = {"out": Path(), "steps": 3, "save_every": 2, "cpu": True}
SR4IR = sr4ir.Config(**RUN, batch=4, train_count=12, test_count=4, size=32)
EDTR_DATA: dict[str, Any] = {"batch": 4, "train_count": 12, "test_count": 4, "size": 32, "mixture_extent": 0.2}
EDTR = edtr.Config(**RUN, **EDTR_DATA, long_steps=3, draws=1)
PAIRS: dict[str, Any] = {"batch": 4, "patch": 24, "train_count": 16, "test_count": 2, "test_size": 24}
DTP = dtp.Config(**RUN, **PAIRS, importance_samples=4, timesteps="paper", replay_share=1.0, experts=2)
DIFFLOSS = diffloss.Config(**RUN, **PAIRS)
PRIOR = diffloss.Diff(weight=0.1, timesteps=(100, 600), every=2, crop=0.5)
UNIRESTORE_DATA: dict[str, Any] = {"batch": 2, "train_count": 8, "test_count": 4, "size": 24, "severities": [1, 2]}
UNIRESTORE = unirestore.Config(**RUN, **UNIRESTORE_DATA, control_channels=8, cfrm_blocks=[1, 1], unseen=False)


class Prepared:
    """Folders of what runs begin with, each trained when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def oracle(self, task: Any) -> Path:
        """A task network."""
        out = self.folder / "oracles" / str(task)
        if not out.exists():
            sr4ir_train.Trainer(replace(SR4IR, out=out, method="oracle", task=task)).run()
        return out

    @functools.cached_property
    def edtr(self) -> Path:
        """What examples.edtr.prepare writes for three tasks."""
        out = self.folder / "edtr"
        options: dict[str, Any] = {**EDTR_DATA, "steps": 2, "prior_steps": 2, "cpu": True}
        edtr_prepare.prepare(edtr_prepare.Config(out=out, tasks=list(TASKS), **options))
        return out

    @functools.cached_property
    def pretrained(self) -> Path:
        """A pre-training of DTP."""
        out = self.folder / "pretrained"
        dtp_train.trainer(replace(DTP, out=out, method="pretrain", steps=6)).run()
        return out

    @functools.cached_property
    def unirestore(self) -> Path:
        """What examples.unirestore.prepare writes, and a run of each stage: "stage1", "stage2", "add-task"."""
        out = self.folder / "unirestore"
        options: dict[str, Any] = {**UNIRESTORE_DATA, "steps": 2, "prior_steps": 2, "cpu": True}
        unirestore_prepare.prepare(unirestore_prepare.Config(out=out / "prepared", **options))
        before: dict[str, Any] = {"prepared": out / "prepared", "steps": 2, "save_every": 1}
        for stage, more in {"stage1": {}, "stage2": {"after": out / "stage1"},
                            "add-task": {"after": out / "stage2", "name": "detection"}}.items():  # fmt: skip
            config = replace(UNIRESTORE, out=out / stage, stage=stage, **before, **more)  # type: ignore[arg-type]
            unirestore_train.Trainer(config).run()
        return out


@dataclass(frozen=True)
class Case:
    """A run of a recipe.

    Attributes:
        train: the module of its command.
        build: from a config to what runs.
        config: its options but ``out``, from the prepared folders.
        restore: the module that restores with it, or None where there is nothing to restore.
        restored: what the loaded run makes of an image, where there is no randomness.
        data: other test data, by option.
        scale: by which it enlarges.
        arguments: of the command line that are given by place.
        more: of the restore command.
    """

    train: Any
    build: Callable[[Any], Recipe[Any]]
    config: Callable[[Prepared], Any]
    restore: Any = None
    restored: Callable[[Any, Tensor], Tensor] | None = None
    data: dict[str, Any] | None = None
    scale: int = 1
    arguments: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


def sr4ir_case(**changes: Any) -> Case:
    def config(prepared: Prepared) -> Any:
        oracle = prepared.oracle("classification")
        return replace(SR4IR, fixed_hr=oracle, judge=oracle, **changes)

    return Case(
        sr4ir_train, sr4ir_train.Trainer, config, sr4ir_restore, lambda run, image: run.s(image), {"data_seed": 7}, 4
    )


def edtr_case(**changes: Any) -> Case:
    return Case(
        edtr_train,
        edtr_train.Trainer,
        lambda p: replace(EDTR, prepared=p.edtr, **changes),
        edtr_restore,
        data={"data_seed": 7},
    )


def dtp_case(**changes: Any) -> Case:
    def config(prepared: Prepared) -> Any:
        return replace(DTP, pretrained=None if changes["method"] == "pretrain" else prepared.pretrained, **changes)

    name = changes.get("degradations", ["rainy"])[0]
    return Case(
        dtp_train, dtp_train.trainer, config, None if changes["method"] == "pretrain" else dtp_restore,
        lambda run, image: run.restore(image, name), {"test_size": 40}, more=("--degradation", name),
    )  # fmt: skip


def diffloss_case(**changes: Any) -> Case:
    config = replace(DIFFLOSS, **changes)
    return Case(
        diffloss_train, diffloss_train.Trainer, lambda _: config, diffloss_restore,
        lambda run, image: run.tested(image), {"test_size": 40},
    )  # fmt: skip


def unirestore_case(stage: Any, name: str | None = None, **changes: Any) -> Case:
    def config(prepared: Prepared) -> Any:
        folder = prepared.unirestore
        after = {"stage1": None, "stage2": folder / "stage1", "add-task": folder / "stage2"}[stage]
        given = {"prepared": folder / "prepared", "after": after, **changes}
        return replace(UNIRESTORE, stage=stage, name=name, **given)

    arguments = (stage,) if name is None else (stage, name)
    restore = None if "network" in changes else unirestore_restore
    return Case(unirestore_train, unirestore_train.Trainer, config, restore, data={"data_seed": 7}, arguments=arguments)


CASES: dict[str, Case] = {
    "sr4ir": sr4ir_case(),
    "edtr": edtr_case(),
    "dtp": dtp_case(method="gef_project", degradations=["hazy", "noisy"], moe=True),
    "dtp, pre-training": dtp_case(method="pretrain"),
    "diffloss": diffloss_case(
        diff=PRIOR, ema=0.8, adversarial=diffloss.Adversarial(weight=1e-3, width=4), eval_every=1
    ),
    "unirestore": unirestore_case("stage2"),
}
"""One of each recipe: the whole contract holds for it."""
MORE: dict[str, Case] = {
    "diffloss, shares": diffloss_case(
        diff=diffloss.Diff(share=0.4, timesteps=(100, 600)), filter=diffloss.Filter(share=0.2), accumulate=2
    ),
    "sr4ir, two stages": sr4ir_case(method="s_to_t"),
    "edtr, three tasks": edtr_case(all_in_one=True),
    "dtp, orthogonality": dtp_case(method="gef", orthogonality_every=2, patch=16, test_size=16),
    "unirestore, stage 1": unirestore_case("stage1"),
    "unirestore, new task": unirestore_case("add-task", "detection"),
    "unirestore, adapters of each task": unirestore_case(
        "stage2", adapter="several", tasks=["restoration", "classification"]
    ),
    "unirestore, another network": unirestore_case("stage2", network="edsr-small", after=None),
}
"""Runs that are resumed as well, for they keep a state of another kind."""


class Stopped(Exception):
    """Raised in the place of a step."""


def stop_at(run: Recipe[Any], step: int) -> None:
    """Let a run raise :class:`Stopped` instead of a step, counted over all stages."""
    taken = [0]

    def stopping(take: Callable[[Any], Any], batch: Any) -> Any:
        taken[0] += 1
        if taken[0] == step:
            raise Stopped
        return take(batch)

    for stage in run.stages:
        stage.alternation.step = functools.partial(stopping, stage.alternation.step)  # type: ignore[method-assign]


def stop_before_the_end(run: Recipe[Any]) -> None:
    """Run up to the last step of the last stage, as if the process were killed then."""
    stop_at(run, sum(stage.steps for stage in run.stages))
    with pytest.raises(Stopped):
        run.run()


def weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All weights that a run left, by the name of their file."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_weights(one: Path, other: Path) -> None:
    """The same files of weights, equal to the bit."""
    first, second = weights(one), weights(other)
    assert first and first.keys() == second.keys()
    for name, values in first.items():
        assert values.keys() == second[name].keys()
        for key, value in values.items():
            assert torch.equal(value, second[name][key]), f"{name}: {key}"


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def command(module: Any, *arguments: str) -> None:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()


def results_of(folder: Path) -> dict[str, Any]:
    """The figures of results.json, but the seconds."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in found.items() if name != "seconds"}


def write_images(folder: Path) -> Path:
    """Three images of several sizes, two of one name, and a file that is none."""
    (folder / "deep").mkdir()
    cat = torch.from_numpy(photographs.chelsea()[:50, :61].copy()).permute(2, 0, 1) / 255
    save_image(cat, folder / "cat.png")
    save_image(cat[:, :48], folder / "cat.jpg")
    save_image(cat[:, :20, :20], folder / "deep" / "part.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


SIZES = {"cat.png": (48, 61), "cat.png.png": (50, 61), "deep/part.png": (20, 20)}
"""Height and width of what becomes of :func:`write_images`."""
