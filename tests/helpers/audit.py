"""Losses and images for the tests of audit and calibrate."""

import math

import torch
import torch.nn.functional as F

from restoreloss import DiffLoss, Objective

SCHEDULE = torch.linspace(0.9, 0.1, 5, dtype=torch.float64)


def pair(shape=(2, 3, 6, 5), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


class Edges(Objective):
    def terms(self, restored, target):
        d = restored - target
        return {"x": d.diff(dim=3).abs().mean(), "y": d.diff(dim=2).abs().mean()}


def linear_diffloss(noise=0.5, h=3.0, **options):
    return DiffLoss(lambda x_t, t: (noise * x_t, h * x_t), SCHEDULE, h_space_weight=0.01, **options)


def under_no_grad(restored, target):
    with torch.no_grad():
        return F.mse_loss(restored, target)


def saturated(restored, target):
    return F.mse_loss((restored + 2).clamp(0, 1), target)


def detached(restored, target):
    return F.mse_loss(restored.detach(), target)


def nan_value(restored, target):
    return F.mse_loss(restored, target).log() * math.nan


def root_of_zero(restored, target):
    return (restored - restored.detach()).square().sum().sqrt()


def stochastic(restored, target):
    return (torch.randn(restored.shape, dtype=restored.dtype) * (restored - target)).square().mean()
