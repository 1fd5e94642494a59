"""What holds for every corruption, and the numbers of the package."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from restoreloss import CORRUPTIONS, corrupt
from tests.helpers.corruptions import SEVERITIES, every_severity, photo, seeded

FIXED = (
    *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur"),
    "saturate",
)

every = pytest.mark.parametrize("name", CORRUPTIONS)

# imagecorruptions 1.1.2 on three photographs of 224 pixels: mean and deviation of what it adds to a picture in [0, 1],
# before it rounds to 8 bits, for the five severities; averages over 200 draws of fog, 100 of frost, 2 to 40 of others.
PACKAGE = {
    "gaussian_noise": [(0.0033, 0.0760), (0.0056, 0.1118), (0.0098, 0.1620), (0.0152, 0.2218), (0.0236, 0.2939)],
    "shot_noise": [(-0.0014, 0.0807), (-0.0039, 0.1217), (-0.0093, 0.1685), (-0.0244, 0.2428), (-0.0404, 0.2957)],
    "impulse_noise": [(0.0024, 0.0997), (0.0049, 0.1407), (0.0076, 0.1725), (0.0142, 0.2366), (0.0220, 0.2973)],
    "defocus_blur": [(0.0000, 0.0556), (0.0000, 0.0660), (0.0000, 0.0841), (0.0054, 0.0975), (0.0045, 0.1097)],
    "glass_blur": [(-0.0011, 0.0672), (-0.0014, 0.0658), (-0.0006, 0.1023), (-0.0009, 0.0969), (-0.0004, 0.1049)],
    "motion_blur": [(-0.0002, 0.0740), (0.0004, 0.0978), (0.0008, 0.1205), (0.0013, 0.1392), (0.0019, 0.1485)],
    "zoom_blur": [(0.0005, 0.1073), (0.0007, 0.1226), (0.0009, 0.1287), (0.0009, 0.1380), (0.0011, 0.1436)],
    "snow": [(0.1658, 0.0740), (0.2687, 0.1110), (0.2660, 0.1202), (0.3203, 0.1459), (0.3793, 0.1419)],
    "frost": [(0.2389, 0.0622), (0.2833, 0.1084), (0.3065, 0.1345), (0.2920, 0.1411), (0.3052, 0.1578)],
    "fog": [(0.0329, 0.1824), (0.0343, 0.2024), (0.0414, 0.2205), (0.0377, 0.2253), (0.0420, 0.2367)],
    "brightness": [(0.0679, 0.0298), (0.1292, 0.0605), (0.1797, 0.0898), (0.2151, 0.1163), (0.2373, 0.1402)],
    "contrast": [(0.0000, 0.1362), (0.0000, 0.1589), (0.0000, 0.1816), (0.0000, 0.2043), (0.0000, 0.2157)],
    "elastic_transform": [(0.0001, 0.0708), (-0.0001, 0.0842), (0.0000, 0.0986), (0.0001, 0.1086), (-0.0004, 0.1195)],
    "pixelate": [(0.0015, 0.0376), (0.0019, 0.0416), (0.0007, 0.0527), (0.0004, 0.0633), (0.0009, 0.0696)],
    "jpeg_compression": [(0.0010, 0.0362), (0.0010, 0.0408), (0.0009, 0.0437), (0.0012, 0.0513), (0.0013, 0.0603)],
    "speckle_noise": [(-0.0015, 0.0716), (-0.0030, 0.0935), (-0.0095, 0.1553), (-0.0155, 0.1919), (-0.0231, 0.2351)],
    "gaussian_blur": [(0.0000, 0.0355), (0.0000, 0.0598), (0.0000, 0.0764), (0.0000, 0.0894), (0.0001, 0.1089)],
    "spatter": [(0.0034, 0.0238), (0.0180, 0.0599), (0.0307, 0.0732), (-0.0270, 0.1049), (-0.0440, 0.1315)],
    "saturate": [(0.1144, 0.1238), (0.1471, 0.1592), (-0.0771, 0.0892), (-0.1205, 0.1424), (-0.1488, 0.1867)],
}


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


# what holds for all


def test_the_names_are_those_of_the_package() -> None:
    assert set(CORRUPTIONS) == set(PACKAGE) and len(CORRUPTIONS) == 19
    assert CORRUPTIONS[15:] == ("speckle_noise", "gaussian_blur", "spatter", "saturate")


@every
@every_severity
def test_what_is_added_is_what_the_package_adds(name: str, severity: int) -> None:
    """Up to chance: tolerances are three to four standard errors of the mean over what is drawn here."""
    draws = {"fog": 40, "frost": 10, "motion_blur": 10, "spatter": 6, "snow": 6}.get(name, 1)
    mean, deviation = {
        "fog": (0.025, 0.01),  # 0.07 and 0.045 from draw to draw
        "frost": (0.05, 0.012),  # 0.1 and 0.03; and it is a model
        "spatter": (0.002, 0.004),
        "snow": (0.003, 0.003),
        "motion_blur": (0.003, 0.004),
        "glass_blur": (0.003, 0.002),  # the package rounds down to 8 bits between its blurs
        "pixelate": (0.002, 0.0002),  # Pillow rounds to 8 bits, twice
        "elastic_transform": (0.002, 0.003),
    }.get(name, (6e-5, 6e-5) if name in FIXED else (0.001, 0.0015))
    clean = torch.cat([photo(each) for each in ("astronaut", "coffee", "chelsea")]).float()
    generator = seeded(10 * CORRUPTIONS.index(name) + severity)
    added = torch.cat([corrupt(clean, name, severity, generator=generator) - clean for _ in range(draws)]).flatten(1)
    expected = PACKAGE[name][severity - 1]
    assert float(added.mean()) == pytest.approx(expected[0], abs=mean)
    assert float(added.std(dim=1).mean()) == pytest.approx(expected[1], abs=deviation)


FALLS = {("glass_blur", 2), ("glass_blur", 4), ("frost", 4), ("saturate", 3)}
"""Where the published parameters do less harm than those of the severity before, in the package as well."""


@every
def test_harm_rises_with_severity(name: str) -> None:
    clean = torch.cat([photo(each, 160, 160) for each in ("astronaut", "coffee", "chelsea")]).float()
    draws = {"fog": 20, "frost": 4, "spatter": 3, "snow": 3}.get(name, 1)
    harm = [
        sum(rms(corrupt(clean, name, severity, generator=seeded(n)) - clean) ** 2 for n in range(draws))
        for severity in SEVERITIES
    ]
    falls = {(name, severity) for severity in SEVERITIES[1:] if harm[severity - 1] <= harm[severity - 2]}
    theirs = [mean**2 + deviation**2 for mean, deviation in PACKAGE[name]]
    assert falls == {(name, n) for n in SEVERITIES[1:] if theirs[n - 1] <= theirs[n - 2]}
    assert falls == {fall for fall in FALLS if fall[0] == name}


@every
@every_severity
def test_shape_dtype_and_range(name: str, severity: int) -> None:
    clean = torch.cat([photo("coffee", 40, 37), photo("chelsea", 40, 37)]).float().requires_grad_()
    before = clean.detach().clone()
    corrupted = corrupt(clean, name, severity, generator=seeded(0))
    assert corrupted.shape == clean.shape and corrupted.dtype == clean.dtype and not corrupted.requires_grad
    assert corrupted.isfinite().all() and corrupted.min() >= 0 and corrupted.max() <= 1
    assert torch.equal(clean, before)
    assert all(rms(one - other) > 0.001 for one, other in zip(corrupted, before, strict=True)), "nothing happened"


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(CORRUPTIONS),
    st.sampled_from(SEVERITIES),
    st.tuples(st.integers(1, 3), st.just(3), st.integers(8, 70), st.integers(8, 70)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_size_and_dtype(name: str, severity: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    image = torch.rand(shape, generator=seeded(0)).to(dtype)
    corrupted = corrupt(image, name, severity, generator=seeded(1))
    assert corrupted.shape == shape and corrupted.dtype == dtype
    assert corrupted.isfinite().all() and corrupted.min() >= 0 and corrupted.max() <= 1


@every
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_pictures_of_one_colour_stay_finite(name: str, value: float) -> None:
    for severity in SEVERITIES:
        assert corrupt(torch.full((1, 3, 8, 8), value), name, severity, generator=seeded(0)).isfinite().all()


@every
def test_seeds(name: str) -> None:
    clean = photo("coffee", 48, 40).float()
    before = torch.get_rng_state()
    one, same, other = (corrupt(clean, name, 3, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same)
    assert torch.equal(one, other) == (name in FIXED)
    torch.manual_seed(5)
    first, second = (corrupt(clean, name, 3) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, corrupt(clean, name, 3))
    assert torch.equal(first, second) == (name in FIXED)


@every
def test_every_sample_has_chance_of_its_own(name: str) -> None:
    clean = photo("coffee", 48, 40).float().repeat(3, 1, 1, 1)
    for generator in (seeded(1), [seeded(n) for n in range(3)]):
        corrupted = corrupt(clean, name, 3, generator=generator)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            same = torch.equal(corrupted[i], corrupted[j])
            assert same == (name in FIXED)


@every
@pytest.mark.parametrize("severity", [1, 5])
def test_a_sample_with_its_own_generator_does_not_depend_on_its_batch(name: str, severity: int) -> None:
    clean = torch.cat([photo(each, 40, 44) for each in ("astronaut", "coffee", "chelsea")]).float()
    together = corrupt(clean, name, severity, generator=[seeded(n) for n in range(3)])
    for n in (2, 0, 1):
        alone = corrupt(clean[n : n + 1], name, severity, generator=seeded(n))
        assert torch.equal(alone[0], together[n])


@every
def test_a_batch_is_computed_as_its_samples_are(name: str) -> None:
    """One generator: what is the same for all comes out the same in a batch and alone."""
    clean = torch.cat([photo("coffee", 40, 44), photo("chelsea", 40, 44)])
    together = corrupt(clean, name, 2, generator=seeded(3))
    if name in FIXED:
        for n in range(2):
            torch.testing.assert_close(corrupt(clean[n : n + 1], name, 2)[0], together[n], rtol=0, atol=1e-12)
    else:
        assert rms(together[0] - clean[0]) == pytest.approx(rms(together[1] - clean[1]), rel=0.9)


def test_names_and_severities_of_each_sample() -> None:
    clean = photo("chelsea", 40, 40).float().repeat(3, 1, 1, 1)
    names, severities = ["snow", "contrast", "shot_noise"], [5, 1, 3]
    together = corrupt(clean, names, severities, generator=[seeded(n) for n in range(3)])
    for n in range(3):
        alone = corrupt(clean[n : n + 1], names[n], severities[n], generator=seeded(n))
        assert torch.equal(alone[0], together[n])
    same = corrupt(clean, "fog", (1, 1, 5), generator=[seeded(0) for _ in range(3)])
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    assert torch.equal(
        corrupt(clean, ["fog"] * 3, 2, generator=seeded(0)), corrupt(clean, ["fog"] * 3, [2, 2, 2], generator=seeded(0))
    )


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_corrupted_in_single(name: str, dtype: torch.dtype) -> None:
    clean = photo("coffee", 40, 40).to(dtype)
    expected = corrupt(clean.float(), name, 4, generator=seeded(0)).to(dtype)
    assert torch.equal(corrupt(clean, name, 4, generator=seeded(0)), expected)


@every
def test_what_is_outside_is_clipped(name: str) -> None:
    wild = 3 * photo("coffee", 40, 40) - 1
    with pytest.warns(UserWarning, match=r"`image` spans .* `input_range` says \(0, 1\)"):
        one = corrupt(wild, name, 2, generator=seeded(0))
    other = corrupt(wild.clamp(0, 1), name, 2, generator=seeded(0))
    assert torch.equal(one, other)


def test_a_severity_may_be_an_integer_of_numpy() -> None:
    image = photo()
    for severity in (np.int64(3), [np.int64(3)] * len(image)):
        found = corrupt(image, "fog", severity, generator=seeded(0))  # type: ignore[arg-type]
        assert found.shape == image.shape
    assert torch.equal(
        corrupt(image, "fog", np.int64(3), generator=seeded(0)),  # type: ignore[arg-type]
        corrupt(image, "fog", 3, generator=seeded(0)),
    )
    for wrong in (np.int64(6), True, 2.0):
        with pytest.raises(ValueError, match="`severity` should be a whole number of at least 1 and at most 5"):
            corrupt(image, "fog", wrong)  # type: ignore[arg-type]
