"""Generated images that show whether restored detail is the right detail, without a download.

Drawn ones: a smooth background with band noise, one to three plain shapes, and on top an object whose class is its
texture. Shape, color, size and place say nothing about the class, and all textures live in the same band of
frequencies, about the highest that an image reduced by four can hold and above. Every image has a label, a mask
and a box.
"""

from functools import lru_cache
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from examples.common.data.tasks import InMemory, Task

CLASSES = (
    "horizontal stripes",
    "rising stripes",
    "vertical stripes",
    "falling stripes",
    "checker",
    "diagonal checker",
    "hexagonal dots",
    "bricks",
    "rings",
    "band noise",
)
STRIPES = {"horizontal stripes": 90, "rising stripes": 135, "vertical stripes": 0, "falling stripes": 45}
"""The direction across them, in degrees."""
SMALLEST = 24

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


@lru_cache(maxsize=4)  # several runs on the same images
def generated(
    task: Task,
    count: int,
    seed: int,
    *,
    size: int = 48,
    period: tuple[float, float] = (5.5, 8.0),
    contrast: tuple[float, float] = (0.07, 0.18),
) -> InMemory:
    """``count`` images, a pure function of the seed: the same ones for every task, the first ones for every count.

    Args:
        task: which of label, mask and box is the target; every ten images in a row show every class once.
        count: at least 1.
        seed: from 0.
        size: side of the images, at least 24. Shapes grow with it, the textures' period does not.
        period: of the textures, in pixels, (lowest, highest).
        contrast: of the textures, (lowest, highest): the amplitude of a sine that varies as much over the object.

    Raises:
        ValueError: For an unknown task and for values out of range.
    """
    if task not in get_args(Task):
        raise ValueError(f"`task` should be one of {get_args(Task)}, found {task!r}.")
    for name, value, lowest in (("count", count, 1), ("seed", seed, 0), ("size", size, SMALLEST)):
        if value < lowest:
            raise ValueError(f"`{name}` should be at least {lowest}, found {value}.")
    for name, (low, high), least, most in (("period", period, 2.0, size / 2), ("contrast", contrast, 0.0, 1.0)):
        if not least <= low <= high <= most:
            raise ValueError(f"`{name}` should be (lowest, highest) from {least:g} to {most:g}, found {(low, high)}.")
    pixels = np.empty((count, size, size, 3), np.uint8)
    masks = np.empty((count, size, size), np.bool_)
    for index in range(count):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
        pixels[index], masks[index] = _image(rng, index % len(CLASSES), size, period, contrast)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous()
    labels = torch.arange(count) % len(CLASSES)
    if task == "classification":
        return InMemory(task, CLASSES, images, labels)
    targets: Any = torch.from_numpy(masks) * (labels + 1)[:, None, None]
    if task == "detection":
        targets = [
            {"boxes": torch.tensor([box_of(mask)]), "labels": label[None] + 1}
            for mask, label in zip(masks, labels, strict=True)
        ]
    return InMemory(task, ("background", *CLASSES), images, targets)


def box_of(mask: Mask) -> tuple[float, float, float, float]:
    """The tight box x1, y1, x2, y2 around a mask (H, W); the last row and column lie just before y2 and x2."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _image(
    rng: np.random.Generator, label: int, size: int, periods: tuple[float, float], contrasts: tuple[float, float]
) -> tuple[NDArray[np.uint8], Mask]:
    """One image (H, W, 3) and the mask (H, W) of its object."""
    image = _smooth(rng, size) + rng.uniform(0.02, 0.05) * _band_noise(rng, size, rng.uniform(*periods))[..., None]
    for _ in range(rng.integers(1, 4)):
        mask, _, _ = _shape(rng, size, rng.uniform(5, 10))
        image[mask] = _color(rng)
    mask, y, x = _shape(rng, size, rng.uniform(11, 17))
    texture = _texture(rng, CLASSES[label], y, x, rng.uniform(*periods))[mask]
    texture = (texture - texture.mean()) / texture.std() * rng.uniform(*contrasts) / np.sqrt(2)
    image[mask] = _color(rng) + texture[:, None]
    image += 0.03 * rng.standard_normal(image.shape, np.float32)
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8), mask


def _color(rng: np.random.Generator) -> Floats:
    return rng.uniform(0.25, 0.75, 3).astype(np.float32)


def _smooth(rng: np.random.Generator, size: int) -> Floats:
    """Random colors at the corners of a 3 x 3 grid and bilinear between, (H, W, 3)."""
    at = np.linspace(0, 2, size, dtype=np.float32)[:, None]
    weights = (1 - np.abs(at - np.arange(3, dtype=np.float32))).clip(0)
    colors: Floats = np.einsum("yi,xj,ijc->yxc", weights, weights, rng.uniform(0.2, 0.8, (3, 3, 3)).astype(np.float32))
    return colors


def _shape(rng: np.random.Generator, size: int, radius: float) -> tuple[Mask, Floats, Floats]:
    """The mask of a random disc, box or diamond within the image, and every pixel's y and x from its center."""
    measure, stretch = ((np.hypot, 1.0), (np.maximum, 0.9), (np.add, 1.2))[rng.integers(3)]
    reach = stretch * radius * size / 48
    side = np.arange(size, dtype=np.float32)
    y, x = np.meshgrid(*(side - np.float32(rng.uniform(reach, size - 1 - reach)) for _ in range(2)), indexing="ij")
    return measure(np.abs(y), np.abs(x)) <= reach, y, x


def _texture(rng: np.random.Generator, name: str, y: Floats, x: Floats, period: float) -> Floats:
    """A texture of about zero mean whose strongest waves are ``period`` pixels long, turned by up to 8 degrees."""
    if name == "band noise":
        return _band_noise(rng, len(y), period)
    tilt, (phase, other_phase) = np.radians(rng.uniform(-8, 8)), rng.uniform(0, 2 * np.pi, 2)

    def wave(degrees: float, phase: float = phase) -> Floats:
        """Bars across the direction, which is counted from the right, upwards."""
        angle = np.radians(degrees) + tilt
        values: Floats = np.cos(2 * np.pi / period * (np.cos(angle) * x - np.sin(angle) * y) + phase)
        return values

    def sharp(values: Floats) -> Floats:
        result: Floats = np.tanh(2.5 * values)
        return result

    if name in STRIPES:
        return sharp(wave(STRIPES[name]))
    if name == "checker":
        return sharp(wave(45) + wave(135, other_phase))
    if name == "diagonal checker":
        return sharp(wave(0) + wave(90, other_phase))
    sign = int(rng.choice((-1, 1)))
    if name == "hexagonal dots":
        return sign * sharp(wave(0) + wave(60, other_phase) + wave(120, other_phase - phase) - 0.5)
    if name == "rings":
        middle = rng.uniform(-3, 3, 2)
        return sharp(np.cos(2 * np.pi / period * np.hypot(y - middle[0], x - middle[1]) + phase))
    return sign * _bricks(np.cos(tilt) * y + np.sin(tilt) * x, np.cos(tilt) * x - np.sin(tilt) * y, period, phase)


def _bricks(down: Floats, along: Floats, period: float, phase: float) -> Floats:
    """Courses ``period`` high of bricks twice as long, each course shifted by half a brick; 1 is mortar."""
    down = down / period + phase
    course = np.floor(down)
    along = along / (2 * period) + phase + course / 2
    joints = (np.abs(down - np.rint(down)), 2 * np.abs(along - np.rint(along)))  # distances, in periods
    mortar: Floats = np.exp(-np.square(np.minimum(*joints) / 0.18))
    return mortar


def _band_noise(rng: np.random.Generator, size: int, period: float) -> Floats:
    """White noise of which only wavelengths near ``period`` are left, of unit variance, (H, W)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * np.exp(-np.square((frequency * period - 1) / 0.15))
    noise: Floats = np.fft.irfft2(spectrum, (size, size)).astype(np.float32)
    noise /= noise.std()
    return noise
