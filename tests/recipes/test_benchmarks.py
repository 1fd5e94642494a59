"""The benchmarks measure what they say: each variant of DiffLoss takes its step."""

import pytest

from examples.benchmarks import all as every
from examples.benchmarks import diffloss_cost
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
