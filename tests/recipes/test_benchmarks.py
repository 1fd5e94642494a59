"""The benchmarks measure what they say: each variant of DiffLoss takes its step."""

import statistics

import pytest
import torch

from examples.benchmarks import all as every
from examples.benchmarks import calibration_spread, diffloss_cost
from tests.helpers.networks import tiny_unet


@pytest.mark.parametrize("variant", [name for name in diffloss_cost.VARIANTS if "compiled" not in name])
def test_a_variant_takes_its_step(variant: str) -> None:
    restored, clean = diffloss_cost.images(4, 16, "cpu")
    diffloss_cost.make_step(variant, diffloss_cost.Subject(tiny_unet()), restored, clean)()


def test_the_command_names_a_benchmark_that_fails(monkeypatch, capfd) -> None:
    monkeypatch.setattr(every, "BENCHMARKS", {"none": ("no_such_benchmark",)})
    monkeypatch.setattr("sys.argv", ["all"])
    with pytest.raises(SystemExit, match="1"):
        every.main()
    printed = capfd.readouterr()
    assert "## none" in printed.out and "no_such_benchmark" in printed.out and "Failed: none" in printed.err


def test_a_calibrated_weight_varies_less_with_stratified_timesteps() -> None:
    # of f(u, t) = u the gradient is that of the mean square times the mean of alphas_cumprod at the timesteps drawn
    restored, clean = torch.rand(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    spread = {
        name: statistics.stdev(calibration_spread.weights(loss, restored, clean, range(12), 1))
        for name, loss in calibration_spread.losses(lambda u, t: u, 0, 1000).items()
    }
    assert 0 < spread["stratified"] < spread["independent"] / 3
