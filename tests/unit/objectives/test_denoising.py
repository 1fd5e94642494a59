"""The denoising loss asks the network for the right answer, and trains nothing but the network."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from restoreloss import DenoisingLoss, FlowLevels, NoiseLevels, NoiseSchedule, as_denoiser
from tests.helpers.networks import tiny_unet

LEVELS = NoiseLevels.ir_sde()
SCHEDULES = [
    *(NoiseLevels.ir_sde(prediction_type=kind) for kind in ("residual", "epsilon", "sample")),
    *(NoiseSchedule.linear(100, prediction_type=kind) for kind in ("residual", "epsilon", "sample", "v_prediction")),
]
DISTANCES = ("l1", "mse", "rms", "l2")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Network(nn.Module):
    """Answers differently at every level."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3, dtype=dtype))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x_t.detach(), t))
        return self.weight * x_t.tanh() + (t.view(-1, 1, 1, 1) / 100).to(x_t.dtype)


def one_by_one(
    schedule: NoiseSchedule, distance: str, clean: Tensor, noise: Tensor, timesteps: Tensor, weight: float = 0.3
) -> list[float]:
    """The loss of each image, written out; ``clean`` is in the range of the model."""
    losses = []
    for x, e, t in zip(clean.double(), noise.double(), timesteps.tolist(), strict=True):
        abar = float(schedule.alphas_cumprod[t].double())
        signal, sigma = math.sqrt(abar), math.sqrt(1 - abar)
        if isinstance(schedule, NoiseLevels):
            signal, sigma = 1.0, float(schedule.sigma[t].double())
        targets = {"residual": sigma * e, "epsilon": e, "sample": x, "v_prediction": signal * e - sigma * x}
        d = weight * (signal * x + sigma * e).tanh() + t / 100 - targets[schedule.prediction_type]
        squares = float((d * d).sum())
        values = {
            "l1": float(d.abs().sum()) / d.numel(),
            "mse": squares / d.numel(),
            "rms": math.sqrt(squares / d.numel()),
            "l2": math.sqrt(squares),
        }
        losses.append(values[distance])
    return losses


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEDULES),
    st.sampled_from(DISTANCES),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    st.integers(1, 50),
)
def test_the_loss_is_the_distance_to_what_should_be_answered(
    schedule: NoiseSchedule, distance: Any, shape: tuple[int, ...], first: int
) -> None:
    clean, noise = images(*shape), normal(*shape, seed=1)
    t = 1 + (first + 13 * torch.arange(len(clean))) % 50
    loss = DenoisingLoss(Network(), schedule, distance=distance, reduction="none")
    low, high = schedule.model_range
    expected = one_by_one(schedule, distance, clean * (high - low) + low, noise, t)
    found = loss(clean, timestep=t, noise=noise)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: f"{type(one).__name__}-{one.prediction_type}")
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_gradient_is_that_of_the_loss_and_reaches_the_network(schedule: NoiseSchedule, distance: Any) -> None:
    network, clean, noise, t = Network(), images(3, 2, 4, 5), normal(3, 2, 4, 5, seed=1), torch.tensor([3, 20, 49])
    loss = DenoisingLoss(network, schedule, distance=distance)
    loss(clean, timestep=t, noise=noise).backward()
    low, high = schedule.model_range
    up, down = (
        sum(one_by_one(schedule, distance, clean * (high - low) + low, noise, t, 0.3 + step)) / 3
        for step in (1e-5, -1e-5)
    )
    assert network.weight.grad is not None
    assert float(network.weight.grad) == pytest.approx((up - down) / 2e-5, rel=1e-3)


def test_a_network_that_answers_right_has_no_loss() -> None:
    clean = images(2, 3, 4, 4)
    for schedule in SCHEDULES:
        x = clean * (schedule.model_range[1] - schedule.model_range[0]) + schedule.model_range[0]

        def perfect(x_t: Tensor, t: Tensor, schedule: NoiseSchedule = schedule, x: Tensor = x) -> Tensor:
            return schedule.training_target(x, schedule.to_noise(x, x_t, t, prediction_type="sample"), t)

        assert float(DenoisingLoss(perfect, schedule)(clean)) < 1e-6


def test_the_defaults_are_those_of_the_papers() -> None:
    assert (DenoisingLoss(Network(), LEVELS).distance, DenoisingLoss(Network(), LEVELS).timesteps) == ("l1", (1, 51))
    ddpm = DenoisingLoss(Network(), NoiseSchedule.linear())
    assert (ddpm.distance, ddpm.timesteps) == ("mse", (0, 1000))
    assert DenoisingLoss(Network(), NoiseLevels.ir_sde(prediction_type="sample")).distance == "l1"


def test_a_network_that_returns_the_image_learns_as_one_that_returns_the_residual() -> None:
    network, clean = nn.Conv2d(3, 3, 3, padding=1), torch.rand(2, 3, 8, 8)
    noise, t = torch.randn_like(clean), torch.tensor([3, 40])
    image = DenoisingLoss(lambda x, t: network(x), NoiseLevels.ir_sde(prediction_type="sample"))
    residual = DenoisingLoss(lambda x, t: x - network(x), LEVELS)
    one, other = (loss(clean, timestep=t, noise=noise) for loss in (image, residual))
    torch.testing.assert_close(one, other)


def test_training_takes_the_noise_out() -> None:
    """Of images of one grey the noise is known: the best weight of a linear answer is 1."""
    weight = nn.Parameter(torch.tensor(0.0))
    loss = DenoisingLoss(lambda x_t, t: weight * (x_t - 0.5), LEVELS, distance="mse")
    optimizer, generator = torch.optim.SGD([weight], lr=200.0), torch.Generator().manual_seed(0)
    for _ in range(20):
        optimizer.zero_grad()
        loss(torch.full((8, 1, 8, 8), 0.5), generator=generator).backward()
        optimizer.step()
    assert weight.item() == pytest.approx(1.0, abs=0.01)


def test_the_network_is_neither_registered_nor_frozen_nor_switched() -> None:
    network = tiny_unet().train()
    network.conv_in.requires_grad_(False)
    flags = [p.requires_grad for p in network.parameters()]
    loss = DenoisingLoss(network, LEVELS, weights=torch.ones(51))
    assert list(loss.parameters()) == [] and loss.state_dict() == {}
    assert network not in list(loss.modules())
    loss.eval()
    loss.requires_grad_(False)
    loss(images(2, 3, 8, 8, dtype=torch.float32)).backward()
    assert all(module.training for module in network.modules())
    assert [p.requires_grad for p in network.parameters()] == flags
    assert network.conv_in.weight.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_are_those_of_the_timesteps(reduction: Any) -> None:
    clean, noise, t = images(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1), torch.tensor([50, 1, 7])
    gamma = torch.linspace(0, 2, 51)
    loss = DenoisingLoss(Network(), LEVELS, weights=gamma.tolist(), reduction=reduction)
    each = torch.tensor(one_by_one(LEVELS, "l1", clean, noise, t), dtype=torch.float64) * gamma[t]
    expected = {"mean": each.sum() / 3, "sum": each.sum(), "none": each}[reduction]
    found = loss(clean, timestep=t, noise=noise)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert list(loss.terms(clean)) == ["denoising"]
    torch.testing.assert_close(loss.terms(clean, timestep=t, noise=noise)["denoising"], found)


@pytest.mark.parametrize(
    ("schedule", "timesteps", "wanted"),
    [
        (NoiseLevels.ir_sde(5), None, {1, 2, 3, 4, 5}),
        (NoiseSchedule.linear(4), None, {0, 1, 2, 3}),
        (NoiseLevels([0.1, 0.2, 0.3]), None, {0, 1, 2}),
        (LEVELS, (7, 9), {7, 8}),
        (LEVELS, (50, 51), {50}),
        (LEVELS, (0, 2), {0, 1}),
    ],
)
def test_timesteps_are_drawn_evenly_from_the_range(schedule: NoiseSchedule, timesteps: Any, wanted: set[int]) -> None:
    network = Network(torch.float32)
    loss = DenoisingLoss(network, schedule, timesteps=timesteps)
    loss(torch.rand(1000, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    drawn = network.seen[0][1]
    assert drawn.shape == (1000,) and drawn.dtype == torch.int64 and set(drawn.tolist()) == wanted
    counts = drawn.bincount()[min(wanted) :].double() * len(wanted) / 1000
    assert (counts - 1).abs().max() < 5 * math.sqrt(len(wanted) / 1000)


def test_a_generator_draws_the_timesteps_and_then_the_noise() -> None:
    network, clean, before = Network(), images(4, 2, 3, 3), torch.get_rng_state()
    found = DenoisingLoss(network, LEVELS)(clean, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    again = torch.Generator().manual_seed(5)
    order = torch.randperm(4, generator=again)  # one timestep from each quarter of 1..50
    t = (1 + (order + torch.rand(4, generator=again)) * 50 / 4).long()
    noise = torch.randn(clean.shape, generator=again, dtype=torch.float64)
    torch.testing.assert_close(network.seen[0][0], clean + LEVELS.sigma[t].view(-1, 1, 1, 1) * noise)
    assert torch.equal(network.seen[0][1], t)
    assert torch.equal(DenoisingLoss(network, LEVELS)(clean, timestep=t, noise=noise), found)
    assert DenoisingLoss(network, LEVELS)(clean) != DenoisingLoss(network, LEVELS)(clean)


@pytest.mark.parametrize("timestep", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])])
def test_one_timestep_serves_all_images(timestep: Any) -> None:
    network = Network()
    DenoisingLoss(network, LEVELS)(images(2, 1, 3, 3), timestep=timestep)
    assert network.seen[0][1].tolist() == [7, 7]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: f"{type(one).__name__}-{one.prediction_type}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_half_precision_is_compared_in_single(schedule: NoiseSchedule, dtype: torch.dtype, distance: Any) -> None:
    network = Network(dtype)
    clean, noise, t = images(2, 3, 16, 16, dtype=dtype), normal(2, 3, 16, 16, dtype=dtype), torch.tensor([2, 40])
    loss = DenoisingLoss(network, schedule, distance=distance, reduction="none")
    found = loss(clean, timestep=t, noise=noise)
    assert found.dtype == torch.float32 and (network.seen[0][0].dtype == dtype or schedule.model_range[0] == -1)
    low, high = schedule.model_range
    expected = one_by_one(schedule, distance, clean.double() * (high - low) + low, noise, t)
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0.03, atol=0.01)
    found.sum().backward()
    assert network.weight.grad is not None and network.weight.grad.isfinite()


def test_autocast_gives_a_loss_in_single_precision() -> None:
    network = tiny_unet()
    with torch.autocast("cpu", torch.bfloat16):
        loss = DenoisingLoss(network, LEVELS)(images(2, 3, 8, 8, dtype=torch.float32))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda answer: (answer,),
        lambda answer: (answer, "h"),
        lambda answer: SimpleNamespace(sample=answer),
        lambda answer: torch.cat([answer, 100 + answer], dim=1),  # a learned variance
        lambda answer: (torch.cat([answer, 100 + answer], dim=1), answer),
    ],
)
def test_the_answer_may_be_wrapped(wrap: Any) -> None:
    network, clean, noise = Network(), images(2, 3, 4, 4), normal(2, 3, 4, 4)
    expected = DenoisingLoss(network, LEVELS)(clean, timestep=9, noise=noise)
    found = DenoisingLoss(lambda x_t, t: wrap(network(x_t, t)), LEVELS)(clean, timestep=9, noise=noise)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("schedule", [LEVELS, NoiseSchedule.linear(100)])
@pytest.mark.parametrize("span", [(0, 255), (-1.0, 1.0), (0.0, 1.0)])
def test_images_of_any_range_reach_the_network_in_its_own(schedule: NoiseSchedule, span: tuple[float, float]) -> None:
    network, unit, noise = Network(), images(2, 3, 4, 4), normal(2, 3, 4, 4)
    clean = unit * (span[1] - span[0]) + span[0]
    DenoisingLoss(network, schedule, input_range=span)(clean, timestep=30, noise=noise)
    low, high = schedule.model_range
    signal, sigma = float(schedule.signal[30]), float(schedule.sigma[30])
    torch.testing.assert_close(network.seen[0][0], signal * (unit * (high - low) + low) + sigma * noise)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DenoisingLoss("net", LEVELS), r"`denoiser` should be callable as denoiser\(x_t, t\), found 'net'"),
        (lambda: DenoisingLoss(Network(), 50), "`schedule` should be NoiseLevels or a NoiseSchedule, found 50"),
        (lambda: DenoisingLoss(Network(), LEVELS, distance="l3"), "`distance` should be one of .* found 'l3'"),
        (lambda: DenoisingLoss(Network(), LEVELS, reduction="max"), "`reduction` should be one of"),
        (lambda: DenoisingLoss(Network(), LEVELS, timesteps=(5, 5)), r"0 <= low < high <= 51, found \(5, 5\)"),
        (lambda: DenoisingLoss(Network(), LEVELS, timesteps=(1, 52)), "`timesteps` should satisfy"),
        (lambda: DenoisingLoss(Network(), LEVELS, timesteps=(-1, 5)), "`timesteps` should be a whole number of at"),
        (lambda: DenoisingLoss(Network(), LEVELS, weights=[1.0]), r"one for each of 51 timesteps, found \(1,\)"),
        (lambda: DenoisingLoss(Network(), LEVELS, input_range=(1, 0)), "`input_range` should rise"),
        (lambda: DenoisingLoss(Network(), LEVELS)(images(3, 4, 4)), r"`clean` should have shape \(N, C, H, W\)"),
        (lambda: DenoisingLoss(Network(), LEVELS)(torch.ones(1, 3, 4, 4).byte()), "`clean` should be floating point"),
        (lambda: DenoisingLoss(Network(), LEVELS)(torch.ones(0, 3, 4, 4)), "`clean` should hold at least one image"),
        (lambda: DenoisingLoss(Network(), LEVELS)(images(2, 3, 4, 4), timestep=51), r"in \[0, 51\), found 51"),
        (lambda: DenoisingLoss(Network(), LEVELS)(images(2, 3, 4, 4), timestep=torch.ones(3).long()), "or 2 of them"),
        (
            lambda: DenoisingLoss(Network(), LEVELS)(images(2, 3, 4, 4), noise=normal(1, 3, 4, 4)),
            "`noise` should be float",
        ),
        (
            lambda: DenoisingLoss(lambda x_t, t: x_t[:, :2], LEVELS)(images(2, 3, 4, 4)),
            r"`denoiser` should return images like \(2, 3, 4, 4\), found \(2, 2, 4, 4\)",
        ),
        (lambda: DenoisingLoss(lambda x_t, t: x_t.mean(), LEVELS)(images(2, 3, 4, 4)), r"found \(\)"),
        (lambda: DenoisingLoss(lambda x_t, t: x_t[..., :2], LEVELS)(images(2, 3, 4, 4)), r"denoiser\(x_t, t\)"),
        (lambda: DenoisingLoss(lambda x_t, t: None, LEVELS)(images(2, 3, 4, 4)), "should return a tensor.*NoneType"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("timesteps", [(1, 2, 3), (1.0, 2), 5])
def test_timesteps_that_are_no_range_are_named(timesteps: Any) -> None:
    with pytest.raises(ValueError, match="`timesteps`"):
        DenoisingLoss(lambda x, t: x, NoiseLevels.ir_sde(), timesteps=timesteps)


def test_a_denoiser_that_gives_noise_is_refused_where_the_network_gives_something_else() -> None:
    levels = NoiseLevels.ir_sde()
    with pytest.raises(ValueError, match="the network itself"):
        DenoisingLoss(as_denoiser(lambda x, t: x, levels), levels)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 3])
def test_latents_are_denoised_as_they_are(count: int) -> None:
    """EDTR's noise term (Eq. 2) and UniRestore's Eq. 3, to the bit for each sample."""
    clean, noise = (3 * normal(count, 4, 6, 10, seed=seed, dtype=torch.float32) for seed in (0, 1))
    unet, t = Network(torch.float32), torch.tensor([900, 5, 300][:count])
    schedule = NoiseSchedule.scaled_linear()
    z_t = schedule.add_noise(clean, noise, t)
    with torch.no_grad():
        eps = unet(z_t, t)
        answers = {"epsilon": (unet, noise, eps)}
        answers["sample"] = (
            lambda z, t: schedule.predict_x0(z, unet(z, t), t),
            clean,
            schedule.predict_x0(z_t, eps, t),
        )
        for kind, (denoiser, target, answer) in answers.items():
            own = NoiseSchedule.scaled_linear(prediction_type=kind)  # type: ignore[arg-type]
            loss = DenoisingLoss(denoiser, own, input_range=None, reduction="none")
            found = loss(clean, timestep=t, noise=noise)
            assert torch.equal(found, torch.stack([F.mse_loss(a, b) for a, b in zip(answer, target, strict=True)]))
            # the mean of the samples' means is rounded once more than the mean of all numbers
            torch.testing.assert_close(found.mean(), F.mse_loss(answer, target), rtol=1e-6, atol=0)


def test_a_flow_network_is_trained_with_the_time_that_samplers_give_it() -> None:
    times: list[Tensor] = []

    def network(noisy: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return torch.zeros_like(noisy)

    levels = FlowLevels.uniform(shift=3.0)
    denoiser, loss = as_denoiser(Recorded(network), levels), DenoisingLoss(network, levels, input_range=None)
    clean = normal(2, 3, 8, 8, dtype=torch.float32)
    loss(clean, timestep=249)
    denoiser(clean, 249)
    s = 3 * 0.25 / (1 + 2 * 0.25)  # the shift of flow matching at a quarter of the way
    assert times[0].tolist() == times[1].tolist() == pytest.approx([1000 * s] * 2)


class Recorded(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.function(noisy, t)
        return result


def test_a_network_in_half_precision_takes_images_in_float32():
    class Pointwise(nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    torch.manual_seed(0)
    network, clean = Pointwise(3, 3, 1), torch.rand(2, 3, 8, 8)
    noise = torch.randn(2, 3, 8, 8)
    values = [
        DenoisingLoss(copy.deepcopy(network).to(dtype), NoiseLevels.ir_sde(50))(clean, timestep=20, noise=noise)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert values[1].dtype == torch.float32
    torch.testing.assert_close(values[1], values[0], rtol=0.02, atol=0.0)
