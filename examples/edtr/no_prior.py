"""EDTR without its diffusion model: the ablation of Table 2, row 7."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor, nn

from restoreloss import LatentPrior
from restoreloss.generators import Generators
from restoreloss.restorers.edtr import EDTR, Hint


class NoPrior(EDTR):
    """The restored latents are the hint plus a projection of what the ControlNet returns.

    Args:
        pre: see :class:`EDTR`, as the others.
        prior: its U-Net is what the ControlNet is a copy of, and is not asked.
        t_p: the timestep that the ControlNet receives.
        n: denoising steps, of which there are none.
        color_fix: as there.
        color_levels: as there.
        noisy: put the noise of ``t_p`` on the hint's latents, as partial diffusion does; nothing takes it out again but
            what the ControlNet has learned.
    """

    def __init__(
        self,
        pre: nn.Module,
        prior: LatentPrior,
        *,
        t_p: int | None = 200,
        n: int = 1,
        color_fix: bool = True,
        color_levels: int = 5,
        noisy: bool = False,
    ) -> None:
        super().__init__(pre, prior, t_p=t_p, n=n, color_fix=color_fix, color_levels=color_levels)
        self.noisy = noisy
        self.projection = nn.ModuleList(_projections(self.controlnet))

    def forward(
        self,
        hint: Hint,
        steps: int | Tensor | Sequence[int],
        *,
        noise: Tensor | Sequence[Tensor],
        latents: Tensor | None = None,
        generator: Generators = None,
        noise_only: bool = False,
    ) -> Tensor:
        """The image, (N, 3, H, W); arguments as in :class:`EDTR`, of which ``hint`` and the first noise are used."""
        prompt, seen, start = self.prompt.expand(len(hint.latents), -1, -1), hint.latents, hint.latents
        if self.noisy:
            first = noise if isinstance(noise, Tensor) else noise[0]
            seen = self.schedule.add_noise(hint.latents, first, self.t_p)
            start = self.schedule.predict_x0(seen, torch.zeros_like(seen), self.t_p)
        residuals, middle = self.controlnet(seen, self.t_p, prompt, controlnet_cond=hint.latents, return_dict=False)
        size = hint.latents.shape[2:]
        parts = [
            F.interpolate(project(part), size=size, mode="nearest")
            for project, part in zip(self.projection, (*residuals, middle), strict=True)
        ]
        return self.finish(start + torch.stack(parts).sum(0), hint)


def _projections(controlnet: ControlNetModel) -> list[nn.Module]:
    """Convolutions to latents, from each residual that the ControlNet returns."""
    widths = [block.out_channels for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block)]
    return [nn.Conv2d(width, controlnet.config.in_channels, 1) for width in widths]
