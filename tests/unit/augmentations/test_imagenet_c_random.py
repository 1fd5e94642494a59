"""Random corruptions, against their distributions or loops over the same draws."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from skimage.filters import gaussian

from restoreloss import corrupt
from restoreloss.augmentations.filters import _edges, relief
from restoreloss.augmentations.imagenet_c import _copied_from
from restoreloss.augmentations.textures import _standard, ice
from tests.helpers.corruptions import every_severity, picture, pixels, seeded, sizes, zoomed


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> np.ndarray[Any, Any]:
    return torch.rand(shape, generator=generator, dtype=torch.float64).numpy()


def normal(shape: tuple[int, ...], generator: torch.Generator) -> np.ndarray[Any, Any]:
    return torch.randn(shape, generator=generator, dtype=torch.float64).numpy()


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
