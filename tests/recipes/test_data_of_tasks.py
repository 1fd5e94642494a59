"""Data of its own for each task of a run: ``data_sets``, from preparation to evaluation, on miniature trees."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped, unused-ignore]

from examples.common.data.task_data import dataset, of_task
from examples.common.engine.train_prior import PriorConfig, PriorTrainer
from examples.edtr import prepare as edtr_preparing
from examples.edtr.train import TASKS
from examples.edtr.train import Trainer as EdtrTrainer
from examples.sr4ir.train import Trainer as Sr4irTrainer
from examples.unirestore import prepare as unirestore_preparing
from examples.unirestore.data import mixed
from tests.helpers.datasets import make_cub, make_voc
from tests.recipes import cases
from tests.recipes.test_more_datasets import make_acdc, make_cityscapes
from tests.recipes.unirestore_runs import SMALL as UNIRESTORE_SMALL
from tests.recipes.unirestore_runs import trainer

SMALL = cases.EDTR_DATA
QUICK: dict[str, Any] = {"steps": 1, "batch": 2, "size": 32, "cpu": True}


def test_edtr_serves_tasks_of_several_data_sets(tmp_path: Path) -> None:
    data, voc = tmp_path / "data", f"voc2012:{tmp_path / 'data'}"
    make_cub(data)
    make_voc(data)
    options: dict[str, Any] = {
        **SMALL, **QUICK, "data": "cub200", "root": data, "data_sets": {"segmentation": voc, "detection": voc}
    }  # fmt: skip
    folder = tmp_path / "prepared"
    edtr_preparing.prepare(edtr_preparing.Config(**options, tasks=[*TASKS], prior_steps=1, out=folder))
    written = yaml.safe_load((folder / "segmentation_hq" / "config.yaml").read_text())
    assert (written["data"], written["data_sets"]) == ("voc2012", {})

    config = replace(cases.EDTR, **{**options, "steps": 3}, all_in_one=True, prepared=folder, out=tmp_path / "run")
    run = EdtrTrainer(config)
    classes = {task: len(reader.train_data.class_names) for task, reader in run.readers.items()}
    assert classes == {"classification": 3, "segmentation": 21, "detection": 21}
    results = run.run()
    assert all(0 <= results[f"{task}_score"] <= 100 for task in TASKS)

    other = {"segmentation": voc, "detection": f"rtts:{data}"}
    with pytest.raises(ValueError, match="`data` should be 'voc2012', as .*detection_hq was trained with"):
        EdtrTrainer(replace(config, data_sets=other))


def test_unirestore_serves_tasks_of_several_data_sets(tmp_path: Path, prepared: cases.Prepared) -> None:
    make_cub(tmp_path)
    make_acdc(tmp_path / "acdc")
    make_cityscapes(tmp_path, fog=True)
    data_sets = {"classification": f"cub200:{tmp_path}", "segmentation": f"acdc:{tmp_path / 'acdc'}"}
    folder, tasks = tmp_path / "prepared", ["restoration", *data_sets]
    options = {**UNIRESTORE_SMALL, **QUICK, "data_sets": data_sets}
    own_side = {**options, "size": None, "train_count": 4, "data_sets": {"segmentation": data_sets["segmentation"]}}
    both = unirestore_preparing.Config(**own_side, tasks=[*data_sets], out=tmp_path / "prior")
    for images in mixed(["restoration", *both.tasks], both):  # of 48 pixels, and of 480
        assert {images[number][0].shape for number in range(len(images))} == {(3, 48, 48)}  # type: ignore[index]
    unirestore_preparing.prepare(
        unirestore_preparing.Config(**options, tasks=[*data_sets], train_prior=False, out=folder)
    )
    run: dict[str, Any] = {
        **options, "network": "edsr-small", "after": None, "tasks": tasks, "prepared": folder, "unseen": False
    }  # fmt: skip
    results = trainer(tmp_path / "run", prepared.unirestore, **run).run()
    assert {"restoration_psnr", "classification_score", "segmentation_score"} < set(results)

    foggy = {**data_sets, "segmentation": f"foggy_cityscapes:{tmp_path}"}
    on_fog = trainer(
        tmp_path / "on_fog", prepared.unirestore, **{**run, "data_sets": foggy}, degradation="none",
        evaluate=tmp_path / "run",
    )  # fmt: skip
    assert "foggy" in str(on_fog.readers["segmentation"].test_data.samples[0][0])  # type: ignore[attr-defined]
    assert 0 <= on_fog.run()["segmentation_score"] <= 100
    with pytest.raises(ValueError, match="for the tasks restoration, classification, segmentation of this run"):
        trainer(
            tmp_path / "typo", prepared.unirestore, **{**run, "data_sets": {"segmentaton": "x"}},
            evaluate=tmp_path / "run",
        )  # fmt: skip


def test_a_prior_is_evaluated_on_images_of_several_sizes(tmp_path: Path) -> None:
    make_voc(tmp_path)
    run = PriorTrainer(PriorConfig(**QUICK, task="segmentation", data="voc2012", root=tmp_path, out=tmp_path / "run"))
    found = run._evaluate([(torch.rand(3, *size), torch.tensor(0)) for size in ((34, 46), (34, 70))])[0]
    assert found["psnr"] > 0


def test_a_task_reads_its_own_data() -> None:
    config = replace(cases.EDTR, data_sets={"segmentation": "photos"})
    assert of_task(config, "segmentation").data == "photos"
    assert of_task(config, "detection").data == config.data
    with pytest.raises(ValueError, match="NAME:ROOT with one of generated, .* for segmentation, found 'voc:here'"):
        of_task(replace(config, data_sets={"segmentation": "voc:here"}), "segmentation")
    with pytest.raises(ValueError, match="`root` should be the folder of the data set 'coco', found None"):
        dataset(of_task(replace(config, data_sets={"detection": "coco"}), "detection"), "test", 0)


def test_data_of_no_task_of_the_run_are_named(tmp_path: Path, prepared: cases.Prepared) -> None:
    data_sets = {"segmentation": "photos"}
    run = replace(cases.EDTR, data_sets=data_sets, prepared=prepared.edtr, out=tmp_path / "run")
    with pytest.raises(ValueError, match="for the tasks classification of this run, found 'segmentation'"):
        EdtrTrainer(run)
    with pytest.raises(ValueError, match="for the tasks classification of this run, found 'segmentation'"):
        edtr_preparing.prepare(edtr_preparing.Config(data_sets=data_sets, out=tmp_path / "run"))
    with pytest.raises(ValueError, match="for the tasks restoration, classification of this run"):
        trainer(tmp_path / "run", prepared.unirestore, tasks=["restoration", "classification"], data_sets=data_sets)
    with pytest.raises(ValueError, match="`data_sets` should be left out of a run of one task"):
        Sr4irTrainer(replace(cases.SR4IR, data_sets=data_sets, out=tmp_path / "run"))
    lonely = {**cases.EDTR_DATA, "data_sets": {"classification": "photos"}, "lq": tmp_path, "out": tmp_path / "run"}
    with pytest.raises(ValueError, match="`lq` should be for a task that reads `root`, found none of classification"):
        edtr_preparing.prepare(edtr_preparing.Config(**lonely))
    assert not (tmp_path / "run").exists()
