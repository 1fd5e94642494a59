"""Is a run or a folder in a wrong role refused before the first step, are other data than the run's tested whole?"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.utils import save_image

from examples.common.data.datasets import FolderData
from examples.common.data.degrade import degradation
from examples.common.data.object_boxes import rtts
from examples.common.data.options import DataOptions
from examples.common.data.task_data import dataset
from examples.common.engine.command_line import _of_the_run_to_evaluate
from examples.common.engine.evaluation import usable
from examples.edtr.train import Trainer as EDTRTrainer
from examples.sr4ir import oracles
from examples.sr4ir.methods import METHODS, check_trained_restorer
from examples.sr4ir.train import Trainer
from examples.unirestore.checks import check
from examples.unirestore.data import data_of
from tests.recipes import cases
from tests.recipes.unirestore_runs import trainer as unirestore


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains its restorer and not its recognizer."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    Trainer(replace(cases.SR4IR, out=out, method="pretrain", steps=1)).run()
    return out


def make(root: Path, count: int, *, named: str = "{:02}.png") -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(count):
            save_image(torch.rand(3, 36, 36), root / name / named.format(number))
    return root


def test_what_a_run_did_not_train_is_not_taken_from_it(
    prepared: cases.Prepared, pretrain: Path, tmp_path: Path
) -> None:
    oracle = prepared.oracle("classification")
    with pytest.raises(ValueError, match=r"`s_weights` should be a run that trains a restorer, found one of 'oracle'"):
        Trainer(replace(cases.SR4IR, out=tmp_path / "a", s_weights=oracle))
    for changes in ({"judge": pretrain}, {"fixed_hr": pretrain}, {"start": "hr", "h_weights": pretrain}):
        with pytest.raises(ValueError, match=r"should have trained a recognizer, found a run of 'pretrain'"):
            Trainer(replace(cases.SR4IR, out=tmp_path / "b", **changes))  # type: ignore[arg-type]
    Trainer(replace(cases.SR4IR, out=tmp_path / "c", s_weights=pretrain, judge=oracle))
    with pytest.raises(ValueError, match=r"`pre` should be a run that trains a restorer, found one of 'oracle'"):
        EDTRTrainer(replace(cases.EDTR, out=tmp_path / "d", prepared=prepared.edtr, pre=oracle))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_whether_its_restorer_is_trained(method: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"method: {method}")
    refused = method in ("oracle", "l_to_t", "l_to_t_3x")
    with pytest.raises(ValueError, match=f"found one of '{method}'") if refused else nullcontext():
        check_trained_restorer(tmp_path, "pre")


def test_networks_that_nothing_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`h_weights` should be left out but for `start` 'hr', found nowhere"):
        Trainer(replace(cases.SR4IR, out=tmp_path / "run", h_weights=Path("nowhere")))
    with pytest.raises(ValueError, match="`foreign` should be left out but for fixed_foreign, found nowhere"):
        Trainer(replace(cases.SR4IR, out=tmp_path / "run", foreign=Path("nowhere")))


def test_weights_of_other_classes_are_refused(prepared: cases.Prepared, tmp_path: Path) -> None:
    data: Any = {"data": "class_folders", "root": make(tmp_path / "own", 4)}
    with pytest.raises(
        ValueError, match="should be a network for classification with 2 classes, as the data have them"
    ):
        Trainer(
            replace(cases.SR4IR, out=tmp_path / "run", start="hr", h_weights=prepared.oracle("classification"), **data)
        )


def test_a_judge_of_the_training_is_told(
    prepared: cases.Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oracle = prepared.oracle("classification")
    Trainer(replace(cases.SR4IR, out=tmp_path / "run", start="hr", h_weights=oracle, judge=oracle))
    assert "takes part in the training: it is no independent one" in caplog.text
    caplog.clear()
    Trainer(replace(cases.SR4IR, out=tmp_path / "other", fixed_hr=oracle, judge=oracle))
    assert not caplog.text


def test_a_root_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`data` should be on disk for `root`, found 'generated'"):
        dataset(DataOptions(root=tmp_path), "train", 1)
    make(tmp_path / "own", 2)
    options = DataOptions(data="class_folders", root=tmp_path / "own", lq=tmp_path / "own" / "lq", scale=1)
    with pytest.raises(ValueError, match="`lq` should lie outside of `root`"):
        dataset(options, "train", 1)


def test_other_folders_than_those_of_the_run_are_tested_whole(tmp_path: Path) -> None:
    own, other = make(tmp_path / "own", 10), make(tmp_path / "other", 7)
    data: Any = {"data": "class_folders", "size": 32, "batch": 4}
    run = replace(cases.SR4IR, out=tmp_path / "run", steps=1, root=own, **data)
    Trainer(run).run()
    same = Trainer(replace(run, out=tmp_path / "same", evaluate=tmp_path / "run"))
    assert len(same.test_data) == 2
    elsewhere = Trainer(replace(run, out=tmp_path / "elsewhere", evaluate=tmp_path / "run", root=other))
    assert len(elsewhere.test_data) == 14
    assert 0 <= elsewhere.run()["score"] <= 100
    # not where a network that reads them was trained on them
    Trainer(replace(run, out=tmp_path / "reader", method="oracle", root=other)).run()
    read = replace(run, out=tmp_path / "read", evaluate=tmp_path / "run", root=other, judge=tmp_path / "reader")
    assert len(Trainer(read).test_data) == 2


def test_other_images_than_those_of_unirestore_are_tested_whole(tmp_path: Path, prepared: cases.Prepared) -> None:
    own, other = make(tmp_path / "own", 10) / "cat", make(tmp_path / "other", 7) / "cat"
    data: Any = {"images": own, "size": 32, "tasks": ["restoration"], "test_count": 10, "steps": 1}
    stage1 = unirestore(tmp_path / "stage1", prepared.unirestore, "stage1", **data)
    stage1.run()
    stage2 = {**data, "images": other, "after": tmp_path / "stage1"}
    unirestore(tmp_path / "run", prepared.unirestore, "stage2", **stage2).run()

    def tested(images: Path) -> int:
        changes = {**stage2, "images": images, "evaluate": tmp_path / "run"}
        run = unirestore(tmp_path / f"of_{images.parent.name}", prepared.unirestore, "stage2", **changes)
        return len({file for file, _ in run.readers["restoration"].test_data.crops})  # type: ignore[attr-defined]

    assert tested(other) == tested(own) == 1  # stage 1 has learned from the others
    assert tested(make(tmp_path / "third", 4) / "cat") == 4


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ([], {"root", "lq", "data", "data_sets", "degradation"}),
        (["--root", "other"], {"root", "data", "data_sets", "degradation"}),
        (["--root", "own"], {"root", "lq", "data", "data_sets", "degradation"}),
        (["--data", "label_file"], {"data", "degradation"}),
        (["--data=class_folders"], {"root", "lq", "data", "data_sets", "degradation"}),
        (["--degradation", "mixture_b"], {"root", "data", "data_sets", "degradation"}),
        (["--lq", "other_lq"], {"root", "data", "data_sets", "degradation"}),
        (["--config", "other.yaml"], {"root", "data", "data_sets", "degradation"}),
        (["--config", "list.yaml"], {"root", "lq", "data", "data_sets", "degradation"}),
    ],
)
def test_what_an_evaluation_is_given_takes_the_place_of_the_runs(
    given: list[str], left: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    settings = {
        "root": str(tmp_path / "own"),
        "lq": "own_lq",
        "data": "class_folders",
        "data_sets": {},
        "degradation": "bicubic",
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    (tmp_path / "other.yaml").write_text("root: other\nsteps: 3\n")
    (tmp_path / "list.yaml").write_text("[root, other]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--evaluate", str(tmp_path), *given])
    assert set(_of_the_run_to_evaluate(set(settings))) == left


def test_what_changes_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for changes in ({"blur": 1.0}, {"noise": 5.0}, {"jpeg": 50}, {"degradation": "none"}, {"lq": Path("lq")}):
        degradation(DataOptions(**{"scale": 1, **changes}), 1)  # type: ignore[arg-type]
    assert not caplog.text
    degradation(DataOptions(scale=1), 1)
    assert "`degradation` 'bicubic' with a `scale` of 1 leaves the images as they are" in caplog.text


def test_an_image_of_each_size_is_tried(tmp_path: Path) -> None:
    for number, side in enumerate((32, 32, 40, 48, 40)):
        save_image(torch.rand(3, side, side), tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    files: list[tuple[Path, int | Path]] = [(path, 0) for path in sorted(tmp_path.glob("*.png"))]
    data = FolderData(
        "classification", ["a"], files, lambda label, _: label, lambda image, label: (image / 255.0, label)
    )
    few = usable(data, "classification")
    assert [tuple(few[n][0].shape[1:]) for n in range(len(few))] == [(32, 32), (40, 40), (48, 48)]  # type: ignore[index]


def test_edtr_says_before_the_first_step_what_it_cannot_take(prepared: cases.Prepared, tmp_path: Path) -> None:
    for changes, message in (
        ({"scale": 4, "degradation": "bicubic"}, "`scale` should be 1, as EDTR keeps the size, found 4"),
        ({"batch": 1}, "`batch` should be at least 2 for each process, found 1"),
    ):
        with pytest.raises(ValueError, match=message):
            EDTRTrainer(replace(cases.EDTR, out=tmp_path / "run", prepared=prepared.edtr, **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_rtts_says_how_it_is_divided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"`root` should have a test\.txt beside trainval\.txt, found none"):
        rtts(tmp_path, "test")
    (lists / "trainval.txt").unlink()
    (tmp_path / "JPEGImages").mkdir()
    save_image(torch.rand(3, 32, 32), tmp_path / "JPEGImages" / "a.png")
    with pytest.raises(ValueError, match="found none to test"):
        rtts(tmp_path, "test")
    assert "has no list of training images: every fifth image is for the test" in caplog.text
    assert "1 images skipped, a first: no image or no annotation of it" in caplog.text


# what a review of UniRestore's options found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task_weights": {"detection": 1.0}},
            "`task_weights` should be for tasks of this run, restoration, .*'detection'",
        ),
        ({"task_weights": {"restoration": -5.0}}, "`task_weights` should be at least 0 and finite, found -5.0"),
        ({"task_weights": {"restoration": float("nan")}}, "`task_weights` should be at least 0 and finite, found nan"),
        ({"tasks": ["classification"], "images": Path("images")}, "`images` should be given for the task restoration"),
        ({"tasks": ["classification"], "paired_tests": {"rain": "lol:DATA"}}, "`paired_tests` should be given for the"),
        ({"paired_tests": {"restoration": "lol:DATA"}}, "`paired_tests` should have names that are no tasks"),
        ({"data_sets": {"restoration": "class_folders:DATA"}}, "images to restore are those of `images`"),
    ],
)
def test_options_of_unirestore_that_would_do_nothing_or_harm_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(cases.UNIRESTORE, **{"tasks": ["restoration"], **changes}))


def test_pairs_to_test_on_are_tried_before_the_first_step(prepared: cases.Prepared, tmp_path: Path) -> None:
    pairs = {"rain": f"lol:{tmp_path / 'nowhere'}"}
    with pytest.raises(ValueError, match="should hold images as lol lays them out, found none"):
        unirestore(tmp_path / "run", prepared.unirestore, "stage1", paired_tests=pairs)
    assert not (tmp_path / "run").exists()


def test_what_lacks_a_degraded_image_moves_nothing_from_the_test_to_the_training(tmp_path: Path) -> None:
    for number in range(24):
        for name in ("gt", "lq"):
            (tmp_path / name).mkdir(exist_ok=True)
            save_image(torch.rand(3, 40, 40), tmp_path / name / f"{number:02}.png")
    prior = data_of("restoration", replace(cases.UNIRESTORE, images=tmp_path / "gt", size=32))[0]
    (tmp_path / "lq" / "05.png").unlink()
    config = replace(cases.UNIRESTORE, images=tmp_path / "gt", images_lq=tmp_path / "lq", size=32, test_count=3)
    _, test = data_of("restoration", config)
    assert not {file for file, _ in test.crops} & set(prior.sources)  # type: ignore[attr-defined]


def test_a_judge_of_generated_data_has_images_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, int | None]] = []

    class Noted:
        def __init__(self, config: Any) -> None:
            seeds.append((config.seed, config.data_seed))

        def run(self) -> None: ...

    monkeypatch.setattr(oracles, "Trainer", Noted)
    for data_seed in (None, 5):
        oracles.train_oracles(replace(cases.SR4IR, out=tmp_path, data_seed=data_seed), ["classification"])
    assert seeds == [(1, None), (1001, None), (1, 5), (1001, 1005)]
