"""Samplers and partial diffusion, against the formulas of the papers, Bayes' rule and the schedulers of diffusers."""

import math
from typing import Any

import diffusers
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from restoreloss import NoiseSchedule, as_denoiser, denoise, partial_diffusion, short_steps
from restoreloss.generators import standard_normal
from tests.helpers.networks import tiny_unet

SCHEDULE = NoiseSchedule.scaled_linear()
SCHEDULES = [NoiseSchedule.linear(), SCHEDULE, NoiseSchedule.cosine()]


def perfect(x: Tensor, schedule: NoiseSchedule = SCHEDULE) -> Any:
    """A denoiser that knows the answer."""
    return lambda x_t, t: schedule.to_noise(x, x_t, t, prediction_type="sample")


def normal(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


@given(st.integers(1, 1000).flatmap(lambda t_p: st.tuples(st.just(t_p), st.integers(1, t_p))))
def test_short_steps(both: tuple[int, int]) -> None:
    t_p, n = both
    assert short_steps(t_p, n) == [math.floor(t_p * (n - j) / n + 1e-9) for j in range(n)]
    assert len(set(short_steps(t_p, n))) == n and short_steps(t_p, n)[-1] >= 1


def test_the_steps_of_the_paper() -> None:
    assert short_steps() == [200]
    assert short_steps(200, 4) == [200, 150, 100, 50]
    assert short_steps(200, 3) == [200, 133, 66]


@pytest.mark.parametrize(("t_p", "n"), [(200, 0), (200, -1), (200, 201), (0, 1), (200.0, 1), (200, True), ("200", 1)])
def test_steps_that_cannot_be(t_p: Any, n: Any) -> None:
    with pytest.raises(ValueError, match="`(n|t_p)` should be"):
        short_steps(t_p, n)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(1, 0), (5, 4), (200, 150), (200, 50), (999, 998), (999, 1), (500, 499)])
def test_the_posterior_is_that_of_two_gaussians(schedule: NoiseSchedule, t: int, s: int) -> None:
    """q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0), both Gaussian in x_s: precisions add."""
    abar_t, abar_s = (float(schedule.alphas_cumprod.double()[k]) for k in (t, s))
    alpha = abar_t / abar_s
    x_t, x0 = normal(2, 3, dtype=torch.float64), normal(2, 3, seed=1, dtype=torch.float64)
    precision = alpha / (1 - alpha) + 1 / (1 - abar_s)
    mean = (math.sqrt(alpha) * x_t / (1 - alpha) + math.sqrt(abar_s) * x0 / (1 - abar_s)) / precision
    found, deviation = schedule.posterior(x_t, x0, t, s)
    # the table is float32, and the difference of two neighbours in it loses digits in this test
    torch.testing.assert_close(found, mean, rtol=5e-3, atol=5e-4)
    torch.testing.assert_close(deviation.double(), torch.full((2, 1), precision**-0.5).double(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.scaled_linear])
def test_the_posterior_keeps_its_digits_at_both_ends(make: Any) -> None:
    ends = {NoiseSchedule.linear: (1e-4, 0.02, 1), NoiseSchedule.scaled_linear: (0.00085**0.5, 0.012**0.5, 2)}
    first, last, power = next(value for key, value in ends.items() if key.__name__ == make.__name__)
    abar = torch.cumprod(1 - torch.linspace(first, last, 1000, dtype=torch.float64) ** power, 0)
    x_t, x0 = normal(1, 3, dtype=torch.float64), normal(1, 3, seed=1, dtype=torch.float64)
    for t, s in ((1, 0), (2, 1), (10, 9), (998, 997), (999, 998)):
        beta = 1 - abar[t] / abar[s]
        mean = (abar[s].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - abar[s]) * x_t) / (1 - abar[t])
        found, deviation = make().posterior(x_t, x0, t, s)
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
        wanted = (beta * (1 - abar[s]) / (1 - abar[t])).sqrt().reshape(1, 1)
        torch.testing.assert_close(deviation.double(), wanted, rtol=1e-5, atol=0)


def test_strides_lead_to_the_same_marginals() -> None:
    """If x_t is q(x_t | x_0), a draw of the posterior is q(x_s | x_0)."""
    x0 = torch.full((200_000, 1), 0.7, dtype=torch.float64)
    x_t = SCHEDULE.add_noise(x0, normal(len(x0), 1, dtype=torch.float64), 200)
    for t, s in ((200, 120), (120, 40)):
        mean, deviation = SCHEDULE.posterior(x_t, x0, t, s)
        x_t = mean + deviation * normal(len(x0), 1, seed=s, dtype=torch.float64)
        abar = float(SCHEDULE.alphas_cumprod[s])
        assert abs(float(x_t.mean()) - math.sqrt(abar) * 0.7) < 0.005
        assert abs(float(x_t.std()) - math.sqrt(1 - abar)) < 0.005


def test_the_posterior_of_no_stride_is_the_point_itself() -> None:
    x_t, x0 = normal(2, 3), normal(2, 3, seed=1)
    mean, deviation = SCHEDULE.posterior(x_t, x0, 50, 50)
    torch.testing.assert_close(mean, x_t)
    assert deviation.abs().max() == 0


def test_a_tensor_of_timesteps_that_rise_is_refused() -> None:
    schedule, x = NoiseSchedule.linear(), torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="`previous` should be at most `t`"):
        schedule.posterior(x, x, torch.tensor([5, 9]), torch.tensor([4, 10]))
    with pytest.raises(ValueError, match="integers where there are several"):
        denoise(lambda x_t, t: x_t, x, [torch.tensor([5, 9]), torch.tensor([2, 3])], schedule)


def test_the_posterior_refuses_what_does_not_fit() -> None:
    x = normal(2, 3)
    with pytest.raises(ValueError, match="`previous` should be at most `t`"):
        SCHEDULE.posterior(x, x, 50, 51)
    with pytest.raises(ValueError, match="`x_t` and `x0`"):
        SCHEDULE.posterior(x, x[:1], 50, 20)
    with pytest.raises(ValueError, match="1000"):
        SCHEDULE.posterior(x, x, 1000, 20)
    mean, _ = SCHEDULE.posterior(x.bfloat16(), x.bfloat16(), torch.tensor([50, 60]), torch.tensor([20, 10]))
    assert mean.dtype == torch.bfloat16


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_is_equation_5(schedule: NoiseSchedule) -> None:
    x, noise, t = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1), torch.tensor([200, 33])
    abar = schedule.alphas_cumprod.double()[t].reshape(2, 1, 1, 1)
    x_t = abar.sqrt() * x + (1 - abar).sqrt() * noise
    expected = (x_t - (1 - abar).sqrt() * x_t.tanh()) / abar.sqrt()
    found = partial_diffusion(lambda z, _: z.tanh(), x, t, schedule, noise=noise)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_several_steps_are_lines_13_to_20() -> None:
    steps = short_steps(200, 4)
    x, start = normal(2, 3, 4, 4, dtype=torch.float64), normal(2, 3, 4, 4, seed=1, dtype=torch.float64)
    drawn = torch.Generator().manual_seed(2)
    found = partial_diffusion(
        lambda z, t: 0.3 * z + t.view(-1, 1, 1, 1) / 1e3, x, steps, SCHEDULE, noise=start, generator=drawn
    )
    again = torch.Generator().manual_seed(2)
    abar = SCHEDULE.alphas_cumprod.double()
    z = abar[200].sqrt() * x + (1 - abar[200]).sqrt() * start
    for t, s in zip(steps, [*steps[1:], 0], strict=True):
        x0 = (z - (1 - abar[t]).sqrt() * (0.3 * z + t / 1e3)) / abar[t].sqrt()
        if s:
            beta = 1 - abar[t] / abar[s]
            mean = (abar[s].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - abar[s]) * z) / (1 - abar[t])
            noise = torch.randn(x.shape, generator=again, dtype=torch.float64)
            z = mean + (beta * (1 - abar[s]) / (1 - abar[t])).sqrt() * noise
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4, 20])
def test_who_knows_the_answer_gives_it(n: int) -> None:
    x = normal(2, 4, 3, 3)
    torch.testing.assert_close(partial_diffusion(perfect(x), x, short_steps(200, n), SCHEDULE), x, atol=1e-5, rtol=1e-5)


def test_a_denoiser_brings_its_schedule() -> None:
    class Carries:
        schedule = SCHEDULE

        def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x_t)

    x = normal(1, 1, 2, 2)
    found = denoise(Carries(), x, 10)
    torch.testing.assert_close(found, x / SCHEDULE.alphas_cumprod[10].sqrt())
    with pytest.raises(ValueError, match="`schedule` should be the NoiseSchedule"):
        denoise(lambda x_t, t: x_t, x, 10)


def test_gradients_reach_the_images_and_the_denoiser() -> None:
    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    x = normal(2, 1, 2, 2, dtype=torch.float64).requires_grad_()
    noise = normal(2, 1, 2, 2, seed=1, dtype=torch.float64)

    def through(x: Tensor, weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return partial_diffusion(
            lambda z, _: weight * z, x, short_steps(200, 3), SCHEDULE, noise=noise, generator=generator
        )

    assert torch.autograd.gradcheck(through, (x, weight))
    with torch.no_grad():
        assert not through(x, weight).requires_grad


def test_every_sample_may_have_its_own_generator() -> None:
    def restored(x: Tensor, generators: Any) -> Tensor:
        return partial_diffusion(lambda z, _: z.tanh(), x, short_steps(200, 3), SCHEDULE, generator=generators)

    x = normal(3, 2, 4, 4)
    together = restored(x, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    for number, seed in enumerate((5, 6, 7)):
        alone = restored(x[number : number + 1], torch.Generator().manual_seed(seed))
        torch.testing.assert_close(together[number : number + 1], alone)
    one = [restored(x, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*one)
    with pytest.raises(ValueError, match="one for each of 3"):
        standard_normal(x, [torch.Generator()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = normal(2, 1, 4, 4).to(dtype)
    found = partial_diffusion(perfect(x), x, short_steps(200, 4), SCHEDULE)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), x.double(), atol=1e-5 if dtype == torch.float64 else 0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "at least one timestep"),
        ([50, 100], "should fall"),
        ([100, 100], "should fall"),
        ([1000], "1000"),
        (-1, "-1"),
        (2.5, "integer"),
        (torch.tensor([1, 2, 3]), "shape"),
    ],
)
def test_steps_that_do_not_fit(steps: Any, message: str) -> None:
    x = normal(2, 1, 2, 2)
    with pytest.raises((ValueError, TypeError), match=message):
        partial_diffusion(perfect(x), x, steps, SCHEDULE)


def test_noise_of_another_shape_is_refused() -> None:
    x = normal(2, 1, 2, 2)
    with pytest.raises(ValueError, match="`x` and `noise`"):
        partial_diffusion(perfect(x), x, 100, SCHEDULE, noise=x[:1])


class Diffusers:
    """The DDPM sampler of diffusers on timesteps of one's own."""

    def __init__(self, steps: list[int]) -> None:
        options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        self.scheduler = diffusers.DDPMScheduler(1000, **options, clip_sample=False)
        self.scheduler.set_timesteps(timesteps=steps)

    def sample(self, denoiser: Any, z: Tensor, generator: torch.Generator) -> Tensor:
        for t in self.scheduler.timesteps:
            last = self.scheduler.step(denoiser(z, t.expand(len(z))), t, z, generator=generator)
            z = last.prev_sample
        return last.pred_original_sample


@pytest.mark.parametrize("steps", [[200], [200, 150, 100, 50], short_steps(999, 50), [3, 2, 1]], ids=len)
def test_the_steps_are_those_of_diffusers(steps: list[int]) -> None:
    x_t, (mine, theirs) = normal(2, 3, 4, 4, dtype=torch.float64), (torch.Generator().manual_seed(3) for _ in "ab")

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        return 0.9 * z.tanh() + t.view(-1, 1, 1, 1) / 1e4

    found = denoise(denoiser, x_t, steps, SCHEDULE, generator=mine)
    expected = Diffusers(steps).sample(denoiser, x_t, theirs)
    # the tables of diffusers are float32, with the differences taken in them
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("steps", [[200], [200, 150, 100, 50], [999, 749, 499, 249]])
def test_deterministic_steps_are_those_of_ddim_in_diffusers(steps: list[int]) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=steps[-1],
    )  # fmt: skip
    unet = tiny_unet()
    x_t = normal(2, 3, 8, 8)
    found = denoise(lambda x, t: unet(x, t).sample, x_t, steps, SCHEDULE, sampler="deterministic")
    stride = steps[0] - steps[1] if len(steps) > 1 else 1
    scheduler.num_inference_steps = 1000 // stride
    for t in steps:
        output = scheduler.step(unet(x_t, torch.tensor([t, t])).sample, t, x_t)
        x_t = output.prev_sample
    torch.testing.assert_close(found, output.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_all_noise_may_be_given() -> None:
    x, steps, denoiser = normal(2, 3, 4, 4), short_steps(200, 3), lambda x_t, t: 0.1 * x_t
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randn(x.shape, generator=generator) for _ in steps]
    drawn = partial_diffusion(denoiser, x, steps, SCHEDULE, generator=torch.Generator().manual_seed(7))
    assert torch.equal(partial_diffusion(denoiser, x, steps, SCHEDULE, noise=noise), drawn)
    for wrong in (noise[:2], [*noise, x]):
        with pytest.raises(ValueError, match="`noise` should be one for between each two of 3 steps"):
            partial_diffusion(denoiser, x, steps, SCHEDULE, noise=wrong)


def test_deterministic_steps_draw_nothing() -> None:
    x, noise = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    denoiser = perfect(0.5 * x)
    first, second = (
        partial_diffusion(
            denoiser, x, short_steps(200, 4), SCHEDULE, sampler="deterministic", noise=noise, generator=generator
        )
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(generator.get_state(), state)
    torch.testing.assert_close(first, 0.5 * x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 4, 50])
def test_gaussian_images_are_restored_with_the_statistics_of_ddpm(n: int) -> None:
    """Of pictures N(mean, spread^2) the best denoiser is linear, and so every step of the chain stays Gaussian."""
    mean, spread, steps = 0.5, 0.8, short_steps(600, n)
    abar = SCHEDULE.alphas_cumprod.double()

    def best(x_t: Tensor, t: Tensor) -> Tensor:
        a = abar[t].view(-1, 1)
        return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * spread**2 + 1 - a)

    # the first restoration is a picture of one grey: what its statistics become, step by step
    center, variance = float(abar[steps[0]].sqrt()) * 0.2, 1 - float(abar[steps[0]])
    for t, s in zip(steps, [*steps[1:], None], strict=True):
        a = float(abar[t])
        gain = math.sqrt(a) * spread**2 / (a * spread**2 + 1 - a)  # E[x | x_t] = mean + gain (x_t - sqrt(a) mean)
        center_0 = mean + gain * (center - math.sqrt(a) * mean)
        if s is None:
            break
        b = float(abar[s])
        beta = 1 - a / b
        of_0, of_t = math.sqrt(b) * beta / (1 - a), math.sqrt(a / b) * (1 - b) / (1 - a)
        slope = of_0 * gain + of_t
        center = of_0 * center_0 + of_t * center
        variance = slope**2 * variance + beta * (1 - b) / (1 - a)
    count = 100_000
    x = torch.full((count, 1), 0.2, dtype=torch.float64)
    found = partial_diffusion(best, x, steps, SCHEDULE, generator=torch.Generator().manual_seed(0))
    deviation = gain * math.sqrt(variance)
    assert abs(float(found.mean()) - center_0) < 5 * deviation / math.sqrt(count)
    assert abs(float(found.std()) / deviation - 1) < 5 / math.sqrt(2 * count)


def test_every_sample_may_have_its_own_timestep() -> None:
    x, noise, t = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([0, 77, 999])
    seen: list[Tensor] = []

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x_t.tanh()

    together = partial_diffusion(denoiser, x, t, SCHEDULE, noise=noise)
    assert torch.equal(seen[0], t)
    for n in range(3):
        alone = partial_diffusion(denoiser, x[n : n + 1], int(t[n]), SCHEDULE, noise=noise[n : n + 1])
        torch.testing.assert_close(together[n : n + 1], alone)


def test_the_denoiser_is_asked_for_every_sample_at_every_step() -> None:
    asked: list[tuple[Any, ...]] = []

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append((x_t.shape, t.tolist(), t.dtype))
        return x_t

    partial_diffusion(denoiser, normal(2, 1, 3, 3), range(9, 0, -4), SCHEDULE)
    assert asked == [((2, 1, 3, 3), [t, t], torch.int64) for t in (9, 5, 1)]


def test_a_network_is_trained_through_one_step_and_left_alone_without_gradient() -> None:
    denoiser, x = as_denoiser(tiny_unet(), SCHEDULE), normal(2, 3, 8, 8).requires_grad_()
    with torch.no_grad():
        assert not partial_diffusion(denoiser, x, short_steps(200, 2)).requires_grad
    weights = nn.Conv2d(3, 3, 1)
    partial_diffusion(lambda x_t, t: denoiser(weights(x_t), t), x, 200, SCHEDULE).square().mean().backward()
    for reached in (x, weights.weight):
        assert reached.grad is not None and reached.grad.isfinite().all() and reached.grad.any()


def test_a_generator_draws_where_it_lives_and_nowhere_else() -> None:
    x, before = normal(2, 3, 4, 4), torch.get_rng_state()
    denoiser = lambda z, _: z.tanh()  # noqa: E731
    results = [
        partial_diffusion(denoiser, x, short_steps(200, 3), SCHEDULE, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), before)
    here, there = (torch.Generator().manual_seed(0) for _ in "ab")
    partial_diffusion(denoiser, x, short_steps(200, 3), SCHEDULE, generator=here)
    elsewhere = partial_diffusion(denoiser, x.to("meta"), short_steps(200, 3), SCHEDULE, generator=there)
    assert elsewhere.is_meta and elsewhere.shape == x.shape
    assert torch.equal(here.get_state(), there.get_state())  # the same noise, drawn on the CPU for images elsewhere
    torch.manual_seed(5)
    partial_diffusion(denoiser, x, [200, 100], SCHEDULE)
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    torch.randn(2, *x.shape)
    assert torch.equal(torch.get_rng_state(), drawn)  # twice the pictures: before the first step and after it


def test_what_is_given_is_left_as_it_is() -> None:
    x, noise, steps = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), [200, 100]
    kept = x.clone(), noise.clone()
    partial_diffusion(lambda z, _: z.tanh(), x, steps, SCHEDULE, noise=noise)
    denoise(lambda z, _: z.tanh(), x, steps, SCHEDULE)
    assert torch.equal(x, kept[0]) and torch.equal(noise, kept[1]) and steps == [200, 100]


def test_images_that_are_not_floating_point_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`x` should be a floating point tensor \(N, ...\), found a tensor of .* torch.int64"
    ):
        partial_diffusion(lambda z, _: z, torch.ones(1, 3, 4, 4).long(), 5, SCHEDULE)
    with pytest.raises(ValueError, match="floating point"):
        denoise(lambda z, _: z, torch.ones(1, 3, 4, 4).long(), 5, SCHEDULE)


@pytest.mark.parametrize("t_p", [1000, 5000])
def test_steps_beyond_the_schedule_are_refused(t_p: int) -> None:
    x = normal(1, 1, 2, 2)
    with pytest.raises(ValueError, match=rf"`steps` should be in \[0, 1000\), found {t_p}"):
        partial_diffusion(perfect(x), x, short_steps(t_p, 4), SCHEDULE)


@pytest.mark.parametrize("last", [-1, 5.5, None])
def test_steps_are_checked_before_the_first(last: Any) -> None:
    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("should not be asked")

    with pytest.raises(ValueError, match="`steps` should be"):
        denoise(denoiser, normal(1, 1, 2, 2), [100, 50, last], SCHEDULE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": None}, r"`denoiser` should be a network or a callable f\(x_t, t\), found None"),
        ({"denoiser": lambda x: x}, r"`denoiser` should be called as f\(x_t, t\) .* which takes \(x\)"),
        ({"denoiser": NoiseSchedule}, "`denoiser` should be .* found the class NoiseSchedule"),
        ({"x": None}, "`x_?t?` should be a floating point tensor .* found None"),
        ({"x": numpy.zeros((1, 3, 4, 4))}, "`x_?t?` should be a floating point tensor .* found a numpy array"),
        ({"steps": None}, "`steps` should be an integer or an integer tensor, found None"),
        ({"steps": "200"}, "`steps` should be"),
        ({"steps": 200.0}, "`steps` should be an integer or an integer tensor, found 200.0"),
        ({"steps": numpy.array([200, 100])}, "`steps` should be .* found a numpy array"),
        ({"steps": [1000]}, r"`steps` should be in \[0, 1000\), found 1000"),
        ({"schedule": "linear"}, "`schedule` should be the NoiseSchedule .* found 'linear'"),
        ({"schedule": None}, r"`schedule` should be the NoiseSchedule .* \(it carries none\), found None"),
        ({"generator": 0}, "`generator` should be a torch.Generator, or one for each sample, found 0"),
        ({"sampler": "ddim"}, r"`sampler` should be one of \('posterior', 'deterministic'\), found 'ddim'"),
        ({"generator": "cpu"}, "`generator` should be a torch.Generator, or one for each sample, found 'cpu'"),
    ],
)
def test_arguments_of_another_kind_are_named(changes: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {
        "denoiser": lambda x, t: x,
        "x": torch.zeros(1, 3, 4, 4),
        "steps": 200,
        "schedule": NoiseSchedule.linear(),
    }
    denoiser, x, steps, schedule = (changes.get(name, value) for name, value in usual.items())
    for call in (partial_diffusion, denoise):
        with pytest.raises(ValueError, match=message):
            call(
                denoiser, x, steps, schedule, generator=changes.get("generator"),
                sampler=changes.get("sampler", "posterior"),
            )  # fmt: skip


@pytest.mark.parametrize("wrong", [None, 2.0, "4", True, 0, torch.tensor(2.5), [4]])
def test_short_steps_are_counted_by_whole_numbers(wrong: Any) -> None:
    for name in ("t_p", "n"):
        with pytest.raises(ValueError, match=f"`{name}` should be a whole number of at least 1, found"):
            short_steps(**{name: wrong})
    assert short_steps(numpy.int64(200), numpy.int64(2)) == [200, 100]
