"""Losses that know no network: what every loss that looks through one has to beat."""

from torch import Tensor, nn


class ImageGradients(nn.Module):
    """Squared error of the differences between neighboring pixels: a loss on detail."""

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        error = restored - target
        return error.diff(dim=-2).square().mean() + error.diff(dim=-1).square().mean()
