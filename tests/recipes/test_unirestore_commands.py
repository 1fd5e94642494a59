"""The commands of UniRestore: its stages, preparation, restoration of folders, and what they refuse."""

import itertools
import json
import re
import shutil
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.utils import save_image

from examples.common.data.folder import read_image
from examples.common.engine.evaluation import load_recognizer
from examples.common.seeds import derive_seed
from examples.experiments import unirestore as experiment
from examples.unirestore import prepare as preparing
from examples.unirestore import restore as restoring
from examples.unirestore import train as training
from examples.unirestore.config import TASKS
from examples.unirestore.data import data_of, mixed
from restoreloss import Alternation, Denoiser, NoiseSchedule
from restoreloss.generators import standard_normal
from tests.helpers.restorers import uniform
from tests.recipes.cases import assert_same_weights
from tests.recipes.unirestore_runs import SMALL, TINY, trainer


def test_a_folder_is_restored_for_a_task(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    save_image(uniform(3, 20, 33), images / "a.png")
    save_image(uniform(3, 7, 5, seed=1), images / "deep" / "b.jpg")
    (images / "broken.png").write_bytes(b"no image")

    def restore(run: str, out: str, *options: str) -> list[Tensor]:
        restoring.main([str(folder / run), str(images), str(tmp_path / out), "--device", "cpu", *options])
        return [read_image(tmp_path / out / name) for name in ("a.png", "deep/b.png")]

    with caplog.at_level("INFO"):
        plain = restore("stage2", "plain")
    assert "broken.png skipped" in caplog.text and "2 images restored" in caplog.text
    assert [tuple(image.shape) for image in plain] == [(3, 20, 33), (3, 7, 5)]
    model, smallest = restoring.load_run(folder / "stage2")
    assert smallest == 0
    generator = torch.Generator().manual_seed(derive_seed(0, zlib.crc32(b"a.png")))
    wanted = model.restore(read_image(images / "a.png")[None], "restoration", generator=generator, smallest=0)[0]
    torch.testing.assert_close(plain[0], wanted, atol=0.51 / 255, rtol=0)

    # the prompt that came later, on the run that it was trained on
    prompts = str(folder / "add-task" / "prompts.safetensors")
    added = restore("stage2", "added", "--prompts", prompts, "--task", "detection")
    assert all(map(torch.equal, added, restore("add-task", "own", "--task", "detection")))
    for option, value in (("--steps", "4"), ("--smallest", "40"), ("--seed", "1")):
        assert not any(map(torch.equal, plain, restore("stage2", option, option, value)))
    restore("stage1", "first")
    tiles = restore("stage2", "tiles", "--tile", "32", "--overlap", "8")
    assert not any(map(torch.equal, plain[:1], tiles[:1])) and torch.equal(plain[1], tiles[1])
    # the noise of an image is its own, whatever lies beside it
    shutil.copy(images / "a.png", images / "0.png")
    assert all(map(torch.equal, plain, restore("stage2", "more")))
    assert not torch.equal(read_image(tmp_path / "more" / "0.png"), plain[0])
    shutil.copytree(folder / "prepared" / "prior", tmp_path / "prior")
    assert all(map(torch.equal, plain, restore("stage2", "moved", "--prior", str(tmp_path / "prior"))))
    schedule = tmp_path / "prior" / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"beta_end": 0.02}))
    with pytest.warns(UserWarning, match="was trained with the prior"):
        restore("stage2", "other", "--prior", str(tmp_path / "prior"))


def test_restoring_enlarges_as_the_run_did(tmp_path: Path, folder: Path) -> None:
    trainer(tmp_path / "run", folder, steps=1, smallest=32, steps_of_diffusion=2, cfrm_weights=[1.0, 1.0]).run()
    model, smallest = restoring.load_run(tmp_path / "run")
    assert smallest == 32 and model.timesteps() == [999, 499]


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("stage2", ["--task", "detection"], "`task` should be one of .*restoration.*, found 'detection'"),
        ("stage2", ["--prompts", "nowhere"], "found no such file"),
        ("other", ["--prompts", "{0}/add-task/prompts.safetensors"], "fingerprint"),
        ("stage1", ["--task", "nonsense"], "`task` should be one of restoration, found 'nonsense'"),
        ("stage2", ["--steps", "-1"], "`steps` should be a whole number of at least 0 and at most 1000, found -1"),
        ("stage2", ["--smallest", "-1"], "`smallest` should be at least 0, found -1"),
        ("stage2", ["--prior", "{0}"], "should hold vae/"),
    ],
)
def test_what_cannot_be_restored_is_named(
    run: str, options: list[str], message: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (folder / "other").exists():
        shutil.copytree(folder / "stage2", folder / "other")
        weights = load_file(folder / "other" / "unirestore.safetensors")
        weights["tfa.levels.0.merge.weight"] += 1
        save_file(weights, folder / "other" / "unirestore.safetensors")
    options = [option.format(folder) for option in options]
    with pytest.raises(SystemExit):
        restoring.main([str(folder / run), str(tmp_path), str(tmp_path / "out"), "--device", "cpu", *options])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_stages_are_run_from_the_command_line(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [f"--{name}={str(value).lower()}" for name, value in SMALL.items()]
    small += ["--steps=2", "--save_every=1", "--unseen=false", "--control_channels=8", "--cfrm_blocks=[1,1]"]
    small += [f"--prepared={folder / 'prepared'}"]

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train", *arguments, *small])
        training.main()

    run("stage1", f"--out={tmp_path / 'one'}")
    assert "restoration_psnr" in capsys.readouterr().out
    assert_same_weights(tmp_path / "one", folder / "stage1")
    (tmp_path / "more.yaml").write_text(f"after: {folder / 'stage2'}\nprompt_lr: 0.5\n")
    run("add-task", "detection", f"--out={tmp_path / 'two'}", f"--config={tmp_path / 'more.yaml'}", "--prompt_lr=1e-2")
    assert "detection_judge" in capsys.readouterr().out
    assert_same_weights(tmp_path / "two", folder / "add-task")
    for arguments, message in (
        (["stage3"], "stage3"), (["add-task", "painting", f"--after={folder / 'stage2'}"], "found 'painting'"),
        (["stage2"], "`after` should be a run of the stage before stage2"), (["add-task"], "`name` should be given"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            run(*arguments, f"--out={tmp_path / 'none'}")
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()


def test_preparing_is_a_command_that_goes_on(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [f"--{name}={str(value).lower()}" for name, value in SMALL.items()]
    monkeypatch.setattr(sys, "argv", ["prepare", f"--out={tmp_path}", "--tasks=[classification]", "--steps=1",
                                      "--train_prior=false", *small])  # fmt: skip
    preparing.main()
    assert {path.name for path in tmp_path.iterdir()} == {"classification_hq", "classification_judge"}
    hq, judge = (load_recognizer(tmp_path / f"classification_{name}").state_dict() for name in ("hq", "judge"))
    assert any(not torch.equal(value, judge[name]) for name, value in hq.items())
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    preparing.main()
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    for changes, message in (({"tasks": []}, "at least one task"), ({"task": "detection"}, "`tasks` should")):
        with pytest.raises(ValueError, match=message):
            preparing.prepare(replace(preparing.Config(out=tmp_path / "none", **SMALL), **changes))


def test_the_prior_is_of_the_images_of_all_tasks(folder: Path) -> None:
    config = preparing.Config(out=folder / "prepared", **SMALL)
    train, test = mixed(["restoration", "classification"], config)
    parts = [data_of(task, config) for task in ("restoration", "classification")]
    assert len(train) == 16 and len(test) == 8
    for number, (part, place) in {0: (0, 0), 1: (1, 2), 4: (0, 2), 5: (1, 0), 7: (1, 1)}.items():
        one, other = test[number], parts[part][1][place]
        assert one is not None and other is not None and torch.equal(one[0], other[0])
    vae = AutoencoderKL.from_pretrained(folder / "prepared" / "prior", subfolder="vae")
    assert len(vae.config.block_out_channels) == 3


@pytest.mark.slow
def test_the_experiment_runs_each_kind_of_name_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = replace(TINY, out=tmp_path, steps=1, unseen=True, **{**SMALL, "train_count": 16})
    study = experiment.Experiment(
        tmp_path, base, prior_steps=1, prior_images=16, prepare_steps=1, tasks=list(TASKS[1:4])
    )
    names = ("lq", "pir", "tir", "pir_tir", "unirestore", "one_prompt", "epsilon", "no_diffusion")
    found = {name: study.run(name, 1) for name in names}
    study.new_task(1)
    errors = study.one_step([1, 2])
    steps = [0]
    monkeypatch.setattr(Alternation, "step", lambda *_: steps.__setitem__(0, steps[0] + 1))
    assert {name: study.run(name, 1) for name in names} == found  # all done
    study.new_task(1)
    assert steps == [0]
    parameters = {
        name: int((tmp_path / "table" / name / "seed1" / "parameters.json").read_text())
        for name in ("unirestore", "one_prompt", "no_tfa")
    }
    assert parameters["unirestore"] - parameters["one_prompt"] == 2 * study_width(tmp_path)
    lq, hq = (
        json.loads((tmp_path / "new_task" / name / "seed1" / "results.json").read_text()) for name in ("lq", "hq")
    )
    assert "detection_psnr" not in hq and lq["detection_psnr"] > 0
    assert hq["detection_score"] == lq["detection_score_on_hr"]
    new = {path.parent.name for path in (tmp_path / "new_task").glob("*/seed1")}
    assert new == {"lq", "hq", "tir", "prompt", *(f"prompt_of_{task}" for task in TASKS[:3])}
    assert int((tmp_path / "new_task" / "prompt" / "seed1" / "parameters.json").read_text()) == study_width(tmp_path)

    monkeypatch.setattr(sys, "argv", ["experiment", "tables", f"--out={tmp_path}"])
    experiment.main()
    text = capsys.readouterr().out
    for row in (*(f"| `{name}`" for name in (*names, "no_tfa")), "| `one_prompt` - `unirestore`", "### new_task",
                "| `prompt_of_restoration` - `prompt`", "| `prompt`"):  # fmt: skip
        assert row in text, row
    rows = study.latents().splitlines()
    cells = [float(cell) for row in rows if "`no_tfa`" in row for cell in row.strip("| ").split("|")[2:]]
    assert len(rows) == 6 and len(cells) == 6 and min(cells) >= 0
    assert "| `epsilon` |" in errors and "| `v_prediction` - `epsilon` |" in errors
    priors = [tmp_path / "one_step" / name for name in ("epsilon/seed1", "v_prediction/seed1", "epsilon/seed2")]
    first, same, other = (load_file(prior / "autoencoder.safetensors") for prior in priors)
    assert all(torch.equal(first[key], same[key]) for key in first)  # of one seed what they predict differs alone
    assert any(not torch.equal(first[key], other[key]) for key in first)
    monkeypatch.setattr(sys, "argv", ["experiment", "sheet", f"--out={tmp_path}"])
    experiment.main()
    assert Path(capsys.readouterr().out.strip()).stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["experiment", "table", f"--out={tmp_path}", "--names", "nothing"])
    with pytest.raises(SystemExit):
        experiment.main()
    assert "found nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_words_are_restored_for_people_and_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    small = ["--steps=1", "--batch=2", "--test_count=4", "--prior_steps=1", "--prior_images=16", "--seeds=1"]
    names = ["lq", "pir_tir", "unirestore"]
    monkeypatch.setattr(sys, "argv", ["experiment", "words", f"--out={tmp_path}", *small, "--names", *names])
    experiment.main()
    found = json.loads((tmp_path / "table/unirestore/seed1/results.json").read_text())
    for task, prompt in itertools.product(("restoration", "reading"), repeat=2):
        assert f"{task}_by_{prompt}_psnr" in found
    assert {"reading_score", "reading_judge", "reading_by_restoration_score"} < found.keys()


def test_one_step_errors_are_those_of_a_predicted_noise_of_zero() -> None:
    schedule = NoiseSchedule.scaled_linear()
    prior = SimpleNamespace(encoder=lambda x: x, denoiser=Denoiser(lambda x, t: torch.zeros_like(x), schedule))
    images = uniform(2, 3, 8, 8)
    clean = 2 * images - 1
    noise = standard_normal(clean, torch.Generator().manual_seed(0)).double()
    for t, error in experiment._one_step_errors(prior, images).items():  # type: ignore[arg-type]
        kept = float(schedule.alphas_cumprod[int(t)])
        wanted = (1 - kept) / kept * noise.square().mean() / clean.double().var()
        assert error == pytest.approx(float(wanted), rel=1e-3)


def study_width(folder: Path) -> int:
    """Of a prompt."""
    return len(load_file(folder / "new_task" / "prompt" / "seed1" / "prompts.safetensors")["detection"])


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "stage": ("stage2", {"stage": "stage3"}, "`stage` should be one of stage1, stage2, add-task, found 'stage3'"),
    "task": ("stage2", {"tasks": ["restoration", "paint"]}, "one of restoration, .*, reading, found 'paint'"),
    "new task": ("add-task", {"name": "paint"}, "one of restoration, .*, reading, found 'paint'"),
    "task twice": ("stage2", {"tasks": ["restoration"] * 2}, "each once, found"),
    "no task": ("stage2", {"tasks": []}, r"at least one, each once, found \[\]"),
    "known task": ("add-task", {"name": "segmentation"}, "new task, found 'segmentation', which is one of"),
    "name": ("stage2", {"name": "detection"}, "`name` should be given for 'add-task' and no other stage"),
    "no name": ("add-task", {"name": None}, "`name` should be given for 'add-task'"),
    "no start": ("stage2", {"after": None}, "`after` should be a run of the stage before stage2, found None"),
    "wrong start": ("stage2", {"after": "stage2"}, "should be a finished run of stage1, found .*which is stage2"),
    "early start": ("add-task", {"after": "stage1"}, "should be a finished run of stage2 or add-task, found .* stage1"),
    "no run": ("stage2", {"after": "prepared"}, "`after` should be a finished run of stage1, found .*, which is none"),
    "another gate": ("add-task", {"gate": "sigmoid"}, "`gate` should be 'softmax', as in .*stage2, found 'sigmoid'"),
    "other sizes": ("stage2", {"control_channels": 16}, "should hold the weights of this UniRestore"),
    "other features": ("stage2", {"cfrm": False}, "should hold the weights of this UniRestore"),
    "adapter": ("stage2", {"adapter": None}, "`adapter` should be there after stage 1"),
    "prompts": ("add-task", {"adapter": "several"}, "`adapter` should be 'prompts', as in .*, found 'several'"),
    "steps of before": ("add-task", {"steps_of_diffusion": 4}, "`steps_of_diffusion` should be 1, as in"),
    "size of before": ("add-task", {"smallest": 64}, "`smallest` should be 0, as in"),
    "new task unread": (
        "add-task", {"prepared": None, "prior": "prepared/prior", "tasks": ["restoration"]},
        "`prepared` should be a folder of examples.unirestore.prepare, found None",
    ),
    "detection first": ("stage1", {"tasks": ["restoration", "detection"], "train_tasks": ["detection"]}, "of one size"),
    "seen": ("stage2", {"degradation": "unseen_corruptions", "unseen": True}, "`unseen` should be false"),
    "network after": ("stage2", {"network": "edsr-small"}, "`after` should be left out for `network` edsr-small"),
    "prior nowhere": ("stage1", {"prior": "nowhere"}, "should be in the folder .*nowhere, or on the hub"),
    "one image": ("stage1", {"images": "stage1/tb"}, "at least two images, found 0"),
    "weight": ("stage2", {"task_weights": {"paint": 1.0}}, "`task_weights` should be for .*, found 'paint'"),
    "training": ("stage2", {"train_tasks": ["detection"]}, "`train_tasks` should be of `tasks`"),
    "training a new task": ("add-task", {"train_tasks": ["restoration"]}, "`train_tasks` should be left out"),
    "a network's task": ("add-task", {"network": "edsr-small"}, "`network` should be left out of 'add-task'"),
    "a prompt at rest": ("add-task", {"restored_too": 1.0}, "`restored_too` should be left out of 'add-task'"),
    "small photographs": ("stage1", {"size": 600}, "`images` should be a folder of photographs for `size` 600"),
    "training first": ("stage1", {"train_tasks": ["restoration", "classification"]}, "`train_tasks` should be one"),
    "nothing to train first": ("stage1", {"tasks": ["classification"]}, "`tasks` should have 'restoration'"),
    "nobody to please": ("stage2", {"tasks": ["classification"], "restored_too": 1.0}, "needs the task 'restoration'"),
    "no references": ("stage2", {"prepared": None}, "`prepared` should be a folder of examples.unirestore.prepare"),
    "none of the task": ("stage2", {"prepared": "stage1"}, "should be a finished run"),
    "no prior": ("stage1", {"prepared": None}, "`prior` should be given, or `prepared`"),
    "wrong prior": ("stage1", {"prior": "stage1"}, "should hold vae/ as diffusers saves it"),
    "steps": ("stage2", {"steps_of_diffusion": -1}, "`steps_of_diffusion` should be at least 0, found -1"),
    "blocks": ("stage1", {"cfrm_blocks": [1, 1, 9]}, "first 2 levels"),
    "weights": ("stage1", {"cfrm_weights": [0.1]}, r"`cfrm_weights` should be 2 numbers, found \[0.1\]"),
    "scale": ("stage2", {"scale": 4}, "`scale` should be 1: images are restored at their own size"),
    "batch": ("stage2", {"batch": 0}, "`batch` should be at least 1, found 0"),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "changes", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_named_and_leave_no_folder(
    stage: str, changes: dict[str, Any], message: str, tmp_path: Path, folder: Path
) -> None:
    for name in ("after", "prepared", "prior", "images"):
        if isinstance(changes.get(name), str):
            changes = {**changes, name: folder / changes[name]}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", folder, stage, **changes)
    assert not (tmp_path / "run").exists()
