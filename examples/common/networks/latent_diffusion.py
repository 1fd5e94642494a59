"""Which latent diffusion model? One in the layout of Stable Diffusion, or one that is small enough for two cores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from restoreloss import NoiseSchedule


@dataclass(frozen=True)
class LatentDiffusion:
    """What a folder in the layout of Stable Diffusion holds, in float32."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    prompt: Tensor
    """The embedded empty prompt (1, L, D)."""


def load_latent_diffusion(path: Path | str) -> LatentDiffusion:
    """vae/, unet/, scheduler/, and text_encoder/ with tokenizer/ or prompt.safetensors.

    Args:
        path: the folder, or a name on the hub that diffusers downloads.

    Raises:
        ValueError: If a part of it is missing.
    """
    if Path(path).is_dir():
        for part in ("vae", "unet", "scheduler"):
            if not (Path(path) / part).is_dir():
                raise ValueError(f"{path} should hold {part}/ as diffusers saves it, found no such folder.")
    try:
        return LatentDiffusion(
            AutoencoderKL.from_pretrained(path, subfolder="vae").float(),  # also of half-precision files
            UNet2DConditionModel.from_pretrained(path, subfolder="unet").float(),
            NoiseSchedule.from_diffusers(DDPMScheduler.from_pretrained(path, subfolder="scheduler")),
            empty_prompt(path),
        )
    except OSError as error:
        raise ValueError(
            f"A latent diffusion model should be in the folder {path}, or on the hub under that name: {error}"
        ) from error


def empty_prompt(path: Path | str) -> Tensor:
    """The embedded empty prompt (1, L, D) of a folder in the layout of Stable Diffusion."""
    stored = Path(path) / "prompt.safetensors"
    if stored.is_file():
        return load_file(stored)["prompt"]
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError(
            "The empty prompt of a Stable Diffusion needs transformers: pip install 'restoreloss[examples]'."
        ) from error
    if Path(path).is_dir() and not (Path(path) / "text_encoder").is_dir():
        raise ValueError(f"{path} should hold text_encoder/ and tokenizer/, or prompt.safetensors, found neither.")
    tokenizer: Any = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    encoder: Any = CLIPTextModel.from_pretrained(path, subfolder="text_encoder").eval()
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        prompt: Tensor = encoder(tokens.input_ids).last_hidden_state
    return prompt.float()


def small_autoencoder(width: int = 16, levels: int = 2) -> AutoencoderKL:
    """Pictures to latents of 4 channels, at half the resolution for each level but the first."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(width * 2**level for level in range(levels)),
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


def small_prompt() -> Tensor:
    """Nothing, (1, 1, 8)."""
    return torch.zeros(1, 1, 8)


def scheduler() -> DDPMScheduler:
    """The noise of Stable Diffusion."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
