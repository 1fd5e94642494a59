"""EDTR trains its ControlNet and its decoder alone, and restores images of any size."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from restoreloss import DiffLoss, HLFLoss, partial_diffusion
from restoreloss.restorers import EDTR, small_latent_prior, stable_diffusion_prior
from restoreloss.restorers.edtr import latent_controlnet
from tests.helpers.restorers import small_edtr


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
    image = torch.rand(1, 3, 16, 16)
    first, again = (edtr.restore(image, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, edtr.restore(image))
    alone = edtr.restore(image, generator=[torch.Generator().manual_seed(5)])
    both = edtr.restore(image.repeat(2, 1, 1, 1), generator=[torch.Generator().manual_seed(s) for s in (5, 6)])
    torch.testing.assert_close(both[:1], alone)
    with pytest.raises(ValueError, match="multiples of 4"):
        edtr.hint(torch.rand(1, 3, 18, 16))


def test_small_images_are_padded_and_cut_back() -> None:
    edtr = small_edtr().eval()
    seen: list[tuple[int, ...]] = []
    edtr._pre.network.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[2:])))
    assert edtr.restore(torch.rand(1, 3, 20, 31), smallest=32).shape == (1, 3, 20, 31)
    assert seen == [(32, 32)]


def test_from_noise_does_not_know_the_latents_but_as_a_hint() -> None:
    noise = torch.randn(1, 4, 8, 8)
    image = torch.rand(1, 3, 16, 16)
    for t_p, same in ((None, True), (200, False)):
        edtr = small_edtr(t_p=t_p).eval()
        for block in (*edtr.controlnet.controlnet_down_blocks, edtr.controlnet.controlnet_mid_block):
            nn.init.zeros_(block.weight)  # tells nothing
        edtr.color_fix = None
        results = [edtr(edtr.hint(x), edtr.timesteps(), noise=noise) for x in (image, 1 - image)]
        assert torch.equal(*results) == same
    assert small_edtr(t_p=None).timesteps(2) == [999, 499]


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


def test_half_precision_decodes_to_more_than_its_own_levels() -> None:
    edtr = small_edtr(color_fix=True)
    ramp = torch.linspace(0.5, 1, 64 * 64).reshape(1, 1, 64, 64).expand(1, 3, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        hint = edtr.hint(ramp)
        image = edtr(hint, 200, noise=edtr.noise(hint))
    assert hint.image.dtype == hint.latents.dtype == image.dtype == torch.float32


def test_the_image_is_equations_3_to_6() -> None:
    edtr = small_edtr(n=4).eval()
    image, noise = torch.rand(2, 3, 16, 16), torch.randn(4, 2, 4, 8, 8)
    vae, unet = edtr._latents[0].encoder, edtr._unet.network
    with torch.no_grad():
        pre = edtr._pre.network(image)
        z_pre = vae.encode(2 * pre - 1).latent_dist.mode() * vae.config.scaling_factor

        def eps(z_t: Tensor, t: Tensor) -> Any:
            words = edtr.prompt.expand(2, -1, -1)
            down, mid = edtr.controlnet(z_t, t, words, controlnet_cond=z_pre, return_dict=False)
            return unet(z_t, t, words, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample

        z_0 = partial_diffusion(eps, z_pre, [200, 150, 100, 50], edtr.schedule, noise=list(noise))
        decoded = (vae.decode(z_0 / vae.config.scaling_factor).sample + 1) / 2
        assert edtr.color_fix is not None
        wanted = decoded - edtr.color_fix.low(decoded) + edtr.color_fix.low(pre)
        found = edtr(edtr.hint(image), edtr.timesteps(), noise=list(noise))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_hlf_reaches_what_is_trained_and_nothing_else() -> None:
    edtr, task, reference = small_edtr(), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    hint = edtr.hint(torch.rand(2, 3, 16, 16))
    restored = edtr(hint, torch.tensor([200, 50]), noise=edtr.noise(hint))
    HLFLoss(task, reference, layers="", normalize=None)(restored, torch.rand(2, 3, 16, 16)).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in edtr.decoder.parameters())
    assert any(bool(p.grad.any()) for p in edtr.controlnet.parameters() if p.grad is not None)
    assert task.weight.grad is None and reference.weight.grad is None


def test_conventional_training_predicts_the_noise() -> None:
    edtr = small_edtr(t_p=None)
    hint = edtr.hint(torch.rand(2, 3, 16, 16))
    clean, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([900, 10])
    found = edtr(hint, t, noise=noise, latents=clean, noise_only=True)
    wanted = edtr.denoiser(hint)(edtr.schedule.add_noise(clean, noise, t), t)
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="`noise_only` needs `latents`"):
        edtr(hint, t, noise=noise, noise_only=True)


@pytest.mark.parametrize("t_p", [200, None])
def test_tiles_share_one_field_of_noise(t_p: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edtr = small_edtr(n=3, t_p=t_p).eval()
    image, seen = torch.rand(1, 3, 30, 50), []
    forward = EDTR.forward
    monkeypatch.setattr(
        EDTR,
        "forward",
        lambda self, hint, steps, *, noise: seen.append(noise) or forward(self, hint, steps, noise=noise),
    )
    found = edtr.restore(image, tile=18, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    fields = [torch.randn(1, 4, 16, 26, generator=generator) for _ in range(3)]
    assert found.shape == image.shape and len(seen) == 8
    for noise in seen:
        places = [
            (y, x) for y in range(7) for x in range(17)
            if torch.equal(noise[0], fields[0][..., y : y + 10, x : x + 10])
        ]  # fmt: skip
        ((y, x),) = places
        assert all(torch.equal(a, b[..., y : y + 10, x : x + 10]) for a, b in zip(noise, fields, strict=True))
    one, plain = (edtr.restore(image, tile=tile, generator=torch.Generator().manual_seed(2)) for tile in (64, None))
    assert torch.equal(one, plain)


def test_another_controlnet_may_be_given() -> None:
    prior = small_latent_prior(4)
    controlnet = latent_controlnet(prior.denoiser.model)
    assert EDTR(nn.Identity(), prior, controlnet=controlnet).controlnet is controlnet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_p": 0}, "`t_p`"),
        ({"t_p": 1000}, "`t_p`"),
        ({"n": 0}, "`n`"),
        ({"n": 201}, "`n`"),
    ],
)
def test_steps_that_cannot_be_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} should be"):
        small_edtr(**options)


def test_stable_diffusion_has_its_shapes() -> None:
    prior = stable_diffusion_prior(device="meta")
    with torch.device("meta"):
        edtr = EDTR(nn.Identity(), prior)
    assert (edtr.multiple, edtr.latent_factor, edtr.timesteps(4)) == (64, 8, [200, 150, 100, 50])
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in edtr.named_children()}
    assert counts["decoder"] == 49_490_199 and counts["_unet"] == counts["_pre"] == counts["_encoder"] == 0
    assert edtr.restore(torch.empty(1, 3, 500, 700, device="meta")).shape == (1, 3, 500, 700)


def test_a_copy_restores_alike_and_is_independent() -> None:
    edtr = small_edtr().eval()
    image = torch.rand(1, 3, 16, 16)

    def restored(model: EDTR) -> Tensor:
        return model.restore(image, generator=torch.Generator().manual_seed(1))

    before = restored(edtr)
    for other in (copy.deepcopy(edtr), pickle.loads(pickle.dumps(edtr))):
        assert torch.equal(restored(other), before)
        for held in (other.decoder, other._encoder.network, other._unet.network, other._pre.network):
            with torch.no_grad():
                next(held.parameters()).mul_(2)
        assert not torch.equal(restored(other), before)
        assert torch.equal(restored(edtr), before)


def test_all_parts_follow_the_dtype() -> None:
    edtr = small_edtr().double().eval()
    for part in (edtr.controlnet, edtr.decoder, edtr._encoder.network, edtr._unet.network, edtr._pre.network):
        assert {p.dtype for p in part.parameters()} == {torch.float64}
    assert edtr.prompt.dtype == torch.float64


def test_one_prior_serves_difference_and_restorer() -> None:
    for first in (True, False):
        prior = small_latent_prior(4)
        losses = [DiffLoss(prior)] if first else []
        edtr = EDTR(nn.Identity(), prior)
        losses += [] if first else [DiffLoss(prior)]
        assert all(parameter.requires_grad for parameter in edtr.parameters())
    assert all(p.requires_grad for p in EDTR(nn.Identity(), small_latent_prior(4).requires_grad_(False)).parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_restores_in_half_precision(dtype: torch.dtype) -> None:
    edtr, image = small_edtr().eval(), torch.rand(1, 3, 32, 32)
    whole, half = (
        one.restore(image, generator=torch.Generator().manual_seed(0)) for one in (edtr, copy.deepcopy(edtr).to(dtype))
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, atol=0.05, rtol=0)
