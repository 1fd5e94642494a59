"""Corruptions without randomness, against other libraries."""

import io
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image
from skimage.color import hsv2rgb, rgb2hsv
from skimage.filters import gaussian

from restoreloss import corrupt
from tests.helpers.corruptions import SEVERITIES, every_severity, picture, pixels, sizes, zoomed

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


@pytest.mark.parametrize("size", [(224, 224), (40, 61)], ids=str)
@every_severity
def test_zoom_blur_is_a_mean_of_enlargements(size: tuple[int, int], severity: int) -> None:
    image, array = picture(*size)
    end, step = [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)][severity - 1]
    factors = np.arange(1, end, step)
    layers = [zoomed(array, factor)[: size[0], : size[1]] for factor in factors]
    expected = (array + sum(layers)) / (len(factors) + 1)
    np.testing.assert_allclose(pixels(corrupt(image, "zoom_blur", severity)), expected, atol=1e-9)
