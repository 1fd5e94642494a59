"""EDSR, the restoration network of SR4IR, and its weights in the files of other repositories."""

import logging
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class EDSR(nn.Module):
    """Residual blocks at low resolution, then PixelShuffle (Lim et al., "Enhanced Deep Residual Networks", baseline).

    Args:
        scale: 1, 2, 3, 4 or 8.
        features: channels of the body.
        blocks: residual blocks.
        light: enlarge by one PixelShuffle straight to the image and add the bilinearly enlarged input: a small one
            is fast and need only learn the detail.
    """

    def __init__(self, scale: int, *, features: int = 64, blocks: int = 16, light: bool = False) -> None:
        super().__init__()
        factors = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}
        if scale not in factors:
            raise ValueError(f"`scale` should be one of {tuple(factors)}, found {scale}.")
        self.scale, self.light = scale, light
        self.head = nn.Conv2d(3, features, 3, padding=1)
        self.body = nn.Sequential(*(_ResidualBlock(features) for _ in range(blocks)))
        self.after_body = nn.Conv2d(features, features, 3, padding=1)
        if light:
            self.upsample = nn.Sequential(_enlarge(features, 3, scale))
            self.tail: nn.Module = nn.Identity()
        else:
            self.upsample = nn.Sequential(*(_enlarge(features, features, factor) for factor in factors[scale]))
            self.tail = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, 3, scale H, scale W)."""
        centered = image - 0.5
        features = self.head(centered)
        features = features + self.after_body(self.body(features))
        restored: Tensor = self.tail(self.upsample(features))
        base = F.interpolate(centered, scale_factor=float(self.scale), mode="bilinear") if self.light else 0
        return restored + base + 0.5


def _enlarge(inputs: int, outputs: int, factor: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs * factor**2, 3, padding=1), nn.PixelShuffle(factor))


class _ResidualBlock(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(self.conv1(x).relu())
        return x + residual


def named_as_here(network: EDSR, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of an EDSR by the names that they have here, if there are as many, of the same shapes in order.

    Files of its authors' code also say which mean is subtracted from the input and by how much it is multiplied:
    biases are scaled and shifted to do the same. At the border, where padding is another gray, that is not exact.
    """
    shift = {name: value for name, value in state.items() if name.startswith(("sub_mean.", "add_mean."))}
    others, own = [value for name, value in state.items() if name not in shift], network.state_dict()
    if [value.shape for value in others] != [value.shape for value in own.values()] or len(shift) not in (0, 4):
        return state  # whose names say what is wrong
    state = dict(zip(own, others, strict=True))
    if not shift:
        logger.warning(
            "%s: read in its order, for the names are of another EDSR. How it scales its input is not in the file: "
            "here it is [0, 1] less 0.5. Where it was 255 times that (img_range=255), divide its biases by 255 first.",
            path,
        )
        return state
    mean = shift["add_mean.bias"].double()
    multiplied = 255.0 if float(mean.max()) > 1 else 1.0
    state = {name: value / multiplied if name.endswith("bias") else value for name, value in state.items()}
    offset = (0.5 - mean / multiplied).to(state["head.weight"])
    state["head.bias"] = state["head.bias"] + state["head.weight"].sum(dim=(2, 3)) @ offset
    state["tail.bias"] = state["tail.bias"] - offset
    logger.info("%s: read in its order as an EDSR whose input is %g times the image less its mean", path, multiplied)
    return state
