"""Controller and SCTuner: steer a frozen diffusion model by a degraded image, without a copy of its encoder."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss._optional import require
from restoreloss.checks import check_integer, check_map, check_time, describe


class Controller(nn.Module):
    r"""A small encoder of the degraded latents, conditioned on the timestep: one map of controls for each resolution.

    Residual blocks and attention as in diffusers, a downsampling between the levels; the map of a level is a last
    residual block's. The last convolution of every residual block and the output of every attention are zero at the
    start.

    Args:
        in_channels: of the latents.
        channels: of the first level.
        multipliers: of the channels, one for each resolution of the diffusion model.
        control_channels: of each map.
        layers: residual blocks of a level.
        heads: of the attention.
        attention: which levels have it; the default is all but the coarsest, which has it in its middle.
        groups: of the normalizations.

    Raises:
        ValueError: For an ``attention`` that does not fit the levels, and channels that the groups or heads do not
            divide.

    Example:
        >>> control = Controller(4, channels=8, multipliers=(1, 2), control_channels=8, heads=2, groups=4)
        >>> [tuple(c.shape) for c in control(torch.rand(1, 4, 16, 12), torch.tensor([999]))]
        [(1, 8, 16, 12), (1, 8, 8, 6)]

    Source: Chen et al., "UniRestore", Section 3.1; the sizes are those of the authors' code, which has them from
    StableSR (Wang et al.): 256 channels, 1, 1, 2, 2 times, two residual blocks, four heads.
    """

    def __init__(
        self,
        in_channels: int = 4,
        *,
        channels: int = 256,
        multipliers: Sequence[int] = (1, 1, 2, 2),
        control_channels: int = 256,
        layers: int = 2,
        heads: int = 4,
        attention: Sequence[bool] | None = None,
        groups: int = 32,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels), ("channels", channels), ("control_channels", control_channels),
            ("layers", layers), ("heads", heads), ("groups", groups),
        ):  # fmt: skip
            check_integer(name, value)
        if not isinstance(multipliers, Sequence) or isinstance(multipliers, str) or not multipliers:
            raise ValueError(f"`multipliers` should be at least one whole number, found {describe(multipliers)}.")
        for multiplier in multipliers:
            check_integer("multipliers", multiplier)
        if attention is not None and not (
            isinstance(attention, Sequence) and all(isinstance(level, bool) for level in attention)
        ):
            raise ValueError(f"`attention` should be one bool for each level, found {describe(attention)}.")
        last = len(multipliers) - 1
        attention = [level < last for level in range(last + 1)] if attention is None else list(attention)
        if len(attention) != last + 1:
            raise ValueError(
                f"`attention` should be one for each of `multipliers` {tuple(multipliers)}, found {len(attention)}."
            )
        widths = [channels * multiplier for multiplier in multipliers]
        if any(width % groups or width % heads for width in widths) or control_channels % groups:
            raise ValueError(
                f"`groups` and `heads` should divide the channels {widths}, and `groups` also `control_channels` "
                f"{control_channels}, found {groups} and {heads}."
            )
        purpose, install = "A Controller", "diffusers"
        embeddings = require("diffusers.models.embeddings", purpose=purpose, install=install)
        parts = require("diffusers.models.unets.unet_2d_blocks", purpose=purpose, install=install)
        residual = require("diffusers.models.resnet", purpose=purpose, install=install).ResnetBlock2D
        attends = require("diffusers.models.attention_processor", purpose=purpose, install=install).Attention
        embedding = 4 * channels
        norm: dict[str, Any] = {"resnet_eps": 1e-5, "resnet_groups": groups}

        self.in_channels = in_channels
        self.time_features = embeddings.Timesteps(channels, True, 0)
        self.embed_time = embeddings.TimestepEmbedding(channels, embedding)
        self.enter = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.layers, self.control_channels = layers, control_channels
        self.levels = nn.ModuleList()
        for level, (before, width) in enumerate(zip([channels, *widths], widths, strict=False)):
            if attention[level]:
                block = parts.AttnDownBlock2D(
                    before, width, embedding, num_layers=layers, attention_head_dim=width // heads,
                    downsample_type="conv" if level < last else None, **norm,
                )  # fmt: skip
            else:
                block = parts.DownBlock2D(
                    before, width, embedding, num_layers=layers, add_downsample=level < last, **norm
                )
            self.levels.append(block)
        self.middle = parts.UNetMidBlock2D(widths[-1], embedding, attention_head_dim=widths[-1] // heads, **norm)
        self.to_control = nn.ModuleList(
            residual(in_channels=width, out_channels=control_channels, temb_channels=embedding, groups=groups, eps=1e-5)
            for width in widths
        )
        for module in self.modules():
            silent = module.conv2 if isinstance(module, residual) else None
            silent = module.to_out[0] if isinstance(module, attends) else silent
            if silent is not None:
                nn.init.zeros_(silent.weight)
                nn.init.zeros_(silent.bias)

    def forward(self, latents: Tensor, timestep: Tensor | int) -> list[Tensor]:
        """(N, in_channels, h, w) and (N,) or (1,) to (N, control_channels, h, w), then half as high and wide, ...

        Raises:
            ValueError: For latents of another shape, and timesteps that are negative, not finite, or neither one nor N.
        """
        check_map("latents", latents, self.in_channels)
        check_time("timestep", timestep)
        timestep = torch.as_tensor(timestep, device=latents.device)
        if timestep.numel() not in (1, len(latents)):
            raise ValueError(f"`timestep` should be one or {len(latents)}, found {tuple(timestep.shape)}.")
        time = self.embed_time(self.time_features(timestep.reshape(-1).expand(len(latents))).to(latents.dtype))
        h, maps = self.enter(latents), []
        for level, block in enumerate(self.levels):
            h, states = block(h, time)
            last = level == len(self.levels) - 1
            seen = self.middle(h, time) if last else states[self.layers - 1]  # The state before the downsampling.
            maps.append(self.to_control[level](seen, time))
        return maps


class SCTuner(nn.Module):
    r"""An edit of a skip connection of a frozen U-Net by a control.

    .. math:: s \leftarrow s' + W_2\,\mathrm{GELU}(W_1 s'), \qquad s' = s + W_c\, c

    :math:`W_c` and :math:`W_2` are zero at the start, so that the U-Net computes what it did before.

    Args:
        channels: of s.
        control_channels: of c.
        hidden: rows of :math:`W_1`; the default is ``channels``.

    Raises:
        ValueError: For numbers that are not whole or below 1.

    Example:
        >>> tuner = SCTuner(8, 4)
        >>> skip = torch.rand(1, 8, 5, 5)
        >>> torch.equal(tuner(skip, torch.rand(1, 4, 5, 5)), skip)
        True

    Source: Jiang et al., "SCEdit", as used by Chen et al., "UniRestore", Section 3.1. Their code begins at random.
    """

    def __init__(self, channels: int, control_channels: int, *, hidden: int | None = None) -> None:
        super().__init__()
        hidden = check_integer("channels", channels) if hidden is None else check_integer("hidden", hidden)
        self.channels, self.control_channels = channels, check_integer("control_channels", control_channels)
        self.project = nn.Conv2d(control_channels, channels, 1)
        self.first, self.second = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        for silent in (self.project, self.second):
            nn.init.zeros_(silent.weight)
            nn.init.zeros_(silent.bias)  # type: ignore[arg-type]

    def forward(self, skip: Tensor, control: Tensor) -> Tensor:
        """(N, C, H, W) and (N, control_channels, H, W) to (N, C, H, W).

        Raises:
            ValueError: For maps of other channels, and a control of another size.
        """
        check_map("skip", skip, self.channels)
        check_map("control", control, self.control_channels)
        if control.shape[2:] != skip.shape[2:] or len(control) != len(skip):
            raise ValueError(
                f"`control` should have the batch and size of `skip` {tuple(skip.shape)}, found {tuple(control.shape)}."
            )
        skip = skip + self.project(control)
        edited: Tensor = skip + self.second(F.gelu(self.first(skip)))
        return edited
