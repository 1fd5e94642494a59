"""The EDTR trainer, on a few steps: every method and task, Algorithm S1 line by line, resumption, bad input."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.utils import save_image

from examples.common.networks.latent_diffusion import load_latent_diffusion, scheduler
from examples.edtr import prepare as preparing
from examples.edtr import restore as restoring
from examples.edtr.config import MethodName
from examples.edtr.methods import METHODS
from examples.edtr.no_prior import NoPrior
from examples.edtr.train import TASKS, Trainer
from examples.experiments import edtr as experiment
from examples.experiments.report import read_runs
from restoreloss import Alternation, LatentPrior, NoiseSchedule, WaveletColorFix
from restoreloss.restorers import EDTR, small_latent_prior
from tests.helpers.restorers import small_edtr
from tests.recipes import cases

SMALL: dict[str, Any] = {**cases.EDTR_DATA, "cpu": True}
TINY = cases.EDTR


@pytest.fixture(scope="module")
def prepared(prepared: cases.Prepared) -> Path:
    return prepared.edtr


def trainer(out: Path, prepared: Path, **changes: Any) -> Trainer:
    return Trainer(replace(TINY, out=out, prepared=prepared, **changes))


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def changed(before: dict[str, Tensor], network: nn.Module) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_says(method: str, tmp_path: Path, prepared: Path) -> None:
    run, described = trainer(tmp_path / "run", prepared, method=method), METHODS[method]
    controlnet, decoder = state(run.restorer.controlnet), state(run.restorer.decoder)
    (reader,) = run.readers.values()
    recognizer, reference = state(reader.network), state(reader.reference.network)
    results = run.run()
    assert all(math.isfinite(value) for value in results.values())
    assert {"score", "score_on_hr", "fixed_hr", "judge", "judge_distance", "psnr", "ssim"} < set(results)
    assert changed(controlnet, run.restorer.controlnet)
    assert changed(decoder, run.restorer.decoder) == (described.decoder and described.hlf is not None)
    assert changed(recognizer, reader.network)
    assert not changed(reference, reader.reference.network)
    logged = set(json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]))
    counts = {"both": 2, "task": 1, "reference": 1, None: 1}
    assert len([name for name in logged if name.startswith("edtr/")]) == counts[described.hlf]
    assert ("edtr/noise" in logged) == (described.hlf is None)
    assert ("classification/matching" in logged) == described.matching


def test_method_names_are_those_of_the_config() -> None:
    assert set(get_args(MethodName)) == set(METHODS)


@pytest.mark.parametrize(("task", "n"), [("segmentation", 1), ("detection", 4)])
def test_other_tasks(task: str, n: int, tmp_path: Path, prepared: Path) -> None:
    results = trainer(tmp_path / "run", prepared, task=task, n=n).run()
    assert 0 <= results["score"] <= 100 and math.isfinite(results["psnr"])


def test_one_restorer_serves_three_tasks_in_turn(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "run", prepared, all_in_one=True, steps=7)
    seen, step = [], Alternation.step

    def note(self: Any, batch: Any) -> Any:
        seen.append(batch.task)
        return step(self, batch)

    monkeypatch.setattr(Alternation, "step", note)
    results = run.run()
    assert seen == [*TASKS, *TASKS, TASKS[0]]
    assert {f"{task}_score" for task in TASKS} < set(results)
    assert {path.stem for path in (tmp_path / "run").glob("*.safetensors")} == {
        "edtr", *(f"recognizer_{task}" for task in TASKS)
    }  # fmt: skip


def test_a_step_is_the_algorithm_written_out(tmp_path: Path, prepared: Path) -> None:
    run = trainer(tmp_path / "run", prepared, n=4)
    (reader,) = run.readers.values()
    edtr, hq_net = run.restorer, reader.reference
    edtr.controlnet.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Conv2d) else None)
    images, targets = next(run.read(0, 1))
    batch = run.batch(images, targets, 0, 3)
    copies = [torch.Generator().set_state(generator.get_state()) for generator in batch.generators]
    terms = run._restorer_terms(batch)

    # lines 6-11 with everything spelled out
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    t = torch.tensor([[200, 150, 100, 50][int(torch.randint(4, (), generator=g))] for g in copies])
    z = batch.hint.latents
    noise = torch.cat([torch.randn(1, *z.shape[1:], generator=g) for g in copies])
    a, s = (root.float()[:, None, None, None] for root in (abar[t].sqrt(), (1 - abar[t]).sqrt()))
    z_t = a * z + s * noise
    unet, vae = edtr._unet.network, edtr._latents[0].encoder
    prompt = torch.zeros(len(z), 1, 8)
    down, middle = edtr.controlnet(z_t, t, prompt, controlnet_cond=z, return_dict=False)
    eps = unet(z_t, t, prompt, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    image = vae.decode((z_t - s * eps) / a / vae.config.scaling_factor).sample / 2 + 0.5
    low = WaveletColorFix(1).low  # what fits 32 pixels
    image = image - low(image) + low(batch.hint.image)
    reader.network.eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    wanted = {}
    for name, network in (("task", reader.network), ("reference", hq_net.network)):
        kept: list[Tensor] = []
        hook = network.get_submodule(hq_net.layers[0]).register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        for shown in (image, batch.first):
            network((shown - mean) / std)
        hook.remove()
        wanted[name] = (kept[0] - kept[1]).abs().mean() / 2
    for (name, value), expected in zip(terms.items(), wanted.values(), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4, msg=name)
    parameters = [p for p in edtr.parameters() if p.requires_grad]
    mine = torch.autograd.grad(sum(terms.values()), parameters, allow_unused=True)
    theirs = torch.autograd.grad(sum(wanted.values()), parameters, allow_unused=True)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)

    # lines 12-22: what H reads, and what it is compared with
    reader.network.train()
    read: list[Tensor] = []
    hook = reader.network.register_forward_pre_hook(lambda m, i: read.append(i[0]))
    more = run._recognizer_terms(batch)
    hook.remove()
    assert set(more) == {"task", "matching"} and len(read) == 1
    half = len(batch.first)
    torch.testing.assert_close(read[0][half:], (batch.second - mean) / std)
    assert not read[0].requires_grad
    more["task"].backward()
    assert all(p.grad is None for p in edtr.parameters())


def test_the_teacher_sees_every_image_once(tmp_path: Path, prepared: Path) -> None:
    run = trainer(tmp_path / "run", prepared, steps=1)
    (reader,) = run.readers.values()
    shown: list[int] = []
    stem = next(iter(reader.reference.network.children()))
    stem.register_forward_hook(lambda m, i, o: shown.append(len(o)) if not torch.is_grad_enabled() else None)
    batch = run.batch(*next(run.read(0, 1)), 0, 1)
    run.stages[0].alternation.step(batch)
    assert shown == [2, 2]  # the halves; I_train passes with a graph and is not counted


def test_the_pre_restoration_runs_once_a_step(tmp_path: Path, prepared: Path) -> None:
    run = trainer(tmp_path / "run", prepared, steps=1, n=4)
    count = [0, 0]
    run.restorer._pre.network.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    run.restorer._encoder.network[0].register_forward_hook(lambda *_: count.__setitem__(1, count[1] + 1))
    run.stages[0].alternation.step(run.batch(*next(run.read(0, 1)), 0, 1))
    assert count == [1, 1]


def test_without_prior_the_controlnet_restores_alone() -> None:
    edtr = small_edtr(NoPrior)
    hint = edtr.hint(torch.rand(1, 3, 16, 16))
    edtr(hint, [200], noise=torch.zeros_like(hint.latents)).mean().backward()
    assert all(
        p.grad is not None for p in (*edtr.projection.parameters(), *edtr.controlnet.controlnet_mid_block.parameters())
    )


def test_folders_of_stable_diffusion_are_read(tmp_path: Path) -> None:
    prior, prompt = small_latent_prior(8), torch.randn(1, 3, 8)
    parts = {"vae": prior.encoder.encoder, "unet": prior.denoiser.model, "scheduler": scheduler()}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / "sd" / name)
    save_file({"prompt": prompt}, tmp_path / "sd" / "prompt.safetensors")
    torch.manual_seed(0)
    edtr = EDTR(nn.Identity(), load_latent_diffusion(tmp_path / "sd"))
    torch.manual_seed(0)
    wanted = EDTR(nn.Identity(), LatentPrior(*list(parts.values())[:2], prompt, schedule=NoiseSchedule.scaled_linear()))
    image = torch.rand(1, 3, 16, 16)
    found, wanted_image = (model.restore(image, generator=torch.Generator().manual_seed(1)) for model in (edtr, wanted))
    torch.testing.assert_close(found, wanted_image)
    for name in ("vae", "unet"):
        parts[name].half().save_pretrained(tmp_path / "sd" / name)
    half = EDTR(nn.Identity(), load_latent_diffusion(tmp_path / "sd"))
    assert half.restore(torch.rand(1, 3, 16, 16)).dtype == torch.float32
    (tmp_path / "words" / "vae").mkdir(parents=True)
    with pytest.raises(ValueError, match="unet/"):
        load_latent_diffusion(tmp_path / "words")


@pytest.mark.parametrize("method", ["edtr", "no_pre", "no_color_fix", "no_prior", "no_prior_noise", "hlf_from_noise"])
def test_what_restores_is_what_was_trained(method: str, tmp_path: Path, prepared: Path) -> None:
    run = trainer(tmp_path / "run", prepared, steps=1, method=method)
    run.run()
    loaded, _ = restoring.load_run(tmp_path / "run")
    image = torch.rand(1, 3, 48, 48)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    wanted, found = (
        each.eval().restore(image, generator=generator)
        for each, generator in zip((run.restorer, loaded), generators, strict=True)
    )
    torch.testing.assert_close(found, wanted)


def test_restoring_pads_as_the_run_did(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path / "run", prepared, steps=1, smallest=64).run()
    (tmp_path / "images").mkdir()
    save_image(torch.rand(3, 40, 52), tmp_path / "images" / "a.png")
    seen = []
    hint = EDTR.hint
    monkeypatch.setattr(EDTR, "hint", lambda self, degraded: seen.append(degraded.shape[2:]) or hint(self, degraded))
    restoring.main([str(tmp_path / "run"), str(tmp_path / "images"), str(tmp_path / "o"), "--device", "cpu"])
    assert seen == [(64, 64)]


def test_the_options_of_the_preparation_reach_its_runs(tmp_path: Path) -> None:
    config = preparing.Config(
        out=tmp_path, steps=1, train_prior=False, pre_batch=3, pre_lr=0.125, h_lr=0.25,
        h_optimizer="sgd", **SMALL,
    )  # fmt: skip
    preparing.prepare(config)
    before, oracle = (
        yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("pre", "classification_hq")
    )
    assert (before["batch"], before["s_lr"]) == (3, 0.125)
    assert (oracle["batch"], oracle["h_lr"], oracle["h_optimizer"]) == (SMALL["batch"], 0.25, "sgd")
    for changes, message in (({"tasks": []}, "at least one task"), ({"task": "detection"}, "`tasks` should")):
        with pytest.raises(ValueError, match=message):
            preparing.prepare(replace(config, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "`n` should be at least 1, found 0"),
        ({"t_p": 1000}, r"in \[0, 1000\), found 1000"),
        ({"n": 201}, "`n` should be at most `t_p`"),
        ({"layers": ["layer9"]}, "'layer9'"),
        ({"mixture_extent": 0.3}, "`mixture_extent` should be 0.2"),
        ({"degradation": "mixture_a"}, "`degradation` should be 'mixture_b'"),
        ({"prepared": None, "references": [Path("nowhere")]}, "`prior` and `pre` should be given"),
        ({"references": [Path("nowhere"), Path("nowhere")]}, "oracles for classification, or `prepared` .*, found 2"),
        ({"references": [Path("nowhere")]}, "should be a finished run"),
        (
            {"judges": [Path("nowhere"), Path("nowhere")]},
            "`judges` should be .* for classification, .*, found 2",
        ),
        ({"prior": Path("nowhere/at/all")}, "nowhere"),
    ],
)
def test_bad_options_are_named_and_leave_no_folder(
    changes: dict[str, Any], message: str, tmp_path: Path, prepared: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        trainer(tmp_path / "run", **{"prepared": prepared, **changes})
    assert not (tmp_path / "run").exists()


def test_labels_and_images_of_different_number_are_refused(tmp_path: Path, prepared: Path) -> None:
    run = trainer(tmp_path / "run", prepared)
    images, targets = next(run.read(0, 1))
    batch = run.batch(images, targets[:-1], 0, 3)
    with pytest.raises(ValueError, match="`targets` should be as many as `images`"):
        run._recognizer_terms(batch)
    with pytest.raises(ValueError, match="at least 2 images"):
        run.batch(images[:1], targets[:1], 0, 3)


def test_an_unfinished_preparation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="examples.edtr.prepare wrote, found no"):
        trainer(tmp_path / "run", tmp_path)
    with pytest.raises(ValueError, match="no config.yaml"):
        restoring.load_run(tmp_path)


@pytest.mark.slow
def test_the_experiment_reads_across_tasks(tmp_path: Path) -> None:
    base = replace(TINY, out=tmp_path, test_count=4, all_in_one=True, steps=1)
    study = experiment.Experiment(tmp_path, base, prior_steps=1, prior_images=8, prepare_steps=1)
    found, folder = study.across(1), tmp_path / "across" / experiment.setting(base)
    restorers = [f"edtr_{task}" for task in TASKS]
    assert set(found) == {"all_in_one", "l1_of_each", *restorers}
    assert yaml.safe_load((folder / "all_in_one/seed1/config.yaml").read_text())["steps"] == 3
    assert set(found["all_in_one"]) == set(experiment.ACROSS)
    for task, name in zip(TASKS, restorers, strict=True):  # H reads for its own task alone
        assert set(experiment.ACROSS) - set(found[name]) == {f"{other}_score" for other in TASKS if other != task}
        own = json.loads((folder / name / "seed1/results.json").read_text())
        figures = ("score", "fixed_hr", "judge", "psnr")
        assert {figure: own[figure] for figure in figures} == pytest.approx(
            {figure: found[name][f"{task}_{figure}"] for figure in figures}
        )
    assert set(experiment.ACROSS) - set(found["l1_of_each"]) == {f"{task}_score" for task in TASKS}
    shutil.rmtree(folder / "all_in_one")
    assert study.across(1) == found  # from its file
    table = experiment.across_table([found, found]).splitlines()
    assert len(table) == 8 and all(line.count("|") == len(experiment.ACROSS) + 2 for line in table)


def test_the_last_row_across_tasks_is_one_of_all_minus_that_of_the_task() -> None:
    row = {key: float(number) for number, key in enumerate(experiment.ACROSS)}
    found = {"all_in_one": {key: 2 * value for key, value in row.items()}}
    for task in TASKS:
        found[f"edtr_{task}"] = {key: row[key] + 100 * (not key.startswith(task)) for key in row}
    (last,) = (line for line in experiment.across_table([found]).splitlines() if "minus" in line)
    assert [float(cell) for cell in last.split("|")[2:-1]] == [*row.values()]


@pytest.mark.slow
def test_the_experiment_runs_each_name_once(tmp_path: Path) -> None:
    base = replace(TINY, out=tmp_path, test_count=4)
    study = experiment.Experiment(tmp_path, base, prior_steps=1, prior_images=8, prepare_steps=1)
    names = (*experiment.MAIN, "sr4ir", "no_fm")
    for _ in range(2):  # the second finds all done
        for name in names:
            study.run(name, 1)
    groups = read_runs(tmp_path / "table", by_folder=True)
    (methods,) = groups.values()
    assert set(methods) == set(names)
    shared = json.loads((tmp_path / "table" / experiment.setting(base) / "sr4ir/seed1/results.json").read_text())
    assert {"score", "fixed_hr", "judge", "psnr"} < set(shared)
    found = study.steps(1, [1, 3], 2)
    assert set(found) == {
        f"{name}, {what}" for name in experiment.MAIN for what in ("1 steps", "3 steps", "deviation over noise")
    }
    alone, several = (found[f"edtr_1, {n} steps"]["psnr"] for n in (1, 3))
    assert alone != several and found["edtr_1, deviation over noise"]["psnr"] > 0
    for name in ("sr4ir", "edtr_1"):  # networks of the eleven photographs read, not H, which knows ten textures
        study.unseen(name, 1)
        unseen = json.loads((tmp_path / "unseen" / experiment.setting(base) / name / "seed1/results.json").read_text())
        assert unseen["num_classes"] == 11 and {"fixed_hr", "judge", "psnr"} < set(unseen)
        assert not any(figure.startswith("score") for figure in unseen)
