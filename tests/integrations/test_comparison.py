"""What docs/comparison.md says of other libraries, computed where they are installed."""

import pytest
import torch
from torch import nn

from restoreloss import NoReference, TDPLoss, WeightedSum


def test_the_ssim_loss_of_kornia_is_half_of_that_of_piq() -> None:
    piq, kornia = pytest.importorskip("piq"), pytest.importorskip("kornia")
    a, b = torch.rand(2, 2, 3, 32, 32)
    torch.testing.assert_close(piq.SSIMLoss()(a, b), 1 - piq.ssim(a, b))
    inside = 1 - kornia.metrics.ssim(a, b, 11).mean()
    torch.testing.assert_close(kornia.losses.SSIMLoss(11)(a, b), inside / 2)
    torch.testing.assert_close(piq.SSIMLoss()(a, b), inside, rtol=0.02, atol=0)  # They differ in the border.


def test_piq_refuses_overshoot_and_freezes_what_it_is_given_and_ours_does_neither() -> None:
    piq = pytest.importorskip("piq")
    network, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(1, 3, 16, 16)
    TDPLoss(network, ["1"], normalize=None)(images - 0.01, images)
    assert all(p.requires_grad for p in network.parameters())
    piq.ContentLoss(network, layers=["1"])
    assert not any(p.requires_grad for p in network.parameters())
    with pytest.raises(AssertionError, match="greater or equal to 0"):
        piq.SSIMLoss()(images - 0.01, images)
    together = WeightedSum({"pixel": nn.L1Loss(), "ssim": piq.SSIMLoss(), "tv": NoReference(piq.TVLoss())})
    assert set(together.terms(images, images)) == {"pixel", "ssim", "tv/loss"}


def test_torchjd_has_as_many_as_we_say() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    bases = {"Aggregator", "GramianWeightedAggregator", "WeightedAggregator"}
    names = {name for name in aggregation.__all__ if not name.endswith("Weighting")} - bases
    assert len(names) >= 20 and {"UPGrad", "MGDA", "PCGrad"} <= names
