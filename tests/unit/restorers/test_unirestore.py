"""UniRestore begins as its diffusion model, runs its parts in their order, and a task is nothing but a prompt."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn

from examples.unirestore.adapters import AdapterName
from restoreloss import LatentPrior, NoiseSchedule
from restoreloss.restorers import EDTR, UniRestore, small_latent_prior, stable_diffusion_prior
from restoreloss.restorers.shapes import small_autoencoder, small_prompt, small_unet
from restoreloss.restorers.tiling import upscale_to_side
from tests.helpers.restorers import (
    MODELS,
    answers,
    latents_of,
    learned,
    networks,
    normal,
    small,
    small_like,
    stable_diffusion,
    uniform,
)

ADAPTERS: tuple[AdapterName, ...] = get_args(AdapterName)


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("adapter", [*ADAPTERS, None])
def test_it_begins_as_the_plain_diffusion_model(build: Callable[..., UniRestore], adapter: Any) -> None:
    model = build(adapter=adapter)
    vae, unet = networks(model)
    pictures = uniform(2, 3, 64, 128)
    noise = normal(2, 4, 64 // model.latent_factor, 128 // model.latent_factor)
    found = model(pictures, ["look", "classify"], noise=noise)
    with torch.no_grad():
        z = vae.encode(2 * pictures - 1).latent_dist.mode() * vae.config.scaling_factor
        z_t = model.schedule.add_noise(z, noise, 999)
        eps = unet(z_t, 999, model.prompt.expand(2, -1, -1)).sample
        wanted = vae.decode(model.schedule.predict_x0(z_t, eps, 999) / vae.config.scaling_factor).sample / 2 + 0.5
    if adapter in ("several", "convolutions"):  # their levels gather the pictures in another layout in memory
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    else:
        assert torch.equal(found, wanted)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[-1]
    torch.testing.assert_close(z_t, abar.sqrt().float() * z + (1 - abar).sqrt().float() * noise)


def edited(tuner: Any, skip: Tensor, control: Tensor) -> Tensor:
    """SC-Tuner: s' = s + W_c c, then s' + W_2 GELU(W_1 s')."""
    skip = skip + F.conv2d(control, tuner.project.weight, tuner.project.bias)
    hidden = F.conv2d(skip, tuner.first.weight, tuner.first.bias)
    return skip + F.conv2d(F.gelu(hidden), tuner.second.weight, tuner.second.bias)


@pytest.mark.parametrize("build", MODELS)
def test_skips_are_tuned_by_the_control_of_their_resolution(build: Callable[..., UniRestore]) -> None:
    model = build()
    learned(model.controller), learned(model.tuners, 0.3)
    _, unet = networks(model)
    condition, z_t = normal(2, 4, 16, 24, seed=3), normal(2, 4, 16, 24, seed=4)
    t = torch.tensor([999, 249])
    words = model.prompt.expand(2, -1, -1)

    def run(block: Any, *given: Any) -> Any:
        return block(*given, encoder_hidden_states=words) if getattr(block, "has_cross_attention", False) else block(
            *given
        )  # fmt: skip

    with torch.no_grad():
        x0, noise = model.predict(z_t, condition, t), model.denoiser(condition)(z_t, t)
        time = unet.time_embedding(unet.time_proj(t))
        h = unet.conv_in(z_t)
        skips = [h]
        for block in unet.down_blocks:
            h, states = run(block, h, time)
            skips += states
        h = unet.mid_block(h, time, encoder_hidden_states=words)
        controls = {control.shape[3]: control for control in model.controller(condition, t)}
        assert sorted(controls, reverse=True) == list(dict.fromkeys(skip.shape[3] for skip in skips))
        assert len(skips) == len(model.tuners)
        skips = [edited(tuner, s, controls[s.shape[3]]) for tuner, s in zip(model.tuners, skips, strict=True)]
        for block in unet.up_blocks:
            count = len(block.resnets)
            h = run(block, h, tuple(skips[-count:]), time)
            del skips[-count:]
        assert not skips
        wanted = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        plain = unet(z_t, t, words).sample
    torch.testing.assert_close(noise, wanted)
    assert not torch.allclose(noise, plain, rtol=0.1)
    alpha, sigma = (root[t].view(2, 1, 1, 1) for root in (model.schedule.signal, model.schedule.sigma))
    torch.testing.assert_close(x0, (z_t - sigma * noise) / alpha)


def test_the_diffusion_model_is_as_it_was_after_a_call_and_after_an_error() -> None:
    model = small()
    _, unet = networks(model)

    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules())

    before = hooks()  # that of the denoiser, which does nothing here
    latents, noise = latents_of(model)
    model.denoise(latents, noise)
    assert hooks() == before
    tuner = model.tuners[-1]
    tuner.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model.denoise(latents, noise)
    assert hooks() == before
    del tuner.forward
    assert torch.equal(unet(noise, 9, model.prompt.expand(2, -1, -1)).sample, unet(
        noise, 9, model.prompt.expand(2, -1, -1)
    ).sample)  # fmt: skip


def test_what_is_frozen_is_hidden_and_learns_nothing() -> None:
    model = learned(small()).train().requires_grad_(True)
    for names in (dict(model.named_parameters()), model.state_dict()):
        assert {name.partition(".")[0] for name in names} == {"cfrm", "controller", "tuners", "tfa"}
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks(model)]
    latents, skips = model.encode(uniform(2, 3, 16, 16))
    noise = normal(*latents.shape)
    z_0 = model.predict(noise, latents, 999)
    restored = model.decode(z_0, skips, ["look", "classify"])
    (restored.mean() + z_0.mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
    for network, values in zip(networks(model), before, strict=True):
        assert not network.training
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
        assert all(torch.equal(value, values[name]) for name, value in network.state_dict().items())


def test_a_restoration_teaches_the_adapters_alone() -> None:
    model = learned(small())
    model(uniform(2, 3, 16, 16), ["look", "classify"]).mean().backward()
    reached = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"tfa"}
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.tfa.parameters())


@pytest.mark.parametrize("build", MODELS)
def test_features_are_restored_level_by_level_and_latents_have_no_graph(build: Callable[..., UniRestore]) -> None:
    model = build()
    learned(model.cfrm)
    vae, _ = networks(model)
    pictures = uniform(1, 3, 64, 64)
    latents, features = model.encode(pictures)
    plain, clear = model.encode(pictures, restored=False)
    h = kept = vae.encoder.conv_in(2 * pictures - 1)
    for level, block in enumerate(vae.encoder.down_blocks[:-1]):
        h, kept = model.cfrm[level](block(h)), block(kept)
        torch.testing.assert_close(features[level], h)
        torch.testing.assert_close(clear[level], kept)  # the vanilla encoder's
        assert not torch.allclose(features[level], clear[level])
    assert len(features) == len(clear) == len(vae.encoder.down_blocks) - 1
    h = vae.encoder.mid_block(vae.encoder.down_blocks[-1](h))
    moments = vae.quant_conv(vae.encoder.conv_out(vae.encoder.conv_act(vae.encoder.conv_norm_out(h))))
    torch.testing.assert_close(latents, moments[:, :4] * vae.config.scaling_factor)
    torch.testing.assert_close(plain, vae.encode(2 * pictures - 1).latent_dist.mode() * vae.config.scaling_factor)
    assert not latents.requires_grad and not plain.requires_grad
    assert not any(feature.requires_grad for feature in clear)
    features[-1].mean().backward()  # through the encoder's blocks to all CFRMs before it
    assert all(p.grad is not None for p in model.cfrm.parameters())


def test_without_cfrm_features_are_those_of_the_encoder() -> None:
    model = small(cfrm=False)
    one, other = model.encode(uniform(1, 3, 16, 16)), model.encode(uniform(1, 3, 16, 16), restored=False)
    assert torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))
    assert not any(name.startswith("cfrm") for name in model.state_dict())


def test_shifted_latents_and_autoencoders_without_quantisation() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        block_out_channels=(4, 8), norm_num_groups=4, scaling_factor=0.5, shift_factor=0.25, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    prior = LatentPrior(vae, small_unet(8), small_prompt(), schedule=NoiseSchedule.linear())
    model = UniRestore(prior, tasks=["look"], cfrm_blocks=[0], control_channels=8)
    pictures = uniform(1, 3, 16, 16)
    latents, skips = model.encode(pictures)
    torch.testing.assert_close(latents, (vae.encode(2 * pictures - 1).latent_dist.mode() - 0.25) * 0.5)
    torch.testing.assert_close(model.decode(latents, skips, "look"), vae.decode(latents / 0.5 + 0.25).sample / 2 + 0.5)


@pytest.mark.parametrize("build", MODELS)
def test_adapters_see_the_encoders_features_before_each_block_of_the_decoder(build: Callable[..., UniRestore]) -> None:
    model = build()
    learned(model.tfa)
    vae, _ = networks(model)
    pictures = uniform(2, 3, 64, 64)
    with torch.no_grad():
        latents, skips = model.encode(pictures)
        found = model.decode(latents, skips, ["look", "classify"])
        h = vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(latents / vae.config.scaling_factor)))
        prompt = torch.stack([model.tfa.prompts["look"], model.tfa.prompts["classify"]])
        for level, block in enumerate(vae.decoder.up_blocks[:-1]):
            h, prompt = model.tfa.levels[level](h, skips[len(skips) - 1 - level], prompt)
            h = block(h)
        h = vae.decoder.up_blocks[-1](h)
        wanted = vae.decoder.conv_out(F.silu(vae.decoder.conv_norm_out(h))) / 2 + 0.5
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_batch_may_mix_tasks(adapter: AdapterName) -> None:
    tasks = ["look", "classify", "segment"]
    model = small(tasks=tasks, adapter=adapter)
    learned(model, 0.3)
    pictures = uniform(4, 3, 16, 16)
    named = ["segment", "look", "segment", "classify"]
    seeds = [torch.Generator().manual_seed(number) for number in range(4)]
    with torch.no_grad():
        mixed = model(pictures, named, generator=seeds)
        for number, task in enumerate(named):
            for one in (task, [task]):
                again = torch.Generator().manual_seed(number)
                alone = model(pictures[number : number + 1], one, generator=again)
                torch.testing.assert_close(mixed[number : number + 1], alone, atol=1e-5, rtol=1e-4)
        noise = normal(1, 4, 4, 4)
        each = [model(pictures[:1], task, noise=noise) for task in tasks]
    assert all(torch.allclose(each[0], other) == (adapter == "one_prompt") for other in each[1:])


@pytest.mark.parametrize(("prediction", "steps"), [("epsilon", 1), ("epsilon", 4), ("v_prediction", 2)])
def test_steps_are_those_of_ddim(prediction: str, steps: int) -> None:
    model = small(prediction=prediction, steps=steps)
    learned(model.controller), learned(model.tuners, 0.3)
    ddim = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        set_alpha_to_one=True, clip_sample=False, prediction_type="epsilon",
    )  # fmt: skip
    ddim.set_timesteps(steps)
    assert model.timesteps() == ddim.timesteps.tolist()
    latents, noise = latents_of(model)
    with torch.no_grad():
        z = ddim.add_noise(latents, noise, torch.tensor([999]))
        for t in ddim.timesteps:
            z = ddim.step(model.denoiser(latents)(z, t.expand(2)), t, z).prev_sample
        found = model.denoise(latents, noise)
        assert torch.equal(found, small_like(model, 1).denoise(latents, noise, steps))  # asked for at the call
    torch.testing.assert_close(found, z, atol=1e-3, rtol=1e-4)


def test_velocity_is_read_as_velocity() -> None:
    model = small(prediction="v_prediction")
    _, unet = networks(model)
    latents, noise = latents_of(model)
    ddim = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction",
    )  # fmt: skip
    ddim.set_timesteps(1)
    with torch.no_grad():
        z_t = ddim.add_noise(latents, noise, torch.tensor([999]))
        velocity = unet(z_t, 999, model.prompt.expand(2, -1, -1)).sample  # untrained tuners change nothing
        wanted = ddim.step(velocity, torch.tensor(999), z_t).pred_original_sample
        torch.testing.assert_close(model.denoise(latents, noise), wanted, atol=1e-5, rtol=1e-4)


def test_timesteps_are_spread_from_the_last() -> None:
    model = small()
    assert [model.timesteps(n) for n in (1, 2, 4)] == [[999], [999, 499], [999, 749, 499, 249]]
    assert model.timesteps(3)[0] == 999 and len(model.timesteps(1000)) == 1000
    assert model.timesteps(0) == []
    for steps in (-1, 1001):
        with pytest.raises(ValueError, match=f"whole number of at least 0 and at most 1000, found {steps}"):
            model.timesteps(steps)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 24), (17, 30), (3, 41)])
def test_any_size_is_restored(size: tuple[int, int]) -> None:
    model = learned(small())
    pictures = uniform(1, 3, *size)
    for smallest in (0, 32):
        first, again = (
            model.restore(pictures, "look", smallest=smallest, generator=torch.Generator().manual_seed(1))
            for _ in range(2)
        )
        assert first.shape == pictures.shape and torch.equal(first, again)
        assert first.min() >= 0 and first.max() <= 1 and not first.requires_grad
    assert not torch.equal(first, model.restore(pictures, "look", smallest=32))


def test_small_pictures_are_enlarged_and_reduced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(adapter=None)
    seen, encode = [], UniRestore.encode
    monkeypatch.setattr(UniRestore, "encode", lambda self, pictures: seen.append(pictures) or encode(self, pictures))
    pictures = uniform(1, 3, 20, 31)
    noise = normal(1, 4, 8, 14)
    found = model(pictures, "look", noise=noise, smallest=32)
    large = F.interpolate(pictures, (32, 50), mode="bicubic")
    (one,) = seen
    assert one.shape == (1, 3, 32, 56)
    torch.testing.assert_close(one[..., :50], large)
    restored = model(one, "look", noise=noise)[..., :50]
    torch.testing.assert_close(found, F.interpolate(restored, (20, 31), mode="bicubic", antialias=True))
    assert upscale_to_side(pictures, 20) is pictures


def test_sides_that_cannot_be_halved_are_refused_where_nothing_pads() -> None:
    model = small()
    assert model.multiple == 8 and stable_diffusion().multiple == 64
    with pytest.raises(ValueError, match="multiples of 8, found"):
        model.encode(uniform(1, 3, 16, 20))


def test_autocast_returns_pictures_finer_than_its_levels() -> None:
    model = learned(small())
    with torch.autocast("cpu", torch.bfloat16):
        latents, _ = model.encode(uniform(1, 3, 16, 16))
        restored = model(uniform(1, 3, 16, 16), "look")
    assert latents.dtype == restored.dtype == torch.float32 and restored.isfinite().all()


def test_what_it_cannot_be_made_of_is_refused() -> None:
    prior = small_latent_prior(4, 3)
    no_text = LatentPrior(small_autoencoder(4, 2), lambda z, t: z, schedule=NoiseSchedule.linear())
    xl = LatentPrior(
        small_autoencoder(4, 2),
        small_unet(8),
        {"encoder_hidden_states": small_prompt()},
        schedule=prior.denoiser.schedule,
    )
    for wrong, message in (
        (None, "found None"), (prior.denoiser, "found a Denoiser"),
        (no_text, "UNet2DConditionModel, found the function"), (xl, "empty prompt .*, found dict"),
    ):  # fmt: skip
        for build in (UniRestore, partial(EDTR, nn.Identity())):
            with pytest.raises(ValueError, match=f"`prior` should be a LatentPrior .*{message}"):
                build(wrong)
    with pytest.raises(ValueError, match="`pre` should be a network, or nn.Identity"):
        EDTR(None, prior)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`cfrm_blocks` should be one number .* first 2 levels .*, found \(1,\)"):
        small(cfrm_blocks=[1])
    with pytest.raises(ValueError, match="`steps` should be a whole number of at least 0 .* found -1"):
        small(steps=-1)
    with pytest.raises(ValueError, match="`tasks` should be left out without adapters"):
        UniRestore(prior, tasks=["look"], adapters=False)


def test_unknown_tasks_are_named_with_those_that_are_known() -> None:
    for adapter in ADAPTERS:
        model = small(adapter=adapter)
        for tasks in ("paint", ["look", "paint"]):
            with pytest.raises(ValueError, match=r"one of look, classify, found 'paint'"):
                model(uniform(2, 3, 16, 16), tasks)
        with pytest.raises(ValueError, match=r"for each of 2 images, found 1"):
            model(uniform(2, 3, 16, 16), ["look"])


def test_another_task_leaves_the_others_as_they_are() -> None:
    model = learned(small(), 0.3)
    before = answers(model, ["look", "classify"])
    prompt = model.add_task("detect", like="classify")
    assert torch.equal(answers(model, ["detect"]), before[1:])
    with torch.no_grad():
        prompt += 1
    assert torch.equal(answers(model, ["look", "classify"]), before)
    assert not torch.equal(answers(model, ["detect"]), before[1:]) and model.tasks == ("look", "classify", "detect")
    with pytest.raises(ValueError, match="new task, found 'look', which is one of look, classify, detect"):
        model.add_task("look")


def test_the_default_sizes_are_those_of_the_authors() -> None:
    prior = stable_diffusion_prior(device="meta")
    with torch.device("meta"):
        model = UniRestore(prior, tasks=["look", "classify", "segment"])
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children() if name != "schedule"
    }
    assert counts["controller"] == 52_494_080
    assert counts["tfa"] == 21_032_192  # with three prompts
    assert {name: round(count / 1e6, 2) for name, count in counts.items() if count} == {
        "cfrm": 23.52, "controller": 52.49, "tuners": 22.15, "tfa": 21.03,
    }  # fmt: skip
    assert [len(cfrm.blocks) for cfrm in model.cfrm] == [1, 1, 9]
    assert [level for _, level in model.skips] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert (model.latent_factor, model.multiple, model.timesteps()) == (8, 64, [999])
    assert model.restore(torch.empty(1, 3, 300, 500, device="meta"), "look", smallest=512).shape == (1, 3, 300, 500)
    vae, unet = networks(model)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724


def test_tiles_share_one_field_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learned(small(steps=2), 0.03)
    images = uniform(2, 3, 30, 50)
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise = torch.cat([torch.randn(1, 4, 8, 14, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    seen: list[Tensor] = []
    restored = UniRestore._restored
    monkeypatch.setattr(
        UniRestore, "_restored",
        lambda self, part, tasks, noise, steps: seen.append(noise) or restored(self, part, tasks, noise, steps),
    )  # fmt: skip
    found = model.restore(images, ["look", "classify"], tile=20, overlap=4, generator=generator)
    assert found.shape == images.shape
    assert len(seen) == 6 and all(
        any(torch.equal(part, noise[..., y : y + 6, x : x + 6]) for y in range(3) for x in range(9)) for part in seen
    )
    again = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    one = model.restore(images, ["look", "classify"], tile=64, generator=again)
    again = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert torch.equal(one, model.restore(images, ["look", "classify"], generator=again))
    seen.clear()
    model.restore(images, ["look", "classify"], smallest=60, tile=50)  # enlarged to 60x100, and yet no large image
    assert len(seen) == 1
