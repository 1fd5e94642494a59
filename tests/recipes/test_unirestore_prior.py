"""The prior of UniRestore: what it predicts, whose autoencoder it has, and the restorer without it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples.common.data.degrade import degradation
from examples.common.data.options import DataOptions
from examples.common.engine.evaluation import GAINS, _Fidelity
from examples.common.networks.latent_diffusion import load_latent_diffusion, scheduler
from examples.unirestore.prepare import Config, prepare, train_prior_of_all
from examples.unirestore.train import Trainer
from restoreloss import NoiseSchedule
from tests.helpers.restorers import learned, uniform
from tests.recipes.unirestore_runs import SMALL, trainer


def test_an_error_of_the_noise_comes_back_fifteen_times_as_large_and_one_of_the_velocity_as_it_was() -> None:
    clean, noise, error = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grown = {}
    for prediction in ("epsilon", "v_prediction"):
        schedule = NoiseSchedule.from_diffusers(scheduler(prediction))  # type: ignore[arg-type]
        noisy = schedule.add_noise(clean, noise, 999)
        answer = schedule.training_target(clean, noise, torch.tensor([999, 999])) + error
        found = schedule.predict_x0(noisy, schedule.to_noise(answer, noisy, 999), 999)
        grown[prediction] = float((found - clean).square().mean() / error.square().mean())
    assert grown["epsilon"] == pytest.approx(213.6, rel=1e-3) and grown["v_prediction"] == pytest.approx(1, rel=0.01)


def test_priors_of_two_predictions_share_an_autoencoder(tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, "tasks": ["classification"], "prior_steps": 2, "out": tmp_path}
    first, second = tmp_path / "velocity", tmp_path / "noise"
    assert Config(out=tmp_path).prediction == "v_prediction"
    train_prior_of_all(Config(**options), first)
    train_prior_of_all(Config(**options, prediction="epsilon", autoencoder=first), second)
    kinds = {path: load_latent_diffusion(path).denoiser.schedule.prediction_type for path in (first, second)}
    assert kinds == {first: "v_prediction", second: "epsilon"}
    weights, others = (load_file(path / "vae" / "diffusion_pytorch_model.safetensors") for path in (first, second))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    scales = {load_latent_diffusion(path).encoder.encoder.config.scaling_factor for path in (first, second)}
    assert len(scales) == 1


def test_an_autoencoder_that_is_none_is_refused_before_any_training(tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, "tasks": ["classification"], "out": tmp_path / "prepared"}
    with pytest.raises(ValueError, match=r"autoencoder.safetensors should hold the weights of this Autoencoder"):
        prepare(Config(**options, autoencoder=tmp_path))
    assert not (tmp_path / "prepared").exists()


def test_a_prior_that_goes_on_is_saved_anew(tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, "tasks": ["classification"], "out": tmp_path}
    train_prior_of_all(Config(**options, prior_steps=1), tmp_path / "first")
    weights = []
    for steps in (1, 2):
        config = Config(**options, prior_steps=steps, autoencoder=tmp_path / "first")
        train_prior_of_all(config, tmp_path / "second")
        saved = load_file(tmp_path / "second" / "unet" / "diffusion_pytorch_model.safetensors")
        trained = load_file(tmp_path / "second" / "unet.safetensors")
        assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)
        weights.append(saved)
    assert any(not torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_without_steps_the_latents_are_decoded_as_they_are(tmp_path: Path, folder: Path) -> None:
    run = trainer(tmp_path / "run", folder, steps_of_diffusion=0)
    model, images = learned(run.model, 0.03), uniform(2, 3, 32, 32)
    latents, skips = model.encode(images)
    with torch.no_grad():
        wanted = model.decode(latents, skips, "classification")
        assert torch.equal(model(images, "classification"), wanted)
        assert not torch.allclose(model(images, "classification", steps=1), wanted)
    before = run.run()
    results = Trainer(replace(run.config, out=tmp_path / "again", evaluate=tmp_path / "run")).run()
    assert results["restoration_psnr"] == pytest.approx(before["restoration_psnr"], rel=1e-4)


def test_gains_are_by_the_degraded_image() -> None:
    clean = torch.full((3, 3, 16, 16), 0.5)
    degraded = clean + torch.tensor([0.3, 0.08, 0.02]).view(3, 1, 1, 1)  # 10.5, 21.9 and 34 dB
    restored = clean + torch.tensor([0.1, 0.08, 0.04]).view(3, 1, 1, 1)
    likeness = _Fidelity(None)
    likeness.update(restored, clean, degraded)
    found = likeness.figures()
    mean = (0.1**2 + 0.08**2 + 0.04**2) / 3
    assert found["psnr_of_mse"] == pytest.approx(-10 * torch.tensor(mean).log10().item(), rel=1e-5)
    assert found["lq_psnr_of_mse"] < found["lq_psnr"] and "gain_15_to_20" not in found
    assert found["gain_below_15"] == pytest.approx(9.542, abs=1e-2)
    assert found["gain_20_to_25"] == pytest.approx(0, abs=1e-4) and found["gain_above_25"] == pytest.approx(
        -6.021, abs=1e-2
    )
    assert set(GAINS) - set(found) == {"gain_15_to_20"}
    likeness = _Fidelity(None)
    likeness.update(restored, clean, degraded[..., ::2, ::2])  # of another size: there is no degraded PSNR
    assert "lq_psnr" not in likeness.figures()


def test_options_reach_the_corruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Kept:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append((*arguments, options))

    monkeypatch.setattr("examples.common.data.degrade.Corruptions", Kept)
    options = DataOptions(
        degradation="corruptions", scale=1, severities=[1, 3], severity_weights=[1.0, 4.0], clean_too=True,
        corruption_side=(128, 512), corruption_extent=0.2,
    )  # fmt: skip
    degradation(options, 1)
    degradation(replace(options, severity_weights=None, clean_too=False, degradation="unseen_corruptions"), 1)
    (names, severities, given), (others, plain, _) = made
    assert names[-1] == "clean" and len(names) == 16 and severities == {1: 1.0, 3: 4.0}
    assert given == {"side": (128, 512), "extent": 0.2} and len(others) == 4 and plain == [1, 3]
    with pytest.raises(ValueError, match="`severity_weights` should be one for each of 2 `severities`"):
        degradation(replace(options, severity_weights=[1.0]), 1)
