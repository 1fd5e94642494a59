"""What wrong uses are made of: small networks, images, and things that are mistaken for them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from restoreloss import (
    DiffLoss,
    FeatureMatchingLoss,
    HLFLoss,
    NoiseLevels,
    NoiseSchedule,
    TDPLoss,
    WeightedSum,
)
from tests.helpers.networks import (
    as_if_trained,
    live_recogniser,
    tiny_autoencoder,
    tiny_conditional_unet,
    tiny_transformer,
    tiny_unet,
)

SHAPE = (2, 3, 8, 8)


def clean(*shape: int, channels: int = 3, size: int = 8) -> Tensor:
    """Images in [0, 1] that need no gradient."""
    return torch.rand(shape or (2, channels, size, size), generator=torch.Generator().manual_seed(1))


def restored(*shape: int, channels: int = 3, size: int = 8) -> Tensor:
    """Images in [0, 1] that need a gradient."""
    return torch.rand(shape or (2, channels, size, size), generator=torch.Generator().manual_seed(2)).requires_grad_()


def seeded(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


@functools.cache
def unet() -> nn.Module:
    """A frozen diffusion model of pixels."""
    return as_if_trained(tiny_unet()).eval().requires_grad_(False)


@functools.cache
def conditional_unet() -> nn.Module:
    """A frozen diffusion model of pixels that wants hidden states (N, tokens, 8)."""
    return as_if_trained(tiny_conditional_unet()).eval().requires_grad_(False)


@functools.cache
def latent_unet() -> nn.Module:
    """A frozen diffusion model of 4 channels."""
    return as_if_trained(tiny_unet(in_channels=4, out_channels=4)).eval().requires_grad_(False)


@functools.cache
def vae() -> Any:
    """A frozen autoencoder of 4 latent channels."""
    return as_if_trained(tiny_autoencoder()).eval().requires_grad_(False)


@functools.cache
def transformer() -> nn.Module:
    """A frozen DiT that wants classes."""
    return tiny_transformer("DiT").eval().requires_grad_(False)


@functools.cache
def reader() -> nn.Module:
    """A live classifier."""
    return live_recogniser()


@functools.cache
def reference() -> nn.Module:
    """A frozen classifier."""
    return live_recogniser().eval().requires_grad_(False)


def restorer() -> nn.Module:
    """A live restoration network, a new one."""
    return nn.Conv2d(3, 3, 3, padding=1)


@functools.cache
def noise_loss() -> DiffLoss:
    """The cheapest DiffLoss."""
    return DiffLoss(lambda x, t: x, h_space_weight=0)


def diff() -> DiffLoss:
    """A DiffLoss of its own, so that its range was not told yet."""
    return DiffLoss(lambda x, t: x, h_space_weight=0)


def diff_unet() -> DiffLoss:
    """A DiffLoss through a U-Net."""
    return DiffLoss(unet())


def tdp(**options: Any) -> TDPLoss:
    """A TDPLoss through a live classifier."""
    return TDPLoss(reader(), "stage", **{"normalize": "imagenet", **options})


def hlf(**options: Any) -> HLFLoss:
    """A HLFLoss through a live classifier and a frozen one."""
    return HLFLoss(reader(), reference(), "stage", **{"normalize": "imagenet", **options})


def matching(**options: Any) -> FeatureMatchingLoss:
    """A FeatureMatchingLoss of a live classifier and a frozen one."""
    return FeatureMatchingLoss(reader(), reference(), "stage", **{"normalize": "imagenet", **options})


def weighted(**options: Any) -> WeightedSum:
    """Two objectives."""
    return WeightedSum({"pixel": nn.L1Loss(), "diff": diff()}, **options)


def fill(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is no module."""
    return 0.5 * x


@functools.cache
def linear() -> NoiseSchedule:
    """1000 timesteps."""
    return NoiseSchedule.linear()


@functools.cache
def levels() -> NoiseLevels:
    """50 timesteps."""
    return NoiseLevels.ir_sde()


BETAS = torch.linspace(1e-4, 0.02, 1000)
ABAR = torch.cumprod(1 - BETAS, dim=0)
ARRAY = np.zeros(SHAPE, dtype=np.float32)
PHOTO = Image.new("RGB", (8, 8))

NOT_TENSORS: dict[str, Any] = {
    "a numpy array": ARRAY,
    "a PIL image": PHOTO,
    "a path": Path("image.png"),
    "text": "image.png",
    "None": None,
    "a number": 3,
    "nested lists": [[[[0.5]]]],
    "a class": Tensor,
    "a mapping": {"image": 1},
}
"""What is given in the place of a tensor."""

NOT_IMAGES: dict[str, Callable[[], Tensor]] = {
    "(C, H, W)": lambda: clean(3, 8, 8),
    "(N, C, T, H, W)": lambda: clean(2, 3, 1, 8, 8),
    "(H, W)": lambda: clean(8, 8),
    "uint8": lambda: (255 * clean()).byte(),
    "long": lambda: clean().long(),
    "bool": lambda: clean() > 0.5,
    "complex": lambda: clean().to(torch.complex64),
    "no image": lambda: clean(0, 3, 8, 8),
    "no pixel": lambda: clean(2, 3, 0, 8),
}
"""Tensors that are no batch of images."""

NOT_GENERATORS: dict[str, Any] = {
    "0": 0,
    "42": 42,
    "text": "0",
    "True": True,
    "numpy's": np.random.default_rng(0),
    "a class": torch.Generator,
}
"""What is given in the place of a generator."""

NOT_NUMBERS: dict[str, Any] = {
    "text": "1e-3",
    "None": None,
    "True": True,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "-1": -1.0,
    "a list": [1.0],
    "a class": float,
}
"""What is given in the place of a weight."""

NOT_WHOLE: dict[str, Any] = {"text": "2", "1.5": 1.5, "0": 0, "-1": -1, "True": True, "None": None}
"""What is given in the place of a count."""

NOT_RANGES: dict[str, Any] = {
    "255": 255, "text": "0,1", "reversed": (1, 0), "equal": (1, 1), "three": (0, 1, 2), "NaN": (0, float("nan")),
    "infinite": (0, float("inf")), "None": None, "numbers as text": ("0", "1"), "a set": {0, 1},
}  # fmt: skip
"""What is given in the place of (low, high)."""
