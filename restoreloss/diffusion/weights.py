"""In which dtype and on which device does a network want its input?"""

from torch import Tensor, nn


def reference_weight(network: nn.Module) -> Tensor | None:
    """The first floating-point parameter (quantised ones say nothing of the input), or None."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            return parameter
    return None
