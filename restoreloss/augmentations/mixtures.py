"""Mixed degradations, Mixture-A and Mixture-B: images that go bad in several ways at once."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss._optional import require
from restoreloss.checks import check_integer, check_number, describe
from restoreloss.generators import check_generators, standard_normal, uniform
from restoreloss.images import RangeWatch, at_least_float32, check_images, check_range, continued, into_range, mirrored

Span = tuple[float, float]


class MixtureA(nn.Module):
    """Bilinear reduction and JPEG, then bilinear enlargement to the size it had.

    Args:
        scale: of the reduction, at least 1; the reduced size is rounded down.
        quality: of JPEG, 1 to 100.
        input_range: what YOUR images span.

    Raises:
        ValueError: At construction for numbers out of these bounds, at a call for anything but float (N, C, H, W) with
            one or three channels.

    Example:
        >>> degraded = MixtureA()(clean)
        >>> degraded.shape == clean.shape
        True

    Source: Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", Section S1.
    """

    def __init__(self, scale: float = 8, quality: int = 75, *, input_range: Span = (0.0, 1.0)) -> None:
        super().__init__()
        self.scale = check_number("scale", scale, low=1)
        self.quality = check_integer("quality", quality, high=100)
        self.input_range = check_range(input_range)
        self._range = RangeWatch(self.input_range)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The degraded images, shape, dtype, device and range of ``images``; without gradient."""
        unit = _to_unit(images, self._range)
        degraded = [_enlarged(jpeg(shrink(image, self.scale), self.quality), image) for image in unit.split(1)]
        return _from_unit(torch.cat(degraded), images, self.input_range)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"scale={self.scale:g}, quality={self.quality}"


class Degradation(NamedTuple):
    """What :class:`MixtureB` does to one image."""

    sigma: Span
    """Standard deviations of the blur along its two axes, in pixels."""
    angle: float
    """Of the first axis against the horizontal, in radians."""
    scale: float
    noise: float
    """Standard deviation, in 1/255."""
    quality: int


class MixtureB(nn.Module):
    r"""Blur, bilinear reduction, noise and JPEG, each of a random strength, then enlargement to the size it had.

    In this order, and independently for each image:

    ========== ==============================================================================================
    blur       Gaussian, :math:`\sigma \sim U[0.1, 8]` pixels; half of the time another :math:`\sigma` along a
               second axis, turned by :math:`U[-\pi, \pi]`; a kernel of 41 x 41, edges mirrored
    reduction  bilinear without antialiasing, by :math:`s \sim U[1, 16]`
    noise      Gaussian, :math:`\sigma \sim U[0, 10] / 255`, of every pixel and channel
    JPEG       quality :math:`\sim U\{50, \dots, 100\}`
    ========== ==============================================================================================

    Args:
        sigma: lowest and highest, in pixels.
        scale: lowest and highest, at least 1; the reduced size is rounded down.
        noise: lowest and highest, in 1/255.
        quality: lowest and highest, 1 to 100.
        anisotropic: probability of a blur with two sigmas.
        kernel_size: of the blur, odd.
        input_range: what YOUR images span.

    Raises:
        ValueError: At construction for numbers out of these bounds, at a call for anything but float (N, C, H, W) with
            one or three channels.

    Example:
        >>> mixture = MixtureB()
        >>> again = [mixture(clean, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        >>> torch.equal(*again), again[0].shape == clean.shape
        (True, True)

    Source: Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", Section S1, where
    the range of sigma is called that of the kernel size; kernels as in Zhou et al., "Towards Robust Blind Face
    Restoration with Codebook Lookup Transformer" (CodeFormer), whose degradation it follows.
    """

    def __init__(
        self,
        *,
        sigma: Span = (0.1, 8.0),
        scale: Span = (1.0, 16.0),
        noise: Span = (0.0, 10.0),
        quality: tuple[int, int] = (50, 100),
        anisotropic: float = 0.5,
        kernel_size: int = 41,
        input_range: Span = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.sigma = _span("sigma", sigma, 0, math.inf)
        self.scale = _span("scale", scale, 1, math.inf)
        self.noise = _span("noise", noise, 0, math.inf)
        low, high = _span("quality", quality, 1, 100)
        self.quality = (int(low), int(high))
        self.anisotropic = check_number("anisotropic", anisotropic, low=0, high=1)
        self.kernel_size = check_integer("kernel_size", kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` should be odd, found {kernel_size}.")
        self.input_range = check_range(input_range)
        self._range = RangeWatch(self.input_range)

    @torch.no_grad()
    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The degraded images.

        Args:
            images: float (N, C, H, W), C = 1 or 3, in ``input_range``; what is outside is clipped.
            generator: for all that is random, on any device.

        Returns:
            Shape, dtype, device and range of ``images``; without gradient.
        """
        check_generators(generator, None)
        unit = _to_unit(images, self._range)
        drawn = self.draw(len(images), generator=generator)
        degraded = [
            self.degrade(image, what, generator=generator) for image, what in zip(unit.split(1), drawn, strict=True)
        ]
        return _from_unit(torch.cat(degraded), images, self.input_range)

    def draw(self, count: int, *, generator: torch.Generator | None = None) -> list[Degradation]:
        """What to do to ``count`` images."""
        check_integer("count", count, low=0)
        drawn_numbers = uniform(torch.empty(count, 7, dtype=torch.float64), generator).tolist()

        def between(span: Span, u: float) -> float:
            return span[0] + (span[1] - span[0]) * u

        drawn = []
        for coin, first, second, turn, scale, noise, quality in drawn_numbers:
            sigma = between(self.sigma, first)
            two = coin < self.anisotropic
            low, high = self.quality
            drawn.append(
                Degradation(
                    sigma=(sigma, between(self.sigma, second) if two else sigma),
                    angle=between((-math.pi, math.pi), turn) if two else 0.0,
                    scale=between(self.scale, scale),
                    noise=between(self.noise, noise),
                    quality=low + int((high - low + 1) * quality),
                )
            )
        return drawn

    def degrade(self, images: Tensor, what: Degradation, *, generator: torch.Generator | None = None) -> Tensor:
        """One degradation of images in [0, 1], (N, C, H, W) in float32 or higher."""
        if not isinstance(what, Degradation):
            raise ValueError(f"`what` should be one of `draw(count)`, found {describe(what)}.")
        kernel = gaussian_kernel(self.kernel_size, what.sigma, what.angle).to(images.device, images.dtype)
        small = shrink(blur(images, kernel), what.scale)
        grain = standard_normal(small, generator)
        return _enlarged(jpeg(small + what.noise / 255 * grain, what.quality), images)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        spans = (f"{name}={getattr(self, name)}" for name in ("sigma", "scale", "noise", "quality"))
        return f"{', '.join(spans)}, anisotropic={self.anisotropic:g}"


def gaussian_kernel(size: int, sigma: Span, angle: float = 0.0) -> Tensor:
    """A Gaussian (size, size) in float64 that sums to 1.

    Args:
        size: odd.
        sigma: standard deviations in pixels, along the horizontal and the vertical, both turned by ``angle``. One near
            0 leaves the middle only.
        angle: in radians, from the horizontal towards the vertical (downwards).
    """
    place = torch.arange(size, dtype=torch.float64) - size // 2
    down, right = torch.meshgrid(place, place, indexing="ij")
    along = right * math.cos(angle) + down * math.sin(angle)
    across = down * math.cos(angle) - right * math.sin(angle)
    first, second = (max(s, 1e-6) for s in sigma)
    exponent = -0.5 * ((along / first) ** 2 + (across / second) ** 2)
    kernel = exponent.exp()
    return kernel / kernel.sum()


def blur(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel of (N, C, H, W) convolved with a kernel of odd sides, edges mirrored as often as it takes."""
    height, width = images.shape[-2:]
    rows, columns = kernel.shape
    padded = images
    for dim, length, reach in ((-2, height, rows // 2), (-1, width, columns // 2)):
        padded = continued(padded, dim, mirrored(length, reach, reach).to(images.device), reach)
    size = [_smooth_number(side) for side in padded.shape[-2:]]
    # This is a product of spectra, because a kernel of 41 x 41 costs 1,681 products for each pixel otherwise.
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernel, s=size)
    blurred: Tensor = torch.fft.irfft2(spectrum, s=size)
    return blurred[..., rows - 1 : rows - 1 + height, columns - 1 : columns - 1 + width]


def _smooth_number(least: int) -> int:
    """The next number without a prime factor above 5: spectra of such a length take half the time."""
    rest = least
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    return least if rest == 1 else _smooth_number(least + 1)


def shrink(images: Tensor, scale: float) -> Tensor:
    """Bilinear reduction without antialiasing to 1/scale of the size, rounded down, at least one pixel."""
    size = [max(1, int(side / scale)) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Through libjpeg and back: (N, C, H, W) in [0, 1] with one or three channels, rounded to 8 bits.

    By Pillow, as torchvision's own codec is deprecated since its version 0.29.

    Raises:
        ValueError: For images that are not finite, as 8 bits have no NaN.
        ImportError: If numpy or Pillow is not installed.
    """
    np = require("numpy", purpose="JPEG", install="numpy")
    image_module = require("PIL.Image", purpose="JPEG", install="Pillow")

    finite = images.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"`images` should be finite, as 8 bits have no NaN, found NaN or infinity in images {bad}.")
    pixels = (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8).movedim(1, -1).numpy()
    coded = []
    for one in pixels:
        file = io.BytesIO()
        # Pillow's chroma is at half the resolution, as that of OpenCV
        image = image_module.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one)
        image.save(file, "JPEG", quality=quality)
        with image_module.open(file) as read:
            coded.append(np.asarray(read).reshape(one.shape))
    return torch.from_numpy(np.stack(coded)).movedim(-1, 1).to(images.device, images.dtype) / 255


def _enlarged(small: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(small, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _to_unit(images: Tensor, watch: RangeWatch) -> Tensor:
    """To [0, 1], in float32 or higher."""
    check_images("images", images)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"`images` should have one or three channels, as JPEG does, found {images.shape[1]}.")
    watch.look({"images": images})
    return into_range(at_least_float32(images), watch.input_range, (0.0, 1.0)).clamp(0, 1)


def _from_unit(unit: Tensor, like: Tensor, input_range: Span) -> Tensor:
    return into_range(unit, (0.0, 1.0), input_range).to(like.dtype)


def _span(name: str, values: Span, lowest: float, highest: float) -> Span:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 2:
        raise ValueError(f"`{name}` should be numbers (lowest, highest), found {values!r}.")
    low, high = (check_number(name, value, low=lowest, high=highest) for value in values)
    if low > high:
        raise ValueError(f"`{name}` should rise from lowest to highest, found {values!r}.")
    return low, high
