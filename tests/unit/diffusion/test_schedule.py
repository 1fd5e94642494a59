import copy
import math
import pickle

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from restoreloss import NoiseSchedule

LEVELS = ("alphas_cumprod", "signal", "sigma")


def linear_beta(i, steps):
    return 1e-4 + (0.02 - 1e-4) * i / (steps - 1)


def scaled_linear_beta(i, steps):
    return (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / (steps - 1)) ** 2


def cosine_beta(i, steps):
    def level(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return min(1 - level((i + 1) / steps) / level(i / steps), 0.999)


def cumulated(beta, steps):
    levels, abar = [], 1.0
    for i in range(steps):
        abar *= 1 - beta(i, steps)
        levels.append(abar)
    return levels


SCHEDULES = {
    "linear": (NoiseSchedule.linear, linear_beta, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        NoiseSchedule.scaled_linear,
        scaled_linear_beta,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (NoiseSchedule.cosine, cosine_beta, {"beta_schedule": "squaredcos_cap_v2"}),
}
ABAR = cumulated(linear_beta, 1000)


def images(n=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), noise.to(dtype)


def mixed(x, noise, t):
    return torch.stack(
        [math.sqrt(ABAR[i]) * a + math.sqrt(1 - ABAR[i]) * b for a, b, i in zip(x, noise, t, strict=True)]
    )


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_equal_a_float64_loop_to_float32_rounding(name, steps):
    make, beta, _ = SCHEDULES[name]
    schedule = make(steps)
    abar = torch.tensor(cumulated(beta, steps), dtype=torch.float64)
    assert schedule.num_timesteps == steps
    for level, expected in zip(LEVELS, (abar, abar.sqrt(), (1 - abar).sqrt()), strict=True):
        table = getattr(schedule, level)
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("scheduler", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_equal_those_of_diffusers(name, scheduler):
    make, _, options = SCHEDULES[name]
    expected = scheduler(num_train_timesteps=1000, **options).alphas_cumprod
    torch.testing.assert_close(make(1000).alphas_cumprod, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("options", [{"beta_start": 0.001, "beta_end": 0.05}, {"prediction_type": "sample"}])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_options_of_the_named_schedules_arrive(name, options):
    make, _, diffusers_options = SCHEDULES[name]
    schedule, scheduler = make(50, **options), diffusers.DDPMScheduler(50, **{**diffusers_options, **options})
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-5, atol=0)
    assert schedule.prediction_type == options.get("prediction_type", "epsilon")


@pytest.mark.parametrize("max_beta", [0.5, 0.9])
def test_cosine_clips_its_betas(max_beta):
    abar = NoiseSchedule.cosine(100, max_beta=max_beta).alphas_cumprod.double()
    betas = 1 - abar[1:] / abar[:-1]
    assert betas[-1] == pytest.approx(max_beta, rel=1e-5)
    assert betas.max() <= max_beta + 1e-5


def test_add_noise_is_equation_7_for_each_sample():
    x, noise = images()
    t = [0, 17, 999]
    x_t = NoiseSchedule.linear().add_noise(x, noise, torch.tensor(t))
    torch.testing.assert_close(x_t, mixed(x, noise, t), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("t", [700, torch.tensor(700), torch.tensor([700]), torch.tensor([700], dtype=torch.int32)])
def test_one_timestep_is_meant_for_all_samples(t):
    x, noise = images()
    x_t = NoiseSchedule.linear().add_noise(x, noise, t)
    torch.testing.assert_close(x_t, mixed(x, noise, [700] * 3), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_of_timestep_means_the_same(dtype):
    x, noise = images()
    t = [0, 1, 100]
    x_t = NoiseSchedule.linear().add_noise(x, noise, torch.tensor(t, dtype=dtype))
    torch.testing.assert_close(x_t, mixed(x, noise, t), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("given_as", ["schedule", "override"])
def test_exactly_known_outputs_give_back_the_noise(prediction_type, given_as):
    x, noise = images(4)
    t = [0, 1, 500, 999]
    x_t = mixed(x, noise, t)
    v = torch.stack([math.sqrt(ABAR[i]) * b - math.sqrt(1 - ABAR[i]) * a for a, b, i in zip(x, noise, t, strict=True)])
    output = {"epsilon": noise, "v_prediction": v, "sample": x}[prediction_type]
    if given_as == "schedule":
        found = NoiseSchedule.linear(prediction_type=prediction_type).to_noise(output, x_t, torch.tensor(t))
    else:
        other = "sample" if prediction_type == "v_prediction" else "v_prediction"
        schedule = NoiseSchedule.linear(prediction_type=other)
        found = schedule.to_noise(output, x_t, torch.tensor(t), prediction_type=prediction_type)
    torch.testing.assert_close(found, noise, rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr_v_prediction_is_finite_and_exact_at_the_last_step():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 0.0]), prediction_type="v_prediction")
    x, noise = images(1)
    x_t = schedule.add_noise(x, noise, 2)
    assert torch.equal(x_t, noise)
    assert torch.equal(schedule.to_noise(-x, x_t, 2), noise)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3),
    shape=st.lists(st.integers(1, 4), max_size=4),
    times=st.lists(st.integers(0, 999), min_size=3, max_size=3),
    form=st.sampled_from(["int", "scalar", "one", "each"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_predict_x0_undoes_add_noise_in_any_shape(n, shape, times, form, dtype):
    schedule, generator = NoiseSchedule.linear(), torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, n, *shape, generator=generator, dtype=dtype)
    t = {"int": times[0], "scalar": torch.tensor(times[0]), "one": torch.tensor(times[:1])}.get(
        form, torch.tensor(times[:n])
    )
    x_t = schedule.add_noise(x, noise, t)
    restored = schedule.predict_x0(x_t, noise, t)
    assert x_t.shape == restored.shape == x.shape
    assert x_t.dtype == restored.dtype == dtype
    largest = float(schedule.signal.reciprocal().max())  # rounding comes back amplified by 1 / sqrt(abar)
    torch.testing.assert_close(restored, x, rtol=0, atol=10 * largest * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("convert", [False, True], ids=["float32 module", "converted module"])
def test_half_precision_images_keep_the_noise_of_the_first_timesteps(dtype, convert):
    schedule = NoiseSchedule.linear()
    if convert:
        nn.Sequential(schedule).to(dtype)
    x, noise = images(dtype=dtype)
    t = [0, 1, 5]
    x_t = schedule.add_noise(x, noise, torch.tensor(t))
    assert x_t.dtype == dtype
    torch.testing.assert_close(x_t, mixed(x.double(), noise.double(), t).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    added = (x_t.double() - x.double()).flatten(1).std(dim=1)
    expected = torch.tensor([math.sqrt(1 - ABAR[i]) for i in t], dtype=torch.float64)
    torch.testing.assert_close(added, expected, rtol=0.15, atol=0)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_converted_in_float32(prediction_type, dtype):
    schedule = NoiseSchedule.linear(prediction_type=prediction_type)
    x_t, output = images(1, dtype)
    signal, sigma = math.sqrt(ABAR[3]), math.sqrt(1 - ABAR[3])
    if prediction_type == "v_prediction":
        expected = signal * output.double() + sigma * x_t.double()
    else:
        expected = (x_t.double() - signal * output.double()) / sigma
    found = schedule.to_noise(output, x_t, 3)
    assert found.dtype == torch.float32  # rounded to half of its digits it would be wrong in them, times 1 / signal
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_come_in_the_dtype_of_the_images(dtype):
    schedule = NoiseSchedule.linear(prediction_type="v_prediction")
    x, noise = images(dtype=dtype)
    for result in (schedule.add_noise, schedule.predict_x0):
        assert result(x, noise, 10).dtype == dtype
    for prediction_type in ("epsilon", "v_prediction", "sample", "residual", "flow_prediction"):
        found = schedule.to_noise(noise, x, 10, prediction_type=prediction_type)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert schedule.to_noise(noise, x.float(), 10, prediction_type=prediction_type).dtype == found.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0, 500, 999])
def test_a_velocity_of_half_precision_leads_to_the_image_that_it_implies(dtype, t):
    schedule = NoiseSchedule.linear(prediction_type="v_prediction")
    x_t, v = images(dtype=dtype)
    signal, sigma = math.sqrt(ABAR[t]), math.sqrt(1 - ABAR[t])
    expected = signal * x_t.double() - sigma * v.double()  # Salimans & Ho, the image in a velocity
    found = schedule.predict_x0(x_t.float(), schedule.to_noise(v, x_t, t), t)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_float64_images_are_mixed_in_float64():
    schedule = NoiseSchedule.linear()
    x, noise = images()
    x_t = schedule.add_noise(x, noise, 500)
    assert not torch.equal(x_t, x_t.float().double())
    torch.testing.assert_close(schedule.predict_x0(x_t, noise, 500), x, rtol=0, atol=1e-14)


def test_gradients_reach_the_image_with_the_factor_of_equation_7():
    x, noise = images()
    x.requires_grad_()
    NoiseSchedule.linear().add_noise(x, noise, 500).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, math.sqrt(ABAR[500])), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler,
        diffusers.DDIMScheduler,
        diffusers.PNDMScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_from_diffusers_takes_table_and_prediction_type(scheduler, prediction_type):
    source = scheduler(num_train_timesteps=50, prediction_type=prediction_type)
    schedule = NoiseSchedule.from_diffusers(source)
    assert torch.equal(schedule.alphas_cumprod, source.alphas_cumprod)
    assert schedule.prediction_type == prediction_type
    assert schedule.num_timesteps == 50


def test_from_diffusers_reads_an_absent_prediction_type_as_epsilon():
    class Bare:
        alphas_cumprod = torch.linspace(0.9, 0.1, 5)

    assert NoiseSchedule.from_diffusers(Bare()).prediction_type == "epsilon"


def test_from_diffusers_accepts_zero_terminal_snr():
    source = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert NoiseSchedule.from_diffusers(source).signal[-1] == 0


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler,
        diffusers.EDMEulerScheduler,
        diffusers.EDMDPMSolverMultistepScheduler,
        diffusers.ScoreSdeVeScheduler,
        diffusers.CMStochasticIterativeScheduler,
    ],
)
def test_schedulers_that_are_not_variance_preserving_are_refused(scheduler):
    with pytest.raises(ValueError, match=rf"`alphas_cumprod`.*found {scheduler.__name__}"):
        NoiseSchedule.from_diffusers(scheduler())


def test_a_flow_prediction_is_refused_though_its_scheduler_has_a_table():
    source = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match="found DPMSolverMultistepScheduler. Flow matching has FlowLevels"):
        NoiseSchedule.from_diffusers(source)


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(torch.linspace(1e-4, 0.02, 1000), id="betas"),
        pytest.param(torch.linspace(80.0, 0.002, 40), id="sigmas"),
        pytest.param(torch.rand(2, 5), id="2-D"),
        pytest.param(torch.tensor(0.5), id="0-D"),
        pytest.param(torch.empty(0), id="empty"),
        pytest.param(torch.arange(5), id="integers"),
        pytest.param(torch.tensor([1.1, 0.5]), id="above 1"),
        pytest.param(torch.tensor([0.5, -0.1]), id="below 0"),
        pytest.param(torch.tensor([0.9, float("nan"), 0.1]), id="nan"),
    ],
)
def test_what_is_no_table_is_refused(table):
    with pytest.raises(ValueError, match=r"`alphas_cumprod` should .*found"):
        NoiseSchedule(table)


def test_unknown_prediction_types_are_refused_by_name():
    with pytest.raises(ValueError, match=r"`prediction_type`.*'flow'"):
        NoiseSchedule.linear(prediction_type="flow")
    x, noise = images()
    with pytest.raises(ValueError, match=r"`prediction_type`.*'x0'"):
        NoiseSchedule.linear().to_noise(noise, x, 3, prediction_type="x0")


@pytest.mark.parametrize("method", ["add_noise", "predict_x0", "to_noise"])
@pytest.mark.parametrize("t", [-1, 1000, torch.tensor(1000), torch.tensor([0, -1, 5]), torch.tensor([0, 5, 1000])])
def test_timesteps_outside_the_table_are_refused(method, t):
    x, noise = images()
    with pytest.raises(ValueError, match=r"`timestep` should be in \[0, 1000\), found (-1|1000)"):
        getattr(NoiseSchedule.linear(prediction_type="v_prediction"), method)(x, noise, t)


@pytest.mark.parametrize("method", ["add_noise", "predict_x0", "to_noise"])
@pytest.mark.parametrize("t", [0.5, 500.0, torch.tensor(5.0), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([True] * 3)])
def test_timesteps_that_are_no_integers_are_refused(method, t):
    x, noise = images()
    with pytest.raises(ValueError, match="`timestep` should be an integer"):
        getattr(NoiseSchedule.linear(prediction_type="v_prediction"), method)(x, noise, t)


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to(torch.float16),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: nn.Sequential(nn.Sequential(module)).half(),
    ],
    ids=["half", "bfloat16", "double", "to", "to device and dtype", "parent"],
)
def test_conversion_to_another_dtype_leaves_the_tables_alone(convert):
    schedule, untouched = NoiseSchedule.linear(), NoiseSchedule.linear()
    convert(schedule)
    for level in LEVELS:
        assert getattr(schedule, level).dtype == torch.float32
        assert torch.equal(getattr(schedule, level), getattr(untouched, level))


@pytest.mark.parametrize("arguments", [("meta",), ("meta", torch.bfloat16)])
def test_tables_follow_the_device_of_a_parent(arguments):
    schedule = NoiseSchedule.linear()
    nn.Sequential(schedule).to(*arguments)
    for level in LEVELS:
        assert getattr(schedule, level).device.type == "meta"
        assert getattr(schedule, level).dtype == torch.float32


def test_nothing_is_saved_or_trained():
    parent = nn.Sequential(NoiseSchedule.linear())
    assert not parent.state_dict()
    assert not list(parent.parameters())
    parent.load_state_dict({}, strict=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_equal_and_independent(duplicate):
    schedule = NoiseSchedule.cosine(100, prediction_type="v_prediction")
    other = duplicate(schedule).half()
    assert other.prediction_type == "v_prediction"
    for level in LEVELS:
        assert torch.equal(getattr(other, level), getattr(schedule, level))
        assert getattr(other, level).data_ptr() != getattr(schedule, level).data_ptr()


def test_the_table_is_copied_not_shared():
    table = torch.tensor([0.9, 0.5])
    schedule = NoiseSchedule(table)
    table.zero_()
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.9, 0.5]))


@pytest.mark.parametrize("timesteps", [torch.tensor([1, 2]), torch.tensor([[1], [2], [3]])])
def test_timesteps_neither_one_nor_as_many_as_the_images_are_refused(timesteps: torch.Tensor) -> None:
    x = torch.rand(3, 3, 4, 4)
    with pytest.raises(ValueError, match="`timestep` should be one integer or 3"):
        NoiseSchedule.linear().add_noise(x, x, timesteps)


# the posterior, by its coefficients: of x0 alone, and of x_t alone


def coefficients(schedule, t, s):
    one = torch.ones(len(t), dtype=torch.float64)
    of_x0, deviation = schedule.posterior(0 * one, one, t, s)
    of_x_t, _ = schedule.posterior(one, 0 * one, t, s)
    return of_x0, of_x_t, deviation.double()


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes_rule_in_float64_at_all_strides(name, steps):
    make, beta, _ = SCHEDULES[name]
    abar = torch.tensor(cumulated(beta, steps), dtype=torch.float64)
    t, s = torch.tril_indices(steps, steps, -1)
    # x_s | x0 and x_t | x_s are Gaussian: their precisions for x_s add
    step = abar[t] / abar[s]
    precision = 1 / (1 - abar[s]) + step / (1 - step)
    expected = (abar[s].sqrt() / (1 - abar[s]) / precision, step.sqrt() / (1 - step) / precision, precision.rsqrt())
    for found, wanted in zip(coefficients(make(steps), t, s), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    times=st.lists(st.integers(0, 999), min_size=3, max_size=3, unique=True),
    make=st.sampled_from([NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine]),
)
def test_two_strides_of_the_posterior_are_one(times, make):
    r, s, t = (torch.tensor([time]) for time in sorted(times))
    schedule = make()
    x0, x_t, deviation = coefficients(schedule, t, s)
    x0_on, x_s, deviation_on = coefficients(schedule, s, r)
    both = (x0_on + x_s * x0, x_s * x_t, (deviation_on**2 + (x_s * deviation) ** 2).sqrt())
    for found, wanted in zip(both, coefficients(schedule, t, r), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_of_noisy_images_has_the_noise_of_the_schedule(name):
    schedule = SCHEDULES[name][0]()
    t, s = torch.tril_indices(1000, 1000, -1)
    x0, x_t, deviation = coefficients(schedule, t, s)
    signal, sigma = schedule.signal.double(), schedule.sigma.double()
    torch.testing.assert_close(x0 + x_t * signal[t], signal[s], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((x_t * sigma[t]).square() + deviation.square(), sigma[s].square(), rtol=1e-5, atol=0)


def test_posterior_takes_timesteps_for_each_sample():
    x, noise = images()
    schedule, t, s = NoiseSchedule.linear(), [1, 500, 999], [0, 20, 998]
    mean, deviation = schedule.posterior(noise, x, torch.tensor(t), torch.tensor(s))
    assert deviation.shape == (3, 1, 1, 1)
    for n in range(3):
        alone = schedule.posterior(noise[n : n + 1], x[n : n + 1], t[n], s[n])
        assert torch.equal(mean[n : n + 1], alone[0]) and torch.equal(deviation[n : n + 1], alone[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_posterior_is_computed_in_single_precision_or_higher(dtype):
    x, noise = images(dtype=dtype)
    mean, deviation = NoiseSchedule.linear().posterior(noise, x, 300, 299)
    exact, _ = NoiseSchedule.linear().posterior(noise.double(), x.double(), 300, 299)
    assert mean.dtype == dtype and deviation.dtype == torch.float32
    torch.testing.assert_close(mean, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_posterior_is_finite_at_no_signal_and_at_no_noise():
    schedule = NoiseSchedule(torch.tensor([1.0, 0.5, 0.0]))
    x, noise = images()
    mean, deviation = schedule.posterior(noise, x, 2, 1)  # pure noise tells nothing
    torch.testing.assert_close(mean, math.sqrt(0.5) * x, rtol=1e-6, atol=0)
    assert (deviation == schedule.sigma[1]).all()
    mean, deviation = schedule.posterior(noise, x, 1, 0)  # nothing to be drawn
    torch.testing.assert_close(mean, x, rtol=1e-6, atol=0)
    assert not deviation.any()


@pytest.mark.parametrize("t", [-1, 1000, 5.0, torch.tensor([1, 2])])
@pytest.mark.parametrize("which", ["t", "previous"])
def test_posterior_refuses_timesteps_that_do_not_fit(which, t):
    x, noise = images()
    times = {"t": torch.tensor([999] * 3), "previous": torch.tensor([0] * 3)} | {which: t}
    with pytest.raises(ValueError, match="`timestep` should be"):
        NoiseSchedule.linear().posterior(noise, x, **times)
