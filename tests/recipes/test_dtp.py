"""The DTP trainer, on a few steps: what each method trains, stages, resumption, data, degradations, bad input."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.utils import save_image

from examples.common.networks.restorers import SAME_SIZE
from examples.dtp.config import PAPER, MethodName
from examples.dtp.finetune import FineTuning, turns
from examples.dtp.gef import GEF, Batch
from examples.dtp.methods import METHODS
from examples.dtp.networks import add_experts, timed_network
from examples.dtp.train import trainer as build
from examples.experiments import dtp as experiment
from restoreloss.frozen import unwrap
from tests.recipes import cases
from tests.recipes.dtp_runs import TINY, first_batch, trainer


@pytest.fixture(scope="module")
def pretrained(prepared: cases.Prepared) -> Path:
    return prepared.pretrained


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
    noisy, network = batch, unwrap(run.net)
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
            kept.update({n: p.grad.clone() for n, p in unwrap(run.net).named_parameters() if p.grad is not None})

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


@pytest.mark.slow
def test_the_penalty_holds_the_network_where_it_began(tmp_path: Path, pretrained: Path) -> None:
    start = load_file(pretrained / "network.safetensors")

    def moved(method: str, **changes: Any) -> float:
        trainer(tmp_path / f"{method}{changes}", pretrained, method=method, steps=4, **changes).run()
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
            decay, {n: p.grad.clone() for n, p in unwrap(run.net).named_parameters()}
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


@pytest.mark.parametrize("name", ["nafnet-small", "restormer-small"])
def test_networks_take_any_size_and_begin_as_if_without_time_and_experts(name: str) -> None:
    timed = timed_network(name, num_timesteps=50)
    plain, image = SAME_SIZE[name](), torch.rand(1, 3, 21, 30)
    plain.load_state_dict(timed.network.state_dict())
    assert torch.equal(timed(image, 7), plain(image)) and timed(image, 7).shape == image.shape
    add_experts(timed, 3)
    assert torch.equal(timed(image, 7), plain(image))
    for layer in timed.layers:
        for parameter in timed.blocks[layer.replace(".", "/")].parameters():
            nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(timed(image, 7), timed(image, 30))


def write(path: Path, *, size: tuple[int, int] = (30, 34)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.rand(3, *size), path)


def test_clean_folders_are_the_pool_of_pretraining_and_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(6):
        write(tmp_path / "div2k" / "train" / f"{k}.png")
        write(tmp_path / "div2k" / "test" / f"{k}.png")
    (tmp_path / "div2k" / "train" / "6.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    clean = {"data": "folders", "clean": "clean:div2k"}
    results = build(replace(TINY, out=tmp_path / "pre", method="pretrain", **clean)).run()
    assert math.isfinite(results["generative"]) and "psnr" not in results
    assert f"clean: clean:{tmp_path.resolve() / 'div2k'}\n" in (tmp_path / "pre" / "config.yaml").read_text()
    roots = {"noisy": f"clean:{tmp_path / 'div2k'}"}
    changes = {"method": "gef_project", "degradations": ["noisy"], "pairs": roots, **clean}
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
        pairs={"rainy": f"rain100h:{tmp_path / 'light'}", "inpainting": f"celebahq:{tmp_path / 'faces'}"},
        shifted_pairs={"rainy": f"rain100h:{tmp_path / 'heavy'}"},
    )  # fmt: skip
    results = build(config).run()
    assert {"psnr_rainy", "psnr_inpainting", "shifted_psnr"} < set(results)


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
        ({"data": "folders"}, "`pairs` should name"),
        ({"data": "folders", "pairs": {"rainy": "somewhere"}}, "LAYOUT:ROOT"),
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


@pytest.mark.slow
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
