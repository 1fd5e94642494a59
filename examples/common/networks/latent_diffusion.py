"""The latent diffusion model of a folder in the layout of Stable Diffusion, or of a name on the hub."""

from pathlib import Path
from typing import Literal

from diffusers import DDPMScheduler
from safetensors.torch import load_file

from restoreloss import LatentPrior, load_prior

Prediction = Literal["epsilon", "v_prediction", "sample"]


def load_latent_diffusion(path: Path | str) -> LatentPrior:
    """The prior in vae/, unet/, scheduler/, and prompt.safetensors or text_encoder/ with tokenizer/.

    Args:
        path: the folder, or a name on the hub that diffusers downloads.

    Raises:
        ValueError: If a part of it is missing.
    """
    prompt = Path(path) / "prompt.safetensors"
    if Path(path).is_dir():
        for part in ("vae", "unet", "scheduler"):
            if not (Path(path) / part).is_dir():
                raise ValueError(f"{path} should hold {part}/ as diffusers saves it, found no such folder.")
    try:
        prior = load_prior(path, conditioning=load_file(prompt)["prompt"] if prompt.is_file() else None)
    except OSError as error:
        raise ValueError(
            f"A latent diffusion model should be in the folder {path}, or on the hub under that name: {error}"
        ) from error
    if not isinstance(prior, LatentPrior):
        raise ValueError(f"{path} should hold a latent diffusion model, found one without an autoencoder.")
    return prior


def scheduler(prediction: Prediction = "epsilon") -> DDPMScheduler:
    """The noise of Stable Diffusion, for a model that predicts "epsilon", "v_prediction" or "sample"."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type=prediction
    )
