"""Tables of noise levels: those that end without signal, those that are none, and what is said of them."""

import math

import pytest
import torch

from restoreloss import NoiseLevels, NoiseSchedule


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 3, 4, 4, generator=generator).unbind()


# no signal at the end


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
def test_zero_terminal_snr_is_that_of_diffusers(make):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    schedule = make(prediction_type="v_prediction")
    abar = schedule.alphas_cumprod.double()
    betas = 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
    rescaled = schedule.zero_terminal_snr()
    torch.testing.assert_close(
        rescaled.alphas_cumprod.double(), torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0), rtol=1e-6, atol=1e-7
    )
    assert rescaled.alphas_cumprod[-1] == 0 and rescaled.alphas_cumprod[0] == schedule.alphas_cumprod[0]
    assert rescaled.prediction_type == "v_prediction"
    assert (schedule.last_timestep, rescaled.last_timestep) == (999, 998)
    torch.testing.assert_close(rescaled.zero_terminal_snr().alphas_cumprod, rescaled.alphas_cumprod)


def test_an_image_that_is_not_there_is_not_looked_for():
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction").zero_terminal_snr()
    x, noise = images()
    x_t = schedule.add_noise(x, noise, 999)
    assert torch.equal(x_t, noise) and torch.equal(schedule.to_noise(-x, x_t, 999), noise)
    for t in (999, torch.tensor([5, 999, 7])[: len(x)]):
        with pytest.raises(
            ValueError, match=r"`timestep` should be at most 998, the last level .* holds signal.*found 999"
        ):
            schedule.predict_x0(x_t, noise, t)
    assert schedule.predict_x0(schedule.add_noise(x, noise, 998), noise, 998).isfinite().all()


def test_noise_that_is_not_there_is_not_looked_for():
    levels, (x, output) = NoiseLevels.ir_sde(), images()
    assert (levels.first_timestep, NoiseSchedule.linear().first_timestep) == (1, 0)
    for prediction_type in ("residual", "sample"):
        for t in (0, torch.tensor([5, 0, 7])[: len(x)]):
            with pytest.raises(ValueError, match="`timestep` should be at least 1, the first level .* noise, found 0"):
                levels.to_noise(output, x, t, prediction_type=prediction_type)
        assert levels.to_noise(output, x, 1, prediction_type=prediction_type).isfinite().all()
    assert torch.equal(levels.to_noise(output, x, 0, prediction_type="epsilon"), output)


# tables that are none


def betas_of(name, count):
    table = getattr(NoiseSchedule, name)(count).alphas_cumprod.double()
    return 1 - torch.cat([table[:1], table[1:] / table[:-1]])


CASES = [(name, count) for name in ("linear", "scaled_linear", "cosine") for count in (50, 100, 250, 1000, 4000)]
DOUBTFUL = [("linear", 50), ("linear", 100), ("cosine", 50)]  # short: they may be a table that ends early


@pytest.mark.parametrize(("name", "count"), CASES)
def test_alphas_that_were_not_multiplied_up_are_told(name, count):
    alphas = (1 - betas_of(name, count)).float()
    if (name, count) in DOUBTFUL:
        with pytest.warns(UserWarning, match="cumulative product of 1 - betas .* Is it 1 - betas itself?"):
            NoiseSchedule(alphas)
    else:
        with pytest.raises(ValueError, match="cumulative product of 1 - betas .* it seems to be 1 - betas itself"):
            NoiseSchedule(alphas)


@pytest.mark.parametrize(("name", "count"), CASES)
def test_those_that_were_are_not(name, count, recwarn):
    abar = torch.cumprod(1 - betas_of(name, count), 0)
    NoiseSchedule(abar), NoiseSchedule(abar.float()), NoiseSchedule(abar.numpy())
    assert not recwarn.list


def test_no_scheduler_of_diffusers_is_taken_for_one_of_those(recwarn):
    import diffusers

    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        for count in (50, 100, 1000):
            scheduler = diffusers.DDPMScheduler(num_train_timesteps=count, beta_schedule=kind)
            NoiseSchedule.from_diffusers(scheduler)
    NoiseSchedule.from_diffusers(diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    NoiseSchedule(torch.full((100,), 0.99))  # one level of noise
    assert not [one for one in recwarn.list if "alphas_cumprod" in str(one.message)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule(None), "`alphas_cumprod` should be a table of numbers, found None"),
        (lambda: NoiseSchedule("linear"), "`alphas_cumprod` should be a table of numbers, found 'linear'"),
        (lambda: NoiseSchedule(["0.9", "0.8"]), "`alphas_cumprod` should be a table of numbers, found list"),
        (lambda: NoiseSchedule(torch.tensor([0.9, math.nan, 0.1])), "`alphas_cumprod` should fall"),
        (lambda: NoiseSchedule(torch.linspace(1e-4, 0.02, 1000)), "is it a table of betas or of sigmas"),
        (lambda: NoiseSchedule.linear(1000.0), "`num_timesteps` should be a whole number of at least 1, found 1000.0"),
        (lambda: NoiseSchedule.linear(True), "`num_timesteps` should be a whole number"),
        (lambda: NoiseSchedule.linear("1000"), "`num_timesteps` should be a whole number"),
        (lambda: NoiseSchedule.linear(beta_end="2e-2"), "`beta_end` should be a finite number.*YAML"),
        (lambda: NoiseSchedule.scaled_linear(beta_start=-1.0), "`beta_start` should be a finite number of at least 0"),
        (lambda: NoiseSchedule.cosine(max_beta=2.0), "`max_beta` should be a finite number .* at most 1, found 2.0"),
        (lambda: NoiseSchedule.cosine(prediction_type=None), "`prediction_type` should be one of"),
        (lambda: NoiseSchedule.from_diffusers(NoiseSchedule.linear), "found the function linear .*call missing"),
        (lambda: NoiseSchedule.linear().add_noise(None, torch.ones(1), 5), "`x` should be a tensor, found None"),
        (lambda: NoiseSchedule.linear().add_noise(torch.ones(1), 0.5, 5), "`noise` should be a tensor, found 0.5"),
        (lambda: NoiseSchedule.linear().to_noise(None, torch.ones(1), 5), "`output` should be a tensor, found None"),
        (
            lambda: NoiseSchedule.linear().to_noise(torch.ones(1), torch.ones(2), 5),
            "`output` and `x_t` .* of one shape",
        ),
        (lambda: NoiseSchedule.linear().check_timestep([1, 2]), "`timestep` should be an integer .* found list"),
        (lambda: NoiseSchedule.linear().check_timestep(True), "`timestep` should be an integer .* found True"),
        (lambda: NoiseSchedule.linear().check_timestep(None), "`timestep` should be an integer .* found None"),
    ],
)
def test_wrong_kinds_are_described(make, message):
    with pytest.raises(ValueError, match=message):
        make()
