"""What is a diffusion model is recognized and wrapped, and what is none is refused."""

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

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
from tests.helpers.denoisers import CAPTION, CASES, KINDS, NOISY, POOLED, SDXL, SIX, STATES, Bare, Case, T, sine, wrap
from tests.helpers.networks import (
    guided_unet,
    live_detector,
    live_recogniser,
    tiny_autoencoder,
    tiny_conditional_unet,
    tiny_transformer,
    tiny_unet,
)


@torch.no_grad()
def test_a_u_net_without_a_middle_block_says_that_it_has_no_bottleneck():
    model = tiny_unet(mid_block_type=None)
    denoiser = as_denoiser(model)
    assert denoiser.has_bottleneck is False
    torch.testing.assert_close(denoiser(NOISY, T), model(NOISY, T).sample)
    with pytest.raises(ValueError, match="UNet2DModel has no bottleneck"):
        denoiser.bottleneck(NOISY, T)


@pytest.mark.parametrize(("model", "expected"), [(tiny_unet, True), (guided_unet, True), (lambda: sine, None)])
def test_has_bottleneck_is_known_where_it_can_be(model, expected):
    assert as_denoiser(model()).has_bottleneck is expected


@pytest.mark.parametrize(("model", "expected"), [(tiny_unet, 3), (guided_unet, 3), (lambda: sine, None)])
def test_in_channels_are_known_where_they_can_be(model, expected):
    assert as_denoiser(model()).in_channels == expected


def test_a_layer_may_be_named():
    unet = tiny_unet()
    first = as_denoiser(unet, bottleneck="down_blocks.0")
    assert first.bottleneck(NOISY, T).shape == (2, 8, 4, 4)
    assert as_denoiser(unet).bottleneck(NOISY, T).shape == (2, 16, 2, 2)
    with pytest.raises(ValueError, match="`bottleneck` should name a layer of UNet2DModel .*found 'middle'"):
        as_denoiser(unet, bottleneck="middle")


@pytest.mark.parametrize("block", [nn.ModuleList([nn.Conv2d(3, 3, 1)]), torch.sin])
def test_a_mid_block_that_is_no_layer_is_none_of_ours(block: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid_block = block

        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x_t, 2 * x_t

    noisy = torch.randn(1, 3, 8, 8)
    assert torch.equal(as_denoiser(Net()).bottleneck(noisy, 5), 2 * noisy)


def test_a_callable_takes_any_size():
    assert as_denoiser(sine).multiple == 1


@torch.no_grad()
@pytest.mark.parametrize("channels", [(8,), (8, 8), (8, 8, 16), (8, 8, 8, 8)])
@pytest.mark.parametrize("make", [tiny_unet, guided_unet])
def test_sizes_that_are_multiples_pass_and_others_do_not(make, channels):
    model = make(channels=channels)
    denoiser = as_denoiser(model)
    multiple = denoiser.multiple
    assert multiple == 2 ** (len(channels) - 1)
    size = 16 + multiple
    assert denoiser(torch.rand(2, 3, size, 16), T).shape == (2, 3, size, 16)
    if multiple > 1:
        with pytest.raises(RuntimeError, match="size"):
            model(torch.rand(2, 3, size + multiple // 2, 16), T)


def test_multiple_counts_blocks_that_halve_while_they_convolve():
    model = guided_unet()
    halving = [block for block in model.input_blocks if type(block[0]).__name__ == "Downsample"]
    for block in halving:  # as with resblock_updown: two samplers within one block halve once
        block[0].also = type(block[0])(8)
    assert as_denoiser(model).multiple == 4


@pytest.mark.parametrize("table", [torch.linspace(0.9, 0.1, 7), None])
def test_the_schedule_may_be_a_table_or_left_to_the_default(table):
    schedule = as_denoiser(sine, table).schedule
    expected = NoiseSchedule.linear() if table is None else NoiseSchedule(table)
    assert torch.equal(schedule.alphas_cumprod, expected.alphas_cumprod)
    assert schedule.prediction_type == "epsilon"


def test_schedules_come_in_several_forms() -> None:
    table = NoiseSchedule.cosine(10).alphas_cumprod
    for schedule in (table, table.numpy(), diffusers.DDPMScheduler(trained_betas=(1 - table).tolist())):
        assert as_denoiser(lambda x_t, t: x_t, schedule).schedule.num_timesteps == 10
    for wrong in ("linear", 1000, diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True)):
        with pytest.raises(ValueError, match="schedule"):
            as_denoiser(lambda x_t, t: x_t, wrong)


def test_a_schedule_is_used_as_it_is():
    schedule = NoiseSchedule.cosine()
    assert as_denoiser(sine, schedule).schedule is schedule


def test_a_conditional_u_net_without_a_schedule_warns_that_it_may_be_another():
    with pytest.warns(UserWarning, match="UNet2DConditionModel without a `schedule`.*scaled_linear"):
        as_denoiser(tiny_conditional_unet(), conditioning=STATES)


def test_nothing_warns_where_the_default_schedule_is_likely_or_another_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        as_denoiser(tiny_unet())
        as_denoiser(tiny_conditional_unet(), NoiseSchedule.scaled_linear(), conditioning=STATES)


def test_a_denoiser_is_returned_as_it_is_and_takes_no_second_schedule_or_conditioning():
    denoiser = as_denoiser(sine, NoiseSchedule.cosine())
    assert as_denoiser(denoiser) is denoiser
    assert as_denoiser(denoiser, denoiser.schedule) is denoiser
    for options in ({"schedule": NoiseSchedule.linear()}, {"conditioning": STATES}, {"bottleneck": "mid"}):
        with pytest.raises(ValueError, match="is a Denoiser, which has its schedule, conditioning and bottleneck"):
            as_denoiser(denoiser, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_be_wrapped_twice(kind):
    case = CASES[kind]()
    noise, h = case.direct(NOISY, T)
    for denoiser in [wrap(case) for _ in range(2)]:
        torch.testing.assert_close(denoiser.bottleneck(NOISY, T), h)
        torch.testing.assert_close(denoiser.with_bottleneck(NOISY, T), (noise, h))


def test_one_hook_serves_every_denoiser_of_a_model() -> None:
    unet = tiny_unet()
    first, second = as_denoiser(unet), as_denoiser(unet)
    assert len(unet.mid_block._forward_hooks) == 1
    noisy = torch.randn(1, 3, 8, 8)
    assert torch.equal(first.bottleneck(noisy, 5), second.with_bottleneck(noisy, 5)[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_wrapping_and_using_leaves_the_callers_model_as_it_was(kind, training):
    case = CASES[kind]()
    model = case.model.train(training)
    next(model.parameters()).requires_grad_(False)
    next(model.children()).train(not training)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    noise, _ = case.direct(NOISY, T)

    denoiser = wrap(case)
    denoiser.with_bottleneck(NOISY, T)
    denoiser.bottleneck(NOISY, T)
    assert denoiser.model is model
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    torch.testing.assert_close(case.direct(NOISY, T)[0], noise)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_wrapped_model_is_a_model_that_can_be_wrapped(kind):
    case = CASES[kind]()
    noise, h = case.direct(NOISY, T)
    wrap(case)
    other = copy.deepcopy(case.model)
    torch.testing.assert_close(Case(other, case.arguments).direct(NOISY, T), (noise, h))
    denoiser = wrap(Case(other, case.arguments, case.conditioning))
    torch.testing.assert_close(denoiser.bottleneck(NOISY, T), h)


def test_the_guided_network_fails_on_frozen_weights_before_it_is_wrapped():
    model, x = guided_unet().requires_grad_(False), NOISY.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(x, T).sum().backward()


class Pipeline:
    def __init__(self):
        self.unet, self.scheduler = tiny_unet(), diffusers.DDPMScheduler()

    def __call__(self):
        return None


@pytest.mark.parametrize(
    ("model", "conditioning", "message"),
    [
        (Pipeline, None, r"`model` should be a network, found a Pipeline: pass `pipeline\.unet`"),
        (
            lambda: "some/unet",
            None,
            r"`model` should be a network, found the name 'some/unet': load_prior\('some/unet'\)",
        ),
        (lambda: None, None, r"`model` should be a network or a callable f\(x_t, t\), found None"),
        (tiny_conditional_unet, None, r"`conditioning` should be hidden states of shape \(1 or N, tokens, 8\)"),
        (lambda: tiny_conditional_unet(**SDXL), STATES, "`conditioning` should be a mapping with `added_cond_kwargs`"),
        (lambda: tiny_unet(num_class_embeds=5), None, r"`conditioning` should be class labels .*UNet2DModel"),
        (lambda: guided_unet(num_classes=5), None, r"`conditioning` should be class labels .*found None"),
        (tiny_conditional_unet, [1, 2], "`conditioning` should be a tensor or a mapping .*found list"),
    ],
)
def test_what_cannot_work_is_refused_when_wrapped(model, conditioning, message):
    with pytest.raises(ValueError, match=message):
        as_denoiser(model(), NoiseSchedule.linear(), conditioning=conditioning)


@pytest.mark.parametrize(
    ("make", "conditioning", "message"),
    [
        (lambda: tiny_unet(num_class_embeds=5), torch.tensor([5]), "class labels below 5"),
        (lambda: tiny_unet(num_class_embeds=5), torch.ones(1), "class labels .* found a tensor of .*float32"),
        (lambda: tiny_transformer("DiT"), torch.tensor([6]), "class labels below 6"),
        (lambda: tiny_transformer("PixArt"), None, r"tokens, 6\).*found None"),
        (lambda: tiny_transformer("SD3"), {"encoder_hidden_states": CAPTION}, r"`pooled_projections` of shape"),
        (lambda: tiny_transformer("SD3"), CAPTION, r"`pooled_projections` of shape"),
        (
            lambda: tiny_conditional_unet(**SDXL),
            {"encoder_hidden_states": STATES, "added_cond_kwargs": {"text_embeds": POOLED, "time_ids": SIX}},
            r"widths p and k with p \+ k \* 4 = 32 .* found 5 and 6",
        ),
        (
            lambda: tiny_conditional_unet(**SDXL),
            {"encoder_hidden_states": STATES, "added_cond_kwargs": {"text_embeds": POOLED}},
            "should have text_embeds and time_ids",
        ),
    ],
)  # fmt: skip
def test_conditioning_of_another_kind_or_width_is_refused(make, conditioning, message):
    with pytest.raises(ValueError, match=message):
        as_denoiser(make(), NoiseSchedule.linear(), conditioning=conditioning)


def test_flux_is_to_be_wrapped():
    flux = type("FluxTransformer2DModel", (Bare,), {})
    with pytest.raises(ValueError, match="wrapped in a function .* docs/guides/priors.md"):
        as_denoiser(flux.__new__(flux))


def test_a_real_pipeline_is_refused():
    pipeline = diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="found a DDPMPipeline"):
        as_denoiser(pipeline)


def test_a_schedule_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"`alphas_cumprod`.*found EDMEulerScheduler"):
        as_denoiser(tiny_unet(), diffusers.EDMEulerScheduler())


def test_a_refused_model_gets_no_hook():
    model = tiny_conditional_unet()
    with pytest.raises(ValueError, match="hidden states"):
        as_denoiser(model, NoiseSchedule.linear())
    assert not model.mid_block._forward_hooks


def test_a_parallel_wrapper_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="DataParallel: pass its `.module`"):
        as_denoiser(nn.DataParallel(tiny_unet()))


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
