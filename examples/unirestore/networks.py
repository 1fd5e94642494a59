"""Another restoration network in the place of UniRestore."""

from typing import Any

import torch
from torch import Tensor, nn

from restoreloss.restorers.tiling import resize_to, tile_if_larger, tiled, upscale_to_side


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
        large = upscale_to_side(images, smallest)
        found = tiled(self.network, large, tile=tile_if_larger(images, tile))
        return resize_to(found, images.shape[2:]).clamp(0, 1)
