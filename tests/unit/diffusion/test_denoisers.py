import copy
import functools
import gc
import math
import pickle
import threading
import warnings
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from restoreloss import NoiseSchedule, as_denoiser
from restoreloss.diffusion.latents import LatentEncoder
from tests.helpers.networks import guided_unet, tiny_autoencoder, tiny_conditional_unet, tiny_transformer, tiny_unet

T = torch.tensor([3, 700])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


NOISY = randn(2, 3, 8, 8)
LABELS = torch.tensor([1, 4])
STATES = randn(2, 5, 8, seed=1)
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
}


@dataclass
class Case:
    """A model, and how a person would call it without this library."""

    model: Any
    arguments: dict[str, Any]
    conditioning: Any = None

    @property
    def is_transformer(self):
        return hasattr(self.model, "transformer_blocks")

    @property
    def middle(self):
        if self.is_transformer:
            return self.model.transformer_blocks[1]  # of three
        return getattr(self.model, "mid_block", None) or self.model.middle_block

    @property
    def decoder(self):
        if self.is_transformer:
            return self.model.transformer_blocks[2]
        return (getattr(self.model, "up_blocks", None) or self.model.output_blocks)[0]

    def direct(self, noisy, t):
        """The noise of a direct call, cut to the channels of the image by hand, and what the middle put out."""
        seen = []
        handle = self.middle.register_forward_hook(lambda module, args, output: seen.append(output))
        if self.is_transformer:
            output = self.model(noisy, timestep=t, **self.arguments)
        else:
            output = self.model(noisy, t, **self.arguments)
        handle.remove()
        output = getattr(output, "sample", output)
        output = output[0] if isinstance(output, tuple) else output
        h = seen[0][1] if isinstance(seen[0], tuple) else seen[0]
        if self.is_transformer:  # tokens of 2x2 pixels, row by row
            h = torch.stack([h[:, 4 * row : 4 * row + 4].transpose(1, 2) for row in range(4)], dim=2)
        return output[:, :3], h


def wrap(case):
    return as_denoiser(case.model, NoiseSchedule.linear(), conditioning=case.conditioning)


def sdxl_case(rows):
    embedded = {"text_embeds": randn(2, 8, seed=2), "time_ids": torch.ones(2, 6)}
    if rows == 1:
        embedded = {name: value[:1] for name, value in embedded.items()}
    full = {name: value.expand(2, -1) for name, value in embedded.items()}
    return Case(
        tiny_conditional_unet(**SDXL),
        {"encoder_hidden_states": STATES, "added_cond_kwargs": full},
        {"encoder_hidden_states": STATES, "added_cond_kwargs": embedded},
    )


CAPTION, POOLED = randn(1, 4, 6, seed=3), randn(1, 5, seed=4)
SIX = torch.ones(1, 6)
CAPTION_2 = CAPTION.expand(2, -1, -1)
STATES_1 = STATES[:1].expand(2, -1, -1)
CASES = {
    "diffusers": lambda: Case(tiny_unet(), {}),
    "diffusers, attention": lambda: Case(tiny_unet(attention=True), {}),
    "diffusers, learned variance": lambda: Case(tiny_unet(out_channels=6), {}),
    "diffusers, one label": lambda: Case(
        tiny_unet(num_class_embeds=5), {"class_labels": LABELS[1:].expand(2)}, LABELS[1:]
    ),
    "diffusers, scalar label": lambda: Case(
        tiny_unet(num_class_embeds=5), {"class_labels": LABELS[1].expand(2)}, LABELS[1]
    ),
    "diffusers, labels": lambda: Case(tiny_unet(num_class_embeds=5), {"class_labels": LABELS}, LABELS),
    "conditional, one row": lambda: Case(tiny_conditional_unet(), {"encoder_hidden_states": STATES_1}, STATES[:1]),
    "conditional, rows": lambda: Case(tiny_conditional_unet(), {"encoder_hidden_states": STATES}, STATES),
    "conditional, mapping": lambda: Case(
        tiny_conditional_unet(num_class_embeds=5),
        {"encoder_hidden_states": STATES_1, "class_labels": LABELS},
        {"encoder_hidden_states": STATES[:1], "class_labels": LABELS},
    ),
    "conditional, nested mapping of one row": lambda: sdxl_case(1),
    "conditional, nested mapping of rows": lambda: sdxl_case(2),
    "DiT": lambda: Case(tiny_transformer("DiT"), {"class_labels": LABELS}, LABELS),
    "DiT, one label": lambda: Case(tiny_transformer("DiT"), {"class_labels": LABELS[1:].expand(2)}, LABELS[1:]),
    "PixArt": lambda: Case(tiny_transformer("PixArt"), {"encoder_hidden_states": CAPTION_2}, CAPTION),
    "SD3": lambda: Case(
        tiny_transformer("SD3"),
        {"encoder_hidden_states": CAPTION_2, "pooled_projections": POOLED.expand(2, -1)},
        {"encoder_hidden_states": CAPTION, "pooled_projections": POOLED},
    ),
    "guided": lambda: Case(guided_unet(), {}),
    "guided, not checkpointed": lambda: Case(guided_unet(use_checkpoint=False), {}),
    "guided, one label": lambda: Case(guided_unet(num_classes=5), {"y": LABELS[1:].expand(2)}, LABELS[1:]),
    "guided, labels": lambda: Case(guided_unet(num_classes=5), {"y": LABELS}, LABELS),
    "guided, fork that returns h": lambda: Case(guided_unet(returns_bottleneck=True), {}),
}
KINDS = ("diffusers", "conditional, one row", "guided", "guided, fork that returns h", "SD3")


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x_t, t):
        return self.conv(x_t) + t[:, None, None, None] / 1000


class BareWithBottleneck(Bare):
    def forward(self, x_t, t):
        return super().forward(x_t, t), x_t.mean(dim=(2, 3))


def sine(x_t, t):
    return (x_t * (1 + t[:, None, None, None])).sin()


def sine_and_mean(x_t, t):
    return sine(x_t, t), x_t.mean(dim=(2, 3))


def calls_of(module):
    """A list that grows with every call of a module."""
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


# ---- noise and h-space are those of the model


@torch.no_grad()
def test_the_noise_is_what_the_model_itself_puts_out(case):
    noise, _ = case.direct(NOISY, T)
    denoiser = wrap(case)
    torch.testing.assert_close(denoiser(NOISY, T), noise)


@torch.no_grad()
def test_with_bottleneck_adds_what_the_middle_block_puts_out(case):
    noise, h = case.direct(NOISY, T)
    denoiser = wrap(case)
    found_noise, found_h = denoiser.with_bottleneck(NOISY, T)
    torch.testing.assert_close(found_noise, noise)
    torch.testing.assert_close(found_h, h)


@torch.no_grad()
def test_bottleneck_is_the_same_and_the_decoder_is_not_run(case):
    _, h = case.direct(NOISY, T)
    denoiser = wrap(case)
    decoder = calls_of(case.decoder)
    torch.testing.assert_close(denoiser.bottleneck(NOISY, T), h)
    assert not decoder
    denoiser.with_bottleneck(NOISY, T)
    assert len(decoder) == 1


@torch.no_grad()
@pytest.mark.parametrize("model", [sine, Bare()], ids=["function", "module"])
def test_a_callable_predicts_the_noise_and_has_no_bottleneck(model):
    denoiser = as_denoiser(model)
    assert torch.equal(denoiser(NOISY, T), model(NOISY, T))
    for method in (denoiser.with_bottleneck, denoiser.bottleneck):
        with pytest.raises(ValueError, match=r"no bottleneck: expected a `mid_block`.*returns \(noise, h\)"):
            method(NOISY, T)


@torch.no_grad()
@pytest.mark.parametrize("model", [sine_and_mean, BareWithBottleneck()], ids=["function", "module"])
def test_a_callable_that_returns_h_has_a_bottleneck(model):
    denoiser, (noise, h) = as_denoiser(model), model(NOISY, T)
    assert torch.equal(denoiser(NOISY, T), noise)
    assert torch.equal(denoiser.with_bottleneck(NOISY, T)[0], noise)
    assert torch.equal(denoiser.with_bottleneck(NOISY, T)[1], h)
    assert torch.equal(denoiser.bottleneck(NOISY, T), h)


@torch.no_grad()
def test_a_callable_gets_its_conditioning_as_third_argument_or_by_keyword():
    def model(x_t, t, scale, shift=0.0):
        return x_t * scale[:, None, None, None] + shift

    scale = torch.tensor([2.0])
    assert torch.equal(as_denoiser(model, conditioning=scale)(NOISY, T), 2 * NOISY)
    both = {"scale": torch.tensor([2.0, 3.0]), "shift": 0.5}
    expected = torch.stack([2 * NOISY[0], 3 * NOISY[1]]) + 0.5
    assert torch.equal(as_denoiser(model, conditioning=both)(NOISY, T), expected)


def test_conditioning_is_fitted_to_batch_and_model_at_every_depth():
    class Conditioned(Bare):
        def forward(self, x_t, t, embeddings, ids, name):
            self.found = embeddings["text"], ids, name
            return x_t

    model, ids = Conditioned().bfloat16(), torch.tensor([[7, 8]])
    given = {"embeddings": {"text": STATES[:1]}, "ids": ids, "name": "as it is"}
    as_denoiser(model, conditioning=given)(NOISY, T)
    text, found_ids, name = model.found
    assert torch.equal(text, STATES[:1].expand(2, -1, -1).bfloat16())
    assert torch.equal(found_ids, ids.expand(2, -1))
    assert (text.dtype, found_ids.dtype, name) == (torch.bfloat16, torch.int64, "as it is")


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


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_be_wrapped_twice(kind):
    case = CASES[kind]()
    noise, h = case.direct(NOISY, T)
    for denoiser in [wrap(case) for _ in range(2)]:
        torch.testing.assert_close(denoiser.bottleneck(NOISY, T), h)
        torch.testing.assert_close(denoiser.with_bottleneck(NOISY, T), (noise, h))


# ---- prediction types, timesteps, dtypes


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("given_as", ["schedule", "scheduler"])
@pytest.mark.parametrize("out_channels", [3, 6])
def test_the_output_is_read_as_the_schedule_says(prediction_type, given_as, out_channels):
    model = tiny_unet(out_channels=out_channels).double()
    noisy = NOISY.double()
    schedule = NoiseSchedule.linear(prediction_type=prediction_type)
    if given_as == "scheduler":
        schedule = diffusers.DDPMScheduler(prediction_type=prediction_type)
    output = model(noisy, T).sample[:, :3]
    expected = []
    for u, x_t, steps in zip(output, noisy, T.tolist(), strict=True):
        abar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(steps + 1))
        a, b = math.sqrt(abar), math.sqrt(1 - abar)
        expected.append({"epsilon": u, "v_prediction": a * u + b * x_t, "sample": (x_t - a * u) / b}[prediction_type])
    denoiser = as_denoiser(model, schedule)
    torch.testing.assert_close(denoiser(noisy, T), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(denoiser.with_bottleneck(noisy, T)[0], denoiser(noisy, T))


@pytest.mark.parametrize("table", [torch.linspace(0.9, 0.1, 7), None])
def test_the_schedule_may_be_a_table_or_left_to_the_default(table):
    schedule = as_denoiser(sine, table).schedule
    expected = NoiseSchedule.linear() if table is None else NoiseSchedule(table)
    assert torch.equal(schedule.alphas_cumprod, expected.alphas_cumprod)
    assert schedule.prediction_type == "epsilon"


def test_a_conditional_u_net_without_a_schedule_warns_that_it_may_be_another():
    with pytest.warns(UserWarning, match="UNet2DConditionModel without a `schedule`.*scaled_linear"):
        as_denoiser(tiny_conditional_unet(), conditioning=STATES)


def test_nothing_warns_where_the_default_schedule_is_likely_or_another_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        as_denoiser(tiny_unet())
        as_denoiser(tiny_conditional_unet(), NoiseSchedule.scaled_linear(), conditioning=STATES)


def test_a_schedule_is_used_as_it_is():
    schedule = NoiseSchedule.cosine()
    assert as_denoiser(sine, schedule).schedule is schedule


@torch.no_grad()
@pytest.mark.parametrize("method", ["forward", "with_bottleneck", "bottleneck"])
@pytest.mark.parametrize("kind", ["diffusers", "guided"])
@pytest.mark.parametrize("t", [700, torch.tensor(700), torch.tensor([700])], ids=["int", "scalar", "one"])
def test_one_timestep_is_meant_for_all_samples(kind, method, t):
    denoise = getattr(wrap(CASES[kind]()), method)
    torch.testing.assert_close(denoise(NOISY, t), denoise(NOISY, torch.tensor([700, 700])), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["forward", "with_bottleneck", "bottleneck"])
@pytest.mark.parametrize(
    ("t", "message"),
    [
        (-1, r"\[0, 1000\), found -1"),
        (1000, r"\[0, 1000\), found 1000"),
        (torch.tensor([0, 1000]), r"\[0, 1000\), found 1000"),
        (torch.tensor([0.5, 0.7]), "integer"),
        (0.5, "integer"),
        (500.0, "integer"),
        (torch.tensor([1, 2, 3]), r"one integer or 2 of them, found .*\(3,\)"),
        (torch.tensor([[1], [2]]), r"one integer or 2 of them, found .*\(2, 1\)"),
    ],
)
def test_bad_timesteps_are_refused(method, t, message):
    with pytest.raises(ValueError, match=f"`timestep` should be .*{message}"):
        getattr(as_denoiser(sine_and_mean), method)(NOISY, t)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["diffusers", "conditional, one row", "guided"])
@pytest.mark.parametrize(
    ("of_model", "of_image"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32)],
)
def test_images_are_cast_to_the_model_and_its_noise_back(kind, of_model, of_image):
    case = CASES[kind]()
    case.model.to(of_model)
    case.arguments = {name: value.to(of_model) for name, value in case.arguments.items()}
    noise, h = case.direct(NOISY.to(of_image).to(of_model), T)
    denoiser = wrap(case)
    found_noise, found_h = denoiser.with_bottleneck(NOISY.to(of_image), T)
    assert found_noise.dtype == denoiser(NOISY.to(of_image), T).dtype == torch.float32
    torch.testing.assert_close(found_noise, noise.float())
    torch.testing.assert_close(found_h, h, check_dtype=False)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conditional, one row", "conditional, nested mapping of one row"])
def test_conditioning_and_model_follow_the_dtype_of_a_parent(kind):
    case = CASES[kind]()
    noise, h = case.direct(NOISY, T)
    denoiser = wrap(case)
    nn.Sequential(denoiser).double()
    assert case.model.dtype == torch.float64
    assert denoiser.schedule.signal.dtype == torch.float32
    found_noise, found_h = denoiser.with_bottleneck(NOISY.double(), T)
    torch.testing.assert_close(found_noise, noise.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_h, h.double(), rtol=1e-4, atol=1e-4)


# ---- gradients and the caller's model


@pytest.mark.parametrize("method", ["forward", "with_bottleneck", "bottleneck"])
def test_gradients_through_a_frozen_model_are_those_of_a_direct_call(case, method):
    def pull(noise, h):
        wanted = {"forward": (noise,), "with_bottleneck": (noise, h), "bottleneck": (h,)}[method]
        return sum(value.square().sum() for value in wanted)

    x = NOISY.clone().requires_grad_()
    (expected,) = torch.autograd.grad(pull(*case.direct(x, T)), x)

    case.model.requires_grad_(False)
    seen = getattr(wrap(case), method)(x, T)
    noise, h = {"forward": (seen, None), "with_bottleneck": seen, "bottleneck": (None, seen)}[method]
    pull(noise, h).backward()
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_the_guided_network_fails_on_frozen_weights_before_it_is_wrapped():
    model, x = guided_unet().requires_grad_(False), NOISY.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(x, T).sum().backward()


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


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_frozen_can_still_be_trained(kind):
    case = CASES[kind]()
    expected = torch.autograd.grad(case.direct(NOISY, T)[0].square().sum(), case.middle.parameters())
    denoiser = wrap(case)
    found = torch.autograd.grad(denoiser(NOISY, T).square().sum(), case.middle.parameters())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# ---- refusals


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
    with pytest.raises(ValueError, match="wrapped in a function .* docs/priors.md"):
        as_denoiser(flux.__new__(flux))


def test_a_layer_may_be_named():
    unet = tiny_unet()
    first = as_denoiser(unet, bottleneck="down_blocks.0")
    assert first.bottleneck(NOISY, T).shape == (2, 8, 4, 4)
    assert as_denoiser(unet).bottleneck(NOISY, T).shape == (2, 16, 2, 2)
    with pytest.raises(ValueError, match="`bottleneck` should name a layer of UNet2DModel .*found 'middle'"):
        as_denoiser(unet, bottleneck="middle")


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


@pytest.mark.parametrize(
    "conditioning", [STATES[:1].expand(3, -1, -1), {"encoder_hidden_states": STATES[:1].expand(3, -1, -1)}]
)
def test_conditioning_of_other_rows_than_the_batch_is_refused(conditioning):
    denoiser = as_denoiser(tiny_conditional_unet(), NoiseSchedule.linear(), conditioning=conditioning)
    with pytest.raises(ValueError, match="`conditioning` should have 1 or 2 rows for this batch, found 3"):
        denoiser(NOISY, T)


def test_a_denoiser_is_returned_as_it_is_and_takes_no_second_schedule_or_conditioning():
    denoiser = as_denoiser(sine, NoiseSchedule.cosine())
    assert as_denoiser(denoiser) is denoiser
    assert as_denoiser(denoiser, denoiser.schedule) is denoiser
    for options in ({"schedule": NoiseSchedule.linear()}, {"conditioning": STATES}, {"bottleneck": "mid"}):
        with pytest.raises(ValueError, match="is a Denoiser, which has its schedule, conditioning and bottleneck"):
            as_denoiser(denoiser, **options)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (NOISY[:, :, :4], r"shape of its input \(2, 3, 8, 8\).*found \(2, 3, 4, 8\)"),
        (NOISY[:, :1], r"shape of its input .*found \(2, 1, 8, 8\)"),
        (NOISY[0], r"shape of its input .*found \(3, 8, 8\)"),
        ({"noise": NOISY}, "should return a tensor.*found dict"),
        (None, "should return a tensor.*found NoneType"),
        ((), "should return a tensor.*found tuple"),
    ],
)
def test_an_output_that_is_no_noise_is_refused(output, message):
    with pytest.raises(ValueError, match=message):
        as_denoiser(lambda x_t, t: output)(NOISY, T)


# ---- sizes


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


def test_a_callable_takes_any_size():
    assert as_denoiser(sine).multiple == 1


# ---- state, threads, copies


@torch.no_grad()
@pytest.mark.parametrize("method", ["with_bottleneck", "bottleneck"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_the_model_leaves_no_state_behind(kind, method):
    case = CASES[kind]()
    noise, h = case.direct(NOISY, T)
    denoiser = wrap(case)
    broken = case.decoder if method == "with_bottleneck" else case.middle
    handle = broken.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        getattr(denoiser, method)(NOISY, T)
    handle.remove()
    torch.testing.assert_close(case.direct(NOISY, T), (noise, h))  # neither stopped nor tapped
    torch.testing.assert_close(denoiser.with_bottleneck(NOISY, T), (noise, h))
    torch.testing.assert_close(denoiser.bottleneck(NOISY, T), h)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_early_exit_stops_no_later_call(kind):
    case = CASES[kind]()
    noise, h = case.direct(NOISY, T)
    denoiser = wrap(case)
    for _ in range(2):
        denoiser.bottleneck(NOISY, T)
        torch.testing.assert_close(case.direct(NOISY, T), (noise, h))
        torch.testing.assert_close(denoiser(NOISY, T), noise)


@torch.no_grad()
@pytest.mark.parametrize("method", ["with_bottleneck", "bottleneck"])
def test_h_is_not_kept_alive_after_the_call(method):
    denoiser = as_denoiser(tiny_unet())
    seen = getattr(denoiser, method)(NOISY, T)
    h = weakref.ref(seen[1] if method == "with_bottleneck" else seen)
    del seen
    gc.collect()
    assert h() is None


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_their_own_h_and_stop_only_themselves(kind):
    case = CASES[kind]()
    noisy = [randn(2, 3, 8, 8, seed=seed) for seed in range(3)]
    with torch.no_grad():
        direct = [case.direct(image, T) for image in noisy]
    denoiser = wrap(case)
    together = threading.Barrier(len(noisy), timeout=30)

    def meet(module, args):
        together.wait()  # until all are inside

    case.middle.register_forward_pre_hook(meet)
    found = {}

    def work(name, method, image):
        with torch.no_grad():
            found[name] = method(image, T)

    jobs = zip(("noise", "both", "h"), (denoiser, denoiser.with_bottleneck, denoiser.bottleneck), noisy, strict=True)
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, {"noise": direct[0][0], "both": direct[1], "h": direct[2][1]})


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


@torch.no_grad()
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_denoiser_work_and_are_independent(kind, duplicate, used_before):
    case = CASES[kind]()
    noise, h = case.direct(NOISY, T)
    denoiser = as_denoiser(case.model, NoiseSchedule.cosine(), conditioning=case.conditioning)
    if used_before:
        denoiser.bottleneck(NOISY, T)
    other = DUPLICATES[duplicate](denoiser)
    torch.testing.assert_close(other.with_bottleneck(NOISY, T), (noise, h))
    torch.testing.assert_close(other.bottleneck(NOISY, T), h)
    assert other.multiple == denoiser.multiple
    assert torch.equal(other.schedule.signal, denoiser.schedule.signal)
    for parameter in other.model.parameters():
        parameter.mul_(0.5)
    changed = Case(other.model, case.arguments).direct(NOISY, T)
    assert not torch.allclose(changed[1], h)
    torch.testing.assert_close(other.with_bottleneck(NOISY, T), changed)
    torch.testing.assert_close(other.bottleneck(NOISY, T), changed[1])
    torch.testing.assert_close(denoiser.with_bottleneck(NOISY, T), (noise, h))


def test_a_copy_of_a_guided_network_still_lets_gradients_through_frozen_weights():
    other = copy.deepcopy(as_denoiser(guided_unet()).requires_grad_(False))
    x = NOISY.clone().requires_grad_()
    other(x, T).sum().backward()
    assert x.grad.abs().sum() > 0


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


def test_a_denoiser_trains_and_saves_as_its_model_does():
    model = tiny_unet()
    denoiser = as_denoiser(model)
    assert set(denoiser.parameters()) == set(model.parameters())
    assert list(denoiser.state_dict()) == [f"model.{name}" for name in model.state_dict()]


# ---- torch.compile


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield functools.partial(torch.compile, backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("kind", "method"), [("diffusers", "with_bottleneck"), ("diffusers", "bottleneck"), ("guided", "bottleneck")]
)
def test_a_whole_pass_compiles_into_one_graph(fresh_compiler, kind, method):
    case = CASES[kind]()
    case.model.requires_grad_(False)
    eager = getattr(wrap(case), method)
    # the early exit is an exception, which the compiler of torch 2.6 leaves to Python
    traces_exceptions = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)
    compiled = fresh_compiler(eager, fullgraph=traces_exceptions or method == "with_bottleneck")

    def gradient(function):
        x = NOISY.clone().requires_grad_()
        seen = function(x, T)
        loss = sum(value.square().sum() for value in (seen if isinstance(seen, tuple) else (seen,)))
        return seen, torch.autograd.grad(loss, x)

    torch.testing.assert_close(gradient(compiled), gradient(eager))
    torch.testing.assert_close(eager(NOISY, T), compiled(NOISY, T))


@torch.no_grad()
@pytest.mark.parametrize("compiled", ["wrapped", "in place", "middle block only"])
def test_a_model_compiled_before_it_is_wrapped_keeps_its_bottleneck(fresh_compiler, compiled):
    case = CASES["diffusers"]()
    noise, h = case.direct(NOISY, T)
    if compiled == "wrapped":
        case.model = fresh_compiler(case.model)
    else:
        (case.model if compiled == "in place" else case.middle).compile(backend="aot_eager")
    denoiser = wrap(case)
    assert denoiser.multiple == 4
    torch.testing.assert_close(denoiser(NOISY, T), noise)
    torch.testing.assert_close(denoiser.with_bottleneck(NOISY, T), (noise, h))
    torch.testing.assert_close(denoiser.bottleneck(NOISY, T), h)
    torch.testing.assert_close(denoiser(NOISY, T), noise)


# ---- latents


@torch.no_grad()
@pytest.mark.parametrize("shift", [None, 0.25])
def test_an_autoencoder_gives_its_mode_shifted_and_scaled(shift):
    model = tiny_autoencoder(scaling_factor=0.5, shift_factor=shift)
    mean, _ = model.quant_conv(model.encoder(NOISY)).chunk(2, dim=1)
    encoder = LatentEncoder(model)
    torch.testing.assert_close(encoder(NOISY), (mean - (shift or 0)) * 0.5)
    assert torch.equal(encoder(NOISY), encoder(NOISY))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_multiple_of_an_autoencoder_is_what_it_halves(levels):
    model = tiny_autoencoder(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    encoder = LatentEncoder(model)
    assert 16 // encoder(torch.rand(1, 3, 16, 16)).shape[-1] == encoder.multiple == 2 ** (levels - 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "encoder", [lambda u: u[:, :, ::2, ::2], nn.Conv2d(3, 4, 2, stride=2)], ids=["function", "module"]
)
def test_any_other_encoder_is_called_as_it_is(encoder):
    latent = LatentEncoder(encoder)
    assert torch.equal(latent(NOISY), encoder(NOISY))
    assert latent.multiple == 1


@pytest.mark.parametrize("make", [tiny_autoencoder, lambda: nn.Conv2d(3, 4, 2, stride=2)])
@pytest.mark.parametrize(("of_model", "of_image"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_latents_come_in_the_dtype_of_the_image(make, of_model, of_image):
    encoder = LatentEncoder(make().to(of_model))
    latents = encoder(NOISY.to(of_image))
    assert latents.dtype == of_image
    expected = encoder(NOISY.to(of_image).to(of_model))
    torch.testing.assert_close(latents, expected.to(of_image), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("make", [tiny_autoencoder, lambda: nn.Conv2d(3, 4, 2, stride=2)])
def test_gradients_reach_the_image_through_an_encoder(make):
    x = NOISY.clone().requires_grad_()
    LatentEncoder(make().requires_grad_(False))(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_what_is_no_encoder_is_refused():
    with pytest.raises(ValueError, match="`encoder` should be an autoencoder of .*found SimpleNamespace"):
        LatentEncoder(SimpleNamespace())


def test_a_parallel_wrapper_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="DataParallel: pass its `.module`"):
        as_denoiser(nn.DataParallel(tiny_unet()))


def test_one_hook_serves_every_denoiser_of_a_model() -> None:
    unet = tiny_unet()
    first, second = as_denoiser(unet), as_denoiser(unet)
    assert len(unet.mid_block._forward_hooks) == 1
    noisy = torch.randn(1, 3, 8, 8)
    assert torch.equal(first.bottleneck(noisy, 5), second.with_bottleneck(noisy, 5)[1])


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 7, 8), "multiples of 4.*7x8"), ((1, 1, 8, 8), r"\(N, 3, H, W\)"), ((3, 8, 8), r"\(N, 3, H, W\)")],
)
def test_inputs_that_do_not_fit_are_refused_by_name(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"`noisy` should have.*{message}"):
        as_denoiser(tiny_unet())(torch.randn(shape), 5)


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


def test_schedules_come_in_several_forms() -> None:
    table = NoiseSchedule.cosine(10).alphas_cumprod
    for schedule in (table, table.numpy(), diffusers.DDPMScheduler(trained_betas=(1 - table).tolist())):
        assert as_denoiser(lambda x_t, t: x_t, schedule).schedule.num_timesteps == 10
    for wrong in ("linear", 1000, diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True)):
        with pytest.raises(ValueError, match="schedule"):
            as_denoiser(lambda x_t, t: x_t, wrong)


def test_autoencoders_without_a_distribution_encode_too() -> None:
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    encoder = LatentEncoder(tiny)
    torch.testing.assert_close(encoder(image), tiny.encode(image).latents * tiny.config.scaling_factor)
    with pytest.raises(ValueError, match="3 channels for this encoder, found 1"):
        encoder(image[:, :1])
