"""Restormer, from a size for two cores to that of its paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
