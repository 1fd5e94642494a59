"""Which networks does the recipe train, and where do they hear of the timestep?

NAFNet as spandrel has it, and a small Restormer: both map a picture to a picture of the same size. Any other network
joins by its name, its layers and :class:`~restoreloss.TimeConditioned`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss import FiLM, TimeConditioned, TimeMoE
from restoreloss.blocks.time_moe import channels_of


def nafnet(width: int, encoders: tuple[int, ...], middle: int, decoders: tuple[int, ...]) -> nn.Module:
    """NAFNet (Chen et al. 2022)."""
    from spandrel.architectures.NAFNet import NAFNet

    network: nn.Module = NAFNet(
        img_channel=3, width=width, enc_blk_nums=list(encoders), middle_blk_num=middle, dec_blk_nums=list(decoders)
    )
    return network


class Restormer(nn.Module):
    """A U-Net of transposed attention and gated feed-forward blocks, after Zamir et al. 2022.

    Args:
        width: channels at full resolution; each level has twice as many.
        blocks: of each level, the deepest last.
        heads: of the attention at each level.
    """

    def __init__(
        self, width: int = 16, blocks: tuple[int, ...] = (1, 1, 2), heads: tuple[int, ...] = (1, 2, 4)
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(len(blocks))]
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        self.ups, self.joins, self.decoders = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, (channels, count) in enumerate(zip(widths[:-1], blocks[:-1], strict=True)):
            self.encoders.append(_blocks(channels, heads[level], count))
            self.downs.append(nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1), nn.PixelUnshuffle(2)))
            self.ups.insert(0, nn.Sequential(nn.Conv2d(2 * channels, 4 * channels, 1), nn.PixelShuffle(2)))
            self.joins.insert(0, nn.Conv2d(2 * channels, channels, 1))
            self.decoders.insert(0, _blocks(channels, heads[level], count))
        self.middle = _blocks(widths[-1], heads[-1], blocks[-1])
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        self.multiple = 2 ** len(self.downs)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) to the same."""
        height, width = image.shape[2:]
        padded = F.pad(image, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        x, skips = self.intro(padded), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle(x)
        for up, join, decoder in zip(self.ups, self.joins, self.decoders, strict=True):
            x = decoder(join(torch.cat([up(x), skips.pop()], dim=1)))
        restored: Tensor = padded + self.ending(x)
        return restored[..., :height, :width]


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        hidden = round(2.66 * channels)
        self.heads = heads
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        self.to_qkv = nn.Sequential(
            nn.Conv2d(channels, 3 * channels, 1),
            nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels),
        )
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.project = nn.Conv2d(channels, channels, 1)
        self.enter = nn.Sequential(
            nn.Conv2d(channels, 2 * hidden, 1), nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        )
        self.leave = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # channels attend to channels: the cost grows with the pixels, not with their square
        parts = self.to_qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1)).flatten(4)
        q, k, v = parts.unbind(dim=1)
        attention = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * self.temperature
        x = x + self.project((attention.softmax(dim=-1) @ v).reshape(x.shape))
        gate, value = self.enter(self.norm2(x)).chunk(2, dim=1)
        result: Tensor = x + self.leave(F.gelu(gate) * value)
        return result


def _blocks(channels: int, heads: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(channels, heads) for _ in range(count)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "nafnet-small": lambda: nafnet(12, (1, 1), 2, (1, 1)),
    "nafnet": lambda: nafnet(64, (1, 1, 1, 28), 1, (1, 1, 1, 1)),
    "restormer-small": lambda: Restormer(12),
    "restormer": lambda: Restormer(48, (4, 6, 6, 8), (1, 2, 4, 8)),
}


def timed_network(name: str, *, num_timesteps: int, moe: bool = False, experts: int = 10) -> TimeConditioned:
    """A network that is told the timestep behind each of its levels, and has a mixture of experts behind each decoder.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"`network` should be one of {', '.join(NETWORKS)}, found {name!r}.")
    network = NETWORKS[name]()
    middle = "middle_blks" if "nafnet" in name else "middle"
    levels = [f"{part}.{k}" for part in ("encoders", "decoders") for k in range(len(network.get_submodule(part)))]  # type: ignore[arg-type]
    layers = [*levels, middle]
    channels = channels_of(network, layers, torch.zeros(1, 3, 32, 32))
    timed = TimeConditioned(network, {layer: FiLM(channels[layer]) for layer in layers}, num_timesteps=num_timesteps)
    if moe:
        add_experts(timed, experts)
    return timed


def add_experts(timed: TimeConditioned, experts: int = 10, **options: Any) -> None:
    """A :class:`~restoreloss.TimeMoE` behind each decoder level."""
    layers = [layer for layer in timed.layers if layer.startswith("decoders.")]
    channels = channels_of(timed.network, layers, torch.zeros(1, 3, 32, 32))
    timed.attach({layer: TimeMoE(channels[layer], timed.time_dim, experts=experts, **options) for layer in layers})
