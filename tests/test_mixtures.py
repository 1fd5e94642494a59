"""The mixtures of degradations, each part against scipy, Pillow or a loop."""

import io
import math
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
from torch import Tensor

from restoreloss import MixtureA, MixtureB
from restoreloss.augmentations.mixtures import blur, gaussian_kernel, jpeg, shrink


def photo(height: int = 96, width: int = 121) -> Tensor:
    return torch.from_numpy(photos.astronaut()[:height, :width].copy()).permute(2, 0, 1)[None].double() / 255


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("sigma", "angle"), [((3.0, 1.0), 0.0), ((4.0, 1.5), 0.7), ((2.0, 2.0), 1.0), ((1.0, 5.0), 3)])
def test_the_covariance_of_a_kernel_is_what_was_asked(sigma: tuple[float, float], angle: float) -> None:
    kernel = gaussian_kernel(41, sigma, angle)
    place = torch.arange(41).double() - 20
    down, right = torch.meshgrid(place, place, indexing="ij")
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    wanted = turn @ torch.diag(torch.tensor(sigma).double() ** 2) @ turn.T
    found = torch.tensor(
        [
            [(kernel * right * right).sum(), (kernel * right * down).sum()],
            [(kernel * down * right).sum(), (kernel * down * down).sum()],
        ]
    )
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0.01)
    torch.testing.assert_close(kernel.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(kernel, kernel.flip(0, 1))


def test_a_kernel_without_width_leaves_the_picture() -> None:
    kernel = gaussian_kernel(41, (0.0, 0.0))
    torch.testing.assert_close(blur(photo(), kernel), photo(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
def test_blur_is_that_of_scipy_on_a_photograph(sigma: float) -> None:
    found = blur(photo(), gaussian_kernel(41, (sigma, sigma)))
    for channel, expected in zip(found[0], photo()[0].numpy(), strict=True):
        wanted = scipy.ndimage.gaussian_filter(expected, sigma, mode="mirror", truncate=20 / sigma)
        np.testing.assert_allclose(channel.numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("size", [(50, 47), (41, 9), (3, 30), (2, 2), (1, 5)])
def test_a_turned_blur_is_a_convolution_also_where_the_kernel_is_larger(size: tuple[int, int]) -> None:
    kernel = gaussian_kernel(21, (5.0, 1.0), 0.6)
    kernel[0, 0] += 0.3  # neither symmetric
    picture = photo(*size)
    found = blur(picture, kernel)
    for channel, expected in zip(found[0], picture[0].numpy(), strict=True):
        wanted = scipy.ndimage.convolve(expected, kernel.numpy(), mode="mirror")
        np.testing.assert_allclose(channel.numpy(), wanted, atol=1e-10)


def test_shrinking_is_bilinear_without_antialiasing() -> None:
    picture, scale = photo(40, 51), 3.7
    found = shrink(picture, scale)
    assert found.shape[2:] == (10, 13)

    def weights(old: int, new: int) -> Tensor:
        matrix = torch.zeros(new, old, dtype=torch.float64)
        for k in range(new):
            at = min(max((k + 0.5) * old / new - 0.5, 0.0), old - 1.0)
            low = int(at)
            matrix[k, low] += 1 - (at - low)
            matrix[k, min(low + 1, old - 1)] += at - low
        return matrix

    torch.testing.assert_close(found, weights(40, 10) @ picture @ weights(51, 13).T)
    assert shrink(picture, 100).shape[2:] == (1, 1)


@pytest.mark.parametrize("quality", [1, 50, 75, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_pillow(quality: int, channels: int) -> None:
    picture = photo()[:, :channels]
    pixels = (picture[0] * 255).round().byte().movedim(0, -1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "JPEG", quality=quality)
    expected = torch.from_numpy(np.array(Image.open(file)).reshape(pixels.shape)).movedim(-1, 0)
    assert torch.equal((jpeg(picture, quality)[0] * 255).round().byte(), expected)
    assert jpeg(picture + 3, quality).max() <= 1


def test_mixture_a_is_its_three_parts() -> None:
    picture = photo(64, 80)
    small = torch.nn.functional.interpolate(picture, size=(8, 10), mode="bilinear")
    expected = torch.nn.functional.interpolate(jpeg(small, 75), size=(64, 80), mode="bilinear")
    torch.testing.assert_close(MixtureA()(picture), expected)
    assert not torch.equal(MixtureA()(picture), MixtureA(quality=20)(picture))


def test_mixture_b_is_its_parts_in_this_order() -> None:
    mixture, picture = MixtureB(), photo()
    (what,) = mixture.draw(1, generator=seeded(4))
    found = mixture.degrade(picture, what, generator=seeded(5))
    small = shrink(blur(picture, gaussian_kernel(41, what.sigma, what.angle)), what.scale)
    noise = torch.randn(small.shape, generator=seeded(5), dtype=torch.float64)
    small = jpeg(small + what.noise / 255 * noise, what.quality)
    torch.testing.assert_close(found, torch.nn.functional.interpolate(small, size=picture.shape[2:], mode="bilinear"))


def test_the_noise_has_the_strength_that_was_drawn() -> None:
    mixture = MixtureB(sigma=(0, 0), scale=(1, 1), noise=(8, 8), quality=(100, 100))
    grey = torch.full((1, 3, 256, 256), 0.5, dtype=torch.float64)
    luma = torch.tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1)  # what JPEG keeps at full resolution
    found = (mixture(grey, generator=seeded(0))[0] * luma).sum(0)
    assert abs(float(found.std()) * 255 / (8 * float(luma.square().sum().sqrt())) - 1) < 0.02
    assert abs(float(found.mean()) - 0.5) < 0.002


def test_the_draws_are_uniform_and_independent() -> None:
    drawn = MixtureB().draw(4000, generator=seeded(0))
    columns = {
        "first": ([d.sigma[0] for d in drawn], (0.1, 8)),
        "scale": ([d.scale for d in drawn], (1, 16)),
        "noise": ([d.noise for d in drawn], (0, 10)),
        "angle": ([d.angle for d in drawn if d.sigma[0] != d.sigma[1]], (-math.pi, math.pi)),
        "second": ([d.sigma[1] for d in drawn if d.sigma[0] != d.sigma[1]], (0.1, 8)),
    }
    for name, (values, (low, high)) in columns.items():
        assert scipy.stats.kstest(values, "uniform", args=(low, high - low)).pvalue > 0.01, name
    turned = sum(d.sigma[0] != d.sigma[1] for d in drawn)
    assert abs(turned / 4000 - 0.5) < 0.03
    assert all(d.angle == 0 for d in drawn if d.sigma[0] == d.sigma[1])
    qualities = [d.quality for d in drawn]
    assert set(qualities) == set(range(50, 101))
    assert scipy.stats.chisquare(np.bincount(qualities)[50:]).pvalue > 0.01
    table = np.array([[d.sigma[0], d.scale, d.noise, d.quality] for d in drawn])
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 0.05
    assert {d.sigma[0] == d.sigma[1] for d in MixtureB(anisotropic=0).draw(50)} == {True}
    assert {d.sigma[0] == d.sigma[1] for d in MixtureB(anisotropic=1).draw(50)} == {False}


def test_seeds_and_samples() -> None:
    batch = photo(48, 48).repeat(3, 1, 1, 1)
    one, same, other = (MixtureB()(batch, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    before = torch.get_rng_state()
    MixtureB()(batch, generator=seeded(1))
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)]),
)
def test_shape_dtype_and_range_are_kept(
    shape: tuple[int, ...], dtype: torch.dtype, input_range: tuple[float, float]
) -> None:
    low, high = input_range
    images = (torch.rand(shape) * (high - low) + low).to(dtype).requires_grad_()
    for mixture in (MixtureA(input_range=input_range), MixtureB(input_range=input_range)):
        degraded = mixture(images)
        assert degraded.shape == shape and degraded.dtype == dtype and not degraded.requires_grad
        assert degraded.min() >= low - 1e-6 and degraded.max() <= high + 1e-6


def test_another_range_is_the_same_degradation() -> None:
    picture = photo(40, 40)
    unit = MixtureB()(picture, generator=seeded(3))
    signed = MixtureB(input_range=(-1, 1))(2 * picture - 1, generator=seeded(3))
    torch.testing.assert_close(signed, 2 * unit - 1)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MixtureA(0.5), "scale"),
        (lambda: MixtureA(quality=0), "quality"),
        (lambda: MixtureA(quality=101), "quality"),
        (lambda: MixtureB(sigma=(2, 1)), "sigma"),
        (lambda: MixtureB(sigma=(-1, 1)), "sigma"),
        (lambda: MixtureB(scale=(0.5, 2)), "scale"),
        (lambda: MixtureB(noise=(0, math.inf)), "noise"),
        (lambda: MixtureB(noise=3), "noise"),
        (lambda: MixtureB(quality=(50, 200)), "quality"),
        (lambda: MixtureB(anisotropic=1.5), "anisotropic"),
        (lambda: MixtureB(kernel_size=40), "kernel_size"),
        (lambda: MixtureB(input_range=(1, 0)), "input_range"),
    ],
)
def test_options_out_of_bounds(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()


@pytest.mark.parametrize(
    "images",
    [torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8).byte(), torch.rand(0, 3, 8, 8), None],
)
def test_images_that_do_not_fit(images: Any) -> None:
    for mixture in (MixtureA(), MixtureB()):
        with pytest.raises(ValueError, match="`images` should"):
            mixture(images)
