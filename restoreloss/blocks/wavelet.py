"""WaveletColorFix: the detail of one image in the colors of another."""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss._optional import require
from restoreloss.checks import check_integer, describe
from restoreloss.images import at_least_float32


class WaveletColorFix(nn.Module):
    r"""The high frequencies of one image with the low frequencies of another.

    .. math:: \text{fixed} = \text{High}(u) + \text{Low}(v) = u + \text{Low}(v - u) \quad\text{(Eq. 6)}

    Low is linear and High(u) = u - Low(u), so one low-pass does for both, and an image fixed by itself is itself.

    By default Low is the à-trous transform of the authors' code: level i of ``levels`` blurs with [1 2 1] / 4 in both
    directions, dilated by :math:`2^i`, edges replicated. With ``wavelet`` it is the approximation band of the discrete
    wavelet transform of PyWavelets, to the same depth: its details set to zero, and back.

    Args:
        levels: how often the resolution of Low is halved, at least 1.
        wavelet: a discrete wavelet of PyWavelets by name ("haar", "db2", "bior4.4", ...), or None.

    Raises:
        ValueError: At construction for levels below 1 or an unknown wavelet, at a call for images that differ in shape
            or are not floating point.

    Example:
        >>> fix = WaveletColorFix()
        >>> generated, faithful = torch.rand(2, 1, 3, 40, 31)
        >>> fixed = fix(generated, faithful)
        >>> torch.allclose(fix.high(generated) + fix.low(faithful), fixed, atol=1e-6)
        True

    Source: Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", Eq. 6, after Wang et al.,
    "Exploiting Diffusion Prior for Real-World Image Super-Resolution" (StableSR). Their code filters both images.
    """

    def __init__(self, levels: int = 5, wavelet: str | None = None) -> None:
        super().__init__()
        check_integer("levels", levels)
        if wavelet is not None:
            pywt = require("pywt", purpose="`wavelet`", install="PyWavelets")
            if wavelet not in pywt.wavelist(kind="discrete"):
                raise ValueError(
                    f"`wavelet` should be None or a discrete wavelet of PyWavelets ('haar', 'db2', 'sym4', 'bior4.4', "
                    f"...), found {wavelet!r}."
                )
        self.levels = levels
        self.wavelet = wavelet

    def forward(self, detail: Tensor, color: Tensor) -> Tensor:
        """The detail of one image in the colors of the other.

        Args:
            detail: float (N, C, H, W) of any size, channels and range.
            color: the same shape.

        Returns:
            The image, in the dtype of ``detail``, computed in float32 or higher. It may leave the range of both by a
            little. Gradients reach both.
        """
        wide = _wide(detail, "detail")
        if not isinstance(color, Tensor) or color.shape != detail.shape:
            raise ValueError(
                f"`color` should have the shape of `detail` {tuple(detail.shape)}, found {describe(color)}."
            )
        other = _wide(color, "color")
        return (wide + self._low(other - wide)).to(detail.dtype)

    def low(self, image: Tensor) -> Tensor:
        """The low frequencies of float (N, C, H, W)."""
        return self._low(_wide(image, "image")).to(image.dtype)

    def high(self, image: Tensor) -> Tensor:
        """What :meth:`low` leaves out."""
        wide = _wide(image, "image")
        return (wide - self._low(wide)).to(image.dtype)

    def _low(self, image: Tensor) -> Tensor:
        if self.wavelet is not None:
            rows, columns = (
                torch.from_numpy(_approximation(size, self.wavelet, self.levels)).to(image.device, image.dtype)
                for size in image.shape[-2:]
            )
            with torch.autocast(image.device.type, enabled=False):
                return rows @ image @ columns.T
        for level in range(self.levels):
            step = 2**level
            image = _blur(_blur(image, (step, step, 0, 0)), (0, 0, step, step))
        return image

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"levels={self.levels}, wavelet={self.wavelet!r}"


def _blur(image: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """[1 2 1] / 4 along the axis that is padded, dilated by the padding."""
    padded = F.pad(image, padding, mode="replicate")
    height, width = image.shape[-2:]
    before, after = padded[..., :height, :width], padded[..., -height:, -width:]
    return (before + after) / 4 + image / 2


@functools.lru_cache(maxsize=32)
def _approximation(size: int, wavelet: str, levels: int) -> Any:
    """The matrix (size, size) of a transform along one axis, all details dropped, and back.

    It is an array, because a tensor that was made in inference mode cannot be part of a graph later.
    """
    np = require("numpy", purpose="`wavelet`", install="numpy")
    pywt = require("pywt", purpose="`wavelet`", install="PyWavelets")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A small image has a level that is all border, as it should be.
        approximation, *details = pywt.wavedec(np.eye(size), wavelet, level=levels, axis=0)
        matrix = pywt.waverec([approximation, *(np.zeros_like(d) for d in details)], wavelet, axis=0)
    return matrix[:size].copy()


def _wide(image: Tensor, name: str) -> Tensor:
    fits = isinstance(image, Tensor) and image.ndim == 4 and image.is_floating_point() and image.numel() > 0
    if not fits:
        raise ValueError(f"`{name}` should be a float tensor (N, C, H, W), not empty, found {describe(image)}.")
    return at_least_float32(image)
