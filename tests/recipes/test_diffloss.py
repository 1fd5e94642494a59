"""Does the reference trainer of DiffLoss train what it says, go on after a kill, and leave what others can read?"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml  # type: ignore[import-untyped, unused-ignore]
from safetensors.torch import load_file, save_file
from spandrel import ModelLoader
from torch import Tensor, nn
from torchvision.utils import save_image

from examples.diffloss import train as training
from examples.diffloss.config import Adversarial, Config, Diff, Filter, Perceptual, Pixel
from examples.diffloss.objectives import objectives_of, terms_of
from examples.diffloss.train import Trainer
from examples.experiments import diffloss as experiment
from restoreloss import NoiseSchedule, audit, small_prior
from tests.contract.objectives import networks
from tests.helpers.networks import tiny_unet
from tests.helpers.processes import ROOT
from tests.recipes import cases

TINY = Config(
    out=Path(), steps=4, batch=4, patch=24, train_count=64, test_size=32, test_count=2, save_every=2, cpu=True,
)  # fmt: skip
DIFF = Diff(weight=0.1, timesteps=(100, 600))


def run(out: Path, **changes: Any) -> Trainer:
    trainer = Trainer(replace(TINY, out=out, **changes))
    trainer.run()
    return trainer


def logged(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_others_read(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", diff=DIFF, ema=0.9, eval_every=2, adversarial=Adversarial(weight=1e-3))
    out = tmp_path / "run"
    described = ModelLoader(device="cpu").load_from_file(out / "last.safetensors")
    assert described.architecture.id == "NAFNet" and described.scale == 1
    degraded, clean = trainer.tests["rainy"][0]
    trainer.tested.eval()
    with torch.no_grad():
        torch.testing.assert_close(described.model(degraded), trainer.tested(degraded))
    begun = Trainer(replace(TINY, out=tmp_path / "more", network="file", weights=out / "best.safetensors"))
    best = load_file(out / "best.safetensors")
    assert all(torch.equal(value.cpu(), best[name]) for name, value in begun.net.state_dict().items())
    figures = [row for row in logged(out) if "test/psnr" in row]
    assert [row["step"] for row in figures] == [2, 4]
    results = trainer.run_directory.results or {}
    assert results["psnr"] == pytest.approx(figures[-1]["test/psnr"])
    assert {"ssim", "degraded_psnr", "rainy_psnr", "share/pixel", "share/diff/noise", "seconds"} <= results.keys()
    for name in ("test.png", "test_0000002.png", "test_0000004.png"):
        assert (out / "samples" / name).stat().st_size > 1000
    assert trainer.best == max(row["test/psnr"] for row in figures)


def test_the_best_network_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "run", eval_every=1))
    figures = iter([10.0, 12.0, 11.0, 12.0, 9.0])
    weights: list[Any] = []

    def evaluate() -> Any:
        weights.append({name: value.clone() for name, value in trainer.tested.state_dict().items()})
        return {"psnr": next(figures)}, {kind: torch.rand(1, 3, 8, 8) for kind in ("lr", "restored", "hr")}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.run()
    for name, number in (("best", 1), ("last", 4)):
        kept = load_file(tmp_path / "run" / f"{name}.safetensors")
        assert all(torch.equal(kept[key], value) for key, value in weights[number].items())


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    options = ["--steps=40", "--batch=4", "--patch=24", "--train_count=64", "--test_size=32", "--test_count=2"]
    options += ["--save_every=3", "--cpu=true", "--diff.weight=0.1", "--diff.timesteps=[100,600]", "--ema=0.9"]
    command = [sys.executable, "-m", "examples.diffloss.train", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"--out={tmp_path / 'whole'}"], check=True, env=environment, capture_output=True)
    with subprocess.Popen(
        [*command, f"--out={tmp_path / 'killed'}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as killed:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "results.json").exists()
    subprocess.run([*command, f"--out={tmp_path / 'killed'}"], check=True, env=environment, capture_output=True)
    cases.assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_parts_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    for name, accumulate in (("whole", 1), ("parts", 4)):
        run(tmp_path / name, steps=2, accumulate=accumulate)
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_the_average_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "run", ema=0.75))
    steps = trainer.stages[0].alternation
    step, seen = steps.step, []

    def watched(batch: Any) -> Any:
        logs = step(batch)
        seen.append({name: value.clone() for name, value in trainer.net.state_dict().items()})
        return logs

    monkeypatch.setattr(steps, "step", watched)
    trainer.run()
    last = load_file(tmp_path / "run" / "last.safetensors")
    for name, value in seen[0].items():
        average = value  # the first is taken as it is
        for later in seen[1:]:
            average = 0.75 * average + 0.25 * later[name]
        torch.testing.assert_close(last[name], average, rtol=1e-5, atol=1e-6)


def test_every_kth_step_looks_through_the_prior(tmp_path: Path) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "run", diff=replace(DIFF, every=3), accumulate=2))
    seen = []
    for step, (images, targets) in enumerate(trainer.read(0, 4)):
        logs = trainer.stages[0].alternation.step(trainer.batch(images, targets, step, 4))
        seen.append(float(logs["restore/diff/noise"]) > 0)
    assert seen == [True, False, False, True]


def test_terms_are_what_the_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert terms_of(TINY) == ["pixel"]
    assert terms_of(replace(TINY, diff=Diff(share=0.2), pixel=Pixel(weight=0.5))) == ["pixel", "diff"]

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.features(x)
            return found

    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights=None: Small())
    save_file(Small().state_dict(), tmp_path / "vgg.safetensors")
    layers = ["features.0", "features.2"]
    vgg = Perceptual(weight=0.3, layers=layers, weights=tmp_path / "vgg.safetensors")
    trainer = Trainer(
        replace(
            TINY, out=tmp_path / "run", perceptual=vgg, diff=replace(DIFF, h_space_weight=0.0),
            pixel=Pixel(weight=2.0, distance="mse"), adversarial=Adversarial(weight=0.01),
        )
    )  # fmt: skip
    batch = trainer.batch(*next(trainer.read(0, 1)), 0, 4)
    terms = trainer._terms(batch)
    assert list(terms) == ["pixel", "perceptual/features.0", "perceptual/features.2", "diff/noise", "adversarial"]
    with torch.no_grad():
        restored = trainer.net(batch.degraded)
        torch.testing.assert_close(terms["pixel"], 2 * (restored - batch.clean).square().mean())
        assert trainer.adversarial is not None
        judged = trainer.adversarial.discriminator(restored)
        expected = 0.01 * (1 + (-judged).exp()).log().mean()
    torch.testing.assert_close(terms["adversarial"], expected, rtol=1e-3, atol=1e-6)
    judged_terms = trainer._discriminator_terms(batch)
    with torch.no_grad():
        clean = trainer.adversarial.discriminator(batch.clean)
    torch.testing.assert_close(judged_terms["clean"].detach(), (1 + (-clean).exp()).log().mean(), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(judged_terms["restored"].detach(), (1 + judged.exp()).log().mean(), rtol=1e-2, atol=1e-4)
    sum(judged_terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in trainer.adversarial.discriminator.parameters())
    assert all(p.grad is None for p in trainer.net.parameters())


@pytest.mark.parametrize("kind", ["images", "gradients", "fourier"])
def test_a_loss_without_a_network_has_its_share(tmp_path: Path, kind: Any) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "run", filter=Filter(kind=kind, share=0.5)))
    batch = trainer.batch(*next(trainer.read(0, 1)), 0, 4)
    terms = trainer._terms(batch)
    assert list(terms) == ["pixel", "filter"]
    weight = trainer.objectives.current_weights()["filter"]
    with torch.no_grad():
        error = trainer.net(batch.degraded) - batch.clean
    if kind == "images":
        expected = error.square().mean()
    elif kind == "gradients":
        across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
        expected = across.square().mean() + down.square().mean()
    else:
        waves = [torch.exp(-2j * torch.pi * torch.outer(k, k) / len(k)) for k in map(torch.arange, error.shape[2:])]
        spectrum = waves[0] @ error.to(torch.complex64) @ waves[1]  # by the definition
        expected = (spectrum.real.abs().mean() + spectrum.imag.abs().mean()) / 2
    torch.testing.assert_close(terms["filter"], weight * expected)
    restored = trainer.net(batch.degraded).detach()
    assert audit(trainer.objectives, restored, batch.clean)["filter"].share == pytest.approx(0.5, abs=1e-4)


def test_the_untrained_prior_is_another_one_with_each_seed(tmp_path: Path) -> None:
    diff = replace(DIFF, prior="untrained", h_space_weight=0.0)
    weights = []
    for seed in (1, 1, 2):
        trainer = Trainer(replace(TINY, out=tmp_path / f"run{len(weights)}", seed=seed, diff=diff))
        loss: Any = trainer.objectives.objectives["diff"]
        weights.append(loss.objective._denoiser.network.model.conv_in.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], small_prior().conv_in.weight)


@pytest.mark.slow
def test_a_share_is_kept_while_training(tmp_path: Path) -> None:
    options = replace(TINY, steps=15, diff=replace(DIFF, weight=0.0, share=0.3), pixel=Pixel(weight=0.5))
    trainer = Trainer(replace(options, out=tmp_path / "run"))
    results = trainer.run()
    norms: Any = trainer.objectives.norms
    norms.take_in()
    weights, means = trainer.objectives.current_weights(), norms.by_name()
    assert int(norms.calls_diff) >= 15 and weights["pixel"] == 0.5
    strength = {name: weight * float(means[name]) for name, weight in weights.items()}
    assert strength["diff"] / sum(strength.values()) == pytest.approx(0.3, rel=1e-5)
    assert 0.05 < results["share/diff/noise"] < 0.7  # of four images, whose draws of noise are few
    assert results["weight/diff"] == pytest.approx(weights["diff"], rel=1e-6)
    config = replace(options, out=tmp_path, filter=Filter(share=0.1))
    assert {value.device.type for value in objectives_of(config, torch.device("meta")).buffers()} == {"meta"}


def test_shares_stand_together_beside_weights(tmp_path: Path) -> None:
    options = replace(TINY, out=tmp_path, diff=Diff(share=0.5), adversarial=Adversarial(weight=0.1, width=8))
    objectives = Trainer(replace(options, filter=Filter(share=0.2))).objectives
    assert objectives.shares == {"filter": 0.2, "diff": 0.5}
    assert objectives.weights == {"pixel": 1.0, "adversarial": 0.1}


def test_the_network_begins_the_same_whatever_the_terms(tmp_path: Path) -> None:
    starts = [
        Trainer(replace(TINY, out=tmp_path / str(number), diff=diff)).net.state_dict()
        for number, diff in enumerate((Diff(), DIFF, Diff(share=0.5)))
    ]
    for other in starts[1:]:
        assert all(torch.equal(value, other[name]) for name, value in starts[0].items())


def test_indices_are_not_averaged(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", network="swinir-small", ema=0.9995, steps=2, batch=1, patch=16, test_size=16)
    own = trainer.net.state_dict()
    indices = {name: value for name, value in trainer.tested.state_dict().items() if not value.is_floating_point()}
    assert indices and all(torch.equal(value, own[name]) for name, value in indices.items())


def test_every_option_of_the_prior_reaches_it(tmp_path: Path) -> None:
    diff = Diff(
        weight=0.3, noise_weight=0.7, h_space_weight=0.2, timesteps=(3, 40), distance="l1", compare="native",
        snr_power=0.25, crop=0.5, subset=0.75, every=3,
    )  # fmt: skip
    loss = Trainer(replace(TINY, out=tmp_path / "run", diff=diff)).diff
    assert loss is not None
    for name in ("noise_weight", "h_space_weight", "timesteps", "distance", "compare", "snr_power", "crop"):
        assert getattr(loss.objective, name) == getattr(diff, name), name
    assert (loss.every, loss.subset) == (3, 0.75)


def test_each_image_has_a_chance_of_its_own(tmp_path: Path) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "run"))
    batches = [trainer.batch(*read, step, 4) for step, read in enumerate(trainer.read(0, 3))]
    seeds = [generator.initial_seed() for batch in batches for generator in batch.generators]
    assert len(set(seeds)) == len(seeds) == 3 * 4
    assert [len(part.generators) for part in batches[0].split(2)] == [2, 2]


def test_networks_are_tested_at_rest_and_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(self.layer(x))
            return found

    monkeypatch.setattr(training, "restorer", lambda *_, option: Counting())
    trainer = Trainer(replace(TINY, out=tmp_path / "run"))
    norm: Any = trainer.net.norm
    assert trainer.net.training and not norm.running_mean.any() and int(norm.num_batches_tracked) == 0
    before = trainer.evaluate()[0]["psnr"]
    assert trainer.net.training and not norm.running_mean.any()
    trainer.tested.eval()
    degraded, clean = trainer.tests["rainy"][0]
    with torch.no_grad():
        mse = (trainer.net(degraded).clamp(0, 1) - clean).square().mean()
    assert before == pytest.approx(float(-10 * mse.log10()), abs=3.0)  # one of two images


def test_any_prior_and_any_network_may_be_named(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "prior")
    trainer = Trainer(
        replace(
            TINY, out=tmp_path / "run", network="restormer-small", steps=1,
            diff=replace(DIFF, prior=str(tmp_path / "prior"), bf16=True, checkpointing=True, snr_power=0.5),
        )
    )  # fmt: skip
    trainer.run()
    assert trainer.diff is not None
    weights = list(networks(trainer.diff)[0].parameters())
    assert {weight.dtype for weight in weights} == {torch.bfloat16} and sum(map(torch.numel, weights)) < 100_000


@pytest.mark.parametrize("constrain", ["image", "previous"])
def test_images_may_be_compared_instead_of_noise(constrain: Any, tmp_path: Path) -> None:
    diff = Diff(weight=1.0, h_space_weight=0.0, constrain=constrain)
    trainer = Trainer(replace(TINY, out=tmp_path / "run", diff=diff))
    prior = small_prior()
    schedule, t = NoiseSchedule.linear(), 300
    z, x, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    abar, before = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[t - 1])
    with torch.no_grad():
        noisy = [schedule.add_noise(2 * image - 1, noise, t) for image in (z, x)]
        clean = [(y - (1 - abar) ** 0.5 * prior(y, t).sample) / abar**0.5 for y in noisy]
        alpha = abar / before
        earlier = [  # Ho et al. 2020, Eq. (7)
            before**0.5 * (1 - alpha) / (1 - abar) * c + alpha**0.5 * (1 - before) / (1 - abar) * y
            for c, y in zip(clean, noisy, strict=True)
        ]
    assert trainer.diff is not None
    found = trainer.diff.inner(z, x, timestep=t, noise=noise)
    expected = nn.functional.mse_loss(*(clean if constrain == "image" else earlier))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_pairs_on_disk_are_read(tmp_path: Path) -> None:
    for split, count in (("our485", 5), ("eval15", 2)):
        for side in ("low", "high"):
            (tmp_path / "lol" / split / side).mkdir(parents=True)
            for number in range(count):
                image = torch.rand(3, 40, 52, generator=torch.Generator().manual_seed(number))
                save_image(image * (0.2 if side == "low" else 1), tmp_path / "lol" / split / side / f"{number}.png")
    trainer = run(
        tmp_path / "run", degradations=["low_light"], data="folders", pairs={"low_light": f"lol:{tmp_path / 'lol'}"},
        steps=1, batch=2,
    )  # fmt: skip
    results = trainer.run_directory.results or {}
    assert results["low_light_degraded_psnr"] < 12 and math.isfinite(results["psnr"])


def test_lpips_is_left_out_where_its_weights_are_not_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torchmetrics.image import lpip

    def offline(**options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", offline)
    trainer = run(tmp_path / "run", steps=1, lpips=True)
    assert "LPIPS is left out" in caplog.text and "lpips" not in (trainer.run_directory.results or {})

    class Constant(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            assert one.min() >= 0 and one.max() <= 1
            return torch.tensor(0.25)

    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", Constant)
    assert (run(tmp_path / "there", steps=1, lpips=True).run_directory.results or {})["lpips"] == 0.25


def test_options_come_from_a_file_and_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.yaml").write_text(
        "steps: 1\nbatch: 2\npatch: 24\ntest_size: 32\ntest_count: 1\ntrain_count: 8\ncpu: true\n"
        "diff: {weight: 0.5, timesteps: [100, 600], crop: 0.5}\npixel: {distance: mse}\n"
    )
    monkeypatch.setattr(
        sys, "argv",
        ["train", f"--config={tmp_path / 'my.yaml'}", f"--out={tmp_path / 'run'}", "--diff.weight=0.25", "--ema=0.5"],
    )  # fmt: skip
    training.main()
    assert "share/diff/noise" in capsys.readouterr().out
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["diff"]["weight"] == 0.25 and settings["diff"]["crop"] == 0.5 and settings["ema"] == 0.5
    assert settings["pixel"] == {"weight": 1.0, "distance": "mse"}
    monkeypatch.setattr(sys, "argv", ["train", f"--out={tmp_path / 'no'}", "--diff.wait=1"])
    with pytest.raises(SystemExit):
        training.main()
    monkeypatch.setattr(sys, "argv", ["train", f"--out={tmp_path / 'no'}", "--ema=1.5"])
    with pytest.raises(SystemExit):
        training.main()
    assert "`ema` should be a decay" in capsys.readouterr().err and not (tmp_path / "no").exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "degradation": ({"degradations": ["foggy"]}, "`degradations` should be of blurry, .*found \\['foggy'\\]"),
    "accumulate": ({"accumulate": 3}, "`batch` should be a multiple of `accumulate` 3 .* found 4"),
    "ema": ({"ema": 1.0}, "`ema` should be a decay from 0 to below 1, found 1.0"),
    "network": ({"network": "unet"}, "`network` should be one of .*spandrel/NAME.*found 'unet'"),
    "no such": ({"network": "spandrel/Nothing"}, "an architecture of spandrel that needs no options, found 'Nothing'"),
    "gray": ({"network": "spandrel/DRUNet"}, "`network` spandrel/DRUNet should map .* to the same shape, found"),
    "larger": (
        {"network": "file", "weights": Path("nowhere.pth")},
        "should be given a file of weights, found nowhere.pth",
    ),
    "weight": ({"pixel": Pixel(weight=-1.0)}, "`pixel.weight` should be at least 0, found -1.0"),
    "nothing": ({"pixel": Pixel(weight=0.0)}, "`pixel`, `diff`, .* should have a weight above 0, found none"),
    "share": ({"diff": Diff(share=1.5)}, "`diff.share` should be above 0 and below 1"),
    "perceptual": ({"perceptual": Perceptual(share=0.0)}, "`perceptual.share` should be above 0 and below 1"),
    "adversarial": ({"adversarial": Adversarial(share=0.5, weight=0.1)}, "without `adversarial.weight`, found 0.5"),
    "lite0": (
        {"perceptual": Perceptual(share=0.5, network="lite0", weights=Path("nowhere.pt"))},
        "`perceptual`: `weights` should be a state dict of EfficientNet-Lite0, .*found nowhere.pt",
    ),
    "no rest": (
        {"diff": Diff(share=0.5), "filter": Filter(share=0.5)},
        "`filter.share` and `diff.share` should be below 1 in",
    ),
    "filter": ({"filter": Filter(share=1.0)}, "`filter.share` should be at least 0 and below 1, found 1.0"),
    "alone": (
        {"diff": Diff(share=0.5), "pixel": Pixel(weight=0.0)},
        "should have a weight above 0 beside `diff.share`, found none",
    ),
    "both": ({"diff": Diff(share=0.5, weight=0.1)}, "without `diff.weight`, found 0.5 and 0.1"),
    "patch": ({"patch": 0}, "`patch` should be at least 1, found 0"),
    "lr": ({"lr": 0.0}, "`lr` should be above 0"),
    "crop": ({"diff": Diff(weight=1.0, crop=32)}, "`diff.crop` should be at most `patch` 24, found 32"),
    "prior": ({"diff": Diff(weight=1.0, prior="./nowhere")}, "`diff.prior` should be small, untrained, or .*nowhere"),
    "constrain": ({"diff": Diff(weight=1.0, constrain="image")}, "`diff.constrain` should be 'noise'"),
    "timesteps": ({"diff": Diff(weight=1.0, timesteps=(600, 100))}, "`timesteps` should satisfy"),
    "pairs": ({"data": "folders"}, "`pairs` should name the data of 'rainy' as LAYOUT:ROOT"),
    "batch": ({"batch": 100}, "`batch` should be between 1 and the 64 training samples"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(replace(TINY, out=tmp_path / "run", **changes)).run()


@pytest.mark.slow
def test_the_experiment_runs_and_shows_each_kind_of_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = replace(TINY, out=tmp_path, steps=1)
    study = experiment.Experiment(tmp_path, base)
    gamma = dict(study.configs("gamma", 1))
    assert len(gamma) == 3 * (1 + 3 * 4 + 2) and len(dict(study.configs("constrain", 1))) == 3 * 4
    both = gamma["rainy/both_1e-03"].diff
    assert (both.weight, both.noise_weight, both.h_space_weight) == (1e-3, 1.0, 0.01)
    assert gamma["hazy/h_space_1e-01"].diff.noise_weight == 0 and gamma["hazy/pixel"].diff.weight == 0
    assert gamma["low_light/noise_1e-04"].degradations == ["low_light"]
    monkeypatch.setattr(experiment, "DEGRADATIONS", ("rainy",))
    study.run("gamma", [1, 2], ["pixel", "both_1e-01"])
    study.run("constrain", [1], ["pixel", "image"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert len(before) == 6
    study.run("gamma", [1, 2], ["pixel", "both_1e-01"])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    found = study.results("gamma")["rainy"]
    gap = [found["both_1e-01"][seed]["psnr"] - found["pixel"][seed]["psnr"] for seed in ("seed1", "seed2")]
    text = study.tables()
    assert "### gamma, rainy" in text and "### constrain, rainy" in text
    row = next(line for line in text.splitlines() if "`both_1e-01`" in line)
    assert f"{sum(gap) / 2:+.2f}" in row
    assert [path.name for path in study.plot() if path.stat().st_size > 5000] == ["diffloss-gamma.png"]
    monkeypatch.setattr(sys, "argv", ["experiment", "tables", f"--out={tmp_path}"])
    experiment.main()
    assert "both_1e-01" in capsys.readouterr().out
