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
