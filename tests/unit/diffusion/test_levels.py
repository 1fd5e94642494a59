"""How much noise is at each level, and does every way to describe it lead back? Against the table and float64."""

import copy
import math
import pickle
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from restoreloss import FlowLevels, NoiseLevels, NoiseSchedule, as_denoiser, partial_diffusion

TYPES = ("residual", "epsilon", "sample")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ir_sde(steps: int, largest: float) -> list[float]:
    """Term by term, as the formula is written."""
    scale = 1000 / (steps + 1)
    theta = [scale * (1e-4 + (0.02 - 1e-4) * i / steps) for i in range(steps + 1)]
    total = [sum(theta[: t + 1]) - theta[0] for t in range(steps + 1)]
    delta = -math.log(0.005) / total[-1]
    return [largest * math.sqrt(1 - math.exp(-2 * value * delta)) for value in total]


def answer(schedule: NoiseSchedule, x: Tensor, noise: Tensor, t: int) -> Tensor:
    """What a model of this prediction type says who knows, in float64."""
    abar = float(schedule.alphas_cumprod[t].double())
    signal, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    if isinstance(schedule, NoiseLevels | FlowLevels):
        sigma = float(schedule.sigma[t].double())
        signal = 1.0 if isinstance(schedule, NoiseLevels) else 1 - sigma
    answers = {
        "residual": sigma * noise, "epsilon": noise, "sample": x, "v_prediction": signal * noise - sigma * x,
        "flow_prediction": noise - x,
    }  # fmt: skip
    return answers[schedule.prediction_type]


SCHEDULES = [
    *(NoiseLevels.ir_sde(prediction_type=kind) for kind in TYPES),
    *(NoiseSchedule.linear(prediction_type=kind) for kind in (*TYPES, "v_prediction", "flow_prediction")),
    *(FlowLevels.uniform(100, shift=2.0, prediction_type=kind) for kind in (*TYPES, "flow_prediction")),
]


def test_the_levels_are_those_of_the_paper() -> None:
    levels = NoiseLevels.ir_sde()
    found = [round(255 * float(levels.sigma[t]), 3) for t in (0, 1, 4, 8, 12, 25, 47, 50)]
    assert found == [0, 1.012, 2.943, 5.183, 6.976, 9.667, 10.0, 10.0]
    assert levels.prediction_type == "residual"
    assert levels.model_range == (0.0, 1.0) and NoiseSchedule.linear().model_range == (-1.0, 1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.floats(1e-3, 2.0))
def test_the_levels_are_the_formula_at_any_length(steps: int, largest: float) -> None:
    levels = NoiseLevels.ir_sde(steps, sigma_max=largest)
    expected = torch.tensor(ir_sde(steps, largest))
    torch.testing.assert_close(levels.sigma, expected)
    torch.testing.assert_close(levels.alphas_cumprod, 1 / (1 + expected.double().square()).float())
    assert torch.equal(levels.signal, torch.ones(steps + 1))


def test_noise_is_added_and_the_picture_stays_as_bright_as_it_was() -> None:
    levels, x, noise, t = NoiseLevels([0.0, 0.5, 2.0]), normal(3, 2, 4, 5), normal(3, 2, 4, 5, seed=1), [2, 0, 1]
    found = levels.add_noise(x, noise, torch.tensor(t))
    for n, sigma in enumerate((2.0, 0.0, 0.5)):
        torch.testing.assert_close(found[n], x[n] + sigma * noise[n])
    assert torch.equal(levels.add_noise(x, noise, 0), x)
    torch.testing.assert_close(levels.predict_x0(found, noise, torch.tensor(t)), x)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SCHEDULES),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    st.integers(0, 49),
)
def test_what_a_model_should_answer_is_the_noise_it_implies(
    schedule: NoiseSchedule, shape: tuple[int, ...], first: int
) -> None:
    x, noise = normal(*shape), normal(*shape, seed=1)
    t = 1 + (first + 7 * torch.arange(len(x))) % 50
    x_t, target = schedule.add_noise(x, noise, t), schedule.training_target(x, noise, t)
    for n, step in enumerate(t.tolist()):
        torch.testing.assert_close(target[n], answer(schedule, x[n], noise[n], step), rtol=1e-5, atol=1e-5)
    found = schedule.to_noise(target, x_t, t)
    torch.testing.assert_close(found, noise, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(schedule.predict_x0(x_t, found, t), x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("schedule", [NoiseLevels.ir_sde(), NoiseSchedule.linear()])
def test_the_residual_is_the_noise_as_it_was_added(schedule: NoiseSchedule) -> None:
    x, noise = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    x_t = schedule.add_noise(x, noise, 30)
    residual = x_t - float(schedule.signal[30]) * x
    found = schedule.to_noise(residual, x_t, 30, prediction_type="residual")
    torch.testing.assert_close(found, noise, rtol=1e-5, atol=1e-5)
    assert NoiseSchedule(schedule.alphas_cumprod, prediction_type="residual").prediction_type == "residual"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: f"{type(one).__name__}-{one.prediction_type}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_mixed_in_single(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    x, noise = normal(2, 1, 4, 4, dtype=dtype), normal(2, 1, 4, 4, seed=1, dtype=dtype)
    target = schedule.training_target(x, noise, 20)
    assert target.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        target.double(), answer(schedule, x.double(), noise.double(), 20), rtol=1e-5, atol=1e-6, check_dtype=False
    )
    x_t = schedule.add_noise(x, noise, 20)
    assert x_t.dtype == dtype and schedule.to_noise(target.to(dtype), x_t, 20).dtype == target.dtype


@pytest.mark.parametrize(("t", "s"), [(1, 0), (2, 1), (12, 4), (50, 25), (50, 49), (50, 0)])
def test_the_posterior_is_that_of_two_gaussians(t: int, s: int) -> None:
    """q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0): a random walk, whose precisions add."""
    levels, x_t, x0 = NoiseLevels.ir_sde(), normal(2, 3), normal(2, 3, seed=1)
    of_t, of_s = (value**2 for value in (ir_sde(50, 10 / 255)[t], ir_sde(50, 10 / 255)[s]))
    found, deviation = levels.posterior(x_t, x0, t, s)
    # from x_s to x_t noise of variance of_t - of_s was added
    mean, variance = x0, 0.0
    if s:
        precision = 1 / (of_t - of_s) + 1 / of_s
        mean, variance = (x_t / (of_t - of_s) + x0 / of_s) / precision, 1 / precision
    torch.testing.assert_close(found, mean, rtol=2e-3, atol=2e-3 if t - s == 1 and t == 50 else 1e-5)
    torch.testing.assert_close(
        deviation.double(), torch.full((2, 1), math.sqrt(variance)).double(), rtol=2e-2 if t == 50 else 1e-5, atol=1e-8
    )


def test_a_walk_back_along_the_posterior_has_the_noise_of_every_level() -> None:
    levels = NoiseLevels([0.0, 0.3, 1.0, 2.0])
    x0 = torch.full((100_000, 1), 0.7, dtype=torch.float64)
    x_t = levels.add_noise(x0, normal(len(x0), 1), 3)
    for t, s in ((3, 2), (2, 1)):
        mean, deviation = levels.posterior(x_t, x0, t, s)
        x_t = mean + deviation * normal(len(x0), 1, seed=s)
        sigma = float(levels.sigma[s])
        assert abs(float(x_t.mean()) - 0.7) < 5 * sigma / math.sqrt(len(x0))
        assert abs(float(x_t.std()) / sigma - 1) < 5 / math.sqrt(2 * len(x0))


@pytest.mark.parametrize("steps", [30, [50], [50, 25, 4]])
def test_who_knows_the_answer_gives_it_from_any_level(steps: Any) -> None:
    levels, x = NoiseLevels.ir_sde(), normal(2, 3, 4, 4)

    def perfect(x_t: Tensor, t: Tensor) -> Tensor:
        return levels.to_noise(x, x_t, t, prediction_type="sample")

    torch.testing.assert_close(partial_diffusion(perfect, x, steps, levels), x, rtol=1e-5, atol=1e-5)


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "half": lambda module: nn.Sequential(module).half()[0],
}


@pytest.mark.parametrize("way", DUPLICATES)
def test_a_copy_has_the_levels_in_single_precision(way: str) -> None:
    levels = DUPLICATES[way](NoiseLevels.ir_sde(prediction_type="sample"))
    assert torch.equal(levels.sigma, NoiseLevels.ir_sde().sigma) and levels.sigma.dtype == torch.float32
    assert levels.prediction_type == "sample" and levels.state_dict() == {}


@pytest.mark.parametrize("table", [[0.0, 0.1, 0.1], torch.tensor([0.5, 1.0]), torch.tensor([0, 1, 3])])
def test_any_table_that_does_not_fall_will_do(table: Any) -> None:
    assert torch.equal(NoiseLevels(table).sigma, torch.as_tensor(table).float())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NoiseLevels([0.0, 0.2, 0.1]), "`sigmas` should rise from at least 0, found values from 0 to 0.1"),
        (lambda: NoiseLevels([-0.1, 0.2]), "`sigmas` should rise"),
        (lambda: NoiseLevels([0.0, math.nan]), "`sigmas` should rise"),
        (lambda: NoiseLevels([0.0, math.inf]), "`sigmas` should rise"),
        (lambda: NoiseLevels([0.1]), r"`sigmas` should be a table of shape \(T \+ 1,\), found shape \(1,\)"),
        (lambda: NoiseLevels(torch.zeros(2, 2)), r"found a tensor of shape \(2, 2\)"),
        (lambda: NoiseLevels([0.0, 0.1], prediction_type="v_prediction"), "residual, epsilon or sample, found 'v_pre"),
        (lambda: NoiseLevels.ir_sde(prediction_type="noise"), "`prediction_type` should be"),
        (lambda: NoiseSchedule.linear(prediction_type="noise"), "`prediction_type` should be one of .*'residual'"),
        (lambda: NoiseLevels.ir_sde(0), "`num_timesteps` should be a whole number of at least 1, found 0"),
        (lambda: NoiseLevels.ir_sde(5.0), "`num_timesteps` should be"),
        (lambda: NoiseLevels.ir_sde().add_noise(normal(1, 2), normal(1, 2), 51), r"in \[0, 51\), found 51"),
        (lambda: NoiseLevels.ir_sde().training_target(normal(1, 2), normal(1, 3), 5), "`x` and `noise`"),
        (lambda: NoiseLevels.ir_sde().training_target(normal(1, 2), normal(1, 2), 1.5), "`timestep` should be"),
        (
            lambda: NoiseLevels.ir_sde().to_noise(normal(1, 2), normal(1, 2), 5, prediction_type="x0"),
            "`prediction_type` should be one of .* found 'x0'",
        ),
    ],
)
def test_what_cannot_be_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# flow matching


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"num_train_timesteps": 50, "shift": 0.5}])
def test_the_levels_of_a_flow_are_those_of_the_scheduler(options: dict[str, Any]) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    told, sigmas = scheduler.timesteps.flip(0).clone(), scheduler.sigmas.flip(0).clone()
    scheduler.set_timesteps(7)  # leaves what it was trained with
    levels = FlowLevels.from_diffusers(scheduler)
    assert levels.num_timesteps == len(told) and levels.prediction_type == "flow_prediction"
    torch.testing.assert_close(levels.sigma, sigmas)
    torch.testing.assert_close(levels.signal, 1 - sigmas)
    every = torch.arange(len(told))
    scale = options.get("num_train_timesteps", 1000)
    torch.testing.assert_close(levels.model_time(every) / levels.time_scale * scale, told)
    x, noise = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    t = torch.tensor([0, 20, len(told) - 1])
    torch.testing.assert_close(levels.add_noise(x, noise, t), scheduler_mix(x, noise, sigmas[t]), rtol=1e-6, atol=1e-6)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    torch.testing.assert_close(FlowLevels.from_diffusers(dynamic).sigma, torch.arange(1, 1001) / 1000)


def scheduler_mix(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    level = sigma.double()[:, None, None]
    return (1 - level) * x + level * noise


@pytest.mark.parametrize(("t", "s"), [(5, 2), (99, 98), (60, 0), (1, 0)])
def test_the_posterior_of_a_flow_is_that_of_two_gaussians(t: int, s: int) -> None:
    """x_t = a x_s + noise with a = (1 - t)/(1 - s), so that all of its noise has the variance of level t."""
    levels = FlowLevels.uniform(101)
    of_t, of_s = (t + 1) / 101, (s + 1) / 101
    a = (1 - of_t) / (1 - of_s)
    step = of_t**2 - a**2 * of_s**2
    x_t, x0 = normal(2, 3), normal(2, 3, seed=1)
    precision = a**2 / step + 1 / of_s**2
    mean = (a * x_t / step + (1 - of_s) * x0 / of_s**2) / precision
    found, deviation = levels.posterior(x_t, x0, t, s)
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deviation.double(), torch.full((2, 1), precision**-0.5).double(), rtol=1e-4, atol=1e-6)


def test_a_model_of_a_flow_is_told_its_level_and_read_as_a_velocity() -> None:
    levels, told = FlowLevels.uniform(shift=3.0), []

    def velocity(x_s: Tensor, time: Tensor) -> Tensor:
        told.append(time)
        return 0.5 * x_s

    noisy, t = normal(2, 3, 4, 4, dtype=torch.float32), torch.tensor([0, 700])
    denoiser = as_denoiser(velocity, levels)
    s = torch.tensor([3 / 1002, 3 * 701 / (1000 + 2 * 701)])
    found = denoiser(noisy, t)
    torch.testing.assert_close(told[0], 1000 * s)
    torch.testing.assert_close(found, noisy + (1 - s)[:, None, None, None] * 0.5 * noisy)
    assert torch.equal(denoiser(noisy, t, native=True), 0.5 * noisy)
    assert isinstance(as_denoiser(velocity, diffusers.FlowMatchEulerDiscreteScheduler()).schedule, FlowLevels)


def test_a_model_may_count_its_time_otherwise() -> None:
    levels = FlowLevels([0.25, 0.5], time_scale=1.0)
    assert levels.model_time(torch.tensor([1, 0])).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowLevels([0.0, 0.5]), r"`levels` should rise within \(0, 1\], found values from 0 to 0.5"),
        (lambda: FlowLevels([0.5, 0.4]), "should rise"),
        (lambda: FlowLevels([0.5, 1.1]), "should rise"),
        (lambda: FlowLevels([math.nan]), "should rise"),
        (lambda: FlowLevels([]), r"tensor of shape \(T,\)"),
        (lambda: FlowLevels([0.5], prediction_type="v_prediction"), "`prediction_type`.*found 'v_prediction'"),
        (lambda: FlowLevels.uniform(0), "`num_timesteps`.*found 0"),
        (lambda: FlowLevels.uniform(10, shift=0.0), "`shift` should be a finite number above 0"),
        (lambda: FlowLevels.from_diffusers(diffusers.DDPMScheduler()), "found DDPMScheduler"),
        (
            lambda: FlowLevels.from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)),
            "without `invert_sigmas`",
        ),
        (lambda: NoiseLevels([0.0, 0.5], prediction_type="flow_prediction"), "residual, epsilon or sample"),
    ],
)  # fmt: skip
def test_levels_that_are_none_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_not_mixed_in_has_no_zero_terminal_snr() -> None:
    for levels in (NoiseLevels.ir_sde(), FlowLevels.uniform(10)):
        with pytest.raises(ValueError, match=f"`zero_terminal_snr` is .* found (them|{type(levels).__name__})"):
            levels.zero_terminal_snr()


def test_a_level_without_noise_has_no_posterior() -> None:
    x = torch.rand(1, 3, 4, 4)
    with pytest.raises(
        ValueError, match="`timestep` should be at least 1, the first level of this schedule that holds"
    ):
        NoiseLevels.ir_sde().posterior(x, x, 0, 0)
