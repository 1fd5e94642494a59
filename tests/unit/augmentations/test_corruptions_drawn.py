"""Corruptions draws for each image; what is refused."""

import pickle
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from restoreloss import CORRUPTIONS, Corruptions, corrupt
from tests.helpers.corruptions import SEVERITIES, photo, seeded

# drawn for each picture


def test_names_and_severities_are_drawn_evenly() -> None:
    drawn = Corruptions().draw(3000, generator=seeded(0))
    names, severities = [what.name for what in drawn], [what.severity for what in drawn]
    assert set(names) == set(CORRUPTIONS[:15]) and set(severities) == set(SEVERITIES)
    table = np.array([[names.count(name) for name in CORRUPTIONS[:15]]])
    assert scipy.stats.chisquare(table[0]).pvalue > 0.01
    pairs = np.zeros((15, 5))
    for name, severity, *_ in drawn:
        pairs[CORRUPTIONS.index(name), severity - 1] += 1
    assert scipy.stats.chi2_contingency(pairs).pvalue > 0.01
    assert {what.severity for what in Corruptions(severities=[2, 4]).draw(50)} == {2, 4}
    assert {what.name for what in Corruptions(["fog"]).draw(5)} == {"fog"}


def test_every_picture_gets_the_corruption_that_was_drawn_for_it() -> None:
    corruptions = Corruptions(CORRUPTIONS)
    clean = photo("coffee", 40, 40).float().repeat(4, 1, 1, 1)
    chance = seeded(3)
    drawn = corruptions.draw(4, generator=chance)
    expected = corrupt(clean, [each.name for each in drawn], [each.severity for each in drawn], generator=chance)
    assert torch.equal(corruptions(clean, generator=seeded(3)), expected)
    together = corruptions(clean, generator=[seeded(n) for n in range(4)])
    for n in range(4):
        assert torch.equal(corruptions(clean[n : n + 1], generator=seeded(n))[0], together[n])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_range_is_the_same_corruption(dtype: torch.dtype) -> None:
    clean = photo("chelsea", 40, 40).to(dtype).repeat(2, 1, 1, 1)
    unit = Corruptions()(clean, generator=seeded(3))
    signed = Corruptions(input_range=(-1, 1))(2 * clean - 1, generator=seeded(3))
    assert signed.dtype == dtype and not signed.requires_grad
    torch.testing.assert_close(
        signed.float(), 2 * unit.float() - 1, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.5
    )
    assert torch.equal(pickle.loads(pickle.dumps(Corruptions()))(clean, generator=seeded(3)), unit)


# what is refused


@pytest.mark.parametrize(
    "image",
    [
        *(
            torch.rand(shape)
            for shape in ((3, 8, 8), (1, 1, 8, 8), (1, 4, 8, 8), (0, 3, 8, 8), (1, 3, 7, 8), (1, 3, 8, 7))
        ),
        *(torch.zeros(1, 3, 8, 8).byte(), np.zeros((1, 3, 8, 8)), None),
    ],
)
def test_images_that_do_not_fit(image: Any) -> None:
    for use in (lambda x: corrupt(x, "fog", 1), Corruptions()):
        with pytest.raises(ValueError, match="`image` should .* found"):
            use(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "rain"}, "`name` should be one of gaussian_noise, .*, saturate, found 'rain'"),
        ({"name": 3}, "`name` should be one of .* found 3"),
        ({"name": ["fog", "rain"]}, "`name` should be one of .* found 'rain'"),
        ({"name": ["fog"]}, "`name` should be one, or one for each of 2, found 1"),
        ({"severity": 0}, "`severity` should be a whole number of at least 1 and at most 5, found 0"),
        ({"severity": 6}, "`severity` .* found 6"),
        ({"severity": 2.0}, "`severity` .* found 2.0"),
        ({"severity": True}, "`severity` .* found True"),
        ({"severity": [1, 9]}, "`severity` .* found 9"),
        ({"severity": [1, 2, 3]}, "`severity` should be one, or one for each of 2, found 3"),
        ({"generator": [torch.Generator()]}, "`generator` should be one, or one for each of 2, found 1"),
    ],
)
def test_what_does_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrupt(torch.rand(2, 3, 8, 8), **{"name": "fog", "severity": 1, **options})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Corruptions(["rain"]), "names"),
        (lambda: Corruptions([]), "names"),
        (lambda: Corruptions("fog"), "names"),
        (lambda: Corruptions(severities=(0, 1)), "severities"),
        (lambda: Corruptions(severities=()), "severities"),
        (lambda: Corruptions(severities=3), "severities"),
        (lambda: Corruptions(input_range=(1, 0)), "input_range"),
    ],
)
def test_options_that_do_not_exist(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` should"):
        make()


def test_as_many_generators_as_pictures_are_drawn_for() -> None:
    with pytest.raises(ValueError, match="`generator` should be one, or one for each of 2, found 3"):
        Corruptions()(torch.rand(2, 3, 8, 8), generator=[seeded(n) for n in range(3)])


def test_clean_images_stay_bit_for_bit_and_are_clipped_like_all_others() -> None:
    bytes_of = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(Corruptions(["clean"], input_range=(0, 255))(bytes_of), bytes_of)
    over = torch.full((2, 3, 32, 32), 1.1)
    assert torch.equal(Corruptions(["clean"])(over), torch.ones(2, 3, 32, 32))
    mixed = Corruptions(["clean", "brightness"])(over.repeat(8, 1, 1, 1))
    assert float(mixed.max()) == 1
