"""CFRM: the features of an encoder that sees a degraded image, made those of the clean image."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss._optional import require
from restoreloss.checks import check_integer, check_map, describe


class CFRM(nn.Module):
    r"""Complementary feature restoration module: groups of channels, weighed by the degradation that is there.

    .. math::
        h &= \mathrm{NAFBlocks}(x) \\
        u &= \mathrm{GELU}\bigl(\mathrm{Conv}^{g}_{3\times 3}(\mathrm{GN}(W_{in} h))\bigr) \\
        v &= u \cdot W^{g}_{intra}\,\mathrm{GAP}(u) \\
        y &= h + W_{out}\bigl(v \cdot W_{inter}\,\mathrm{GAP}(v)\bigr)

    :math:`W_{in}` expands C to ``expansion`` C channels in g groups. A layer with :math:`{}^{g}` reads its own group
    alone; :math:`W_{inter}` gives one weight for each group. :math:`W_{out}` is zero at the start and NAFBlocks are the
    identity, so that the module changes nothing behind a trained encoder until it has learned to.

    Args:
        channels: C.
        blocks: how many NAFBlocks come first (spandrel's, which have no second derivative; the authors have 1, 1 and 9
            on the three levels of their encoder), or a network of your own in their place, from C channels to C.
        groups: g.
        expansion: of the channels.

    Raises:
        ValueError: If ``expansion`` C cannot be divided into ``groups``, for numbers that are not whole or below 1, and
            at a call for features of another shape.
        ImportError: For NAFBlocks without spandrel.

    Example:
        >>> restore = CFRM(16, blocks=2, groups=4)
        >>> features = torch.rand(1, 16, 9, 7)
        >>> torch.equal(restore(features), features)
        True

    Source: Chen et al., "UniRestore: Unified Perceptual and Task-Oriented Image Restoration Model Using Diffusion
    Prior", Section 3.2 and Fig. 3a. The authors' code has one more NAFBlock behind the sum, and begins at random.
    """

    def __init__(self, channels: int, *, blocks: int | nn.Module = 1, groups: int = 16, expansion: int = 4) -> None:
        super().__init__()
        width = check_integer("expansion", expansion) * check_integer("channels", channels)
        if width % check_integer("groups", groups):
            raise ValueError(
                f"`expansion` x `channels` should be a multiple of `groups` ({groups}), found {expansion} x {channels}."
            )
        self.channels, self.groups = channels, groups
        self.blocks = blocks if isinstance(blocks, nn.Module) else naf_blocks(channels, blocks)
        self.expand = nn.Conv2d(channels, width, 1)
        self.norm = nn.GroupNorm(groups, width)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.intra = nn.Conv2d(width, width, 1, groups=groups)
        self.inter = nn.Conv2d(width, groups, 1)
        self.merge = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.merge.weight)
        nn.init.zeros_(self.merge.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W), degraded, to (N, C, H, W), restored."""
        check_map("features", features, self.channels)
        h = self.blocks(features)
        if not isinstance(h, Tensor) or h.shape != features.shape:
            raise ValueError(
                f"`blocks` should return features of the shape that they are given, {tuple(features.shape)}, found "
                f"{describe(h)}."
            )
        u = F.gelu(self.mix(self.norm(self.expand(h))))
        # Both attentions scale whole channels, and GAP(u w) = w GAP(u): u is read once and scaled once.
        pooled = u.mean(dim=(2, 3), keepdim=True)
        weight = self.intra(pooled)
        inter = self.inter(pooled * weight).repeat_interleave(weight.shape[1] // self.groups, dim=1)
        restored: Tensor = h + self.merge(u * (weight * inter))
        return restored


def naf_blocks(channels: int, count: int) -> nn.Sequential:
    """NAFBlocks in a row, (N, C, H, W) to the same; the identity at the start.

    Raises:
        ValueError: For a negative count.
        ImportError: Without spandrel.
    """
    if check_integer("blocks", count, low=0) == 0:
        return nn.Sequential()
    spandrel: Any = require("spandrel.architectures.NAFNet", purpose="A NAFBlock", install="spandrel")
    network = spandrel.NAFNet(width=channels, middle_blk_num=count, enc_blk_nums=[], dec_blk_nums=[])
    blocks: nn.Sequential = network.middle_blks
    return blocks
