"""Small networks and images for the tests of TDPLoss."""

import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pair(shape=(2, 3, 8, 8), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def normalised(images):
    mean, std = (torch.tensor(values, dtype=images.dtype).view(-1, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def stage(network, images):
    """What ``live_recogniser().stage`` returns at rest, written out."""
    network = network.eval()
    return network.stage(network.stem(normalised(images)))


def value_and_gradient(loss, restored, target):
    restored = restored.detach().clone().requires_grad_()
    value = loss(restored, target)
    value.backward()
    return value.detach(), restored.grad
