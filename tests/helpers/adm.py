"""The U-Net of guided-diffusion (ADM), as Dhariwal & Nichol 2021 describe it and with the names of its state dict.

Written for the tests of load_prior: nothing of it comes from diffusers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the embedding scales and shifts between, or is added."""

    def __init__(self, channels: int, embedding: int, out: int, *, scale_shift: bool, change: str = "") -> None:
        super().__init__()
        self.scale_shift, self.change = scale_shift, change
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def resized(self, x: Tensor) -> Tensor:
        if self.change == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.change == "down" else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, silu, convolution = self.in_layers
        h = convolution(self.resized(silu(norm(x))))
        x = self.resized(x)
        embedded = self.emb_layers(embedding)[..., None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + embedded)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Over all pixels, in heads of ``width`` channels."""

    def __init__(self, channels: int, width: int, *, grouped: bool) -> None:
        super().__init__()
        self.heads, self.width, self.grouped = channels // width, width, grouped
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        tokens = x.reshape(n, channels, -1)
        qkv = self.qkv(self.norm(tokens))
        outputs = []
        for head in range(self.heads):
            if self.grouped:  # q, k and v of a head lie together
                start = 3 * self.width * head
                q, k, v = (qkv[:, start + i * self.width : start + (i + 1) * self.width] for i in range(3))
            else:
                q, k, v = (qkv[:, i * channels + head * self.width :][:, : self.width] for i in range(3))
            weights = torch.einsum("nct,ncs->nts", q, k) / math.sqrt(self.width)
            outputs.append(torch.einsum("nts,ncs->nct", weights.softmax(dim=-1), v))
        return x + self.proj_out(torch.cat(outputs, dim=1)).reshape(n, channels, height, width)


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class First(nn.Conv2d):
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class ADM(nn.Module):
    """``attention``: the levels that have it."""

    def __init__(
        self,
        *,
        channels: int = 32,
        mults: Sequence[float] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (1, 2),
        out_channels: int = 6,
        width: int = 16,
        updown: bool = True,
        scale_shift: bool = True,
        grouped: bool = True,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        embedding = 4 * channels
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, embedding)

        def residual(before: int, after: int, change: str = "") -> Residual:
            return Residual(before, embedding, after, scale_shift=scale_shift, change=change)

        def attend(wide: int) -> Attention:
            return Attention(wide, width, grouped=grouped)

        now = int(channels * mults[0])
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(3, now, 3, padding=1)])])
        kept = [now]
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                layers = [residual(now, int(mult * channels))]
                now = int(mult * channels)
                self.input_blocks.append(nn.ModuleList([*layers, *([attend(now)] if level in attention else [])]))
                kept.append(now)
            if level < len(mults) - 1:
                self.input_blocks.append(nn.ModuleList([residual(now, now, "down") if updown else Down(now)]))
                kept.append(now)
        self.middle_block = nn.ModuleList([residual(now, now), attend(now), residual(now, now)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for number in range(blocks + 1):
                parts: list[nn.Module] = [residual(now + kept.pop(), int(mult * channels))]
                now = int(mult * channels)
                if level in attention:
                    parts.append(attend(now))
                if level and number == blocks:
                    parts.append(residual(now, now, "up") if updown else Up(now))
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, out_channels, 3, padding=1))
        for parameter in self.parameters():  # as if trained: a fresh ADM ends in zeros
            nn.init.normal_(parameter, std=0.15)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, mean=1.0, std=0.2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.channels // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        if y is not None:
            embedding = embedding + self.label_emb(y)
        kept = []

        def run(block: nn.Module, h: Tensor) -> Tensor:
            for layer in block.children():
                h = layer(h, embedding)
            return h

        for block in self.input_blocks:
            kept.append(x := run(block, x))
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, kept.pop()], dim=1))
        found: Tensor = self.out(x)
        return found
