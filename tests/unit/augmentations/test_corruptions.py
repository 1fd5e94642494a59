"""The corruptions: each against a loop, scipy, scikit-image or Pillow, and all against numbers of the package."""

import io
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photos
from skimage.color import hsv2rgb, rgb2hsv
from skimage.filters import gaussian
from torch import Tensor

from restoreloss import CORRUPTIONS, Corruptions, corrupt
from restoreloss.augmentations.filters import _edges, relief
from restoreloss.augmentations.imagenet_c import _copied_from
from restoreloss.augmentations.textures import _standard, ice

FIXED = (
    *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur"),
    "saturate",
)
RANDOM = tuple(name for name in CORRUPTIONS if name not in FIXED)
SEVERITIES = (1, 2, 3, 4, 5)

every = pytest.mark.parametrize("name", CORRUPTIONS)
every_severity = pytest.mark.parametrize("severity", SEVERITIES)
sizes = pytest.mark.parametrize("size", [(96, 96), (40, 61)], ids=str)

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


def photo(name: str = "astronaut", height: int = 224, width: int = 224) -> Tensor:
    """The middle of a photograph of scikit-image, (1, 3, height, width), of 8 bits as the package takes it."""
    pixels = getattr(photos, name)()
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    small = np.asarray(square.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(small.copy()).permute(2, 0, 1)[None].double() / 255


def picture(height: int, width: int) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """A photograph as we and as scikit-image take it."""
    image = photo("astronaut", height, width)
    return image, image[0].permute(1, 2, 0).numpy()


def pixels(image: Tensor) -> np.ndarray[Any, Any]:
    assert len(image) == 1
    return image[0].permute(1, 2, 0).numpy()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> np.ndarray[Any, Any]:
    return torch.rand(shape, generator=generator, dtype=torch.float64).numpy()


def normal(shape: tuple[int, ...], generator: torch.Generator) -> np.ndarray[Any, Any]:
    return torch.randn(shape, generator=generator, dtype=torch.float64).numpy()


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


# the fixed ones, against other libraries


@sizes
@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_is_about_the_mean_of_each_channel(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    factor = [0.4, 0.3, 0.2, 0.1, 0.05][severity - 1]
    mean = array.mean(axis=(0, 1))
    np.testing.assert_allclose(pixels(corrupt(image, "contrast", severity)), mean + factor * (array - mean), atol=1e-12)


@every_severity
def test_brightness_and_saturation_are_those_of_hsv(severity: int) -> None:
    image, array = picture(96, 61)
    array[:4] = array[:4, :, :1]  # grey, of hue 0
    array[4:6] = 0
    hsv = rgb2hsv(array)
    brighter, stronger = hsv.copy(), hsv.copy()
    brighter[..., 2] = (hsv[..., 2] + [0.1, 0.2, 0.3, 0.4, 0.5][severity - 1]).clip(0, 1)
    factor, add = [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)][severity - 1]
    stronger[..., 1] = (hsv[..., 1] * factor + add).clip(0, 1)
    np.testing.assert_allclose(pixels(corrupt(image, "brightness", severity)), hsv2rgb(brighter), atol=1e-12)
    np.testing.assert_allclose(pixels(corrupt(image, "saturate", severity)), hsv2rgb(stronger), atol=1e-12)


@pytest.mark.parametrize("size", [(224, 224), (96, 64), (8, 32)], ids=str)
@every_severity
def test_pixelate_is_that_of_pillow_without_its_rounding(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    share = [0.6, 0.5, 0.4, 0.3, 0.25][severity - 1]
    small = (int(size[1] * share), int(size[0] * share))
    channels = [Image.fromarray(array[..., c].astype(np.float32)) for c in range(3)]  # mode F, nothing is rounded
    expected = [
        each.resize(small, Image.Resampling.BOX).resize(size[::-1], Image.Resampling.NEAREST) for each in channels
    ]
    np.testing.assert_allclose(pixels(corrupt(image, "pixelate", severity)), np.stack(expected, axis=-1), atol=1e-6)


@pytest.mark.parametrize("size", [(9, 25), (61, 40)], ids=str)
@every_severity
def test_pixelate_is_a_loop_over_cells_where_pixels_lie_on_their_edges(size: tuple[int, int], severity: int) -> None:
    """Where Pillow leaves it to its rounding: such a pixel counts for the cell before and shows the next one."""
    image, array = picture(*size)
    share = [0.6, 0.5, 0.4, 0.3, 0.25][severity - 1]
    for axis, side in enumerate(size):
        cells = int(side * share)
        middles = [Fraction(2 * pixel + 1, 2) * cells / side for pixel in range(side)]
        lines = np.moveaxis(array, axis, 0)
        means = [
            np.mean([line for line, at in zip(lines, middles, strict=True) if cell < at <= cell + 1], axis=0)
            for cell in range(cells)
        ]
        array = np.moveaxis(np.stack([means[math.floor(at)] for at in middles]), 0, axis)
    np.testing.assert_allclose(pixels(corrupt(image, "pixelate", severity)), array, atol=1e-12)


@sizes
@every_severity
def test_jpeg_compression_is_that_of_pillow(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    file = io.BytesIO()
    Image.fromarray((array * 255).round().astype(np.uint8)).save(
        file, "JPEG", quality=[25, 18, 15, 10, 7][severity - 1]
    )
    expected = np.asarray(Image.open(file)) / 255
    np.testing.assert_allclose(pixels(corrupt(image, "jpeg_compression", severity)), expected, atol=1e-12)


@sizes
@every_severity
def test_gaussian_blur_is_that_of_scikit_image(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    expected = gaussian(array, sigma=[1, 2, 3, 4, 6][severity - 1], channel_axis=-1)
    np.testing.assert_allclose(pixels(corrupt(image, "gaussian_blur", severity)), expected, atol=1e-12)


@sizes
@every_severity
def test_defocus_blur_is_a_mean_over_a_softened_disk(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    radius, softness = [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)][severity - 1]
    reach = max(radius, 8)
    down, right = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (down**2 + right**2 <= radius**2).astype(float)
    support = 1 if radius <= 8 else 2
    kernel = scipy.ndimage.gaussian_filter(disk / disk.sum(), softness, mode="mirror", radius=support)
    expected = [scipy.ndimage.correlate(array[..., c], kernel, mode="mirror") for c in range(3)]
    found = pixels(corrupt(image, "defocus_blur", severity))
    np.testing.assert_allclose(found, np.stack(expected, axis=-1).clip(0, 1), atol=1e-9)


def zoomed(array: np.ndarray[Any, Any], factor: float) -> np.ndarray[Any, Any]:
    height, width = array.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = array[top : top + rows, left : left + columns]
    return scipy.ndimage.zoom(middle, (factor, factor, 1), order=1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [(224, 224), (40, 61)], ids=str)
@every_severity
def test_zoom_blur_is_a_mean_of_enlargements(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    end, step = [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)][severity - 1]
    factors = np.arange(1, end, step)
    layers = [zoomed(array, factor)[: size[0], : size[1]] for factor in factors]
    expected = (array + sum(layers)) / (len(factors) + 1)
    np.testing.assert_allclose(pixels(corrupt(image, "zoom_blur", severity)), expected, atol=1e-9)


# the random ones: distributions, or loops over the same draws


@every_severity
@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise"])
def test_noise_is_normal_of_the_published_deviation(name: str, severity: int) -> None:
    scale = {"gaussian_noise": [0.08, 0.12, 0.18, 0.26, 0.38], "speckle_noise": [0.15, 0.2, 0.35, 0.45, 0.6]}[name]
    value = 0.4
    deviation = scale[severity - 1] * (value if name == "speckle_noise" else 1)
    found = corrupt(torch.full((1, 3, 64, 64), value).double(), name, severity, generator=seeded(severity))
    inside = found[(found > 0) & (found < 1)].numpy()
    low, high = -value / deviation, (1 - value) / deviation
    assert scipy.stats.kstest((inside - value) / deviation, scipy.stats.truncnorm(low, high).cdf).pvalue > 0.01
    expected = scipy.stats.norm.cdf(low) + scipy.stats.norm.sf(high)
    assert abs(1 - inside.size / found.numel() - expected) < 5 * math.sqrt(0.25 / found.numel())
    assert np.corrcoef(found[0].flatten(1))[0, 1] < 0.07  # channels apart


def test_speckle_grows_with_the_value_and_leaves_black() -> None:
    image = torch.cat([torch.zeros(1, 3, 40, 40), torch.full((1, 3, 40, 40), 0.1), torch.full((1, 3, 40, 40), 0.2)])
    dark, low, high = corrupt(image, "speckle_noise", 1, generator=seeded(0))
    assert not dark.any() and float(high.std() / low.std()) == pytest.approx(2, rel=0.05)


@every_severity
def test_shot_noise_counts_photons(severity: int) -> None:
    photons, value, size = [60, 25, 12, 5, 3][severity - 1], 0.3, 96
    found = corrupt(torch.full((1, 3, size, size), value).double(), "shot_noise", severity, generator=seeded(severity))
    counts = (found * photons).round().long()
    torch.testing.assert_close(counts.double() / photons, found, rtol=0, atol=1e-9)
    observed = counts.flatten().bincount(minlength=photons + 1).double().numpy()
    expected = scipy.stats.poisson.pmf(np.arange(photons + 1), value * photons)
    expected[-1] = scipy.stats.poisson.sf(photons - 1, value * photons)  # clipped
    often = expected * counts.numel() > 5
    assert observed[~often].sum() <= 5 * max(1, expected[~often].sum() * counts.numel())
    expected = expected[often] / expected[often].sum()
    assert scipy.stats.chisquare(observed[often], expected * observed[often].sum()).pvalue > 0.01


@every_severity
def test_impulse_noise_makes_half_of_its_share_black_and_half_white(severity: int) -> None:
    share = [0.03, 0.06, 0.09, 0.17, 0.27][severity - 1]
    image = torch.full((2, 3, 100, 100), 0.5)
    found = corrupt(image, "impulse_noise", severity, generator=seeded(severity))
    bound = 5 * math.sqrt(share / 2 / found.numel())
    assert abs(float((found == 0).float().mean()) - share / 2) < bound
    assert abs(float((found == 1).float().mean()) - share / 2) < bound
    assert ((found == 0) | (found == 1) | (found == 0.5)).all()
    changed = (found != 0.5).double()
    assert abs(float((changed[:, 0] * changed[:, 1]).mean()) - share**2) < 5 * share / math.sqrt(20_000)  # by channel


@every_severity
def test_glass_blur_copies_pixels_one_after_the_other(severity: int) -> None:
    height, width = 26, 31
    image, array = picture(height, width)
    sigma, reach, passes = [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)][severity - 1]
    chance, expected = seeded(severity), gaussian(array, sigma=sigma, channel_axis=-1)
    for _ in range(passes):
        offsets = np.floor(uniform((1, 2, height, width), chance) * 2 * reach).astype(int)[0] - reach
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                down, right = offsets[:, row, column]
                expected[row, column] = expected[row + down, column + right]
    expected = gaussian(expected, sigma=sigma, channel_axis=-1)
    found = pixels(corrupt(image, "glass_blur", severity, generator=seeded(severity)))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_chain_of_copies_is_followed_to_its_end() -> None:
    """Every pixel shows the one to its right: all of a row come from its last."""
    offsets = torch.zeros(1, 2, 9, 300, dtype=torch.long)
    offsets[:, 1] = 1
    column = torch.arange(300)
    origin = _copied_from(offsets, 2)[0]
    assert torch.equal(origin[5] - 5 * 300, torch.where((column > 2) & (column < 299), 299, column))
    assert torch.equal(origin[2] - 2 * 300, column) and torch.equal(origin[8] - 8 * 300, column)  # of the frame


def smeared(array: np.ndarray[Any, Any], radius: int, sigma: float, degrees: float) -> np.ndarray[Any, Any]:
    height, width = array.shape[:2]
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    total = np.zeros_like(array)
    for k, weight in enumerate(weights / weights.sum()):
        down = math.ceil(k * math.sin(math.radians(degrees)) - 0.5)
        right = math.ceil(k * math.cos(math.radians(degrees)) - 0.5)
        rows, columns = np.arange(height) + down, np.arange(width) + right
        total += weight * array[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    return total


@sizes
@every_severity
def test_motion_blur_is_half_a_gaussian_along_a_line(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    radius, sigma = [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)][severity - 1]
    degrees = -45 + 90 * uniform((1,), seeded(severity)).item()
    found = pixels(corrupt(image, "motion_blur", severity, generator=seeded(severity)))
    np.testing.assert_allclose(found, smeared(array, radius, sigma, degrees), atol=1e-12)


@pytest.mark.parametrize("size", [(224, 224), (40, 61)], ids=str)
@every_severity
def test_snow_is_its_parts(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    mean, spread, factor, least, radius, sigma, keep = [
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ][severity - 1]
    chance = seeded(severity)
    flakes = zoomed(mean + spread * normal((*size, 1), chance), factor)
    flakes[flakes < least] = 0
    degrees = -135 + 90 * uniform((1,), chance).item()
    fallen = smeared(flakes.clip(0, 1), radius, sigma, degrees)[: size[0], : size[1]]
    white = array @ [0.299, 0.587, 0.114] * 1.5 + 0.5
    expected = keep * array + (1 - keep) * np.maximum(array, white[..., None]) + fallen + np.rot90(fallen, 2)
    found = pixels(corrupt(image, "snow", severity, generator=seeded(severity)))
    np.testing.assert_allclose(found, expected.clip(0, 1), atol=1e-9)


def diamond_square(side: int, decay: float, chance: torch.Generator) -> np.ndarray[Any, Any]:
    """Point by point, on a torus."""
    land, step, wobble = np.zeros((side, side)), side, 100.0
    while step > 1:
        half, count = step // 2, side // step
        for first, second, axes in ((half, half, False), (0, half, True), (half, 0, True)):
            draws = uniform((1, 1, count, count), chance)[0, 0]
            for i in range(count):
                for j in range(count):
                    y, x = i * step + first, j * step + second
                    around = [(y - half, x), (y + half, x), (y, x - half), (y, x + half)]
                    corners = [(y - half, x - half), (y - half, x + half), (y + half, x - half), (y + half, x + half)]
                    mean = sum(land[a % side, b % side] for a, b in (around if axes else corners)) / 4
                    land[y, x] = mean + wobble * (2 * draws[i, j] - 1) * wobble
        step, wobble = half, wobble / decay
    return (land - land.min()) / (land.max() - land.min())  # type: ignore[no-any-return]


@pytest.mark.parametrize(("size", "side"), [((32, 32), 32), ((20, 33), 64), ((17, 9), 32)])
@every_severity
def test_fog_is_a_plasma_fractal(size: tuple[int, int], side: int, severity: int) -> None:
    image, array = picture(*size)
    array *= 0.8  # the brightest is not 1
    amount, decay = [(1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)][severity - 1]
    land = diamond_square(side, decay, seeded(severity))[: size[0], : size[1], None]
    expected = (array + amount * land) * array.max() / (array.max() + amount)
    found = pixels(corrupt(image, "fog", severity, generator=seeded(severity)))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("size", [(224, 224), (160, 61), (30, 200)], ids=str)
@every_severity
def test_elastic_transform_looks_up_each_pixel_near_by(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    strength = 250 * [0.05, 0.065, 0.085, 0.1, 0.12][severity - 1]
    sigma = (0.01 * size[0], 0.01 * size[1])
    field = 0.005 * size[0] * (2 * uniform((2, *size), seeded(severity)) - 1)
    down, right = (strength * gaussian(part, sigma, mode="reflect", truncate=3) for part in field)
    row, column = np.mgrid[: size[0], : size[1]]
    places = [row + down, column + right]
    expected = [scipy.ndimage.map_coordinates(array[..., c], places, order=1, mode="reflect") for c in range(3)]
    found = pixels(corrupt(image, "elastic_transform", severity, generator=seeded(severity)))
    np.testing.assert_allclose(found, np.stack(expected, axis=-1), atol=1e-9)


@sizes
@pytest.mark.parametrize("severity", [4, 5])
def test_mud_covers_what_it_hits(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    mean, spread = [(0.65, 0.3), (0.67, 0.4)][severity - 4]
    liquid = gaussian(mean + spread * normal(size, seeded(severity)), sigma=1)
    cover = gaussian((liquid > 0.65).astype(float), sigma=1.5)[..., None]
    cover[cover < 0.8] = 0
    expected = (1 - cover) * array + cover * np.array([63, 42, 20]) / 255
    found = pixels(corrupt(image, "spatter", severity, generator=seeded(severity)))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert 0.05 < (cover > 0).mean() < 0.5


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_water_is_pale_turquoise_where_the_drops_are(severity: int) -> None:
    sigma, least, strength = [(4, 0.69, 0.6), (3, 0.68, 0.6), (2, 0.68, 0.5)][severity - 1]
    clean = torch.full((1, 3, 160, 120), 0.1, dtype=torch.float64)
    added = corrupt(clean, "spatter", severity, generator=seeded(severity))[0] - 0.1
    liquid = gaussian(0.65 + 0.3 * normal((160, 120), seeded(severity)), sigma=sigma)
    assert not added[:, torch.from_numpy(liquid < least)].any()
    assert (added[1] > 0).sum() > 0.3 * (liquid >= least).sum() > 0
    torch.testing.assert_close(added[1], added[2])
    torch.testing.assert_close(added[0] * 238, added[1] * 175)
    assert float(added[1].max()) == pytest.approx(strength * 238 / 255)


DROPS = """
..........................
..........................
......bfgc.......cb.......
......bfggecccddfiie......
.......cfhhhggfeeggd......
........ehiihfd...........
........dikjgc............
........cikid.........b...
.........hkic........bb...
.........diid.............
..........gie.............
..........dgf.............
...ghc.....dc.............
...hkhb...................
...cggd...................
.......befgfb.............
..........................
..........................
"""
CANNY = """
..........................
..........................
......#####.....####......
......#....#####...#......
......##.........###......
.......#......##..........
........#....##...........
........#....#.......##...
........#...#........#....
.........#..#.............
.........#..#.............
..........#.#.............
...####...###.............
...#..#...................
...####.#####.............
............#.............
.......######.............
..........................
"""
RELIEF = [
    0,
    19,
    47,
    76,
    0,
    28,
    0,
    47,
    104,
    161,
    151,
    94,
    38,
    0,
    0,
    19,
    47,
    76,
    113,
    170,
    76,
    161,
    227,
    198,
    113,
    47,
    0,
    19,
    66,
    123,
    161,
    198,
    227,
    151,
    198,
    170,
    85,
    38,
    19,
    66,
    113,
    132,
    104,
    28,
    9,
    47,
    66,
    76,
    66,
    9,
    28,
    107,
    28,
    28,
    19,
    76,
    94,
    170,
    9,
    9,
    47,
    132,
    0,
    76,
    161,
    0,
    85,
    170,
    0,
    0,
    0,
    85,
    170,
    9,
    9,
    9,
    0,
    72,
    82,
    66,
    28,
    19,
    0,
    0,
    0,
    85,
    170,
]


def test_edges_and_relief_of_drops_are_those_of_opencv() -> None:
    """OpenCV 5.0: Canny(50, 150), distance, blur, equalised, filtered, blur; the relief of the drops, "a" is 175."""
    levels = [[0 if each == "." else 175 + ord(each) - ord("a") for each in line] for line in DROPS.split()]
    drops = torch.tensor(levels).double()[None, None]
    edges = ["".join(".#"[each] for each in line) for line in _edges(drops)[0, 0].long().tolist()]
    assert edges == CANNY.split()
    torch.testing.assert_close(255 * relief(drops)[drops > 0], torch.tensor(RELIEF).double(), rtol=0, atol=1)


def test_a_step_within_a_drop_is_no_edge() -> None:
    drop = torch.zeros(1, 1, 20, 20)
    drop[..., 4:16, 4:16] = 178
    drop[..., 8:12, 8:12] = 184
    assert _edges(drop).any() and not _edges(drop)[..., 6:14, 6:14].any()


def test_frost_is_the_picture_and_ice_in_the_published_weights() -> None:
    image, array = picture(64, 80)
    for severity, (keep, add) in enumerate(((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), 1):
        frozen = pixels(ice(image, seeded(severity)))
        found = pixels(corrupt(image, "frost", severity, generator=seeded(severity)))
        np.testing.assert_allclose(found, (keep * array + add * frozen).clip(0, 1), atol=1e-12)


def test_ice_has_the_colours_and_the_detail_of_photographs_of_ice() -> None:
    """What was measured on the five photographs that the package draws from, as it lays them on 224 pixels.

    Mean of each channel, contrast (the deviation of grey), and how the amplitude falls with frequency: relative to that
    of 4 cycles a picture, at 16 and at 64 cycles it lies within 0.21 and 0.47, and 0.07 and 0.16.
    """
    frozen = ice(torch.zeros(40, 3, 224, 224), seeded(0))
    colours = frozen.mean(dim=(2, 3))
    panes = torch.tensor([[78, 150, 166], [201, 205, 214], [138, 153, 165], [112, 123, 135]]) / 255
    distance, nearest = torch.cdist(colours, panes).min(dim=1)
    assert distance.max() < 0.02
    counts = nearest.bincount(minlength=4)
    assert scipy.stats.chisquare(counts, [8, 16, 8, 8]).pvalue > 0.01
    grey = frozen.mean(dim=1)
    contrast = torch.tensor([0.059, 0.075, 0.103, 0.136])[nearest]
    assert (grey.std(dim=(1, 2)) / contrast - 1).abs().mean() < 0.15
    window = torch.hann_window(224)
    spectrum = torch.fft.fft2((grey - grey.mean(dim=(1, 2), keepdim=True)) * window * window[:, None]).abs().square()
    frequency = torch.fft.fftfreq(224) * 224
    ring = torch.hypot(frequency[:, None], frequency).long()
    amplitude = [float(spectrum[:, ring == radius].mean().sqrt()) for radius in (4, 16, 64)]
    assert 0.3 < amplitude[1] / amplitude[0] < 0.47 and 0.08 < amplitude[2] / amplitude[0] < 0.16


def test_ice_without_crystals_is_finite() -> None:
    assert torch.equal(_standard(torch.zeros(2, 1, 8, 8)), torch.zeros(2, 1, 8, 8))
    ramp = _standard(torch.stack([torch.arange(64.0), 5 - torch.arange(64.0)]).view(2, 1, 8, 8))
    torch.testing.assert_close(ramp.mean(dim=(2, 3)), torch.zeros(2, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(ramp.std(dim=(2, 3)), torch.ones(2, 1))


# drawn for each picture


def test_names_and_severities_are_drawn_evenly() -> None:
    drawn = Corruptions().draw(3000, generator=seeded(0))
    names, severities = [what.name for what in drawn], [what.severity for what in drawn]
    assert set(names) == set(CORRUPTIONS[:15]) and set(severities) == set(SEVERITIES)
    table = np.array([[names.count(name) for name in CORRUPTIONS[:15]]])
    assert scipy.stats.chisquare(table[0]).pvalue > 0.01
    pairs = np.zeros((15, 5))
    for name, severity in drawn:
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
        ({"severity": 0}, "`severity` should be a whole number from 1 to 5, found 0"),
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
