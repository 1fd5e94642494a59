"""Is the second derivative that L_orth takes the true one, and does it warn where torch gives a wrong one silently?"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.common.networks.restorers import nafnet
from restoreloss import GradientOrthogonality


class Normalize(torch.autograd.Function):
    """x / |x|, which saves its length as NAFNet's LayerNorm saves its variance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = x.norm(dim=1, keepdim=True)
        ctx.save_for_backward(x / length, length)
        return x / length

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        return (grad - unit * (grad * unit).sum(dim=1, keepdim=True)) / length


class Square(torch.autograd.Function):
    """x^2, which saves its input: its second derivative is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def penalty_of(model: Any, parameters: list[nn.Parameter]) -> Tensor:
    batches = torch.rand(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = [(model(batch) - batch.flip(1)).square().mean() for batch in batches]
    return GradientOrthogonality(parameters)(losses[:2], losses[2:])


def slope_error(model: Any, parameters: list[nn.Parameter]) -> float:
    """The derivative of the penalty in a random direction, relative to a finite difference."""
    generator = torch.Generator().manual_seed(1)
    away = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    gradients = torch.autograd.grad(penalty_of(model, parameters), parameters)
    found = sum(float((a * g).sum()) for a, g in zip(away, gradients, strict=True))
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, a in zip(parameters, away, strict=True):
                p.add_(a, alpha=step)
        ends.append(penalty_of(model, parameters).item())
        with torch.no_grad():
            for p, a in zip(parameters, away, strict=True):
                p.sub_(a, alpha=step)
    return abs(found / ((ends[0] - ends[1]) / 2e-5) - 1)


def test_a_function_that_saves_what_it_computed_is_told_for_its_second_derivative_is_wrong() -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 3, 3, padding=1).double(), nn.Conv2d(3, 3, 1).double()
    parameters = [*first.parameters(), *last.parameters()]
    with pytest.warns(UserWarning, match=r"may be wrong: Normalize saved .*`project`") as told:
        error = slope_error(lambda x: last(Normalize.apply(first(x))), parameters)
    assert error > 0.01
    assert all(warning.filename == __file__ for warning in told)
    assert slope_error(lambda x: last(nn.functional.normalize(first(x))), parameters) < 1e-5


class Masked(torch.autograd.Function):
    """x^2 where a mask is, which saves both: its second derivative is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask)
        return x * x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, mask = ctx.saved_tensors
        return 2 * x * mask * grad, None


def test_one_that_saves_its_inputs_is_not_told() -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 3, 3, padding=1).double(), nn.Conv2d(3, 3, 1).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slope_error(lambda x: last(Square.apply(first(x))), [*first.parameters()]) < 1e-5
        mask = (torch.rand(8, 8) > 0.3).double()
        assert slope_error(lambda x: last(Masked.apply(first(x), mask)), [*first.parameters()]) < 1e-5


def test_the_nafnet_of_the_recipes_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    network = nafnet(4, (1,), 1, (1,)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert slope_error(network, [*network.parameters()][:8]) < 1e-4


def test_the_norm_of_that_nafnet_is_the_authors_with_their_names() -> None:
    from spandrel.architectures.NAFNet import NAFNet

    torch.manual_seed(0)
    network = nafnet(8, (1, 1), 1, (1, 1))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = NAFNet(img_channel=3, width=8, enc_blk_nums=[1, 1], middle_blk_num=1, dec_blk_nums=[1, 1])
    theirs.load_state_dict(network.state_dict())
    image = torch.rand(2, 3, 12, 20)
    torch.testing.assert_close(network(image), theirs(image))


def test_parameters_that_projection_leaves_out_are_told(recwarn: pytest.WarningsRecorder) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1))
    images = torch.rand(2, 3, 4, 4)
    rule = GradientOrthogonality(net[0].parameters())
    with pytest.warns(
        UserWarning, match="2 parameters in the graph of `reconstruction` are neither shared nor in `others`"
    ):
        rule.project(net(images).mean(), net(images).square().mean())
    rule.project(net(images).mean(), net(images).square().mean())  # said once
    GradientOrthogonality(net[0].parameters()).project(
        net(images).mean(), net(images).square().mean(), others=net[1].parameters()
    )
    net[1].requires_grad_(False)
    GradientOrthogonality(net[0].parameters()).project(net(images).mean(), net(images).square().mean())
    assert not recwarn.list


def test_deep_graphs_are_released_after_they_were_looked_at() -> None:
    weight, other = (nn.Parameter(torch.ones(1)) for _ in range(2))
    loss = weight * other
    for _ in range(100_000):
        loss = loss + 0.0
    GradientOrthogonality([weight]).project(weight.square().sum(), loss.sum(), others=[other])
    del loss
