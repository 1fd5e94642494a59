"""Latent diffusion models with random weights: small ones for two cores, and one as large as Stable Diffusion 2.1.

:func:`load_prior` gives a trained one, and :class:`LatentPrior` makes one of your own modules of diffusers.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from restoreloss._optional import require
from restoreloss.checks import check_integer, describe
from restoreloss.diffusion.latents import LatentPrior
from restoreloss.diffusion.schedule import NoiseSchedule, PredictionType

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel


def small_latent_prior(width: int = 16, levels: int = 2, *, prediction_type: PredictionType = "epsilon") -> LatentPrior:
    """A small autoencoder and a small U-Net in its latents, with random weights.

    Args:
        width: channels of the first level of the autoencoder; the U-Net has twice as many.
        levels: of the autoencoder, which halves the resolution between two of them.
        prediction_type: of the schedule, which is that of Stable Diffusion.

    Example:
        >>> prior = small_latent_prior(4)
        >>> prior.encoder(torch.rand(1, 3, 16, 16)).shape
        torch.Size([1, 4, 8, 8])
    """
    schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)
    return LatentPrior(small_autoencoder(width, levels), small_unet(2 * width), small_prompt(), schedule=schedule)


def small_autoencoder(width: int = 16, levels: int = 2) -> "AutoencoderKL":
    """Images to latents of 4 channels, at half the resolution for each level but the first."""
    diffusers = require("diffusers", purpose="small_autoencoder()", install="diffusers")
    check_integer("levels", levels)
    autoencoder: AutoencoderKL = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(width * 2**level for level in range(levels)),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return autoencoder


def small_unet(width: int = 32) -> "UNet2DConditionModel":
    """A diffusion model in these latents, of two levels; its prompt is one token of 8 numbers."""
    diffusers = require("diffusers", purpose="small_unet()", install="diffusers")
    unet: UNet2DConditionModel = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    return unet


def small_prompt() -> Tensor:
    """The empty prompt of :func:`small_unet`: zeros (1, 1, 8)."""
    return torch.zeros(1, 1, 8)


def stable_diffusion_prior(*, device: torch.device | str = "cpu") -> LatentPrior:
    """The autoencoder and the U-Net of Stable Diffusion 2.1 (and of SD-Turbo), with random weights.

    Args:
        device: where they are made; "meta" for their shapes alone.
    """
    diffusers = require("diffusers", purpose="stable_diffusion_prior()", install="diffusers")
    with torch.device(device):
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
            sample_size=512,
            scaling_factor=0.18215,
        )
        unet = diffusers.UNet2DConditionModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
        prompt = torch.zeros(1, 77, 1024)
    return LatentPrior(vae, unet, prompt, schedule=NoiseSchedule.scaled_linear())


class Parts(NamedTuple):
    """What a restorer is made of, taken out of a :class:`LatentPrior`."""

    vae: "AutoencoderKL"
    unet: "UNet2DConditionModel"
    schedule: NoiseSchedule
    prompt: Tensor

    @classmethod
    def of(cls, prior: LatentPrior) -> "Parts":
        """The parts of a prior.

        Raises:
            ValueError: If the argument, ``prior``, is of another kind or of other parts than an ``AutoencoderKL``, a
                ``UNet2DConditionModel`` and hidden states (1, L, D).
        """
        said = "`prior` should be a LatentPrior (load_prior reads one)"
        if not isinstance(prior, LatentPrior):
            raise ValueError(f"{said}, found {describe(prior)}.")
        diffusers = require("diffusers", purpose="a restorer", install="diffusers")
        vae, unet, prompt = prior.encoder.encoder, prior.denoiser.model, prior.denoiser.conditioning
        for part, name in ((vae, "AutoencoderKL"), (unet, "UNet2DConditionModel")):
            if not isinstance(part, getattr(diffusers, name)):
                raise ValueError(f"{said} with a {name}, found {describe(part)} in it.")
        if not isinstance(prompt, Tensor) or prompt.ndim != 3 or len(prompt) != 1:
            raise ValueError(f"{said} with the hidden states of the empty prompt (1, L, D), found {describe(prompt)}.")
        return cls(vae, unet, prior.denoiser.schedule, prompt)
