"""audit_timesteps against closed forms: a linear denoiser, a filter, and one that no filter explains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from restoreloss import DiffLoss, NoiseSchedule, audit_timesteps, small_prior

SCHEDULE = NoiseSchedule.linear()


def images(count: int = 8, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(count, 3, size, size, generator=generator)
    return clean + 0.1 * torch.randn(clean.shape, generator=generator), clean


def loss(denoiser: Any, **options: Any) -> DiffLoss:
    return DiffLoss(denoiser, SCHEDULE, h_space_weight=0, **options)


def test_a_linear_denoiser_is_a_squared_error_at_every_timestep() -> None:
    restored, clean = images()
    a = 0.7
    report = audit_timesteps(loss(lambda u, t: a * u), restored, clean, timesteps=[10, 500, 900], draws=2)
    for row in report:
        # L = 4 a^2 abar mse(z, x) for images in [0, 1] that the model sees in [-1, 1]
        weight = 8 * a**2 * float(SCHEDULE.alphas_cumprod[row.timestep]) / restored[0].numel()
        norms = weight * (restored - clean).flatten(1).norm(dim=1)
        assert row.gradient_norm == pytest.approx(float(norms.mean()), rel=1e-4)
        assert row.spread == pytest.approx(float(norms.std(correction=0) / norms.mean()), rel=1e-3)
        assert row.cosine == pytest.approx(1, abs=1e-5)
        assert row.filtered == pytest.approx(1, abs=1e-5)
        assert row.bands == pytest.approx([1] * 4, abs=1e-5)


def test_a_filter_is_a_filter_and_no_squared_error() -> None:
    restored, clean = images()

    radius = torch.hypot(torch.fft.fftfreq(16)[:, None], torch.fft.rfftfreq(16))

    def high_pass(u: Tensor, t: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(u) * (radius >= 0.25), s=u.shape[-2:])

    (row,) = audit_timesteps(loss(high_pass), restored, clean, timesteps=[300], draws=2)
    error = restored - clean
    kept = high_pass(error, torch.zeros(()))
    assert row.cosine == pytest.approx(float((kept.flatten(1).norm(dim=1) / error.flatten(1).norm(dim=1)).mean()))
    assert row.cosine < 0.95
    assert row.filtered == pytest.approx(1, abs=1e-5)
    assert row.bands[2:] == pytest.approx([1, 1], abs=1e-5)


def test_what_no_filter_explains_is_not_called_one() -> None:
    restored, clean = images(16, 32)
    mask = (torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.9).float()
    (row,) = audit_timesteps(loss(lambda u, t: mask * u), restored, clean, timesteps=[300], draws=2)
    # a filter finds the mean of the mask alone: its energy over that of the mask, 0.1^2 / 0.1, here 0.098
    assert row.filtered == pytest.approx(float(mask.mean()), abs=0.03)


def test_the_noise_and_the_global_state_do_not_matter_to_each_other() -> None:
    restored, clean = images(4)
    prior = DiffLoss(small_prior(), crop=0.5).train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.inference_mode():
        one = audit_timesteps(prior, restored, clean, timesteps=[100], draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert one == audit_timesteps(prior, restored, clean, timesteps=[100], draws=2)
    assert one != audit_timesteps(prior, restored, clean, timesteps=[100], draws=2, seed=1)
    assert prior.training and prior.reduction == "mean"


def test_the_timesteps_are_those_of_the_loss() -> None:
    restored, clean = images(2)
    rows = list(audit_timesteps(loss(lambda u, t: u, timesteps=(100, 600)), restored, clean, draws=1))
    assert [row.timestep for row in rows][:: len(rows) - 1] == [100, 599]
    assert len(rows) == 12
    sampler = loss(lambda u, t: u, timesteps=lambda count, generator: torch.full((count,), 5))
    assert [row.timestep for row in audit_timesteps(sampler, restored, clean, draws=1)][-1] == 999
    few = loss(lambda u, t: u, timesteps=(3, 6))
    assert [row.timestep for row in audit_timesteps(few, restored, clean, draws=1)] == [3, 4, 5]


def test_it_prints_and_plots(tmp_path: Path) -> None:
    restored, clean = images(2)
    report = audit_timesteps(loss(lambda u, t: u), restored, clean, timesteps=[7, 70], draws=1)
    text = str(report).splitlines()
    assert len(text) == 4
    assert text[2].split()[0] == "7"
    assert report.plot(tmp_path / "chart.png").stat().st_size > 1000


def test_wrong_use_is_named() -> None:
    restored, clean = images(2)
    with pytest.raises(ValueError, match="`loss` should be a DiffLoss, found L1Loss"):
        audit_timesteps(torch.nn.L1Loss(), restored, clean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`timesteps` should have at least one"):
        audit_timesteps(loss(lambda u, t: u), restored, clean, timesteps=[])
    with pytest.raises(ValueError, match="1000"):
        audit_timesteps(loss(lambda u, t: u), restored, clean, timesteps=[1000])
    with pytest.raises(ValueError, match="`bands`"):
        audit_timesteps(loss(lambda u, t: u), restored, clean, bands=0)
    with pytest.raises(ValueError, match="`target`"):
        audit_timesteps(loss(lambda u, t: u), restored, clean[:1])
