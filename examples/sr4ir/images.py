"""Operations on a batch of images, or on a list of images of several sizes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.data.tasks import map_images


def restore(network: nn.Module, lr: Any) -> Any:
    """S on a batch, or on a list of images, at once where they are of one size."""
    if isinstance(lr, Tensor):
        return network(lr)
    if len({image.shape for image in lr}) == 1:
        return list(network(torch.stack(list(lr))))
    return [network(image[None])[0] for image in lr]


def bilinear(lr: Any, scale: int, *, align_corners: bool = False) -> Any:
    """LR images enlarged without a network."""

    def enlarge(image: Tensor) -> Tensor:
        return F.interpolate(image, scale_factor=float(scale), mode="bilinear", align_corners=align_corners)

    return map_images(enlarge, lr)


def pixel_loss(restored: Any, hr: Any, loss: Callable[[Tensor, Tensor], Tensor] = F.l1_loss) -> Tensor:
    """L1, or another loss, each image of a list counting alike."""
    if isinstance(restored, Tensor):
        return loss(restored, hr)
    return torch.stack([loss(z, x) for z, x in zip(restored, hr, strict=True)]).mean()
