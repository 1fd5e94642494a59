import csv
import json
from importlib.resources import files

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from examples.common.data.photos import photographs
from examples.diffloss.prior_report import crops_of, linear_errors, noise_errors
from restoreloss import DiffLoss, NoiseSchedule, as_denoiser, small_prior

FOLDER = files("restoreloss") / "data" / "small_prior"


def test_small_enough_and_complete() -> None:
    assert sum(p.numel() for p in small_prior().parameters()) <= 3_000_000
    sizes = {path.name: len(path.read_bytes()) for path in FOLDER.iterdir()}
    assert sizes["diffusion_pytorch_model.fp16.safetensors"] <= 6_000_000
    assert {"config.json", "scheduler_config.json", "training_log.csv", "errors.csv", "README.md"} <= set(sizes)
    assert json.loads((FOLDER / "config.json").read_text())["_class_name"] == "UNet2DModel"


def test_ready_to_use_and_the_same_as_diffusers_loads() -> None:
    prior = small_prior()
    assert not prior.training
    assert all(p.dtype == torch.float32 for p in prior.parameters())
    other = UNet2DModel.from_pretrained(str(FOLDER), variant="fp16", local_files_only=True).float()
    x_t = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(prior(x_t, 100).sample, other(x_t, 100).sample)


def test_its_schedule_is_the_default_of_the_library() -> None:
    scheduler = DDPMScheduler.from_pretrained(str(FOLDER))
    own = NoiseSchedule.from_diffusers(scheduler)
    torch.testing.assert_close(own.alphas_cumprod, as_denoiser(small_prior()).schedule.alphas_cumprod)
    assert own.prediction_type == "epsilon"


def test_it_learned_what_a_linear_filter_does_not_know() -> None:
    train, held_out = photographs(None, smallest=96)
    schedule, crops = NoiseSchedule.linear(), crops_of(held_out.values(), 6)
    timesteps = (25, 100, 200)
    errors = noise_errors(as_denoiser(small_prior()), schedule, crops, timesteps)
    linear = linear_errors(schedule, crops, crops_of(train.values(), 32), timesteps)
    told = linear_errors(schedule, crops, crops, timesteps)
    assert all(ours < 0.9 * theirs for ours, theirs in zip(errors, linear, strict=True))
    assert all(ours < 1.05 * theirs for ours, theirs in zip(errors, told, strict=True))


def test_its_log_shows_the_training() -> None:
    rows = list(csv.DictReader((FOLDER / "training_log.csv").read_text().splitlines()))
    errors = [float(row["noise_mse"]) for row in rows]
    assert int(rows[-1]["step"]) == 10_000
    assert sum(errors[-4:]) < 0.8 * sum(errors[:4])


@pytest.mark.parametrize("size", [(1, 1), (17, 30), (64, 64)])
def test_as_a_loss_it_moves_any_image(size: tuple[int, int]) -> None:
    restored, clean = torch.rand(2, 1, 3, *size)
    restored.requires_grad_()
    DiffLoss(small_prior())(restored, clean, timestep=200).backward()
    assert restored.grad.abs().sum() > 0
