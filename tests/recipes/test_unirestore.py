"""Is UniRestore the diffusion model it begins as, is each stage its equations, and is a task nothing but a prompt?"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.utils import save_image

from examples.common.data.folder import read_picture
from examples.common.data.photos import HELD_OUT, load_photo
from examples.common.engine.batches import chance
from examples.common.engine.evaluation import Judges, load_recogniser
from examples.common.networks.latent_diffusion import load_latent_diffusion, scheduler
from examples.experiments import unirestore as experiment
from examples.unirestore import prepare as preparing
from examples.unirestore import restore as restoring
from examples.unirestore import train as training
from examples.unirestore.adapters import AdapterName, PerTask, build_adapters
from examples.unirestore.config import TASKS, Config
from examples.unirestore.data import data_of, mixed
from examples.unirestore.train import Batch, Part, Trainer
from restoreloss import Alternation, NoiseSchedule
from restoreloss.restorers import UniRestore
from tests.helpers.processes import ROOT
from tests.helpers.restorers import answers, learned, networks, normal, stable_diffusion, uniform

ADAPTERS: tuple[AdapterName, ...] = get_args(AdapterName)
SMALL: dict[str, Any] = {
    "batch": 2, "train_count": 8, "test_count": 4, "size": 24, "severities": [1, 2], "cpu": True,
}  # fmt: skip
TINY = Config(out=Path(), steps=2, save_every=1, control_channels=8, cfrm_blocks=[1, 1], unseen=False, **SMALL)
STAGES: dict[str, dict[str, Any]] = {
    "stage1": {"stage": "stage1"}, "stage2": {"stage": "stage2"}, "add-task": {"stage": "add-task", "name": "detection"}
}  # fmt: skip


# the model


# a task is a prompt


def test_folders_of_stable_diffusion_are_read(tmp_path: Path) -> None:
    model = stable_diffusion()
    vae, unet = networks(model)
    velocity = DDPMScheduler.from_config(scheduler().config, prediction_type="v_prediction")
    for name, part in (("vae", vae), ("unet", unet), ("scheduler", velocity)):
        part.save_pretrained(tmp_path / "sd" / name)
    save_file({"prompt": model.prompt.clone()}, tmp_path / "sd" / "prompt.safetensors")
    learned(model).save_trained(tmp_path / "trained.safetensors")
    prior = load_latent_diffusion(tmp_path / "sd")
    again = UniRestore(prior, cfrm_blocks=[1, 1, 1], control_channels=8, tasks=["more"])
    again.load_trained(tmp_path / "trained.safetensors")
    assert again.schedule.prediction_type == "v_prediction" and set(again.tasks) == {"more", "look", "classify"}
    model.schedule = again.schedule
    images, noise = uniform(1, 3, 64, 64), normal(1, 4, 8, 8)
    torch.testing.assert_close(model(images, "look", noise=noise), again(images, "look", noise=noise))
    missing = {"vae": "vae/", "unet": "unet/", "scheduler": "scheduler/", "prompt.safetensors": "hidden states"}
    for part, found in missing.items():
        shutil.copytree(tmp_path / "sd", tmp_path / part)
        path = tmp_path / part / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(ValueError, match=f"should (hold|be) .*{found}"):
            load_latent_diffusion(tmp_path / part)


# what Table 5 compares


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_is_used_alike(name: AdapterName, tmp_path: Path) -> None:
    tasks, skips, widths = ["look", "classify", "segment"], (8, 6), (5, 7)
    torch.manual_seed(0)
    adapters = build_adapters(name, skips, widths, tasks, "softmax").double()
    assert adapters.tasks == tuple(tasks) and len(adapters.levels) == 2
    given = [
        (normal(4, 5, 3, 4).double(), normal(4, 8, 3, 4, seed=1).double()),
        (normal(4, 7, 6, 8).double(), normal(4, 6, 6, 8, seed=1).double()),
    ]

    def run(named: Any, rows: slice = slice(None)) -> list[Tensor]:
        parts = [(decoded[rows], skip[rows]) for decoded, skip in given]
        prompt, found = adapters.prompt(named, len(parts[0][0])), []
        for level, (decoded, skip) in zip(adapters.levels, parts, strict=True):
            decoded, prompt = level(decoded, skip, prompt)
            found.append(decoded)
        return found

    for decoded, found in zip(given, run("look"), strict=True):
        assert torch.equal(decoded[0], found)  # the identity at the start
    learned(adapters, 0.3)
    mixed = ["segment", "look", "segment", "classify"]
    together = run(mixed)
    for number, task in enumerate(mixed):
        for one, alone in zip(together, run(task, slice(number, number + 1)), strict=True):
            torch.testing.assert_close(one[number : number + 1], alone)
    sum(found.mean() for found in together).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapters.parameters())

    saved = adapters.state_dict()
    assert len({value.data_ptr() for value in saved.values()}) == len(saved) == len(list(adapters.parameters()))
    save_file(saved, tmp_path / "adapters.safetensors")
    torch.manual_seed(1)
    again = build_adapters(name, skips, widths, tasks, "softmax").double()
    again.load_state_dict(load_file(tmp_path / "adapters.safetensors"))
    adapters = again
    assert all(map(torch.equal, run(mixed), together))


def test_a_task_with_adapters_of_its_own_learns_alone() -> None:
    adapters = learned(build_adapters("several", (8,), (5,), ["look", "classify"], "sigmoid"))
    assert isinstance(adapters, PerTask)
    decoded, _ = adapters.levels[0](normal(2, 5, 3, 4), normal(2, 8, 3, 4), adapters.prompt("look", 2))
    decoded.mean().backward()
    reached = {name.split(".")[1] for name, p in adapters.named_parameters() if p.grad is not None}
    assert reached == {"look"}
    assert all(level.gate == "sigmoid" for tfa in adapters.by_task.values() for level in tfa.levels)


def test_parameters_are_as_many_as_the_paper_counts() -> None:
    counts = {}
    with torch.device("meta"):
        for name in ADAPTERS:
            adapters = build_adapters(name, (512, 256, 128), (512, 512, 512), TASKS[:3], "softmax")
            counts[name] = round(sum(p.numel() for p in adapters.parameters()) / 1e6, 2)
    # Table 5 has 21.03, 21.01, 63.03 and 65.17; of the last no sizes are given
    assert counts == {"prompts": 21.03, "one_prompt": 21.03, "several": 63.09, "convolutions": 59.55}


# the trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of prepared networks, and of a run of each stage: "prepared", "stage1", "stage2", "add-task"."""
    folder = tmp_path_factory.mktemp("unirestore")
    preparing.prepare(preparing.Config(out=folder / "prepared", steps=2, prior_steps=2, **SMALL))
    for stage in STAGES:
        trainer(folder / stage, folder, stage).run()
    return folder


def trainer(out: Path, folder: Path, stage: str = "stage2", /, **changes: Any) -> Trainer:
    before = {"stage1": None, "stage2": folder / "stage1", "add-task": folder / "stage2"}
    start = {"prepared": folder / "prepared", "after": before[stage]}
    return Trainer(replace(TINY, **{"out": out, **start, **STAGES[stage], **changes}))


def first_batch(run: Trainer) -> Batch:
    return run.batch(*next(run.read(0, 1)), 0, run.config.steps)


def logged(out: Path) -> dict[str, float]:
    return dict(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]))


def alike(one: Path, other: Path) -> bool:
    """The same weights."""
    values = load_file(one / "unirestore.safetensors")
    others = load_file(other / "unirestore.safetensors")
    return set(values) == set(others) and all(torch.equal(value, others[name]) for name, value in values.items())


def alphas(t: Any) -> tuple[Tensor, Tensor]:
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t]
    return tuple(root.float().view(-1, 1, 1, 1) for root in (abar.sqrt(), (1 - abar).sqrt()))  # type: ignore[return-value]


@pytest.mark.parametrize("changes", [{}, {"cfrm": False}, {"cfrm_weights": [0.5, 3.0]}])
def test_stage_1_is_its_equations(changes: dict[str, Any], tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, "stage1", batch=4, size=29, **changes)
    model = learned(run.model)
    vae, unet = networks(model)
    batch = first_batch(run)
    copies = [torch.Generator().set_state(generator.get_state()) for generator in batch.chance]
    terms = run._first_terms(batch)

    (part,) = batch.parts
    assert part.task == "restoration" and part.clean.shape == (4, 3, 29, 29)
    assert all(not torch.equal(one, other) for one, other in zip(part.clean, part.degraded, strict=True))
    clean, degraded = (F.pad(pictures, (0, 3, 0, 3), mode="reflect") for pictures in (part.clean, part.degraded))
    t = torch.tensor([[249, 499, 749, 999, 999, 999][int(torch.randint(6, (), generator=g))] for g in copies])
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in copies])
    z_0 = vae.encode(2 * clean - 1).latent_dist.mode() * vae.config.scaling_factor
    alpha, sigma = alphas(t)
    z_t = alpha * z_0 + sigma * noise
    condition, _ = model.encode(degraded)
    with model._tuned(unet, model.controller(condition, t)):
        eps = unet(z_t, t, torch.zeros(4, 1, 8)).sample
    wanted = {"control": ((z_t - sigma * eps) / alpha - z_0).square().mean()}
    if changes.get("cfrm", True):
        h, clear = vae.encoder.conv_in(2 * degraded - 1), vae.encoder.conv_in(2 * clean - 1)
        weighted = []
        for level, weight in enumerate(changes.get("cfrm_weights", [0.1, 0.01])):
            h, clear = model.cfrm[level](vae.encoder.down_blocks[level](h)), vae.encoder.down_blocks[level](clear)
            weighted.append(weight * (h - clear).square().mean())
        wanted["cfrm"] = weighted[0] + weighted[1]
    assert set(terms) == set(wanted)
    for name, value in terms.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=0, msg=name)
    parameters = list(model.parameters())
    mine, theirs = (
        torch.autograd.grad(sum(values.values()), parameters, allow_unused=True)  # type: ignore[arg-type]
        for values in (terms, wanted)
    )
    most = max(float(value.abs().max()) for value in theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * most)


def test_the_noise_of_stage_1_is_most_often_the_last(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, "stage1")
    seen: list[int] = []
    run.net.forward = lambda degraded, clean, t, chance: seen.extend(t.tolist())  # type: ignore[assignment,method-assign]
    (part,) = first_batch(run).parts
    run._first_terms(Batch([replace(part, chance=[torch.Generator().manual_seed(k) for k in range(600)])]))
    assert set(seen) == {249, 499, 749, 999} and seen.count(999) / 600 == pytest.approx(0.5, abs=0.08)


def test_a_schedule_of_fewer_timesteps_has_the_same_noise(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, "stage1")
    run.model.schedule = NoiseSchedule.scaled_linear(100)
    seen: list[int] = []
    run.net.forward = lambda degraded, clean, t, chance: seen.extend(t.tolist())  # type: ignore[assignment,method-assign]
    (part,) = first_batch(run).parts
    run._first_terms(Batch([replace(part, chance=[torch.Generator().manual_seed(k) for k in range(40)])]))
    assert set(seen) == {24, 49, 74, 99}


WEIGHTED: dict[str, dict[str, Any]] = {
    "as in the paper": {}, "weights": {"task_weights": {"restoration": 1.0, "segmentation": 0.0}},
    "restored too": {"restored_too": 0.5}, "small": {"smallest": 32},
}  # fmt: skip


@pytest.mark.parametrize("changes", WEIGHTED.values(), ids=WEIGHTED)
def test_stage_2_is_its_equation(changes: dict[str, Any], tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, **changes)
    model = learned(run.model)
    batch = first_batch(run)
    assert [part.task for part in batch.parts] == ["restoration", "classification", "segmentation"]
    assert batch.tasks == ["restoration"] * 2 + ["classification"] * 2 + ["segmentation"] * 2
    copies = [torch.Generator().set_state(generator.get_state()) for generator in batch.chance]
    terms = run._task_terms(batch)

    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    beta = {"restoration": 10.0, "classification": 0.1, "segmentation": 0.1, **changes.get("task_weights", {})}
    wanted, likeness = {}, []
    for number, part in enumerate(batch.parts):
        own = copies[2 * number : 2 * number + 2]
        smallest = changes.get("smallest", 0)
        restored = model(part.degraded, part.task, generator=own, smallest=smallest)
        if part.task == "restoration":
            loss = (restored - part.clean).square().mean()
        else:
            logits = run.readers[part.task].network((restored - mean) / std)
            logits = logits["out"] if isinstance(logits, dict) else logits
            loss = F.cross_entropy(logits, part.targets)
            # by another draw of the noise: with the generators that are left
            likeness.append((model(part.degraded, "restoration", generator=own) - part.clean).abs().mean())
        wanted[part.task] = beta[part.task] * loss
    if "restored_too" in changes:
        wanted["restored_too"] = changes["restored_too"] * torch.stack(likeness).mean()
    assert set(terms) == set(wanted)
    for name, value in terms.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-7, msg=name)


def everything(run: Trainer) -> dict[str, Any]:
    """All tensors, flags and modes that a step might touch."""
    model = run.model
    found: dict[str, Any] = dict(model.state_dict())
    others = {"vae": networks(model)[0], "unet": networks(model)[1]} | {
        f"{task}_{name}": network for task, reader in run.readers.items()
        for name, network in (("hq", reader.network), ("judge", reader.judge)) if network is not None
    }  # fmt: skip
    for name, network in others.items():
        found |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        found |= {f"{name}.{key} flag": torch.tensor(p.requires_grad) for key, p in network.named_parameters()}
        found |= {f"{name}.{key} mode": torch.tensor(m.training) for key, m in network.named_modules()}
    return {name: value.clone() for name, value in found.items()}


TRAINED: dict[str, Callable[[str], bool]] = {
    "stage1": lambda name: name.startswith(("cfrm.", "controller.", "tuners.")),
    "stage2": lambda name: name.startswith("tfa."),
    "add-task": lambda name: name == "tfa.prompts.detection",
}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_what_it_says_and_nothing_else(stage: str, tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, stage, lr=1e-2)
    learned(run.model)
    run.before = run._hashes()
    before = everything(run)
    results = run.run()
    after = everything(run)
    assert set(before) == set(after)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in run.model.state_dict() if TRAINED[stage](name)}
    assert not any(bool(value) for name, value in after.items() if name.endswith(("flag", "mode")))
    assert all(math.isfinite(value) for value in results.values())
    known = {"stage1": {"control", "cfrm"}, "stage2": set(TASKS[:3]), "add-task": {"detection"}}[stage]
    assert set(logged(tmp_path / "run")) == {"step", *(f"{stage}/{name}" for name in known)}


def test_a_new_task_changes_no_other(folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level("INFO"):
        run = trainer(tmp_path / "run", folder, "add-task", steps=3)
        before = answers(run.model, TASKS)
        run.run()
    after = answers(run.model, TASKS)
    assert torch.equal(before[:3], after[:3])
    said = [message for message in caplog.messages if message.endswith(("as before", "changed"))]
    names = ("all but prompts", *TASKS[:3])
    assert len(said) == 5 and all(any(f"{name}: " in s and "as before" in s for s in said) for name in names)
    digest = hashlib.sha256(run.model.tfa.prompts["detection"].detach().numpy().tobytes()).hexdigest()
    assert f"detection: {digest[:16]}, changed" in said
    assert any(run.model.fingerprint()[:16] in message for message in said)
    assert list(load_file(tmp_path / "run" / "prompts.safetensors")) == ["detection"]
    assert set(load_file(folder / "stage2" / "prompts.safetensors")) == set(TASKS[:3])
    assert (tmp_path / "run" / "prompts.safetensors").stat().st_size < 2000
    other = trainer(tmp_path / "other", folder).model  # stage 2 from the start, not its trained weights
    with pytest.raises(ValueError, match="fingerprint"):
        other.load_prompts(tmp_path / "run" / "prompts.safetensors")


@pytest.mark.parametrize("name", ["tfa.prompts.classification", "tfa.levels.0.merge.weight", "cfrm.0.merge.weight"])
def test_a_new_task_that_changes_another_is_an_error(
    name: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = trainer(tmp_path / "run", folder, "add-task"), Alternation.step

    def tamper(self: Any, batch: Any) -> Any:
        with torch.no_grad():
            run.model.get_parameter(name).view(-1)[0] += 1e-3
        return step(self, batch)

    monkeypatch.setattr(Alternation, "step", tamper)
    said = "classification" if "prompts" in name else "all but prompts"
    with pytest.raises(RuntimeError, match=f"weights of {said} should be what they were before detection"):
        run.run()
    assert not (tmp_path / "run" / "results.json").exists()


def test_tasks_are_added_one_after_the_other(tmp_path: Path, folder: Path) -> None:
    trainer(tmp_path / "first", folder, "stage2", tasks=["restoration", "classification"]).run()
    for number, name in enumerate(("segmentation", "detection")):
        start = (tmp_path / "first", tmp_path / "segmentation")[number]
        run = trainer(tmp_path / name, folder, "add-task", name=name, after=start)
        run.run()
    assert set(run.model.tasks) == set(TASKS)


RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "stage1": ("stage1", {}),
    "stage2": ("stage2", {"restored_too": 1.0}),
    "add-task": ("add-task", {}),
    "several": ("stage2", {"adapter": "several", "tasks": list(TASKS[:2])}),
    "network": ("stage2", {"network": "edsr-small", "after": None}),
}


@pytest.mark.parametrize(("stage", "changes"), RESUMED.values(), ids=RESUMED)
def test_a_stopped_run_resumes_with_the_same_numbers(
    stage: str, changes: dict[str, Any], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"steps": 4, "save_every": 2, "test_count": 2, **changes}
    whole = trainer(tmp_path / "whole", folder, stage, **changes).run()
    with monkeypatch.context() as patch:
        steps, step = [0], Alternation.step

        def count(self: Any, batch: Any) -> Any:
            steps[0] += 1
            if steps[0] == 4:
                raise KeyboardInterrupt
            return step(self, batch)

        patch.setattr(Alternation, "step", count)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "stopped", folder, stage, **changes).run()
    resumed = trainer(tmp_path / "stopped", folder, stage, **changes).run()
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert alike(tmp_path / "whole", tmp_path / "stopped")
    assert trainer(tmp_path / "whole", folder, stage, **changes).run() == whole  # nothing is done again


PROCESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "stage2": ("stage2", {}), "stage1": ("stage1", {}), "restored_too": ("stage2", {"restored_too": 1.0}),
    "several": ("stage2", {"adapter": "several"}),
}  # fmt: skip


@pytest.mark.slow  # test_distributed.py has the second stage
@pytest.mark.parametrize(("stage", "changes"), PROCESSES.values(), ids=PROCESSES)
def test_two_processes_train_the_model_that_one_trains(
    stage: str, changes: dict[str, Any], tmp_path: Path, folder: Path
) -> None:
    changes = {"tasks": list(TASKS[:3]), "batch": 4, "lr": 1e-3, **changes}
    run = trainer(tmp_path / "one", folder, stage, **changes)
    start = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.run()
    given = {
        **SMALL, "steps": 2, "control_channels": 8, "cfrm_blocks": [1, 1], "unseen": False, **changes,
        "prepared": folder / "prepared", "out": tmp_path / "two",
    }  # fmt: skip
    if stage == "stage2":
        given["after"] = folder / "stage1"
    options = [f"--{name}={json.dumps(value, default=str).strip(chr(34))}" for name, value in given.items()]
    ran = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "-m", "examples.unirestore.train", stage, *options,
        ],
        check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "2 processes" in ran.stderr
    one, two = (load_file(tmp_path / name / "unirestore.safetensors") for name in ("one", "two"))
    moved, apart = (
        math.sqrt(sum(float((net[name] - other[name]).double().square().sum()) for name in one))
        for net, other in ((one, start), (two, one))
    )
    assert moved > 0.01 and apart < 0.02 * moved  # AdamW magnifies what rounding leaves of gradients near zero


def test_unreadable_pictures_leave_out_their_task_and_no_other(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder)
    reader = run.readers["segmentation"]

    class Broken:
        task, class_names = reader.train_data.task, reader.train_data.class_names
        __len__ = lambda self: 8  # noqa: E731
        __getitem__ = lambda self, index: None  # noqa: E731

    run.readers["segmentation"] = replace(reader, train_data=Broken())
    batch = first_batch(run)
    assert [part.task for part in batch.parts] == ["restoration", "classification"]
    run.run()
    assert set(logged(tmp_path / "run")) == {"step", "stage2/restoration", "stage2/classification"}


def test_pictures_of_several_sizes_are_restored_together(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, tasks=["restoration", "detection"])
    learned(run.model, 0.02)
    batch = first_batch(run)
    clean, detected = batch.parts
    batch = Batch([replace(clean, clean=uniform(2, 3, 30, 26), degraded=uniform(2, 3, 30, 26)), detected])
    (phase,) = run.stages[0].alternation.phases  # type: ignore[attr-defined]
    with run.stages[0].alternation.roles(phase):  # type: ignore[attr-defined]
        terms = run._task_terms(batch)
    restored = run._restored(batch, batch.tasks)
    assert restored[0].shape == (2, 3, 30, 26)
    assert [tuple(picture.shape) for picture in restored[1]] == [tuple(picture.shape) for picture in detected.clean]
    assert set(terms) == {"restoration", "detection"} and all(torch.isfinite(value) for value in terms.values())


# figures


def test_figures_have_an_unseen_recogniser_and_unseen_corruptions(tmp_path: Path, folder: Path) -> None:
    results = trainer(tmp_path / "run", folder, unseen=True, tasks=[*TASKS], eval_every=1, steps=1).run()
    for kind in ("", "unseen_"):
        assert {f"restoration_{kind}{name}" for name in ("psnr", "ssim")} < set(results)
        for task in TASKS[1:]:
            named = ("score", "score_on_hr", "judge", "judge_distance", "psnr", "ssim")
            assert {f"{task}_{kind}{name}" for name in named} < set(results)
    assert results["restoration_psnr"] != results["restoration_unseen_psnr"]
    assert results["classification_judge_distance"] > 0
    assert logged(tmp_path / "run")["test/detection_score"] == results["detection_score"]
    for task in TASKS:  # a grid for each
        assert read_picture(tmp_path / "run" / "samples" / f"{task}.png").shape[0] == 3


def test_what_is_read_is_the_picture_restored_for_its_task(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder)
    learned(run.model, 0.05)
    lq = uniform(3, 3, 24, 24)
    found = {task: run.restores(task)(None, lq) for task in run.config.tasks}
    for task, restored in found.items():
        generator = torch.Generator().manual_seed(chance(run.config.seed, 2))
        wanted = [run.model(part, task, generator=generator) for part in (lq[:2], lq[2:])]  # by the batch of training
        assert torch.equal(restored, torch.cat(wanted).clamp(0, 1))
    assert not torch.equal(found["restoration"], found["classification"])
    assert torch.equal(
        run.restores("classification")(None, [lq[0]])[0], run.restores("classification")(None, lq[:1])[0]
    )


@pytest.mark.parametrize("adapter", ["one_prompt", "convolutions"])
def test_other_adapters_are_trained_and_restored_with(adapter: AdapterName, tmp_path: Path, folder: Path) -> None:
    trainer(tmp_path / "run", folder, adapter=adapter).run()
    model, _ = restoring.load_run(tmp_path / "run")
    assert model.tasks == TASKS[:3] and not model.training
    trained = load_file(tmp_path / "run" / "unirestore.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "run" / "prompts.safetensors").exists()


@pytest.mark.parametrize("tasks", [["restoration"], ["classification", "segmentation"]])
def test_a_plain_network_stands_in(tasks: list[str], tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, network="edsr-small", after=None, train_tasks=tasks, smallest=30)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    results = run.run()
    assert {f"stage2/{task}" for task in tasks} == set(logged(tmp_path / "run")) - {"step"}
    assert {"restoration_psnr", "classification_score", "segmentation_judge"} < set(results)
    assert any(not torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert run.model(uniform(1, 3, 17, 30), "look").shape == (1, 3, 17, 30)
    with pytest.raises(ValueError, match="should be a run of UniRestore, found one of edsr-small"):
        restoring.load_run(tmp_path / "run")


def test_half_precision_trains(tmp_path: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    AcceleratorState._reset_state(True)
    request.addfinalizer(lambda: AcceleratorState._reset_state(True))
    for stage in STAGES:
        results = trainer(tmp_path / stage, folder, stage, precision="bf16", max_norm=1.0, steps=1, test_count=2).run()
        assert all(math.isfinite(value) for value in results.values())
        assert all(
            value.dtype == torch.float32 for value in load_file(tmp_path / stage / "unirestore.safetensors").values()
        )


# what no figure shows


def test_options_reach_the_optimiser(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, lr=0.3, prompt_lr=0.7, weight_decay=0.5, max_norm=2.5, steps=4)
    (phase,) = run.stages[0].alternation.phases
    optimizer: Any = phase.optimizers
    weights, prompts = optimizer.param_groups
    assert (weights["lr"], weights["weight_decay"]) == (0.3, 0.5)
    assert (prompts["lr"], prompts["weight_decay"]) == (0.7, 0.0)
    assert {id(p) for p in prompts["params"]} == {id(p) for p in run.model.tfa.prompts.values()}
    assert phase.max_norm == 2.5
    for k in range(4):
        assert weights["lr"] == pytest.approx(0.3 * 0.5 * (1 + math.cos(math.pi * k / 4)))
        run.stages[0].alternation.step(first_batch(run))


def test_every_picture_has_a_chance_of_its_own(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder)
    batches = [run.batch(*read, step, 2) for step, read in enumerate(run.read(0, 2))]
    seeds = [generator.initial_seed() for batch in batches for generator in batch.chance]
    assert len(seeds) == len(set(seeds)) == 2 * 3 * 2
    reader = run.readers["restoration"]
    clean = batches[0].parts[0].clean
    degraded = [reader.degrade(clean, first) for first in (0, 2)]
    assert not torch.equal(*degraded) and torch.equal(degraded[0], reader.degrade(clean, 0))


def test_a_task_is_read_by_its_networks(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path / "run", folder, smallest=32, unseen=True)
    for task in ("classification", "segmentation"):
        reader = run.readers[task]
        for network, name in ((reader.network, "hq"), (reader.judge, "judge")):
            stored = load_recogniser(folder / "prepared" / f"{task}_{name}").state_dict()
            assert network is not None
            assert all(torch.equal(value, stored[key]) for key, value in network.state_dict().items())
    asked: list[Any] = []
    seen: list[Any] = []

    def forward(pictures: Tensor, task: str, **options: Any) -> Tensor:
        asked.append((task, options["smallest"]))
        return pictures

    def evaluated(data: Any, recognition: Any, **options: Any) -> Any:
        options["read"](None, uniform(1, 3, 24, 24))
        seen.append((recognition.task, options["recogniser"], options["judges"], options["degrade"]))
        return {}, {"lr": uniform(1, 3, 4, 4), "restored": uniform(1, 3, 4, 4), "hr": uniform(1, 3, 4, 4)}

    monkeypatch.setattr(run.model, "forward", forward)
    monkeypatch.setattr(training, "evaluate", evaluated)
    run.figures(run.restores)
    tasks = ["restoration", "classification", "segmentation"]
    assert asked == [(task, 32) for task in tasks for _ in ("seen", "unseen")]
    for (_, recogniser, judges, degrade), task in zip(seen, [task for task in tasks for _ in range(2)], strict=True):
        reader = run.readers[task]
        assert recogniser is reader.network and judges == Judges(None, reader.judge)
        pictures = uniform(2, 3, 24, 24)
        assert not torch.equal(degrade(pictures, 0), reader.degrade(pictures, 0))  # not as in training


def test_a_new_prompt_begins_at_zero(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, "add-task")
    assert not run.model.tfa.prompts["detection"].any() and run.model.tfa.prompts["restoration"].any()


@pytest.mark.parametrize("adapter", ["prompts", "one_prompt"])
def test_the_gate_is_that_of_the_run(adapter: AdapterName, tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, gate="sigmoid", adapter=adapter, test_count=2, steps=1)
    run.run()
    model, _ = restoring.load_run(tmp_path / "run")
    assert all(level.gate == "sigmoid" for each in (run.model, model) for level in each.tfa.levels)


def test_pictures_of_the_test_are_not_trained_on(tmp_path: Path) -> None:
    train, test = data_of("restoration", replace(TINY, size=32, test_count=8))
    held_out = [load_photo(name) for name in HELD_OUT]
    assert not any(
        photo.shape == source.shape and torch.equal(photo, source) for photo in held_out for source in train.sources
    )
    crops = [sample[0] for n in range(8) if (sample := test[n]) is not None]
    for n, crop in enumerate(crops):  # of all photographs in turn
        windows = held_out[n % len(held_out)].unfold(1, 32, 1).unfold(2, 32, 1)
        assert bool((windows[..., 0, 0] == crop[:, :1, 0, None]).all(0).any())
    other = data_of("classification", replace(TINY, seed=2))[0][0]
    assert not torch.equal(data_of("classification", TINY)[0][0][0], other[0])
    for number in range(12):
        save_image(torch.full((3, 40, 36), number / 255), tmp_path / f"{number:02d}.png")
    (tmp_path / "05.png").write_bytes(b"broken")
    train, test = data_of("restoration", replace(TINY, pictures=tmp_path, size=32, train_count=20, test_count=5))
    assert len(train) == 20 and len(test) == 5
    trained = {round(255 * float(sample[0].mean())) for n in range(20) if (sample := train[n]) is not None}
    tested = {round(255 * float(sample[0].mean())) for n in range(5) if (sample := test[n]) is not None}
    assert tested == {0, 10} and trained == set(range(12)) - {0, 10, 5}
    save_image(torch.zeros(3, 8, 8), tmp_path / "00.png")
    assert test[0] is None


def test_pictures_of_several_sizes_are_restored_alone(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder)
    batch = first_batch(run)
    look, *others = batch.parts
    parts = [replace(look, clean=uniform(2, 3, 16, 20), degraded=uniform(2, 3, 16, 20, seed=1)), *others]

    def afresh(parts: list[Part]) -> Batch:
        return Batch(
            [replace(p, chance=[torch.Generator().manual_seed(n) for n in range(len(p.chance))]) for p in parts]
        )

    with torch.no_grad():
        mixed = run._restored(afresh(parts), [part.task for part in parts for _ in part.degraded])
        for part, found in zip(parts, mixed, strict=True):
            (alone,) = run._restored(afresh([part]), [part.task] * len(part.degraded))
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


# folders of pictures


def test_a_folder_is_restored_for_a_task(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    save_image(uniform(3, 20, 33), pictures / "a.png")
    save_image(uniform(3, 7, 5, seed=1), pictures / "deep" / "b.jpg")
    (pictures / "broken.png").write_bytes(b"no picture")

    def restore(run: str, out: str, *options: str) -> list[Tensor]:
        restoring.main(["--run", str(folder / run), "--device", "cpu", *options, str(pictures), str(tmp_path / out)])
        return [read_picture(tmp_path / out / name) for name in ("a.png", "deep/b.png")]

    with caplog.at_level("INFO"):
        plain = restore("stage2", "plain")
    assert "broken.png skipped" in caplog.text and "2 images restored" in caplog.text
    assert [tuple(picture.shape) for picture in plain] == [(3, 20, 33), (3, 7, 5)]
    model, smallest = restoring.load_run(folder / "stage2")
    assert smallest == 0
    generator = torch.Generator().manual_seed(chance(0, zlib.crc32(b"a.png")))
    wanted = model.restore(read_picture(pictures / "a.png")[None], "restoration", generator=generator, smallest=0)[0]
    torch.testing.assert_close(plain[0], wanted, atol=0.51 / 255, rtol=0)

    # the prompt that came later, on the run that it was trained on
    prompts = str(folder / "add-task" / "prompts.safetensors")
    added = restore("stage2", "added", "--prompts", prompts, "--task", "detection")
    assert all(map(torch.equal, added, restore("add-task", "own", "--task", "detection")))
    for option, value in (("--steps", "4"), ("--smallest", "40"), ("--seed", "1")):
        assert not any(map(torch.equal, plain, restore("stage2", option, option, value)))
    restore("stage1", "first")
    tiles = restore("stage2", "tiles", "--tile", "16", "--overlap", "4")
    assert not any(map(torch.equal, plain[:1], tiles[:1])) and torch.equal(plain[1], tiles[1])
    # the noise of a picture is its own, whatever lies beside it
    shutil.copy(pictures / "a.png", pictures / "0.png")
    assert all(map(torch.equal, plain, restore("stage2", "more")))
    assert not torch.equal(read_picture(tmp_path / "more" / "0.png"), plain[0])
    shutil.copytree(folder / "prepared" / "prior", tmp_path / "prior")
    assert all(map(torch.equal, plain, restore("stage2", "moved", "--prior", str(tmp_path / "prior"))))


def test_restoring_enlarges_as_the_run_did(tmp_path: Path, folder: Path) -> None:
    trainer(tmp_path / "run", folder, steps=1, smallest=32, steps_of_diffusion=2, cfrm_weights=[1.0, 1.0]).run()
    model, smallest = restoring.load_run(tmp_path / "run")
    assert smallest == 32 and model.timesteps() == [999, 499]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "detection"], "`task` should be one of .*restoration.*, found 'detection'"),
        (["--prompts", "nowhere"], "found no such file"),
        (["--prompts", "{0}/add-task/prompts.safetensors", "--run", "{0}/other"], "fingerprint"),
        (["--run", "{0}/stage1", "--task", "nonsense"], "`task` should be one of restoration, found 'nonsense'"),
        (["--tile", "16", "--overlap", "9"], "`overlap` should be from 0 to half of `tile`, found 9 of 16"),
        (["--steps", "0"], "`steps` should be a whole number of at least 1 and at most 1000, found 0"),
        (["--seed", "-1"], "`seed` should be at least 0, found -1"),
        (["--run", "{0}"], "should be a finished run .*, found no config.yaml"),
        (["--prior", "{0}"], "should hold vae/"),
        (["{0}/none"], "`pictures` should be a folder"),
        (["{0}/empty"], "found none in"),
    ],
)
def test_what_cannot_be_restored_is_named(
    options: list[str], message: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (folder / "empty").mkdir(exist_ok=True)
    if not (folder / "other").exists():
        shutil.copytree(folder / "stage2", folder / "other")
        weights = load_file(folder / "other" / "unirestore.safetensors")
        weights["tfa.levels.0.merge.weight"] += 1
        save_file(weights, folder / "other" / "unirestore.safetensors")
    options = [option.format(folder) for option in options]
    pictures = options if len(options) == 1 else [*options, str(folder / "empty")]
    with pytest.raises(SystemExit):
        restoring.main(["--run", str(folder / "stage2"), "--device", "cpu", *pictures, str(tmp_path / "out")])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


# the command line


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
    assert "restoration_psnr" in capsys.readouterr().out and alike(tmp_path / "one", folder / "stage1")
    (tmp_path / "more.yaml").write_text(f"after: {folder / 'stage2'}\nprompt_lr: 0.5\n")
    run("add-task", "detection", f"--out={tmp_path / 'two'}", f"--config={tmp_path / 'more.yaml'}", "--prompt_lr=1e-2")
    assert "detection_judge" in capsys.readouterr().out and alike(tmp_path / "two", folder / "add-task")
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
    hq, judge = (load_recogniser(tmp_path / f"classification_{name}").state_dict() for name in ("hq", "judge"))
    assert any(not torch.equal(value, judge[name]) for name, value in hq.items())
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    preparing.main()
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    for changes, message in (({"tasks": []}, "at least one task"), ({"task": "detection"}, "`tasks` should")):
        with pytest.raises(ValueError, match=message):
            preparing.prepare(replace(preparing.Config(out=tmp_path / "none", **SMALL), **changes))


def test_the_prior_is_of_the_pictures_of_all_tasks(folder: Path) -> None:
    config = preparing.Config(out=folder / "prepared", **SMALL)
    train, test = mixed(["restoration", "classification"], config)
    parts = [data_of(task, config) for task in ("restoration", "classification")]
    assert len(train) == 16 and len(test) == 8
    for number, (part, place) in {0: (0, 0), 1: (1, 2), 4: (0, 2), 5: (1, 0), 7: (1, 1)}.items():
        one, other = test[number], parts[part][1][place]
        assert one is not None and other is not None and torch.equal(one[0], other[0])
    vae = AutoencoderKL.from_pretrained(folder / "prepared" / "prior", subfolder="vae")
    assert len(vae.config.block_out_channels) == 3


# the experiment


@pytest.mark.slow
def test_the_experiment_runs_each_kind_of_name_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = replace(TINY, out=tmp_path, steps=1, unseen=True, **{**SMALL, "train_count": 16})
    study = experiment.Experiment(tmp_path, base, prior_steps=1, prior_pictures=16, prepare_steps=1)
    names = ("lq", "pir", "tir", "pir_tir", "unirestore", "one_prompt")
    found = {name: study.run(name, 1) for name in names}
    study.new_task(1)
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
    assert len(rows) == 4 and all(float(cell) >= 0 for row in rows[2:] for cell in row.strip("| ").split("|")[1:])
    monkeypatch.setattr(sys, "argv", ["experiment", "sheet", f"--out={tmp_path}"])
    experiment.main()
    assert Path(capsys.readouterr().out.strip()).stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["experiment", "table", f"--out={tmp_path}", "--names", "nothing"])
    with pytest.raises(SystemExit):
        experiment.main()
    assert "found nothing" in capsys.readouterr().err


def study_width(folder: Path) -> int:
    """Of a prompt."""
    return len(load_file(folder / "new_task" / "prompt" / "seed1" / "prompts.safetensors")["detection"])


# what is wrong


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "stage": ("stage2", {"stage": "stage3"}, "`stage` should be one of stage1, stage2, add-task, found 'stage3'"),
    "task": ("stage2", {"tasks": ["restoration", "paint"]}, "one of restoration, .*, detection, found 'paint'"),
    "new task": ("add-task", {"name": "paint"}, "one of restoration, .*, detection, found 'paint'"),
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
    "one picture": ("stage1", {"pictures": "stage1/tb"}, "at least two pictures, found 0"),
    "weight": ("stage2", {"task_weights": {"paint": 1.0}}, "`task_weights` should be for .*, found 'paint'"),
    "training": ("stage2", {"train_tasks": ["detection"]}, "`train_tasks` should be of `tasks`"),
    "training a new task": ("add-task", {"train_tasks": ["restoration"]}, "`train_tasks` should be left out"),
    "a network's task": ("add-task", {"network": "edsr-small"}, "`network` should be left out of 'add-task'"),
    "a prompt at rest": ("add-task", {"restored_too": 1.0}, "`restored_too` should be left out of 'add-task'"),
    "small photographs": ("stage1", {"size": 600}, "`pictures` should be a folder of photographs for `size` 600"),
    "training first": ("stage1", {"train_tasks": ["restoration", "classification"]}, "`train_tasks` should be one"),
    "nothing to train first": ("stage1", {"tasks": ["classification"]}, "`tasks` should have 'restoration'"),
    "nobody to please": ("stage2", {"tasks": ["classification"], "restored_too": 1.0}, "needs the task 'restoration'"),
    "no references": ("stage2", {"prepared": None}, "`prepared` should be a folder of examples.unirestore.prepare"),
    "none of the task": ("stage2", {"prepared": "stage1"}, "should be the directory of a finished run"),
    "no prior": ("stage1", {"prepared": None}, "`prior` should be given, or `prepared`"),
    "wrong prior": ("stage1", {"prior": "stage1"}, "should hold vae/ as diffusers saves it"),
    "steps": ("stage2", {"steps_of_diffusion": 0}, "`steps_of_diffusion` should be at least 1, found 0"),
    "blocks": ("stage1", {"cfrm_blocks": [1, 1, 9]}, "first 2 levels"),
    "weights": ("stage1", {"cfrm_weights": [0.1]}, r"`cfrm_weights` should be 2 numbers, found \[0.1\]"),
    "scale": ("stage2", {"scale": 4}, "`scale` should be 1: pictures are restored at their own size"),
    "batch": ("stage2", {"batch": 0}, "`batch` should be at least 1, found 0"),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "changes", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_named_and_leave_no_folder(
    stage: str, changes: dict[str, Any], message: str, tmp_path: Path, folder: Path
) -> None:
    for name in ("after", "prepared", "prior", "pictures"):
        if isinstance(changes.get(name), str):
            changes = {**changes, name: folder / changes[name]}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", folder, stage, **changes)
    assert not (tmp_path / "run").exists()
