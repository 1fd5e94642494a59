"""Another restoration network in the place of UniRestore."""

from typing import Any

import torch
from torch import Tensor, nn

from restoreloss.restorers.tiling import resize_to, tiled, upscale_to_side


class PlainNetwork(nn.Module):
    """A restoration network that knows no task."""

    tasks = ()

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, tasks: Any, *, generator: Any = None, smallest: int = 0) -> Tensor:
        size = images.shape[2:]
        restored: Tensor = self.network(upscale_to_side(images, smallest))
        return resize_to(restored, size)

    @torch.no_grad()
    def restore(
        self, images: Tensor, tasks: Any, *, generator: Any = None, smallest: int = 0, tile: int | None = None
    ) -> Tensor:
        """In [0, 1], larger images in overlapping tiles."""
        if tile is not None and max(images.shape[2:]) <= tile:
            tile = None
        large = upscale_to_side(images, smallest)
        return resize_to(tiled(self.network, large, tile=tile), images.shape[2:]).clamp(0, 1)
