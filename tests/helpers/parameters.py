"""How many numbers of a module train."""

from torch import nn


def count_parameters(module: nn.Module) -> int:
    """Of all its parameters that require a gradient."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
