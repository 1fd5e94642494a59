"""Losses that know no network: what every loss that looks through one has to beat."""

import torch
from torch import Tensor, nn


class ImageGradients(nn.Module):
    """Squared error of the differences between neighboring pixels: a loss on detail."""

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        error = restored - target
        return error.diff(dim=-2).square().mean() + error.diff(dim=-1).square().mean()


class FourierTransforms(nn.Module):
    """Mean L1 distance of the Fourier transforms, real and imaginary parts, without a factor (Cho et al. 2021)."""

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(restored.float() - target.float())
        return torch.view_as_real(spectrum).abs().mean()
