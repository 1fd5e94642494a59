"""Lengths of corruptions that follow the size of the image."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from restoreloss import Corruptions, corrupt
from restoreloss.augmentations.imagenet_c import WITH_LENGTHS
from tests.helpers.corruptions import photo, seeded

SIDE = 56
"""A quarter of 224."""


def reduced(image: Tensor) -> Tensor:
    return F.avg_pool2d(image, 224 // SIDE)


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


@pytest.mark.parametrize("severity", [2, 5])
@pytest.mark.parametrize("name", ["defocus_blur", "gaussian_blur"])
def test_a_small_image_is_blurred_as_a_large_one_is(name: str, severity: int) -> None:
    large = torch.cat([photo(each, 224, 224) for each in ("astronaut", "coffee", "chelsea")])
    small, wanted = reduced(large), reduced(corrupt(large, name, severity))
    scaled, whole = (corrupt(small, name, severity, extent=extent) for extent in (SIDE / 224, 1.0))
    assert rms(scaled - wanted) < 0.35 * rms(small - wanted)
    assert rms(scaled - wanted) < 0.2 * rms(whole - wanted)


@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_an_extent_of_one_is_what_was_published(name: str) -> None:
    clean = photo("coffee", 40, 37)
    published, given, scaled = (
        corrupt(clean, name, 3, generator=seeded(0), **options) for options in ({}, {"extent": 1.0}, {"extent": 0.2})
    )
    assert torch.equal(published, given) and not torch.equal(published, scaled)
    assert scaled.isfinite().all() and scaled.min() >= 0 and scaled.max() <= 1
    near = WITH_LENGTHS[name](clean, 2, seeded(0), 1 - 1e-9).clamp(0, 1)
    apart = {"defocus_blur": 2e-2, "snow": 1.0}  # a disk of whole pixels; flakes cut from a window of whole pixels
    assert rms(near - published) < apart.get(name, 1e-6)


@pytest.mark.parametrize("side", [None, (16, 16)])
def test_what_is_drawn_has_the_extent(side: tuple[int, int] | None) -> None:
    clean = torch.rand(2, 3, 40, 40, generator=seeded(0))
    usual, scaled = (
        Corruptions(["motion_blur"], [4], side=side, extent=extent)(clean, generator=seeded(1)) for extent in (1.0, 0.2)
    )
    assert rms(scaled - clean) < rms(usual - clean)


@pytest.mark.parametrize("extent", [0, -1.0, float("nan"), "1", None])
def test_an_extent_that_is_none(extent: object) -> None:
    for use in (
        lambda: corrupt(torch.rand(1, 3, 8, 8), "fog", 1, extent=extent),  # type: ignore[arg-type]
        lambda: Corruptions(extent=extent),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="`extent` should be a finite number above 0"):
            use()
