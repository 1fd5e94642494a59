"""Losses of known gradients, and the shares that terms have."""

import torch


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    restored, target = torch.rand(2, 4, 3, 6, 6, generator=generator).unbind()
    return restored.requires_grad_(), target


def scaled(factor):
    """A loss that is linear in the image, whose gradient has the norm `factor`."""
    return lambda restored, target: factor * (restored - target).sum() / restored.numel() ** 0.5


def norm_of(value, image):
    (gradient,) = torch.autograd.grad(value, image, retain_graph=True, allow_unused=True)
    return 0.0 if gradient is None else float(gradient.norm())


def shares_of(terms, image):
    norms = {name: norm_of(value, image) for name, value in terms.items()}
    return {name: norm / sum(norms.values()) for name, norm in norms.items()}


def run(loss, seeds):
    for seed in seeds:
        restored, target = images(seed)
        loss(restored, target).backward()
    return loss
