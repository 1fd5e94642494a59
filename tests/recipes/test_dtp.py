"""The DTP trainer, on a few steps: what each method trains, stages, resumption, data, degradations, bad input."""

import functools
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
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.utils import save_image

from examples.common.data.degradations import DEGRADATIONS, degrade, motion_kernel
from examples.common.data.pair_folders import LAYOUTS, pairs
from examples.common.data.pairs import FolderPairs
from examples.dtp.config import PAPER, Config, MethodName
from examples.dtp.finetune import FineTuning, turns
from examples.dtp.gef import GEF, Batch
from examples.dtp.generation import Steps
from examples.dtp.methods import METHODS
from examples.dtp.networks import NETWORKS, add_experts, timed_network
from examples.dtp.train import trainer as build
from examples.experiments import dtp as experiment
from restoreloss.frozen import unwrap
from tests.helpers.processes import ROOT

SMALL: dict[str, Any] = {
    "batch": 4, "patch": 24, "train_count": 16, "test_count": 4, "test_size": 24, "importance_samples": 4, "cpu": True,
    "timesteps": "paper", "replay_share": 1.0,
}  # fmt: skip
TINY = Config(out=Path(), steps=2, save_every=1, **SMALL)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dtp") / "pretrained"
    build(replace(TINY, method="pretrain", steps=6, out=out)).run()
    return out


def trainer(out: Path, pretrained: Path, **changes: Any) -> FineTuning:
    run = build(replace(TINY, out=out, pretrained=pretrained, **changes))
    assert isinstance(run, FineTuning)
    return run


def first_batch(run: Any) -> Any:
    return run.batch(*next(run.read(0, 1)), 0, run.options.steps)


# what trains


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_says(method: str, tmp_path: Path, pretrained: Path) -> None:
    run, described = trainer(tmp_path / "run", pretrained, method=method), METHODS[method]
    results = run.run()
    assert all(math.isfinite(value) for value in results.values())
    assert {"psnr", "ssim", "shifted_psnr", "degraded_psnr", "generative", "t_rainy"} < set(results)
    logged = set(json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]))
    assert ("generative" in logged) == described.replay
    assert ("penalty" in logged) == (described.penalty is not None)
    assert ("orthogonality" in logged) == (described.conflict == "orthogonality")
    assert ("cosine" in logged) == (described.conflict in ("project", "full"))


def test_method_names_are_those_of_the_config() -> None:
    assert set(get_args(MethodName)) == {"pretrain", *METHODS}


def test_pretraining_is_the_loss_written_out_and_lowers_it(tmp_path: Path) -> None:
    run: Any = build(replace(TINY, method="pretrain", out=tmp_path / "run", steps=30))
    batch = first_batch(run)
    noisy, network = batch, bare(run.net)
    sigma = run.levels.sigma[noisy.t].view(-1, 1, 1, 1)
    x_t = noisy.clean + sigma * noisy.noise
    expected = (x_t - (x_t - network(x_t, noisy.t)) - noisy.clean).abs().mean().item()
    logs = [float(run.stages[0].alternation.step(batch)["generative"]) for _ in range(30)]
    assert logs[0] == pytest.approx(expected, rel=1e-5)
    assert logs[-1] < 0.9 * logs[0]


def test_a_plain_step_is_adam_on_the_restoration_loss(tmp_path: Path, pretrained: Path) -> None:
    run = trainer(tmp_path / "run", pretrained)
    batch, network = first_batch(run), unwrap(run.net)
    twin = timed_network("restormer-small", num_timesteps=50)
    twin.load_state_dict(network.state_dict())
    optimizer = torch.optim.Adam(twin.parameters(), lr=run.config.lr)
    F.l1_loss(twin(batch.degraded, batch.t), batch.clean).backward()
    optimizer.step()
    run.stages[0].alternation.step(batch)
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        felt = parameter.grad.abs() > 1e-6  # Adam magnifies what rounding leaves of the others
        torch.testing.assert_close(network.get_parameter(name)[felt], parameter[felt], msg=name)
    assert batch.t.tolist() == [round(50 * PAPER["rainy"])] * 4


@pytest.mark.parametrize("method", ["replay", "project", "full"])
def test_generation_reaches_shallow_layers_alone(method: str, tmp_path: Path, pretrained: Path) -> None:
    gradients = {}
    for name in ("plain", method):
        run = trainer(tmp_path / name, pretrained, method=name)
        steps: Any = run.stages[0].alternation
        kept: dict[str, Tensor] = {}

        def keep(steps: Any = steps, run: FineTuning = run, kept: dict[str, Tensor] = kept) -> None:
            kept.update({n: p.grad.clone() for n, p in bare(run.net).named_parameters() if p.grad is not None})

        steps.update = keep
        steps.step(first_batch(run))
        gradients[name] = kept
        shallow = {id(p) for p in steps.shallow}
        deep = {n for n, p in unwrap(run.net).named_parameters() if id(p) not in shallow}
    for name, value in gradients["plain"].items():
        torch.testing.assert_close(gradients[method][name], value) if name in deep else None
    assert any(
        not torch.allclose(gradients[method][n], gradients["plain"][n]) for n in gradients["plain"] if n not in deep
    )
    assert deep and len(deep) < len(gradients["plain"])


def test_the_penalty_holds_the_network_where_it_began(tmp_path: Path, pretrained: Path) -> None:
    start = load_file(pretrained / "network.safetensors")

    def moved(method: str, **changes: Any) -> float:
        trainer(tmp_path / f"{method}{changes}", pretrained, method=method, steps=8, **changes).run()
        end = load_file(tmp_path / f"{method}{changes}" / "network.safetensors")
        return math.sqrt(sum(float((end[n] - start[n]).square().sum()) for n in start))

    free = moved("plain")
    for method, weight in (("l2sp", 1e4), ("fisher", 1e12), ("mas", 1e3), ("gn", 1e3), ("taylor2", 1e4)):
        assert moved(method, penalty_weight=weight) < 0.9 * free, method


def test_generation_has_less_to_say_in_deeper_layers(tmp_path: Path, pretrained: Path) -> None:
    kept: dict[float, dict[str, Tensor]] = {}
    for decay in (0.0, 5.0):
        run = trainer(tmp_path / f"{decay}", pretrained, method="gef_project", decay=decay, penalty_weight=0.0)
        steps: Any = run.stages[0].alternation
        steps.update = lambda run=run, decay=decay: kept.__setitem__(
            decay, {n: p.grad.clone() for n, p in bare(run.net).named_parameters()}
        )
        steps.step(first_batch(run))
        assert max(steps.factors) == 1.0 and (min(steps.factors) < 1e-3) == (decay > 0)
    assert any(not torch.allclose(kept[0.0][name], kept[5.0][name], rtol=1e-3) for name in kept[0.0])


def test_the_share_of_replay_is_right_on_average_whatever_the_processes(tmp_path: Path, pretrained: Path) -> None:
    for method in ("replay", "orthogonality"):
        run = trainer(tmp_path / method, pretrained, method=method, replay_share=0.1)
        counts = [len(run._replayed(step)) for step in range(600)]
        assert set(counts) == {0, 2 if method == "orthogonality" else 1}
        assert sum(counts) / 600 == pytest.approx(0.1 * 4, rel=0.25)
        assert run.replay_weight(run.noisy(torch.rand(2, 3, 24, 24), [(0,), (1,)])) == 2 / 4


def test_adapters_that_are_new_are_not_held(tmp_path: Path, pretrained: Path) -> None:
    run = trainer(tmp_path / "run", pretrained, method="taylor2", moe=True)
    steps: Any = run.stages[0].alternation
    steps.step(first_batch(run))
    charged = set(steps.importance.importance())
    assert charged and not any("experts" in name or "alpha" in name for name in charged)
    assert all(parameter.requires_grad for parameter in unwrap(run.net).parameters())
    assert any("decoders/0" in name for name in charged)  # what was there is held


def test_of_l2sp_every_parameter_matters_alike(tmp_path: Path, pretrained: Path) -> None:
    run = trainer(tmp_path / "run", pretrained, method="l2sp")
    steps = run.stages[0].alternation
    assert isinstance(steps, GEF)
    steps.step(first_batch(run))
    assert steps.importance is not None
    assert all(bool((value == 1).all()) for value in steps.importance.importance().values())


# stages


def test_degradations_join_by_their_timestep() -> None:
    t = {"hazy": 47, "noisy": 4, "rainy": 8}
    assert turns(t, "joint", 1) == [["noisy", "rainy", "hazy"]]
    assert turns(t, "ascending", 1) == [["noisy"], ["noisy", "rainy"], ["noisy", "rainy", "hazy"]]
    assert turns(t, "descending", 1)[0] == ["hazy"]
    assert {tuple(turns(t, "random", seed)[0]) for seed in range(20)} == {("noisy",), ("rainy",), ("hazy",)}


def test_each_stage_trains_on_its_degradations_with_their_timesteps(tmp_path: Path, pretrained: Path) -> None:
    run = trainer(tmp_path / "run", pretrained, method="gef_project", degradations=["hazy", "noisy"], moe=True)
    seen, anchors = [], {}

    def watched(steps: GEF, batch: Batch) -> dict[str, Tensor]:
        seen.append(sorted(set(batch.t.tolist())))
        logs = GEF.step(steps, batch)
        if steps.importance is not None:
            kept = steps.importance.state_dict()
            anchors[steps] = next(value for name, value in kept.items() if "anchor" in name)
        return logs

    for stage in run.stages:
        stage.alternation.step = functools.partial(watched, stage.alternation)  # type: ignore[method-assign]
    results = run.run()
    assert seen == [[4], [4], [4, 47], [4, 47]]
    assert {"psnr_hazy", "psnr_noisy", "t_hazy"} < set(results)
    one, other = anchors.values()
    assert not torch.equal(one, other)  # held where each stage began
    first, last = anchors
    assert first.importance is None and not first.optimizer.state  # nothing of a finished stage stays
    assert last.importance is not None and last.optimizer.state  # but the last one, which may go on


def test_matched_timesteps_are_searched_with_the_pretrained_network(tmp_path: Path, pretrained: Path) -> None:
    run = trainer(tmp_path / "run", pretrained, timesteps="matched", degradations=["noisy", "blurry"])
    found = json.loads((tmp_path / "run" / "timesteps.json").read_text())
    for name, value in found.items():
        assert run.t_star[name] == (round(50 * PAPER[name]) if value["degenerate"] else value["best"])
    assert (tmp_path / "run" / "timesteps.png").stat().st_size > 1000
    assert trainer(tmp_path / "first", pretrained, timesteps="first").t_star == {"rainy": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "gef_project", "degradations": ["noisy", "hazy"], "moe": True},
        {"method": "gef", "orthogonality_every": 2},
        {"method": "pretrain"},
    ],
)
def test_a_stopped_run_resumes_with_the_same_numbers(
    changes: dict[str, Any], tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole", pretrained, steps=3, **changes).run()
    with monkeypatch.context() as patch:
        steps, update = [0], Steps.update

        def count(self: Any) -> Any:
            steps[0] += 1
            if steps[0] == 3:
                raise KeyboardInterrupt
            return update(self)

        patch.setattr("examples.dtp.generation.Steps.update", count)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "stopped", pretrained, steps=3, **changes).run()
    resumed = trainer(tmp_path / "stopped", pretrained, steps=3, **changes).run()
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    one, other = (load_file(tmp_path / run / "network.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow  # test_distributed.py has the full method
@pytest.mark.parametrize("method", ["replay", "project"])
def test_two_processes_train_the_network_that_one_trains(method: str, tmp_path: Path, pretrained: Path) -> None:
    small = [f"--{name}={str(value).lower()}" for name, value in SMALL.items()]
    options = [*small, "--steps=2", f"--pretrained={pretrained}", f"--method={method}", "--replay_share=0.5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for processes in (1, 2):
        ran = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                "-m", "examples.dtp.train", f"--out={tmp_path / str(processes)}", *options,
            ],
            check=True, cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert f"{processes} processes" in ran.stderr
    one, two = (load_file(tmp_path / str(processes) / "network.safetensors") for processes in (1, 2))
    start = load_file(pretrained / "network.safetensors")
    moved, apart = (
        math.sqrt(sum(float((net[name] - other[name]).double().square().sum()) for name in one))
        for net, other in ((one, start), (two, one))
    )
    assert moved > 0.01 and apart < 0.02 * moved  # Adam magnifies what rounding leaves of gradients near zero


# networks


@pytest.mark.parametrize("name", ["nafnet-small", "restormer-small"])
def test_networks_take_any_size_and_begin_as_if_without_time_and_experts(name: str) -> None:
    timed = timed_network(name, num_timesteps=50)
    plain, image = NETWORKS[name](), torch.rand(1, 3, 21, 30)
    plain.load_state_dict(timed.network.state_dict())
    assert torch.equal(timed(image, 7), plain(image)) and timed(image, 7).shape == image.shape
    add_experts(timed, 3)
    assert torch.equal(timed(image, 7), plain(image))
    for layer in timed.layers:
        for parameter in timed.blocks[layer.replace(".", "/")].parameters():
            nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(timed(image, 7), timed(image, 30))


# degradations


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_degradations_are_those_of_their_seed_and_harsher_elsewhere(name: str) -> None:
    from examples.common.data.photos import load_photo

    photo = load_photo("coffee")[:, 100:163, 200:277]

    def spoiled(seed: int, shifted: bool = False) -> Tensor:
        return degrade(name, photo, torch.Generator().manual_seed(seed), shifted=shifted)

    one = spoiled(1)
    assert one.shape == photo.shape and torch.equal(one, spoiled(1)) and not torch.equal(one, spoiled(2))
    assert float(one.min()) >= 0 and float(one.max()) <= 1
    torch.testing.assert_close(255 * one, (255 * one).round())
    usual, elsewhere = (
        sum(float((spoiled(seed, shifted) - photo).square().mean()) for seed in range(8)) for shifted in (False, True)
    )
    assert 0 < usual < elsewhere


def test_motion_is_a_path_of_its_length_and_direction() -> None:
    level, upright = motion_kernel(9, 0.0), motion_kernel(9, math.pi / 2)
    assert float(level.sum()) == pytest.approx(1) and torch.allclose(level, upright.T, atol=1e-5)
    assert float(level[level.shape[0] // 2].sum()) == pytest.approx(1, abs=1e-4)
    places = torch.arange(level.shape[1]).float()
    columns = level.sum(0)
    mean = float((columns * places).sum())
    spread = float((columns * (places - mean).square()).sum())
    assert mean == pytest.approx(level.shape[1] // 2, abs=0.01)
    assert spread == pytest.approx(9**2 / 12 + 1 / 6, rel=0.05)  # of a line, and of bilinear splatting


def test_an_unknown_degradation_is_named() -> None:
    with pytest.raises(ValueError, match="'foggy'"):
        degrade("foggy", torch.rand(3, 8, 8), torch.Generator())


# data on disk

PAIRED = {
    "gopro": ("train/a/blur/1.png", "train/a/sharp/1.png", "test/b/blur/2.png", "test/b/sharp/2.png"),
    "reside6k": ("train/hazy/1.jpg", "train/GT/1.png", "test/hazy/2.png", "test/GT/2.png"),
    "lol": ("our485/low/2.png", "our485/high/2.png", "eval15/low/1.png", "eval15/high/1.png"),
    "raindrop": ("train/data/0_rain.png", "train/gt/0_clean.png", "test_a/data/3_rain.png", "test_a/gt/3_clean.png"),
    "rain100h": (
        "train/rain/norain-1x2.png", "train/norain/norain-1.png", "test/rain/rain-002.png",
        "test/norain/norain-002.png",
    ),
    "srd": (
        "train/shadow/I_1.jpg", "train/shadow_free/I_1_no_shadow.jpg", "test/shadow/I_2.png",
        "test/shadow_free/I_2.png",
    ),
    "snow100k": (
        "train/synthetic/s_1.png", "train/gt/s_1.png", "test/Snow100K-L/synthetic/s_2.png",
        "test/Snow100K-L/gt/s_2.png",
    ),
    "universal": ("train/rainy/LQ/1.png", "train/rainy/GT/1.png", "val/rainy/LQ/2.png", "val/rainy/GT/2.png"),
}  # fmt: skip
CLEAN = {
    "cbsd68": ("train/1.png", "original_png/2.png"),
    "celebahq": ("train/1.jpg", "test/2.jpg"),
    "clean": ("train/1.png", "test/2.png"),
}


def write(path: Path, *, size: tuple[int, int] = (30, 34)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.rand(3, *size), path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_read(layout: str, tmp_path: Path) -> None:
    files = PAIRED.get(layout) or CLEAN[layout]
    for file in files:
        write(tmp_path / file)
    (tmp_path / files[0]).with_name("Thumbs.db").write_bytes(b"")
    found = {split: pairs(layout, tmp_path, split, "rainy") for split in ("train", "test")}
    if layout in PAIRED:
        assert found == {
            "train": [(tmp_path / files[0], tmp_path / files[1])],
            "test": [(tmp_path / files[2], tmp_path / files[3])],
        }
    else:
        assert found == {"train": [(None, tmp_path / files[0])], "test": [(None, tmp_path / files[1])]}
    data = FolderPairs({"rainy": (layout, tmp_path)}, "train", 16)
    pair, number = data[0]  # type: ignore[misc]
    assert pair.shape == (2, 3, 16, 16) and int(number) == 0
    test = FolderPairs({"rainy": (layout, tmp_path)}, "test", 16)
    assert torch.equal(test[0][0], test[0][0]) and test[0][0].shape == (2, 3, 30, 34)  # type: ignore[index]


def test_what_is_broken_on_disk_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("1", "2", "3", "4", "5"):
        write(tmp_path / "our485/low" / f"{name}.png")
        if name != "4":
            write(tmp_path / "our485/high" / f"{name}.png", size=(30, 34) if name != "3" else (20, 34))
    (tmp_path / "our485/low/2.png").write_bytes(b"no picture")
    write(tmp_path / "our485/low/5.png", size=(8, 8))
    write(tmp_path / "our485/high/5.png", size=(8, 8))
    data = FolderPairs({"low_light": ("lol", tmp_path)}, "train", 16)
    assert [data[index] is None for index in range(len(data))] == [False, True, True, True]
    assert "4.png skipped: no clean image" in caplog.text
    assert "2.png" in caplog.text and "of one size" in caplog.text and "smaller than the crops" in caplog.text
    with pytest.raises(ValueError, match="found none at train"):
        pairs("gopro", tmp_path, "train", "blurry")


def test_clean_folders_are_the_pool_of_pretraining_and_replay(tmp_path: Path) -> None:
    for k in range(6):
        write(tmp_path / "div2k" / "train" / f"{k}.png")
        write(tmp_path / "div2k" / "test" / f"{k}.png")
    (tmp_path / "div2k" / "train" / "6.png").write_bytes(b"no picture")
    clean = {"data": "folders", "clean": f"clean:{tmp_path / 'div2k'}"}
    results = build(replace(TINY, out=tmp_path / "pre", method="pretrain", **clean)).run()
    assert math.isfinite(results["generative"]) and "psnr" not in results
    places = {"noisy": f"clean:{tmp_path / 'div2k'}"}
    changes = {"method": "gef_project", "degradations": ["noisy"], "places": places, **clean}
    run = trainer(tmp_path / "run", tmp_path / "pre", **changes)
    assert sorted(path.parent.name for path in run.clean.sources) == ["train"] * 7
    assert math.isfinite(run.run()["psnr"])


def test_folders_train_and_are_tested_where_the_data_shift(tmp_path: Path) -> None:
    for k in range(5):
        for folder in ("train/rain", "train/norain", "test/rain", "test/norain"):
            write(tmp_path / "light" / folder / f"norain-{k}.png")
            write(tmp_path / "heavy" / folder / f"norain-{k}.png")
        write(tmp_path / "faces" / "train" / f"{k}.png")
        write(tmp_path / "faces" / "test" / f"{k}.png")
    config = replace(
        TINY, out=tmp_path / "run", method="scratch", data="folders", degradations=["rainy", "inpainting"],
        places={"rainy": f"rain100h:{tmp_path / 'light'}", "inpainting": f"celebahq:{tmp_path / 'faces'}"},
        shifted_places={"rainy": f"rain100h:{tmp_path / 'heavy'}"},
    )  # fmt: skip
    results = build(config).run()
    assert {"psnr_rainy", "psnr_inpainting", "shifted_psnr"} < set(results)


# what is wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"degradations": []}, "`degradations` should be of"),
        ({"degradations": ["foggy"]}, "'foggy'"),
        ({"network": "unet"}, "`network` should be one of"),
        ({"pretrained": Path("nowhere")}, "`pretrained` should be"),
        ({"network": "nafnet-small"}, "a run of network 'nafnet-small'"),
        ({"num_timesteps": 100}, "a run of num_timesteps 100"),
        ({"method": "gef", "batch": 1}, "at least 2 a process|at least 2 for each process"),
        ({"importance_samples": 0}, "`importance_samples`"),
        ({"orthogonality_every": 0}, "`orthogonality_every`"),
        ({"data": "folders"}, "`places` should name"),
        ({"data": "folders", "places": {"rainy": "somewhere"}}, "LAYOUT:ROOT"),
        ({"method": "project", "precision": "fp16"}, "`precision`"),
        ({"steps": 0}, "`steps`"),
    ],
)
def test_bad_options_are_named_and_leave_no_folder(
    changes: dict[str, Any], message: str, tmp_path: Path, pretrained: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **{"pretrained": pretrained, **changes})
    assert not (tmp_path / "run").exists()


def test_the_experiment_and_its_tables(tmp_path: Path) -> None:
    study = experiment.Experiment(tmp_path, replace(TINY, steps=1), pretrain_steps=1)
    for seed in (1, 2):
        for folder, name, changes in study.forgetting():
            if name in ("plain", "taylor2_2"):
                study.run(folder, name, seed, **changes)
    text = study.tables()
    assert "### forgetting" in text and "`taylor2_2`" in text
    names = {name for listing in (study.forgetting(), study.elsewhere(), study.order()) for _, name, _ in listing}
    assert {"gef", "scratch", "ascending", "joint_moe", "mas_0.1"} <= names


@pytest.mark.slow
def test_the_experiment_matches_the_timesteps_of_every_degradation(tmp_path: Path) -> None:
    study = experiment.Experiment(tmp_path, replace(TINY, steps=1), pretrain_steps=1)
    study.timesteps(1)
    assert "| noisy |" in study.tables() and (tmp_path / "timesteps/seed1/timesteps.png").exists()
