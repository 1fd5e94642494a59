"""What is no denoiser, no schedule or no conditioning is refused when it is wrapped, and what is one is not."""

import functools
from pathlib import Path

import diffusers
import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from restoreloss import (
    Denoiser,
    DiffLoss,
    LatentPrior,
    NoiseSchedule,
    WeightedSum,
    as_denoiser,
    load_prior,
    small_prior,
)
from tests.helpers.networks import live_detector, live_recogniser, tiny_autoencoder, tiny_conditional_unet, tiny_unet


@pytest.mark.parametrize(
    ("model", "conditioning", "message"),
    [
        (lambda: Path("u.pt"), None, r"`model` should be a network, found the name 'u.pt': load_prior"),
        (lambda: diffusers.UNet2DModel, None, "found the class UNet2DModel .an instance is needed"),
        (lambda: small_prior, None, r"called as f\(x_t, t\) .* found the function small_prior .is the call missing"),
        (lambda: load_prior, None, "found the function load_prior .is the call missing"),
        (lambda: nn.MSELoss(), None, r"called as f\(x_t, t\) .* found a MSELoss, which takes \(input.*target"),
        (lambda: F.l1_loss, None, "found the function l1_loss"),
        (lambda: DiffLoss(lambda x, t: x, h_space_weight=0), None, r"found a DiffLoss, which takes \(restored.*target"),
        (lambda: WeightedSum({"pixel": nn.L1Loss()}), None, "found a WeightedSum, which takes .*target"),
        (tiny_autoencoder, None, r"found a AutoencoderKL, which encodes images: .* LatentPrior\(vae, unet\)"),
        (lambda: LatentPrior(tiny_autoencoder(), lambda x, t: x), None, "found a LatentPrior, which has no forward"),
        (NoiseSchedule.linear, None, "found a NoiseSchedule, which has no forward"),
        (lambda: nn.Conv2d(3, 3, 1), None, r"found a Conv2d, which takes \(input"),
        (live_recogniser, None, r"found a Recogniser, which takes \(images"),
        (live_detector, None, r"found a FasterRCNN, which takes \(images.*targets"),
        (lambda: torch.compile(live_recogniser()), None, "found a Recogniser, which takes"),
        (lambda: lambda x: x, None, r"called as f\(x_t, t\)"),
        (lambda: lambda x, t: x, torch.ones(1), "with the `conditioning` third, found the function"),
        (lambda: lambda x, t, *, y: x, {"z": 1}, r"with the `conditioning` \['z'\], found"),
        (tiny_unet, torch.ones(1, 2, 3), "`conditioning` should be None for this UNet2DModel, which reads none"),
        (tiny_conditional_unet, numpy.ones((1, 2, 8)), "`conditioning` should be a tensor .* found a numpy array"),
        (tiny_unet, {"words": torch.ones(1)}, r"keyword arguments of UNet2DModel \(sample.* found 'words'"),
        (lambda: tiny_conditional_unet(), "a photo", "`conditioning` should be a tensor or .* found 'a photo'"),
    ],
)
def test_what_is_no_denoiser_is_refused(model, conditioning, message):
    with pytest.raises(ValueError, match=message):
        as_denoiser(model(), NoiseSchedule.linear(), conditioning=conditioning)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("linear", "A schedule should be .* found 'linear'"),
        (1000, "A schedule should be .* found 1000"),
        (NoiseSchedule, "A schedule should be .* found the class NoiseSchedule"),
        (NoiseSchedule.cosine, "A schedule should be .* found the function cosine .is the call missing"),
        (diffusers.DDPMScheduler, "A schedule should be .* found the class DDPMScheduler"),
        (diffusers.DDPMScheduler().config, "A schedule should be .* found FrozenDict"),
        (tiny_unet(), "A schedule should be .* found a UNet2DModel"),
        (numpy.array([0.9, numpy.nan]), "`alphas_cumprod` should fall"),
        (numpy.array(["0.9", "0.5"]), "`alphas_cumprod` should be a table of numbers, found a numpy array"),
        (diffusers.DDPMScheduler().betas, "is it a table of betas"),
        (diffusers.DDPMScheduler().alphas, "it seems to be 1 - betas itself"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        as_denoiser(tiny_unet(), schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "unet"}, "`model` should be a network or a callable .* found 'unet'"),
        ({"model": diffusers.UNet2DModel}, "`model` should be .* found the class UNet2DModel"),
        ({"schedule": diffusers.DDPMScheduler()}, "`schedule` should be a NoiseSchedule, found DDPMScheduler"),
        ({"schedule": None}, "`schedule` should be a NoiseSchedule, found None"),
        ({"multiple": 0}, "`multiple` should be a whole number of at least 1, found 0"),
        ({"conditioning": [1]}, "`conditioning` should be a tensor or a mapping"),
    ],
)
def test_a_denoiser_is_made_of_a_model_and_a_schedule(options, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(**{"model": lambda x, t: x, "schedule": NoiseSchedule.linear(), **options})


def test_other_functions_of_noise_and_time_are_taken():
    class Wrapped:
        def __call__(self, *arguments):
            return arguments[0]

    bound = tiny_unet()
    for model in (
        lambda x, t: x, lambda x, t=0, scale=1: x, lambda *given: given[0], Wrapped(), bound.forward,
        functools.partial(lambda scale, x, t: x, 2.0), torch.compile(lambda x, t: x),
    ):  # fmt: skip
        assert isinstance(as_denoiser(model), Denoiser)
    assert isinstance(as_denoiser(lambda x, t, y: x, conditioning=torch.ones(1)), Denoiser)
    assert isinstance(as_denoiser(lambda x, t, *, y: x, conditioning={"y": torch.ones(1)}), Denoiser)


@pytest.mark.parametrize(
    ("noisy", "t", "message"),
    [
        (None, 5, r"`noisy` should be a floating point tensor \(N, C, H, W\), found None"),
        (numpy.zeros((1, 3, 8, 8)), 5, "`noisy` should be a floating point tensor .* found a numpy array"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 5, "`noisy` should be a floating point tensor .*uint8"),
        (torch.zeros(1, 3, 8, 8), 1000, r"`timestep` should be in \[0, 1000\), found 1000"),
        (torch.zeros(1, 3, 8, 8), -5, r"`timestep` should be in \[0, 1000\), found -5"),
        (torch.zeros(1, 3, 8, 8), 0.5, "`timestep` should be an integer or an integer tensor, found 0.5"),
    ],
)
def test_what_a_denoiser_is_called_with_is_checked(noisy, t, message):
    with pytest.raises(ValueError, match=message):
        as_denoiser(tiny_unet())(noisy, t)
