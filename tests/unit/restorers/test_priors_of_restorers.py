"""What EDTR and UniRestore do with the prior that they are given: its times, its compiled code, and who trains it."""

import warnings
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from restoreloss import LatentPrior, NoiseSchedule
from restoreloss.restorers import EDTR, UniRestore, UniRestoreFirstStage, small_latent_prior
from restoreloss.restorers.shapes import small_autoencoder, small_prompt, small_unet
from tests.helpers.restorers import learned, networks, normal, small, uniform


def told(network: nn.Module, call: Any) -> list[float]:
    """The times that a U-Net receives while something is called."""
    seen: list[float] = []
    handle = network.register_forward_pre_hook(
        lambda _, args: seen.append(float(torch.as_tensor(args[1]).flatten()[0]))
    )
    call()
    handle.remove()
    return seen


def test_a_flow_is_told_its_own_time() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    prior = LatentPrior(small_autoencoder(4), small_unet(8), small_prompt(), schedule=scheduler)
    edtr = EDTR(nn.Identity(), prior, t_p=200)
    wanted = 1000 * 3 * 201 / (1000 + 2 * 201)  # s = a k / (T + (a - 1) k) at k = 201
    for network in (edtr._unet.network, edtr.controlnet):
        assert told(network, lambda: edtr.restore(uniform(1, 3, 16, 16))) == [pytest.approx(wanted)]
    model = UniRestore(prior, adapters=False, cfrm_blocks=[1], control_channels=8, steps=2)
    found = told(networks(model)[1], lambda: model.denoise(normal(1, 4, 8, 8), normal(1, 4, 8, 8)))
    assert found == [pytest.approx(1000 * 3 * 999 / 2998), pytest.approx(1000 * 3 * 499 / 1998)]


def test_steps_begin_below_a_level_of_noise_alone() -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction").zero_terminal_snr()
    prior = LatentPrior(small_autoencoder(4), small_unet(8), small_prompt(), schedule=schedule)
    model = UniRestore(prior, adapters=False, cfrm_blocks=[1], control_channels=8)
    assert model.timesteps(1) == [998] and model.timesteps(4) == [998, 748, 498, 248]
    with pytest.raises(ValueError, match="`steps` should be .* at most 999|`steps` should be .* 999"):
        model.timesteps(1000)
    terms = UniRestoreFirstStage(model)(uniform(2, 3, 16, 16), uniform(2, 3, 16, 16), torch.tensor([999, 249]))
    assert all(bool(term.isfinite()) for term in terms.values())
    assert bool(model.denoise(normal(1, 4, 8, 8), normal(1, 4, 8, 8)).isfinite().all())


def test_a_compiled_prior_is_steered() -> None:
    model = learned(small(), 0.3)
    latents, noise = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1)
    wanted = model.denoise(latents, noise)
    unet: Any = networks(model)[1]
    unet.compile(backend="eager")
    unet(latents, torch.tensor([999]), model.prompt)  # from now on compiled code knows no hook
    torch.testing.assert_close(model.denoise(latents, noise), wanted)


@pytest.mark.slow
def test_the_whole_model_compiles() -> None:
    model, images, noise = learned(small(), 0.3), uniform(1, 3, 16, 16), normal(1, 4, 4, 4)
    wanted = model(images, "look", noise=noise)
    found = torch.compile(model, backend="eager")(images, "look", noise=noise)
    torch.testing.assert_close(found, wanted)


def test_networks_in_training_are_told_of() -> None:
    pre = nn.Conv2d(3, 3, 3, padding=1)
    optimizer = torch.optim.SGD(pre.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"`pre` \(Conv2d\) is frozen from now on, and an optimizer \(SGD\) holds its"):
        EDTR(pre, small_latent_prior(4))
    del optimizer
    prior = small_latent_prior(4)
    edtr = EDTR(nn.Identity(), prior)
    optimizer = torch.optim.SGD(edtr.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"`prior` \(AutoencoderKL\) is frozen from now on, and an optimizer"):
        UniRestore(prior, adapters=False, cfrm_blocks=[1], control_channels=8)
    del optimizer


@pytest.mark.parametrize("scale", [255.0, 2.0], ids=["bytes", "signed"])
def test_another_range_is_told(scale: float) -> None:
    images = uniform(2, 3, 16, 16) * scale - (1 if scale == 2 else 0)
    edtr, model = EDTR(nn.Identity(), small_latent_prior(4)), small()
    stage = UniRestoreFirstStage(UniRestore(small_latent_prior(4), adapters=False, cfrm_blocks=[1], control_channels=8))
    calls: list[Any] = [
        lambda x: edtr.restore(x), lambda x: model.restore(x, "look"), lambda x: stage(x, x, 999),
    ]  # fmt: skip
    for call in calls:
        with pytest.warns(UserWarning, match=r"where \[0, 1\] is expected. .* map them to this one"):
            call(images)
    unasked = EDTR(nn.Identity(), small_latent_prior(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noisy = uniform(1, 3, 16, 16) + 50 / 255 * normal(1, 3, 16, 16)  # as it is degraded, and not clipped
        unasked.restore(noisy)
