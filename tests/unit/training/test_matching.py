"""Is the timestep that is found the one that was planted, and is the network left alone by the search?"""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from restoreloss import NoiseLevels, NoiseSchedule, TimestepMatch, match_timestep, order_by_timestep
from restoreloss.training.matching import plot_matches
from tests.helpers.networks import tiny_unet

LEVELS = NoiseLevels.ir_sde()
MODES: list[Any] = ["direct", "diffuse", "ddim"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sigma_of(t: Tensor, levels: NoiseSchedule = LEVELS) -> Tensor:
    return levels.sigma[t].double().view(-1, 1, 1, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("planted", [1, 4, 20, 33])
def test_a_perfect_denoiser_finds_the_level_that_was_planted(mode: Any, planted: int) -> None:
    """It knows what was added, also by the search, and only has to be told how much of it."""
    clean, noise = images(3, 2, 6, 5), normal(3, 2, 6, 5)
    added = noise if mode == "direct" else noise + torch.randn(noise.shape, generator=seeded(), dtype=torch.float64)
    match = match_timestep(
        lambda x_t, t: sigma_of(t) * added,
        LEVELS,
        LEVELS.add_noise(clean, noise, planted),
        clean,
        mode=mode,
        generator=seeded(),
    )
    assert match.best == planted and match.best_per_image.tolist() == [planted] * 3
    assert match.gain == pytest.approx(1.0, abs=1e-6) and not match.degenerate
    # what is left over is the difference of the levels
    expected = (LEVELS.sigma.double()[1:] - LEVELS.sigma.double()[planted]).abs() * noise.abs().mean()
    torch.testing.assert_close(match.curve, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        match.unrestored, LEVELS.sigma.double()[planted] * noise.abs().mean(dim=(1, 2, 3)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("planted", [10, 40])
@pytest.mark.parametrize("mode", ["direct", "diffuse"])
def test_the_best_denoiser_of_gaussian_pictures_finds_the_level(planted: int, mode: Any) -> None:
    """Where pictures vary as much as their noise, the least error is at the level of the noise in both modes."""
    levels = NoiseLevels(torch.linspace(0, 2, 51), prediction_type="sample")
    spread = float(levels.sigma[planted])
    clean, noise = spread * normal(400, 1, 12, 12), normal(400, 1, 12, 12, seed=1)

    def best(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t * spread**2 / (spread**2 + sigma_of(t, levels) ** 2)

    options: dict[str, Any] = {"mode": mode, "distance": "mse", "timesteps": range(5, 51, 5)}
    match = match_timestep(best, levels, clean + spread * noise, clean, generator=seeded(2), **options)
    assert match.best == planted
    expected = spread**2 * (0.5 if mode == "direct" else 0.75)
    assert float(match.curve.min()) == pytest.approx(expected, rel=0.02)


def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x_t.tanh() + t.view(-1, 1, 1, 1) / 500


def written_out(
    schedule: NoiseSchedule, y: Tensor, x: Tensor, noise: Tensor, t: int, mode: str, steps: int
) -> list[float]:
    """Mean absolute error of every image."""
    signal, sigma = schedule.signal.double(), schedule.sigma.double()

    def split(x_t: Tensor, s: int) -> tuple[Tensor, Tensor]:
        output = 0.3 * x_t.tanh() + s / 500
        if schedule.prediction_type == "residual":
            return (x_t - output) / signal[s], output / sigma[s]
        return (x_t - sigma[s] * output) / signal[s], output

    if mode == "direct":
        restored = split(signal[t] * y, t)[0]
    else:
        visited = [t] if mode == "diffuse" else [math.floor(t * (steps - k) / steps + 1e-9) for k in range(steps)]
        lowest = 1 if float(sigma[0]) == 0 else 0
        visited = list(dict.fromkeys(s for s in visited if s >= lowest))
        x_t = signal[t] * y + sigma[t] * noise
        for number, s in enumerate(visited):
            restored, e = split(x_t, s)
            if number + 1 < len(visited):
                following = visited[number + 1]
                x_t = signal[following] * restored + sigma[following] * e
    return [float((one - other).abs().mean()) for one, other in zip(restored, x, strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([LEVELS, NoiseSchedule.linear(40), NoiseSchedule.linear(40, prediction_type="residual")]),
    st.sampled_from(MODES),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 9),
)
def test_the_curve_is_the_search_written_out(
    schedule: NoiseSchedule, mode: Any, shape: tuple[int, ...], steps: int
) -> None:
    low, high = schedule.model_range
    clean, noise = images(*shape), torch.randn(shape, generator=seeded(), dtype=torch.float64)
    degraded = 0.6 * clean + 0.1
    x, y = (image * (high - low) + low for image in (clean, degraded))
    match = match_timestep(denoiser, schedule, degraded, clean, mode=mode, ddim_steps=steps, generator=seeded())
    first = 1 if schedule is LEVELS else 0
    assert match.timesteps.tolist() == list(range(first, schedule.num_timesteps))
    for column, t in enumerate(match.timesteps.tolist()):
        expected = torch.tensor(written_out(schedule, y, x, noise, t, mode, steps), dtype=torch.float64)
        torch.testing.assert_close(match.per_image[:, column], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(match.unrestored, (y - x).abs().mean(dim=(1, 2, 3)))


def test_a_schedule_of_signed_images_is_told_the_same_images() -> None:
    schedule, clean, noise = NoiseSchedule.linear(200), images(2, 3, 5, 5), normal(2, 3, 5, 5)
    planted = 60
    signal, sigma = float(schedule.signal[planted]), float(schedule.sigma[planted])
    # what `direct` scales by the signal holds noise of sigma / signal
    degraded = clean + sigma / signal * noise / 2  # half: [0, 1] is half as wide as [-1, 1]
    options: dict[str, Any] = {"timesteps": range(0, 200, 5)}
    for scale, span in ((1, (0.0, 1.0)), (255, (0, 255))):
        y, x = scale * degraded, scale * clean
        match = match_timestep(lambda x_t, t: noise, schedule, y, x, input_range=span, **options)
        assert match.best == planted and match.gain == pytest.approx(1, abs=1e-4)
        before = sigma / signal * noise.abs().mean(dim=(1, 2, 3))
        torch.testing.assert_close(match.unrestored, before, rtol=1e-5, atol=0)


def test_of_equals_the_smallest_timestep_is_best() -> None:
    clean = images(2, 3, 4, 4)
    match = match_timestep(lambda x_t, t: torch.zeros_like(x_t), LEVELS, clean + 0.1, clean, timesteps=[30, 7, 12, 7])
    assert match.timesteps.tolist() == [7, 12, 30]
    assert match.best == 7 and match.best_per_image.tolist() == [7, 7]


def test_every_image_has_a_best_of_its_own() -> None:
    per_image = torch.tensor([[1.0, 5.0, 4.0], [5.0, 2.0, 1.0], [3.0, 3.0, 9.0]])
    match = TimestepMatch(torch.tensor([2, 5, 9]), per_image, torch.tensor([4.0, 4.0, 4.0]))
    torch.testing.assert_close(match.curve, torch.tensor([3.0, 10 / 3, 14 / 3]))
    assert match.best == 2 and match.best_per_image.tolist() == [2, 9, 2]
    assert match.gain == pytest.approx(0.25) and not match.degenerate


def test_batches_are_pooled_by_image_and_not_by_batch() -> None:
    clean = images(5, 2, 4, 4)
    degraded = 0.7 * clean
    options: dict[str, Any] = {"timesteps": [3, 9, 27]}
    whole = match_timestep(denoiser, LEVELS, degraded, clean, **options)
    parts = [
        match_timestep(denoiser, LEVELS, degraded[rows], clean[rows], **options) for rows in (slice(1), slice(1, 5))
    ]
    pooled = TimestepMatch.pool(parts)
    torch.testing.assert_close(pooled.curve, whole.curve)
    torch.testing.assert_close(pooled.unrestored, whole.unrestored)
    assert pooled.best == whole.best and pooled.gain == pytest.approx(whole.gain)


def test_only_matches_of_the_same_timesteps_are_pooled() -> None:
    one = TimestepMatch(torch.tensor([1, 2]), torch.ones(1, 2), torch.ones(1))
    other = TimestepMatch(torch.tensor([1, 3]), torch.ones(1, 2), torch.ones(1))
    for matches, message in (([], "at least one, found none"), ([one, other], r"of the same `timesteps`, found")):
        with pytest.raises(ValueError, match=f"`matches` should be {message}"):
            TimestepMatch.pool(matches)


def test_a_degradation_that_never_matches_is_called_degenerate(caplog: pytest.LogCaptureFixture) -> None:
    clean = images(2, 3, 4, 4)
    with caplog.at_level(logging.WARNING):
        match = match_timestep(lambda x_t, t: sigma_of(t).expand_as(x_t), LEVELS, clean - 0.05, clean)
    assert match.degenerate and match.gain < 0 and match.best == 1
    assert "No timestep brings the degraded images closer" in caplog.text
    caplog.clear()
    match = match_timestep(lambda x_t, t: sigma_of(t).expand_as(x_t), LEVELS, clean + 0.05, clean)
    assert not match.degenerate and match.best == 50 and caplog.text == ""
    assert match.gain == pytest.approx(float(LEVELS.sigma[50]) / 0.05, rel=1e-4)


def test_images_without_a_degradation_have_nothing_to_gain() -> None:
    clean = images(1, 3, 4, 4)
    match = match_timestep(lambda x_t, t: torch.zeros_like(x_t), LEVELS, clean, clean)
    assert match.gain == 0 and match.degenerate


def test_an_image_may_have_a_generator_of_its_own() -> None:
    clean = images(3, 3, 8, 8)

    def per_image(rows: slice) -> Tensor:
        return match_timestep(
            lambda x, t: 0.1 * x, LEVELS, 0.7 * clean[rows], clean[rows], mode="diffuse", timesteps=[5, 50],
            generator=[seeded(seed) for seed in range(3)][rows],
        ).per_image  # fmt: skip

    torch.testing.assert_close(per_image(slice(1, 3)), per_image(slice(3))[1:])


@pytest.mark.parametrize("mode", MODES)
def test_all_timesteps_see_the_same_noise_and_the_generator_alone_draws_it(mode: Any) -> None:
    clean, before = images(2, 3, 4, 4), torch.get_rng_state()
    found = [
        match_timestep(denoiser, LEVELS, 0.7 * clean, clean, mode=mode, timesteps=tried, generator=seeded(seed)).curve
        for tried, seed in (([20], 3), ([1, 20], 3), ([20], 4))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    if mode != "ddim":
        assert torch.equal(found[0][0], found[1][1])
    assert torch.equal(found[0], found[2]) == (mode == "direct")


def test_of_long_schedules_fifty_timesteps_are_tried() -> None:
    clean = images(1, 1, 2, 2)
    tried = match_timestep(denoiser, NoiseSchedule.linear(), clean, clean + 0.1).timesteps
    assert len(tried) == 50 and int(tried[0]) == 0 and int(tried[-1]) == 999
    assert set(tried.diff().tolist()) <= {20, 21}
    tried = match_timestep(denoiser, NoiseLevels.ir_sde(300), clean, clean + 0.1).timesteps
    assert len(tried) == 50 and int(tried[0]) == 1 and int(tried[-1]) == 300
    assert len(match_timestep(denoiser, NoiseSchedule.linear(100), clean, clean + 0.1).timesteps) == 100


@pytest.mark.parametrize("distance", ["l1", "mse", "rms", "l2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_distance_finds_noise_in_any_precision(distance: Any, dtype: torch.dtype) -> None:
    levels = NoiseLevels(torch.linspace(0, 1, 11))
    clean, noise = images(2, 3, 8, 8).to(dtype), normal(2, 3, 8, 8, dtype=dtype)
    degraded = levels.add_noise(clean, noise, 6)
    match = match_timestep(
        lambda x_t, t: levels.sigma[t].view(-1, 1, 1, 1) * noise, levels, degraded, clean, distance=distance
    )
    assert match.best == 6 and match.curve.dtype == torch.float32 and match.gain > 0.9


class Disturbing(nn.Module):
    """Batch norm, dropout and odd modes: whatever a search could change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.last = nn.Conv2d(4, 3, 1).requires_grad_(False)
        self.layers[0].eval()
        self.calls, self.fails_at = 0, 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        assert not self.layers[1].training and not torch.is_grad_enabled()
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of memory, say")
        return self.last(self.layers(x_t))


@pytest.mark.parametrize("fails_at", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_network_is_left_as_it_was(mode: Any, fails_at: int) -> None:
    network = Disturbing()
    network.fails_at = fails_at
    for parameter in network.layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes, state = [m.training for m in network.modules()], copy.deepcopy(network.state_dict())
    flags = [p.requires_grad for p in network.parameters()]
    degraded, clean = (images(2, 3, 8, 8, seed=seed).float() for seed in (0, 1))
    degraded.requires_grad_()
    if fails_at:
        with pytest.raises(RuntimeError, match="out of memory"):
            match_timestep(network, LEVELS, degraded, clean, mode=mode, timesteps=range(1, 9))
    else:
        assert not match_timestep(network, LEVELS, degraded, clean, mode=mode, timesteps=[1, 5]).curve.requires_grad
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in network.layers.parameters())
    assert network.last.weight.grad is None and degraded.grad is None


def test_a_unet_of_diffusers_will_do() -> None:
    unet = tiny_unet().train()
    clean = images(1, 3, 8, 8).float()
    match = match_timestep(unet, NoiseSchedule.linear(), 0.9 * clean, clean, timesteps=[10, 500], mode="ddim")
    assert match.per_image.shape == (1, 2) and match.curve.isfinite().all() and unet.training


def test_names_are_ordered_by_rising_timestep() -> None:
    def found(t: int) -> TimestepMatch:
        return TimestepMatch(torch.tensor([1, t, 60]), torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([4.0]))

    table = {"hazy": 47, "rain": found(8), "noise": 4, "snow": 8.0, "blur": found(50)}
    assert order_by_timestep(table) == ["noise", "rain", "snow", "hazy", "blur"]
    assert order_by_timestep({}) == []


def test_curves_are_drawn_into_a_file(tmp_path: Path) -> None:
    match = TimestepMatch(torch.tensor([1, 2]), torch.tensor([[1.0, 2.0]]), torch.tensor([4.0]))
    never = TimestepMatch(torch.tensor([1, 2]), torch.tensor([[5.0, 6.0]]), torch.tensor([4.0]))
    path = plot_matches({"noise": match, "haze": never}, tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    text = plot_matches({"noise": match, "haze": never}, str(tmp_path / "curves.svg")).read_text()
    assert "noise: t* = 1" in text and "haze: no timestep helps" in text and "haze: t*" not in text


IMAGE = images(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degraded": IMAGE[:1]}, "`clean` should have the shape of `degraded`"),
        ({"degraded": IMAGE[0]}, r"`degraded` should have shape \(N, C, H, W\)"),
        ({"clean": IMAGE.float()}, "`clean` should have the dtype of `degraded`"),
        ({"mode": "forward"}, "`mode` should be one of .* found 'forward'"),
        ({"distance": "psnr"}, "`distance` should be one of"),
        ({"ddim_steps": 0}, "`ddim_steps` should be a whole number of at least 1, found 0"),
        ({"timesteps": []}, "`timesteps` should be at least one, found none"),
        ({"timesteps": [5, 51]}, r"in \[0, 51\), found 51"),
        ({"timesteps": [0, 5]}, "`timesteps` should hold noise, found 0, which holds none"),
        ({"timesteps": [2.5]}, "should be an integer"),
        ({"input_range": (1, 0)}, "`input_range` should rise"),
        ({"denoiser": 3}, "`denoiser` should be a network or a callable"),
        ({"denoiser": lambda x_t, t: x_t[:1]}, "should return the shape of its input"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"denoiser": denoiser, "schedule": LEVELS, "degraded": IMAGE, "clean": IMAGE, **arguments}
    with pytest.raises(ValueError, match=message):
        match_timestep(**given)


def test_a_walk_back_does_not_depend_on_what_else_is_tried() -> None:
    levels, x = NoiseLevels.ir_sde(), torch.rand(2, 3, 4, 4)

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        return 0.3 * z.tanh() + t.view(-1, 1, 1, 1) / 500

    def curve(tried: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return match_timestep(denoiser, levels, 0.7 * x, x, mode="ddim", timesteps=tried, generator=generator).curve

    torch.testing.assert_close(curve([30]), curve([1, 30])[1:])


def test_what_is_not_finite_is_named() -> None:
    levels, clean = NoiseLevels.ir_sde(), torch.rand(3, 3, 4, 4)
    with pytest.raises(ValueError, match=r"`denoiser` should give finite images, found others at timesteps \[3\]"):
        match_timestep(lambda x, t: x * (math.nan if t[0] == 3 else 1), levels, 0.5 * clean, clean)
    clean[1, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match=r"`degraded` and `clean` should be finite, found images \[1\]"):
        match_timestep(lambda x, t: x, levels, 0.5 * clean, clean)


def test_a_network_that_returns_the_image_is_matched_and_left_as_it_was() -> None:
    class Restorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            result: Tensor = 0.9 * x + 0.01 * self.norm(x)
            return result

    network, clean = Restorer().train(), torch.rand(2, 3, 8, 8)
    before = copy.deepcopy(network.state_dict())
    levels = NoiseLevels.ir_sde(prediction_type="sample")
    match = match_timestep(network, levels, 0.5 * clean, clean)
    network.eval()
    expected = (network(0.5 * clean, torch.tensor([1, 1])) - clean).abs().mean()
    assert match.curve[0].item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
