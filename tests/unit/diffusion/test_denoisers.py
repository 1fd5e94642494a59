"""A denoiser gives the noise and the h-space of its model, and leaves the model as it was."""

import copy
import functools
import gc
import math
import pickle
import threading
import weakref

import diffusers
import numpy
import pytest
import torch
from torch import nn

from restoreloss import Denoiser, NoiseSchedule, as_denoiser
from tests.helpers.denoisers import (
    CASES,
    KINDS,
    NOISY,
    STATES,
    Bare,
    BareWithBottleneck,
    Case,
    T,
    calls_of,
    randn,
    sine,
    sine_and_mean,
    wrap,
)
from tests.helpers.networks import guided_unet, tiny_conditional_unet, tiny_unet


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


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


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_frozen_can_still_be_trained(kind):
    case = CASES[kind]()
    expected = torch.autograd.grad(case.direct(NOISY, T)[0].square().sum(), case.middle.parameters())
    denoiser = wrap(case)
    found = torch.autograd.grad(denoiser(NOISY, T).square().sum(), case.middle.parameters())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "conditioning", [STATES[:1].expand(3, -1, -1), {"encoder_hidden_states": STATES[:1].expand(3, -1, -1)}]
)
def test_conditioning_of_other_rows_than_the_batch_is_refused(conditioning):
    denoiser = as_denoiser(tiny_conditional_unet(), NoiseSchedule.linear(), conditioning=conditioning)
    with pytest.raises(ValueError, match="`conditioning` should have 1 or 2 rows for this batch, found 3"):
        denoiser(NOISY, T)


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


def test_a_denoiser_trains_and_saves_as_its_model_does():
    model = tiny_unet()
    denoiser = as_denoiser(model)
    assert set(denoiser.parameters()) == set(model.parameters())
    assert list(denoiser.state_dict()) == [f"model.{name}" for name in model.state_dict()]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield functools.partial(torch.compile, backend="aot_eager")
    torch.compiler.reset()


def quickly_traced():
    """CASES["diffusers"] with one resolution less."""
    return Case(tiny_unet((8, 8)), {})


@pytest.mark.parametrize(
    ("build", "method"),
    [
        pytest.param(quickly_traced, "with_bottleneck", marks=pytest.mark.slow, id="diffusers-with_bottleneck"),
        pytest.param(quickly_traced, "bottleneck", id="diffusers-bottleneck"),
        pytest.param(CASES["guided"], "bottleneck", marks=pytest.mark.slow, id="guided-bottleneck"),
    ],
)
def test_a_whole_pass_compiles_into_one_graph(fresh_compiler, build, method):
    case = build()
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
@pytest.mark.parametrize(
    "compiled", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("wrapped", "in place")), "middle block only"]
)
def test_a_model_compiled_before_it_is_wrapped_keeps_its_bottleneck(fresh_compiler, compiled):
    case = quickly_traced()
    noise, h = case.direct(NOISY, T)
    if compiled == "wrapped":
        case.model = fresh_compiler(case.model)
    else:
        (case.model if compiled == "in place" else case.middle).compile(backend="aot_eager")
    denoiser = wrap(case)
    assert denoiser.multiple == 2
    torch.testing.assert_close(denoiser(NOISY, T), noise)
    torch.testing.assert_close(denoiser.with_bottleneck(NOISY, T), (noise, h))
    torch.testing.assert_close(denoiser.bottleneck(NOISY, T), h)
    torch.testing.assert_close(denoiser(NOISY, T), noise)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 7, 8), "multiples of 4.*7x8"), ((1, 1, 8, 8), r"\(N, 3, H, W\)"), ((3, 8, 8), r"\(N, 3, H, W\)")],
)
def test_inputs_that_do_not_fit_are_refused_by_name(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"`noisy` should have.*{message}"):
        as_denoiser(tiny_unet())(torch.randn(shape), 5)


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
