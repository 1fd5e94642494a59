"""Gradients through frozen networks in float16, which would be zero without a scale."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from restoreloss import DiffLoss, FeatureExtractor, LatentPrior, TDPLoss, audit
from restoreloss.precision import enter, leave
from tests.helpers.networks import tiny_autoencoder, tiny_unet


def images(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(shape, generator=generator)
    return (clean + 0.02 * torch.randn(shape, generator=generator)).requires_grad_(), clean


def gradient(loss: nn.Module, z: Tensor, x: Tensor, **options: Any) -> Tensor:
    """As small as that of a batch of sixteen images of 512 pixels, and brought back after the pass."""
    (found,) = torch.autograd.grad(2.0**-14 * loss(z, x, **options), z)
    return 2.0**14 * found


def convolutions() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1))


FIXED = {"timestep": 200, "noise": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))}


@pytest.mark.parametrize("weights", [{}, {"h_space_weight": 0}, {"noise_weight": 0, "h_space_weight": 1}], ids=str)
def test_a_prior_in_float16_pulls_where_it_does_in_float32(weights: dict[str, float]) -> None:
    z, x = images(2, 3, 64, 64)
    single = tiny_unet()
    half = copy.deepcopy(single).half()
    wanted = gradient(DiffLoss(single, **weights), z, x, **FIXED)
    found = gradient(DiffLoss(half, **weights), z, x, **FIXED)
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99
    assert float(found.norm() / wanted.norm()) == pytest.approx(1, abs=0.02)


def test_an_encoder_in_float16_passes_the_gradient() -> None:
    z, x = images(1, 3, 32, 32)
    vae, unet = tiny_autoencoder(), tiny_unet(in_channels=4, out_channels=4)
    halves = copy.deepcopy(vae).half(), copy.deepcopy(unet).half()
    wanted, found = (
        gradient(DiffLoss(LatentPrior(*parts)), z, x, timestep=200, generator=torch.Generator().manual_seed(0))
        for parts in ((vae, unet), halves)
    )
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.97


def test_a_task_network_in_float16_passes_the_gradient() -> None:
    z, x = images(2, 3, 64, 64)
    single = convolutions()
    half = copy.deepcopy(single).half()
    losses = [TDPLoss(net, ["1", "2"], distance="mse", normalize=None) for net in (single, half)]
    wanted, found = (gradient(loss, z, x) for loss in losses)
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999
    assert audit({"tdp": losses[1]}, z, x).flagged("DEAD") == []


def test_the_gradient_of_a_linear_network_is_exact() -> None:
    """Powers of two round nothing: the gradient is that of the float16 network to the last bit."""
    weight = torch.tensor([[0.5, -0.25], [2.0, 1.0]])
    network = nn.Linear(2, 2, bias=False).half().requires_grad_(False)
    network.weight.copy_(weight)
    image = torch.tensor([[0.5, -1.0]], requires_grad=True)
    (cast,), door = enter([image], torch.float16, network)
    (output,) = leave(door, network(cast))
    upstream = torch.tensor([[2.0**-40, -(2.0**-42)]])  # below the smallest number of float16
    (found,) = torch.autograd.grad(output, image, upstream)
    assert torch.equal(found, upstream @ weight)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_zeros_and_what_is_not_finite_pass_as_they_are(value: float) -> None:
    network = nn.Identity()
    image = torch.ones(2, requires_grad=True)
    (cast,), door = enter([image], torch.float16, network)
    (output,) = leave(door, network(cast))
    (found,) = torch.autograd.grad(output, image, torch.full((2,), value))
    torch.testing.assert_close(found, torch.full((2,), value), equal_nan=True)


def test_a_scaled_loss_does_not_overflow() -> None:
    z, x = images(2, 3, 64, 64)
    loss = DiffLoss(tiny_unet().half())
    (plain,) = torch.autograd.grad(loss(z, x, **FIXED), z)
    (scaled,) = torch.autograd.grad(2.0**16 * loss(z, x, **FIXED), z)
    torch.testing.assert_close(scaled / 2.0**16, plain)


@pytest.mark.parametrize("shift", [0.02, 0.2])
def test_a_network_that_sums_over_pixels_does_not_overflow(shift: float) -> None:
    torch.manual_seed(0)
    single = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), SqueezeExcitation(16, 4), nn.Conv2d(16, 8, 1))
    half = copy.deepcopy(single).half()
    clean = 0.5 * images(2, 3, 64, 64)[1]
    restored = (clean + shift).requires_grad_()
    losses = [TDPLoss(net, "3", normalize=None, distance="mse") for net in (single, half)]
    wanted, found = (gradient(loss, restored, clean) for loss in losses)
    assert found.isfinite().all()
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99


def test_batched_gradients_pass_the_doors() -> None:
    network = nn.Linear(2, 2, bias=False).half().requires_grad_(False)
    image = torch.tensor([[0.5, -1.0]], requires_grad=True)
    (cast,), door = enter([image], torch.float16, network)
    (output,) = leave(door, network(cast))
    (found,) = torch.autograd.grad(output, image, torch.eye(2)[:, None], is_grads_batched=True)
    torch.testing.assert_close(found[:, 0], network.weight.float())


def test_a_network_that_trains_gets_no_scaled_gradient() -> None:
    network = convolutions().half()
    image = images(1, 3, 8, 8)[0]
    assert enter([image], torch.float16, network)[1] is None
    assert FeatureExtractor(network, "2", normalize=None)(image)["2"].dtype == torch.float16
