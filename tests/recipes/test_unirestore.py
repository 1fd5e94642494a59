"""Is UniRestore the diffusion model it begins as, is each stage its equations, and is a task nothing but a prompt?"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torchvision.utils import save_image

from examples.common.data.clean_images import training_photographs
from examples.common.data.folder import read_image
from examples.common.data.photos import HELD_OUT, load_photo
from examples.common.engine import recipe
from examples.common.engine.evaluation import load_recognizer
from examples.common.seeds import derive_seed, seeded
from examples.unirestore import restore as restoring
from examples.unirestore import train as training
from examples.unirestore.adapters import AdapterName
from examples.unirestore.config import TASKS
from examples.unirestore.data import data_of
from examples.unirestore.train import Batch, Part, Trainer
from restoreloss import Alternation, NoiseSchedule
from tests.helpers.restorers import answers, learned, networks, uniform
from tests.recipes.unirestore_runs import STAGES, TINY, first_batch, logged, trainer


def alphas(t: Any) -> tuple[Tensor, Tensor]:
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t]
    return tuple(root.float().view(-1, 1, 1, 1) for root in (abar.sqrt(), (1 - abar).sqrt()))  # type: ignore[return-value]


@pytest.mark.parametrize("changes", [{}, {"cfrm": False}, {"cfrm_weights": [0.5, 3.0]}])
def test_stage_1_is_its_equations(changes: dict[str, Any], tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, "stage1", batch=4, size=29, **changes)
    model = learned(run.model)
    vae, unet = networks(model)
    batch = first_batch(run)
    copies = [torch.Generator().set_state(generator.get_state()) for generator in batch.generators]
    terms = run._first_terms(batch)

    (part,) = batch.parts
    assert part.task == "restoration" and part.clean.shape == (4, 3, 29, 29)
    assert all(not torch.equal(one, other) for one, other in zip(part.clean, part.degraded, strict=True))
    clean, degraded = (F.pad(images, (0, 3, 0, 3), mode="reflect") for images in (part.clean, part.degraded))
    t = torch.tensor([[249, 499, 749, 999, 999, 999][int(torch.randint(6, (), generator=g))] for g in copies])
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in copies])
    z_0 = vae.encode(2 * clean - 1).latent_dist.mode() * vae.config.scaling_factor
    alpha, sigma = alphas(t)
    z_t = alpha * z_0 + sigma * noise
    condition, _ = model.encode(degraded)
    with model._tuned(unet, model.controller(condition, t)):
        velocity = unet(z_t, t, torch.zeros(4, 1, 8)).sample
    wanted = {"control": (alpha * z_t - sigma * velocity - z_0).square().mean()}
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
    run.net.forward = lambda degraded, clean, t, generators: seen.extend(t.tolist())  # type: ignore[assignment,method-assign]
    (part,) = first_batch(run).parts
    run._first_terms(Batch([replace(part, generators=[torch.Generator().manual_seed(k) for k in range(600)])]))
    assert set(seen) == {249, 499, 749, 999} and seen.count(999) / 600 == pytest.approx(0.5, abs=0.08)


def test_a_schedule_of_fewer_timesteps_has_the_same_noise(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, "stage1")
    run.model.schedule = NoiseSchedule.scaled_linear(100)
    seen: list[int] = []
    run.net.forward = lambda degraded, clean, t, generators: seen.extend(t.tolist())  # type: ignore[assignment,method-assign]
    (part,) = first_batch(run).parts
    run._first_terms(Batch([replace(part, generators=[torch.Generator().manual_seed(k) for k in range(40)])]))
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
    copies = [torch.Generator().set_state(generator.get_state()) for generator in batch.generators]
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
        before = answers(run.model, TASKS[:4])
        run.run()
    after = answers(run.model, TASKS[:4])
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
    assert set(run.model.tasks) == set(TASKS[:4])


def test_unreadable_images_leave_out_their_task_and_no_other(tmp_path: Path, folder: Path) -> None:
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


def test_images_of_several_sizes_are_restored_together(tmp_path: Path, folder: Path) -> None:
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
    assert [tuple(image.shape) for image in restored[1]] == [tuple(image.shape) for image in detected.clean]
    assert set(terms) == {"restoration", "detection"} and all(torch.isfinite(value) for value in terms.values())


def test_figures_have_an_unseen_recognizer_and_unseen_corruptions(tmp_path: Path, folder: Path) -> None:
    results = trainer(tmp_path / "run", folder, unseen=True, tasks=[*TASKS[:4]], eval_every=1, steps=1).run()
    for kind in ("", "unseen_"):
        assert {f"restoration_{kind}{name}" for name in ("psnr", "ssim")} < set(results)
        for task in TASKS[1:4]:
            named = ("score", "score_on_hr", "judge", "judge_distance", "psnr", "ssim")
            assert {f"{task}_{kind}{name}" for name in named} < set(results)
    assert results["restoration_psnr"] != results["restoration_unseen_psnr"]
    assert results["classification_judge_distance"] > 0
    assert logged(tmp_path / "run")["test/detection_score"] == results["detection_score"]
    for task in TASKS[:4]:  # a grid for each
        assert read_image(tmp_path / "run" / "samples" / f"{task}.png").shape[0] == 3


def test_what_is_read_is_the_image_restored_for_its_task(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder)
    learned(run.model, 0.05)
    lq = uniform(3, 3, 24, 24)
    found = {task: run.restores(task)(None, lq) for task in run.config.tasks}
    for task, restored in found.items():
        generator = torch.Generator().manual_seed(derive_seed(run.config.seed, 2))
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


@pytest.mark.parametrize("network", [None, "edsr-small"])
def test_large_test_images_are_restored_in_tiles(network: str | None, tmp_path: Path, folder: Path) -> None:
    changes = {"network": network, "after": None} if network else {}
    found = {}
    for tile in (0, 32, 512):
        run = trainer(tmp_path / f"{tile}", folder, tile=tile, **changes)
        images, generator = uniform(2, 3, 40, 48), seeded(run.config.seed, 2)
        found[tile] = run.restores("restoration")(None, images)
        expected = run.model.restore(images, "restoration", generator=generator, tile=tile or None)
        assert torch.equal(found[tile], expected)
    assert torch.equal(found[0], found[512]) and not torch.equal(found[0], found[32])


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


def test_half_precision_trains(
    tmp_path: Path,
    folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    AcceleratorState._reset_state(True)
    request.addfinalizer(lambda: AcceleratorState._reset_state(True))
    for stage, capability in zip(STAGES, ("AVX2", "AVX512", "NO AVX"), strict=True):
        monkeypatch.setattr(recipe, "get_cpu_capability", lambda capability=capability: capability)
        caplog.clear()
        results = trainer(tmp_path / stage, folder, stage, precision="bf16", max_norm=1.0, steps=1, test_count=2).run()
        assert ("no instructions for bfloat16" in caplog.text) == (capability != "AVX512")
        assert all(math.isfinite(value) for value in results.values())
        assert all(
            value.dtype == torch.float32 for value in load_file(tmp_path / stage / "unirestore.safetensors").values()
        )


def test_options_reach_the_optimizer(tmp_path: Path, folder: Path) -> None:
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


def test_every_image_has_a_chance_of_its_own(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder)
    batches = [run.batch(*read, step, 2) for step, read in enumerate(run.read(0, 2))]
    seeds = [generator.initial_seed() for batch in batches for generator in batch.generators]
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
            stored = load_recognizer(folder / "prepared" / f"{task}_{name}").state_dict()
            assert network is not None
            assert all(torch.equal(value, stored[key]) for key, value in network.state_dict().items())
    asked: list[Any] = []
    seen: list[Any] = []

    def restore(images: Tensor, task: str, **options: Any) -> Tensor:
        asked.append((task, options["smallest"]))
        return images

    def evaluated(data: Any, recognition: Any, **options: Any) -> Any:
        options["restore"](None, uniform(1, 3, 24, 24))
        seen.append((options["readers"], options["degrade"]))
        return {}, {"lr": uniform(1, 3, 4, 4), "restored": uniform(1, 3, 4, 4), "hr": uniform(1, 3, 4, 4)}

    monkeypatch.setattr(run.model, "restore", restore)
    monkeypatch.setattr(training, "evaluate", evaluated)
    run.figures(run.restores)
    tasks = ["restoration", "classification", "segmentation"]
    assert asked == [(task, 32) for task in tasks for _ in ("seen", "unseen")]
    for (readers, degrade), task in zip(seen, [task for task in tasks for _ in range(2)], strict=True):
        reader = run.readers[task]
        assert readers == {"score": reader.network, "judge": reader.judge}
        images = uniform(2, 3, 24, 24)
        assert not torch.equal(degrade(images, 0), reader.degrade(images, 0))  # not as in training


def test_a_new_prompt_begins_at_zero(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, "add-task")
    assert not run.model.tfa.prompts["detection"].any() and run.model.tfa.prompts["restoration"].any()


@pytest.mark.parametrize("adapter", ["prompts", "one_prompt"])
def test_the_gate_is_that_of_the_run(adapter: AdapterName, tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, gate="sigmoid", adapter=adapter, test_count=2, steps=1)
    run.run()
    model, _ = restoring.load_run(tmp_path / "run")
    assert all(level.gate == "sigmoid" for each in (run.model, model) for level in each.tfa.levels)


def test_images_of_the_test_are_not_trained_on(tmp_path: Path) -> None:
    train, test = data_of("restoration", replace(TINY, size=32, test_count=8))
    held_out = [load_photo(name) for name in HELD_OUT]
    assert not any(
        photo.shape == source.shape and torch.equal(photo, source) for photo in held_out for source in train.sources
    )
    wholes, parts = training_photographs(32), training_photographs(32, beside_textures=True)
    assert [photo.shape for photo in train.sources] == [photo.shape for photo in parts] != [p.shape for p in wholes]
    crops = [sample[0] for n in range(8) if (sample := test[n]) is not None]
    for n, crop in enumerate(crops):  # of all photographs in turn
        windows = held_out[n % len(held_out)].unfold(1, 32, 1).unfold(2, 32, 1)
        assert bool((windows[..., 0, 0] == crop[:, :1, 0, None]).all(0).any())
    other = data_of("classification", replace(TINY, seed=2))[0][0]
    assert not torch.equal(data_of("classification", TINY)[0][0][0], other[0])
    for number in range(12):
        save_image(torch.full((3, 40, 36), number / 255), tmp_path / f"{number:02d}.png")
    (tmp_path / "05.png").write_bytes(b"broken")
    train, test = data_of("restoration", replace(TINY, images=tmp_path, size=32, train_count=20, test_count=5))
    assert len(train) == 20 and len(test) == 5
    trained = {round(255 * float(sample[0].mean())) for n in range(20) if (sample := train[n]) is not None}
    tested = {round(255 * float(sample[0].mean())) for n in range(5) if (sample := test[n]) is not None}
    assert len(tested) == 2 and not tested & trained and tested | trained | {5} == set(range(12))
    for number in tested:
        save_image(torch.zeros(3, 8, 8), tmp_path / f"{number:02d}.png")
    assert test[0] is None


def test_images_of_several_sizes_are_restored_alone(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder)
    batch = first_batch(run)
    look, *others = batch.parts
    parts = [replace(look, clean=uniform(2, 3, 16, 20), degraded=uniform(2, 3, 16, 20, seed=1)), *others]

    def afresh(parts: list[Part]) -> Batch:
        return Batch(
            [replace(p, generators=[torch.Generator().manual_seed(n) for n in range(len(p.generators))]) for p in parts]
        )

    with torch.no_grad():
        mixed = run._restored(afresh(parts), [part.task for part in parts for _ in part.degraded])
        for part, found in zip(parts, mixed, strict=True):
            (alone,) = run._restored(afresh([part]), [part.task] * len(part.degraded))
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
