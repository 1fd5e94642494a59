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


@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 2, -3.0])
def test_a_kernel_is_a_gaussian_density_on_the_pixels(angle: float) -> None:
    """Of the covariance R diag(sigma^2) R^T, x to the right and y downwards."""
    sigma = (3.0, 1.2)
    cos, sin = math.cos(angle), math.sin(angle)
    covariance = np.array([[cos, -sin], [sin, cos]]) @ np.diag(np.square(sigma)) @ np.array([[cos, sin], [-sin, cos]])
    density = scipy.stats.multivariate_normal([0, 0], covariance)
    expected = np.array([[density.pdf([x, y]) for x in range(-9, 10)] for y in range(-9, 10)])
    np.testing.assert_allclose(gaussian_kernel(19, sigma, angle), expected / expected.sum(), rtol=1e-9, atol=1e-300)


def test_blur_keeps_batches_channels_and_dtypes_apart() -> None:
    batch, kernel = torch.cat([photo(20, 30), photo(20, 30).flip(-1) ** 2]), gaussian_kernel(9, (2.0, 1.0), 0.3)
    together = blur(batch, kernel)
    for n in range(2):
        for c in range(3):
            alone = blur(batch[n : n + 1, c : c + 1], kernel)[0, 0]
            torch.testing.assert_close(together[n, c], alone, rtol=0, atol=1e-12)
    single = blur(batch.float(), kernel.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), together, rtol=0, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1.0, 1.5, 2.0, 3.3, 8.0, 16.0]))
def test_a_reduction_is_a_loop_over_pixels(height: int, width: int, scale: float) -> None:
    picture = torch.rand(height, width, generator=seeded(height + 41 * width), dtype=torch.float64)
    found = shrink(picture[None, None], scale)[0, 0]
    rows, columns = max(1, math.floor(height / scale)), max(1, math.floor(width / scale))
    assert found.shape == (rows, columns)

    def places(k: int, old: int, new: int) -> list[tuple[int, float]]:
        at = max((k + 0.5) * old / new - 0.5, 0.0)
        return [(min(math.floor(at), old - 1), 1 - at % 1), (min(math.floor(at) + 1, old - 1), at % 1)]

    for i in range(rows):
        for j in range(columns):
            expected = sum(
                a * b * float(picture[row, column])
                for row, a in places(i, height, rows)
                for column, b in places(j, width, columns)
            )
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-12)


def test_a_mixture_without_strength_is_jpeg_alone() -> None:
    mixture, picture = MixtureB(sigma=(0, 0), scale=(1, 1), noise=(0, 0), quality=(90, 90)), photo()
    torch.testing.assert_close(mixture(picture), jpeg(picture, 90), rtol=0, atol=1e-12)
    torch.testing.assert_close(MixtureA(1, 90)(picture), jpeg(picture, 90), rtol=0, atol=1e-12)
    assert (mixture(picture) - picture).square().mean() < 0.02**2


def test_every_picture_gets_the_degradation_that_was_drawn_for_it() -> None:
    mixture, batch = MixtureB(), torch.cat([photo(40, 40), 1 - photo(40, 40)])
    found, generator = mixture(batch, generator=seeded(8)), seeded(8)
    drawn = mixture.draw(2, generator=generator)
    expected = [
        mixture.degrade(picture, what, generator=generator) for picture, what in zip(batch.split(1), drawn, strict=True)
    ]
    assert torch.equal(found, torch.cat(expected))
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("level", [2.0, 10.0])
def test_the_noise_of_a_grey_picture_is_that_of_its_name(level: float) -> None:
    mixture = MixtureB(sigma=(0, 0), scale=(1, 1), noise=(level, level), quality=(100, 100))
    found = mixture(torch.full((1, 1, 200, 200), 0.5, dtype=torch.float64), generator=seeded(0)) * 255
    # rounded before JPEG, in its frequencies and after it: each adds a twelfth
    assert abs(float(found.var()) - level**2 - 0.25) < 5 * level**2 * math.sqrt(2 / 40_000)
    assert abs(scipy.stats.kurtosis(found.flatten())) < 5 * math.sqrt(24 / 40_000)


def test_noise_comes_after_the_reduction() -> None:
    """Noise of the large picture would be averaged or thinned; that of the small one is enlarged with it."""
    mixture = MixtureB(sigma=(0, 0), scale=(4, 4), noise=(10, 10), quality=(100, 100))
    found = mixture(torch.full((1, 1, 256, 256), 0.5, dtype=torch.float64), generator=seeded(0))[0, 0]
    neighbours = np.corrcoef(found[:, :-1].flatten(), found[:, 1:].flatten())[0, 1]
    assert neighbours > 0.9  # they are a quarter of a pixel apart


def test_mixture_a_does_the_same_to_a_picture_alone_and_among_others() -> None:
    batch = torch.cat([photo(40, 51), 1 - photo(40, 51), photo(40, 51).flip(-1)])
    together = MixtureA()(batch)
    for n in range(3):
        assert torch.equal(MixtureA()(batch[n : n + 1])[0], together[n])
    assert torch.equal(MixtureA()(batch), together)


def test_without_a_generator_the_draws_are_those_of_torch() -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(MixtureB()(photo(40, 40)))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_degraded_in_single(dtype: torch.dtype) -> None:
    images = photo(40, 40).to(dtype)
    for degrade in (MixtureA(), lambda images: MixtureB()(images, generator=seeded(2))):
        assert torch.equal(degrade(images), degrade(images.float()).to(dtype))


@pytest.mark.parametrize("mixture", [MixtureA(2), MixtureB()])
def test_images_are_clipped_and_left_as_they_were(mixture: Any) -> None:
    images = 3 * photo(30, 30) - 1
    kept, options = images.clone(), [{"generator": seeded(0)} if isinstance(mixture, MixtureB) else {} for _ in "ab"]
    with pytest.warns(UserWarning, match=r"`images` spans .* `input_range` says \(0, 1\)"):
        found = mixture(images, **options[0])
    assert torch.equal(found, mixture(images.clamp(0, 1), **options[1]))
    assert torch.equal(images, kept)


def test_grey_stays_grey() -> None:
    grey = photo(40, 40).mean(dim=1, keepdim=True)
    assert MixtureB()(grey, generator=seeded(0)).shape == MixtureA()(grey).shape == (1, 1, 40, 40)
    assert torch.equal(jpeg(grey, 50), jpeg(grey.expand(-1, 3, -1, -1), 50)[:, :1])  # one channel is coded as luma


@pytest.mark.parametrize("coin", [0.0, 0.3, 1.0])
def test_as_many_blurs_have_two_widths_as_was_asked(coin: float) -> None:
    drawn = MixtureB(anisotropic=coin).draw(3000, generator=seeded(1))
    share = sum(what.sigma[0] != what.sigma[1] for what in drawn) / 3000
    assert abs(share - coin) <= 5 * math.sqrt(coin * (1 - coin) / 3000)


def test_draws_stay_within_what_was_asked() -> None:
    mixture = MixtureB(sigma=(1, 2), scale=(3, 4), noise=(5, 6), quality=(70, 71))
    drawn = mixture.draw(300, generator=seeded(0))
    for what in drawn:
        assert all(1 <= sigma <= 2 for sigma in what.sigma) and 3 <= what.scale <= 4 and 5 <= what.noise <= 6
        assert -math.pi <= what.angle <= math.pi
    assert {what.quality for what in drawn} == {70, 71}
    fixed = MixtureB(sigma=(2, 2), scale=(3, 3), noise=(4, 4), quality=(60, 60), anisotropic=0).draw(2)
    assert fixed[0] == fixed[1] == ((2.0, 2.0), 0.0, 3.0, 4.0, 60)
