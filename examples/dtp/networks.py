"""The networks that the recipe trains, and the layers behind which they are given the timestep.

NAFNet as spandrel has it, and a small Restormer: both map an image to an image of the same size. Any other network
joins by its name, its layers and :class:`~restoreloss.TimeConditioned`.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from examples.common.networks.own import own_network
from examples.common.networks.restorers import SAME_SIZE
from restoreloss import FiLM, TimeConditioned, TimeMoE
from restoreloss.blocks.time_conditioned import channels_of

NETWORKS = ("nafnet-small", "nafnet", "restormer-small", "restormer")


def timed_network(
    name: str,
    *,
    num_timesteps: int,
    time_layers: Sequence[str] = (),
    moe: bool = False,
    experts: int = 10,
    **options: Any,
) -> TimeConditioned:
    """A network conditioned on the timestep behind each of its levels; behind each decoder may be a mixture of experts.

    Args:
        name: of ``NETWORKS``, or "module:Class", called without arguments.
        time_layers: of a network of one's own, the layers that are conditioned on it; the mixtures follow those whose
            name has "dec" or "up" in it.
        num_timesteps: T.
        moe: add the mixtures.
        experts: of each.
        options: of :class:`~restoreloss.TimeMoE`.

    Raises:
        ValueError: For an unknown name.
    """
    network, layers = _with_layers(name, time_layers)
    channels = channels_of(network, layers, torch.zeros(1, 3, 32, 32))
    timed = TimeConditioned(network, {layer: FiLM(channels[layer]) for layer in layers}, num_timesteps=num_timesteps)
    if moe:
        add_experts(timed, experts, **options)
    return timed


def _with_layers(name: str, time_layers: Sequence[str]) -> tuple[nn.Module, list[str]]:
    if ":" in name:
        if not time_layers:
            raise ValueError(f"`time_layers` should name layers of {name} that return (N, C, H, W), found none.")
        return own_network(name, "network"), list(time_layers)
    if time_layers:
        raise ValueError(f"`time_layers` should be left out for {name}, found {list(time_layers)}.")
    if name not in NETWORKS:
        raise ValueError(f"`network` should be one of {', '.join(NETWORKS)} or module:Class, found {name!r}.")
    network = SAME_SIZE[name]()
    middle = "middle_blks" if "nafnet" in name else "middle"
    levels = [f"{part}.{k}" for part in ("encoders", "decoders") for k in range(len(network.get_submodule(part)))]  # type: ignore[arg-type]
    return network, [*levels, middle]


def add_experts(timed: TimeConditioned, experts: int = 10, **options: Any) -> None:
    """A :class:`~restoreloss.TimeMoE` behind each decoder level."""
    layers = [layer for layer in timed.layers if re.search("dec|up", layer)]
    if not layers:
        raise ValueError(
            f"`time_layers` should have one with 'dec' or 'up' in its name for mixtures, found {timed.layers}."
        )
    channels = channels_of(timed.network, layers, torch.zeros(1, 3, 32, 32))
    timed.attach({layer: TimeMoE(channels[layer], timed.time_dim, experts=experts, **options) for layer in layers})
