"""Small networks and losses for the tests of ParameterImportance."""

from typing import Any

import torch
from torch import Tensor, nn

from restoreloss import ParameterImportance

ESTIMATORS: list[Any] = ["taylor2", "fisher", "mas", "gn"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def squared(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Linear(2, 1, bias=False, dtype=dtype)
    nn.init.ones_(model.weight)
    return model


def network() -> nn.Sequential:
    """Smooth, with batch norm whose statistics are not those of a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.5), nn.Conv2d(3, 2, 1)
        )
    model[1].running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
    return model.train()


def shift(model: nn.Module, seed: int = 7) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=seed + number).to(parameter.dtype)


def measured(model: nn.Module | None = None, **options: Any) -> ParameterImportance:
    model = linear() if model is None else model
    importance = ParameterImportance(model, **options)
    importance.accumulate(squared, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
    return importance


class Untraceable(nn.Module):
    """Reads a number of its input, which ``torch.func`` cannot see."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Any:
        return self.inner(*inputs) * (1.0 if float(inputs[0].detach().sum()) > -1e9 else 0.0)


BATCH = torch.ones(2, 2)
