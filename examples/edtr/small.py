"""Which latent diffusion model is small enough to train on two cores, and laid out like a large one?"""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel


def small_autoencoder(width: int = 16) -> AutoencoderKL:
    """Pictures to latents of 4 channels at half the resolution."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def small_unet(width: int = 32) -> UNet2DConditionModel:
    """A diffusion model in these latents; its prompt is one token of 8 numbers."""
    return UNet2DConditionModel(
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


def small_prompt() -> torch.Tensor:
    """Nothing, (1, 1, 8)."""
    return torch.zeros(1, 1, 8)


def scheduler() -> DDPMScheduler:
    """The noise of Stable Diffusion."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
