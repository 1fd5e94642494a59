"""The colour fix, against a dilated convolution written out and against PyWavelets itself."""

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from restoreloss import WaveletColorFix


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_trous(image: Tensor, levels: int) -> Tensor:
    """Level by level: the 3 x 3 kernel dilated by 2^i, edges replicated, each channel alone."""
    kernel = torch.tensor([[1.0, 2.0, 1.0]], dtype=image.dtype)
    kernel = (kernel.T @ kernel / 16).expand(image.shape[1], 1, 3, 3)
    for level in range(levels):
        step = 2**level
        padded = F.pad(image, (step, step, step, step), mode="replicate")
        image = F.conv2d(padded, kernel, dilation=step, groups=image.shape[1])
    return image


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("shape", [(2, 3, 40, 33), (1, 1, 7, 64), (1, 5, 1, 1)])
def test_low_is_the_a_trous_transform(levels: int, shape: tuple[int, ...]) -> None:
    image = images(*shape)
    torch.testing.assert_close(WaveletColorFix(levels).low(image), a_trous(image, levels))


@pytest.mark.filterwarnings("ignore:Level value")  # of a size below the filter's
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db7", "sym4", "coif2", "bior4.4", "rbio2.2", "dmey"])
@pytest.mark.parametrize("size", [(32, 32), (33, 20), (5, 70)])
def test_low_is_the_approximation_of_pywavelets(wavelet: str, size: tuple[int, int]) -> None:
    image, levels = images(1, 2, *size), 2
    approximation, *details = pywt.wavedec2(image.numpy(), wavelet, level=levels)
    zeros = [tuple(np.zeros_like(band) for band in bands) for bands in details]
    expected = torch.from_numpy(pywt.waverec2([approximation, *zeros], wavelet)[..., : size[0], : size[1]].copy())
    torch.testing.assert_close(WaveletColorFix(levels, wavelet).low(image), expected, atol=1e-10, rtol=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), st.integers(1, 70)),
    st.integers(1, 6),
    st.sampled_from([None, "haar", "db3", "bior2.2"]),
)
def test_the_two_parts_are_the_whole(shape: tuple[int, ...], levels: int, wavelet: str | None) -> None:
    fix, u, v = WaveletColorFix(levels, wavelet), images(*shape), images(*shape, seed=1)
    torch.testing.assert_close(fix.high(u) + fix.low(u), u)
    torch.testing.assert_close(fix(u, v), fix.high(u) + fix.low(v))
    assert torch.equal(fix(u, u), u)
    flat = torch.full_like(u, 0.3)
    torch.testing.assert_close(fix.low(flat), flat)
    torch.testing.assert_close(fix(u, u + 0.25), u + 0.25)  # another brightness altogether


@pytest.mark.parametrize("wavelet", [None, "db2"])
def test_gradients_reach_both(wavelet: str | None) -> None:
    u, v = (images(1, 2, 5, 6, seed=seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(WaveletColorFix(2, wavelet), (u, v))


@pytest.mark.parametrize("wavelet", [None, "db2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(wavelet: str | None, dtype: torch.dtype) -> None:
    fix, u, v = WaveletColorFix(wavelet=wavelet), images(1, 3, 40, 40, dtype=dtype), images(1, 3, 40, 40, dtype=dtype)
    found = fix(u, v)
    assert found.dtype == dtype
    assert torch.equal(found, fix(u.float(), v.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fix(u.float(), v.float())
    torch.testing.assert_close(inside, fix(u.float(), v.float()))


def test_it_compiles() -> None:
    fix, u, v = WaveletColorFix(), images(1, 3, 20, 24), images(1, 3, 20, 24, seed=1)
    torch.testing.assert_close(torch.compile(fix, backend="aot_eager", fullgraph=True)(u, v), fix(u, v))


def test_what_is_refused() -> None:
    for levels in (0, -1, 2.0):
        with pytest.raises(ValueError, match="`levels` should be a whole number"):
            WaveletColorFix(levels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="discrete wavelet of PyWavelets"):
        WaveletColorFix(wavelet="morl")
    fix, image = WaveletColorFix(), torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"`color` should have the shape of `detail` \(1, 3, 8, 8\)"):
        fix(image, image[..., :4])
    with pytest.raises(ValueError, match="`detail` should be a float tensor"):
        fix((image * 255).byte(), (image * 255).byte())
    with pytest.raises(ValueError, match="`image` should be a float tensor"):
        fix.low(image[0])


def by_hand(image: Tensor, levels: int) -> Tensor:
    """Pixel by pixel; beyond the edge lies the edge."""
    for level in range(levels):
        step, (height, width) = 2**level, image.shape[-2:]
        blurred = torch.zeros_like(image)
        for i in range(height):
            for j in range(width):
                for down, weight in ((-step, 1), (0, 2), (step, 1)):
                    for right, other in ((-step, 1), (0, 2), (step, 1)):
                        row, column = min(max(i + down, 0), height - 1), min(max(j + right, 0), width - 1)
                        blurred[..., i, j] += weight * other / 16 * image[..., row, column]
        image = blurred
    return image


def test_low_is_a_loop_over_pixels() -> None:
    image = images(2, 2, 6, 5)
    torch.testing.assert_close(WaveletColorFix(4).low(image), by_hand(image, 4), rtol=0, atol=1e-12)


def test_five_levels_of_a_trous_by_default() -> None:
    image = images(1, 1, 40, 40)
    assert torch.equal(WaveletColorFix().low(image), WaveletColorFix(5).low(image))
    spike = torch.zeros(1, 1, 127, 127, dtype=torch.float64)
    spike[..., 63, 63] = 1
    seen = WaveletColorFix().low(spike)[0, 0, 63].nonzero().flatten()
    assert (seen.min(), seen.max()) == (63 - 31, 63 + 31)  # 1 + 2 + 4 + 8 + 16 pixels to either side


# the first, one in the middle and the last of each family
FAMILIES = ("haar", "db", "sym", "coif", "bior", "rbio", "dmey")
WAVELETS = sorted({names[k] for names in map(pywt.wavelist, FAMILIES) for k in (0, len(names) // 2, -1)})


@pytest.mark.filterwarnings("error:::restoreloss")
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_every_family_of_discrete_wavelets_serves(wavelet: str) -> None:
    fix = WaveletColorFix(3, wavelet)
    for size in ((1, 1), (7, 30), (64, 33)):
        u, v = images(1, 2, *size), images(1, 2, *size, seed=1)
        torch.testing.assert_close(fix(u, v), fix.high(u) + fix.low(v))
        flat = torch.full_like(u, 0.3)
        # dmey is a truncated Meyer wavelet, the filters of others are tabulated to six digits or so
        torch.testing.assert_close(fix.low(flat), flat, rtol=0, atol=5e-3 if wavelet == "dmey" else 1e-5)
        assert torch.equal(fix(u, u), u)


@pytest.mark.parametrize("wavelet", [None, "db2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_detail(wavelet: str | None, dtype: torch.dtype) -> None:
    fix, (u, v) = WaveletColorFix(wavelet=wavelet), (images(2, 1, 9, 12, seed=seed) for seed in (0, 1))
    u = u.to(dtype)
    for found in (fix(u, v.to(dtype)), fix(u, v.float()), fix.low(u), fix.high(u)):
        assert found.dtype == dtype
    found, exact = fix(u, v.to(dtype)).double(), fix(u.double(), v.to(dtype).double())
    rounding = 1e-14 if dtype == torch.float64 else 1e-6  # of single precision
    torch.testing.assert_close(found, exact, rtol=torch.finfo(dtype).eps, atol=rounding)


@pytest.mark.parametrize("wavelet", [None, "db2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_lower_the_precision(wavelet: str | None, dtype: torch.dtype) -> None:
    fix, u, v = WaveletColorFix(wavelet=wavelet), *(images(1, 3, 20, 20, seed=seed).float() for seed in (0, 1))
    expected = fix(u, v)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(fix(u, v), expected)


@pytest.mark.parametrize("wavelet", ["rbio1.3", "db5"])  # of which no other test has left anything
def test_what_inference_has_computed_serves_a_gradient_later(wavelet: str) -> None:
    fix, image = WaveletColorFix(2, wavelet), images(1, 1, 23, 29).requires_grad_()
    with torch.inference_mode():
        fix.low(image)
    fix.low(image).sum().backward()
    assert image.grad is not None and image.grad.any()


def test_channels_and_samples_are_alone() -> None:
    u, v = images(3, 5, 12, 9), images(3, 5, 12, 9, seed=1)
    for fix in (WaveletColorFix(), WaveletColorFix(2, "sym3")):
        together = fix(u, v)
        for n in range(3):
            for c in range(5):
                alone = fix(u[n : n + 1, c : c + 1], v[n : n + 1, c : c + 1])
                torch.testing.assert_close(together[n, c], alone[0, 0], rtol=0, atol=1e-12)


def test_the_color_of_one_and_the_detail_of_the_other() -> None:
    """A fine pattern on a slope: the slope is taken from the other image, the pattern stays."""
    stripes = (torch.arange(64.0) % 2 - 0.5).expand(1, 3, 64, 64)
    slope = torch.linspace(0, 1, 64).view(64, 1).expand(1, 3, 64, 64)
    inner = (..., slice(None), slice(4, -4))  # of the pattern the edge has a low frequency as well
    for fix in (WaveletColorFix(3), WaveletColorFix(3, "db4")):
        found = fix(stripes + 7, slope)
        torch.testing.assert_close((found - stripes)[inner], fix.low(slope)[inner], rtol=0, atol=0.1)


@pytest.mark.parametrize("color", [None, "red", [[[0.5]]]])
def test_a_color_that_is_no_image_is_refused(color: object) -> None:
    with pytest.raises(ValueError, match="`color` should have the shape of `detail`"):
        WaveletColorFix()(torch.rand(1, 3, 8, 8), color)  # type: ignore[arg-type]
