"""The EDTR trainer, on a few steps: every method and task, Algorithm S1 line by line, resumption, bad input."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from safetensors.torch import load_file
from skimage import data as photos
from torch import Tensor, nn
from torchvision.utils import save_image

from examples.common.data.folder import read_picture
from examples.common.networks.latent_diffusion import (
    empty_prompt,
    scheduler,
    small_autoencoder,
    small_prompt,
    small_unet,
)
from examples.edtr import prepare as preparing
from examples.edtr import restore as restoring
from examples.edtr.config import Config, MethodName
from examples.edtr.methods import METHODS
from examples.edtr.train import TASKS, Trainer
from examples.experiments import edtr as experiment
from examples.experiments.report import read_runs
from restoreloss import Alternation, NoiseSchedule, WaveletColorFix
from restoreloss.restorers.edtr import EDTR, latent_controlnet
from restoreloss.restorers.tiling import apart, tiled, together
from tests.helpers.processes import ROOT

SMALL: dict[str, Any] = {"batch": 4, "train_count": 20, "test_count": 6, "mixture_extent": 0.2, "cpu": True}
TINY = Config(out=Path(), steps=3, save_every=2, long_steps=3, **SMALL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edtr") / "prepared"
    preparing.prepare(preparing.Config(out=folder, steps=2, prior_steps=2, tasks=list(TASKS), **SMALL))
    return folder


def trainer(out: Path, prepared: Path, **changes: Any) -> Trainer:
    return Trainer(replace(TINY, out=out, prepared=prepared, **changes))


def small_edtr(**options: Any) -> EDTR:
    torch.manual_seed(0)
    vae, unet = small_autoencoder(8), small_unet(8)
    pre = nn.Conv2d(3, 3, 1)
    prior = unet if options.pop("prior", True) else None
    edtr = EDTR(pre, vae, prior, latent_controlnet(unet), small_prompt(), NoiseSchedule.scaled_linear(), **options)
    for block in (*edtr.controlnet.controlnet_down_blocks, edtr.controlnet.controlnet_mid_block):
        nn.init.normal_(block.weight, std=0.1)  # they begin at zero, and would hide what is told
    return edtr


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def changed(before: dict[str, Tensor], network: nn.Module) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_says(method: str, tmp_path: Path, prepared: Path) -> None:
    run, described = trainer(tmp_path / "run", prepared, method=method), METHODS[method]
    controlnet, decoder = state(run.restorer.controlnet), state(run.restorer.decoder)
    (reader,) = run.readers.values()
    recogniser, reference = state(reader.network), state(reader.reference.network)
    results = run.run()
    assert all(math.isfinite(value) for value in results.values())
    assert {"score", "score_on_hr", "fixed_hr", "judge", "judge_distance", "psnr", "ssim"} < set(results)
    assert changed(controlnet, run.restorer.controlnet)
    assert changed(decoder, run.restorer.decoder) == (described.decoder and described.hlf is not None)
    assert changed(recogniser, reader.network)
    assert not changed(reference, reader.reference.network)
    logged = set(json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]))
    counts = {"both": 2, "task": 1, "reference": 1, None: 1}
    assert len([name for name in logged if name.startswith("edtr/")]) == counts[described.hlf]
    assert ("edtr/noise" in logged) == (described.hlf is None)
    assert ("classification/matching" in logged) == described.matching


def test_method_names_are_those_of_the_config() -> None:
    assert set(get_args(MethodName)) == set(METHODS)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
@pytest.mark.parametrize("n", [1, 4])
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
        "edtr", *(f"recogniser_{task}" for task in TASKS)
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"all_in_one": True}, {"n": 4}])
def test_a_stopped_run_resumes_with_the_same_numbers(
    changes: dict[str, Any], tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole", prepared, steps=5, **changes).run()
    with monkeypatch.context() as patch:
        steps, step = [0], Alternation.step

        def count(self: Any, batch: Any) -> Any:
            steps[0] += 1
            if steps[0] == 4:
                raise KeyboardInterrupt
            return step(self, batch)

        patch.setattr(Alternation, "step", count)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "stopped", prepared, steps=5, **changes).run()
    resumed = trainer(tmp_path / "stopped", prepared, steps=5, **changes).run()
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    for file in (tmp_path / "whole").glob("*.safetensors"):
        other = load_file(tmp_path / "stopped" / file.name)
        assert all(torch.equal(value, other[name]) for name, value in load_file(file).items())


@pytest.mark.slow  # test_distributed.py has the full method
def test_two_processes_train_the_restorer_that_one_trains(tmp_path: Path, prepared: Path) -> None:
    small = [f"--{name}={str(value).lower()}" for name, value in SMALL.items()]
    # the reference's features alone: those of H follow its batch statistics, which are each process's own
    options = [*small, "--steps=2", f"--prepared={prepared}", "--method=only_reference"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for processes in (1, 2):
        subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                "-m", "examples.edtr.train", f"--out={tmp_path / str(processes)}", *options,
            ],
            check=True, cwd=tmp_path, env=environment, capture_output=True,
        )  # fmt: skip
    one, two = (load_file(tmp_path / str(processes) / "edtr.safetensors") for processes in (1, 2))
    start = trainer(tmp_path / "start", prepared, method="only_reference").restorer.state_dict()
    moved, apart_by = (
        math.sqrt(sum(float((net[name] - other[name]).double().square().sum()) for name in one))
        for net, other in ((one, start), (two, one))
    )
    assert moved > 0.01 and apart_by < 0.02 * moved  # AdamW magnifies what rounding leaves of gradients near zero


# Algorithm S1


def test_a_step_is_the_algorithm_written_out(tmp_path: Path, prepared: Path) -> None:
    run = trainer(tmp_path / "run", prepared, n=4)
    (reader,) = run.readers.values()
    edtr, hq_net = run.restorer, reader.reference
    edtr.controlnet.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Conv2d) else None)
    pictures, targets = next(run.read(0, 1))
    batch = run.batch(pictures, targets, 0, 3)
    copies = [torch.Generator().set_state(generator.get_state()) for generator in batch.chance]
    terms = run._restorer_terms(batch)

    # lines 6-11 with everything spelled out
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    t = torch.tensor([[200, 150, 100, 50][int(torch.randint(4, (), generator=g))] for g in copies])
    z = batch.hint.latents
    noise = torch.cat([torch.randn(1, *z.shape[1:], generator=g) for g in copies])
    a, s = (root.float()[:, None, None, None] for root in (abar[t].sqrt(), (1 - abar[t]).sqrt()))
    z_t = a * z + s * noise
    unet, vae = edtr._unet.network, edtr._vae[0]  # type: ignore[union-attr]
    prompt = torch.zeros(len(z), 1, 8)
    down, middle = edtr.controlnet(z_t, t, prompt, controlnet_cond=z, return_dict=False)
    eps = unet(z_t, t, prompt, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    image = vae.decode((z_t - s * eps) / a / vae.config.scaling_factor).sample / 2 + 0.5
    low = WaveletColorFix().low
    image = image - low(image) + low(batch.hint.picture)
    reader.network.eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    wanted = {}
    for name, network in (("task", reader.network), ("reference", hq_net.network)):
        kept: list[Tensor] = []
        hook = network.get_submodule(hq_net.layers[0]).register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        for picture in (image, batch.first):
            network((picture - mean) / std)
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
    more = run._recogniser_terms(batch)
    hook.remove()
    assert set(more) == {"task", "matching"} and len(read) == 1
    half = len(batch.first)
    torch.testing.assert_close(read[0][half:], (batch.second - mean) / std)
    assert not read[0].requires_grad
    more["task"].backward()
    assert all(p.grad is None for p in edtr.parameters())


def test_the_teacher_sees_every_picture_once(tmp_path: Path, prepared: Path) -> None:
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


# the restorer


def test_only_controlnet_and_decoder_are_its_own() -> None:
    edtr = small_edtr()
    assert {name.partition(".")[0] for name in edtr.state_dict()} == {"controlnet", "decoder"}
    frozen = [edtr._pre, edtr._encoder, edtr._unet]
    edtr.train().requires_grad_(True)
    hint = edtr.hint(torch.rand(2, 3, 16, 16))
    assert not hint.latents.requires_grad
    edtr(hint, torch.tensor([200, 50]), noise=torch.randn_like(hint.latents)).mean().backward()
    for held in frozen:
        assert held is not None and not held.network.training
        assert all(p.grad is None and not p.requires_grad for p in held.network.parameters())
    assert all(p.grad is not None for p in edtr.decoder.parameters())


def test_restore_takes_any_size_and_stays_in_range() -> None:
    edtr = small_edtr(n=2).eval()
    for height, width in ((1, 1), (17, 30), (16, 16)):
        restored = edtr.restore(torch.rand(1, 3, height, width))
        assert restored.shape == (1, 3, height, width) and restored.min() >= 0 and restored.max() <= 1
    picture = torch.rand(1, 3, 16, 16)
    first, again = (edtr.restore(picture, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, edtr.restore(picture))
    alone = edtr.restore(picture, generator=[torch.Generator().manual_seed(5)])
    both = edtr.restore(picture.repeat(2, 1, 1, 1), generator=[torch.Generator().manual_seed(s) for s in (5, 6)])
    torch.testing.assert_close(both[:1], alone)
    with pytest.raises(ValueError, match="multiples of 4"):
        edtr.hint(torch.rand(1, 3, 18, 16))


def test_small_pictures_are_padded_and_cut_back() -> None:
    edtr = small_edtr().eval()
    seen: list[tuple[int, ...]] = []
    edtr._pre.network.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[2:])))
    assert edtr.restore(torch.rand(1, 3, 20, 31), smallest=32).shape == (1, 3, 20, 31)
    assert seen == [(32, 32)]


def test_from_noise_does_not_know_the_latents_but_as_a_hint() -> None:
    noise = torch.randn(1, 4, 8, 8)
    picture = torch.rand(1, 3, 16, 16)
    for t_p, same in ((None, True), (200, False)):
        edtr = small_edtr(t_p=t_p).eval()
        for block in (*edtr.controlnet.controlnet_down_blocks, edtr.controlnet.controlnet_mid_block):
            nn.init.zeros_(block.weight)  # tells nothing
        edtr.color_fix = None
        results = [edtr(edtr.hint(x), edtr.timesteps(), noise=noise) for x in (picture, 1 - picture)]
        assert torch.equal(*results) == same
    assert small_edtr(t_p=None).timesteps(2) == [999, 499]


def test_without_prior_the_controlnet_restores_alone() -> None:
    edtr = small_edtr(prior=False)
    hint = edtr.hint(torch.rand(1, 3, 16, 16))
    edtr(hint, [200], noise=torch.zeros_like(hint.latents)).mean().backward()
    assert all(
        p.grad is not None for p in (*edtr.projection.parameters(), *edtr.controlnet.controlnet_mid_block.parameters())
    )


def test_checkpointing_changes_no_number() -> None:
    gradients = []
    for again in (False, True):
        edtr = small_edtr()
        if again:
            edtr.enable_checkpointing()
        hint = edtr.hint(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
        edtr(hint, torch.tensor([200]), noise=torch.ones_like(hint.latents)).square().mean().backward()
        gradients.append([p.grad for p in edtr.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_folders_of_stable_diffusion_are_read(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (tmp_path / "words" / "merges.txt").write_text("#version: 0.2\n")
    words = CLIPTokenizer(str(tmp_path / "words/vocab.json"), str(tmp_path / "words/merges.txt"), model_max_length=7)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=3, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=7, bos_token_id=0, eos_token_id=1,
        )
    ).eval()  # fmt: skip
    parts = {
        "vae": small_autoencoder(8), "unet": small_unet(8), "scheduler": scheduler(), "text_encoder": text,
        "tokenizer": words,
    }  # fmt: skip
    for name, part in parts.items():
        part.save_pretrained(tmp_path / "sd" / name)
    prompt = empty_prompt(tmp_path / "sd")
    tokens = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(prompt, text(tokens).last_hidden_state)
    edtr = EDTR.from_pretrained(tmp_path / "sd", nn.Identity())
    assert edtr.restore(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    edtr.save_trained(tmp_path / "trained.safetensors")
    again = EDTR.from_pretrained(tmp_path / "sd", nn.Identity(), trained=tmp_path / "trained.safetensors")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in edtr.state_dict().items())
    for name in ("vae", "unet", "text_encoder"):
        parts[name].half().save_pretrained(tmp_path / "sd" / name)
    half = EDTR.from_pretrained(tmp_path / "sd", nn.Identity())
    assert half.restore(torch.rand(1, 3, 16, 16)).dtype == torch.float32
    (tmp_path / "words" / "vae").mkdir()
    with pytest.raises(ValueError, match="unet/"):
        EDTR.from_pretrained(tmp_path / "words", nn.Identity())
    with pytest.raises(ValueError, match="no file"):
        EDTR.from_pretrained(tmp_path / "sd", nn.Identity(), trained=tmp_path / "none")


# pictures


def test_tiles_of_a_pointwise_function_are_its_whole() -> None:
    picture = torch.rand(2, 3, 37, 50, dtype=torch.float64)
    for tile, overlap in ((16, 0), (16, 4), (16, 8), (40, 10), (64, 16)):
        torch.testing.assert_close(tiled(torch.square, picture, tile=tile, overlap=overlap), picture.square())


def test_tiles_fade_into_each_other() -> None:
    count = [0.0]

    def constant(part: Tensor) -> Tensor:
        count[0] += 1
        return torch.full_like(part, count[0])

    row = tiled(constant, torch.zeros(1, 1, 8, 24, dtype=torch.float64), tile=16, overlap=8)[0, 0, 0]
    assert torch.equal(row[:8], torch.ones(8).double()) and torch.equal(row[16:], torch.full((8,), 2.0).double())
    steps = row.diff()[7:16]
    assert (steps > 0).all() and steps.max() < 0.2
    with pytest.raises(ValueError, match="half a tile"):
        tiled(constant, torch.zeros(1, 1, 8, 24), tile=16, overlap=9)


def test_together_and_apart() -> None:
    pictures = [torch.rand(3, 5, 9), torch.rand(3, 8, 4)]
    batch = together(pictures, 4)
    assert batch.shape == (2, 3, 8, 12)
    assert torch.equal(batch[0, :, 7, 11], pictures[0][:, 4, 8])
    assert all(torch.equal(one, other) for one, other in zip(apart(batch, pictures), pictures, strict=True))
    assert together(torch.rand(2, 3, 8, 8), 4, 16).shape == (2, 3, 16, 16)


def test_a_folder_is_restored(tmp_path: Path, prepared: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path / "run", prepared, steps=1).run()
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    cat = torch.from_numpy(photos.chelsea()[:50, :61].copy()).permute(2, 0, 1) / 255
    save_image(cat, pictures / "cat.png")
    save_image(cat[:, :48], pictures / "cat.jpg")
    save_image(cat[:, :20, :20], pictures / "deep" / "part.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    with caplog.at_level("INFO"):
        for out in ("out", "again"):
            command = ["--run", str(tmp_path / "run"), "--tile", "32", "--n", "2", str(pictures), str(tmp_path / out)]
            restoring.main([*command, "--device", "cpu"])
    assert "broken.png skipped" in caplog.text and "3 images restored" in caplog.text
    shapes = {"cat.png": (3, 48, 61), "cat.png.png": (3, 50, 61), "deep/part.png": (3, 20, 20)}
    for name, shape in shapes.items():
        first, again = (read_picture(tmp_path / out / name) for out in ("out", "again"))
        assert first.shape == shape and torch.equal(first, again)


def test_restoring_pads_as_the_run_did(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path / "run", prepared, steps=1, smallest=64).run()
    (tmp_path / "pictures").mkdir()
    save_image(torch.rand(3, 40, 52), tmp_path / "pictures" / "a.png")
    seen = []
    hint = EDTR.hint
    monkeypatch.setattr(EDTR, "hint", lambda self, degraded: seen.append(degraded.shape[2:]) or hint(self, degraded))
    restoring.main(["--run", str(tmp_path / "run"), "--device", "cpu", str(tmp_path / "pictures"), str(tmp_path / "o")])
    assert seen == [(64, 64)]


def test_half_precision_decodes_to_more_than_its_own_levels() -> None:
    edtr = small_edtr(color_fix=True)
    ramp = torch.linspace(0.5, 1, 64 * 64).reshape(1, 1, 64, 64).expand(1, 3, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        hint = edtr.hint(ramp)
        picture = edtr(hint, 200, noise=edtr.noise(hint))
    assert hint.picture.dtype == hint.latents.dtype == picture.dtype == torch.float32


def test_the_pre_restoration_learns_from_patches(tmp_path: Path) -> None:
    config = preparing.Config(
        out=tmp_path, steps=1, train_prior=False, pre_patch=24, pre_batch=3, pre_steps=2, pre_lr=0.125, h_lr=0.25,
        h_optimizer="sgd", **SMALL,
    )  # fmt: skip
    preparing.prepare(config)
    before, oracle = (
        yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("pre", "classification_hq")
    )
    assert (before["patch"], before["batch"], before["steps"], before["s_lr"]) == (24, 3, 2, 0.125)
    assert (oracle["patch"], oracle["h_lr"], oracle["h_optimizer"]) == (None, 0.25, "sgd")
    for changes, message in (({"tasks": []}, "at least one task"), ({"task": "detection"}, "`tasks` should")):
        with pytest.raises(ValueError, match=message):
            preparing.prepare(replace(config, **changes))


# what is wrong


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
        ({"references": [Path("nowhere")]}, "directory of a finished run"),
        ({"prior": Path("nowhere/at/all")}, "nowhere"),
    ],
)
def test_bad_options_are_named_and_leave_no_folder(
    changes: dict[str, Any], message: str, tmp_path: Path, prepared: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        trainer(tmp_path / "run", **{"prepared": prepared, **changes})
    assert not (tmp_path / "run").exists()


def test_labels_and_pictures_of_different_number_are_refused(tmp_path: Path, prepared: Path) -> None:
    run = trainer(tmp_path / "run", prepared)
    pictures, targets = next(run.read(0, 1))
    batch = run.batch(pictures, targets[:-1], 0, 3)
    with pytest.raises(ValueError, match="`targets` should be as many as `images`"):
        run._recogniser_terms(batch)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        run.batch(pictures[:1], targets[:1], 0, 3)


def test_an_unfinished_preparation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="examples.edtr.prepare wrote, found no"):
        trainer(tmp_path / "run", tmp_path)
    with pytest.raises(ValueError, match="no config.yaml"):
        restoring.load_run(tmp_path)


def test_the_experiment_runs_each_name_once(tmp_path: Path) -> None:
    base = replace(TINY, out=tmp_path, test_count=4)
    study = experiment.Experiment(tmp_path, base, prior_steps=1, prior_pictures=8, prepare_steps=1)
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
