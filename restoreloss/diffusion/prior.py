"""The prior that ships with the package and needs no download: a small U-Net of photographic texture.

It has 2.8 M parameters and was trained on crops of fourteen photographs. Its model card, training log and held-out
errors are beside its weights in ``restoreloss/data/small_prior``.
"""

import json
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from restoreloss._optional import require

if TYPE_CHECKING:
    from diffusers import UNet2DModel


def small_prior() -> "UNet2DModel":
    """The prior that ships: a small unconditional DDPM of photographic texture.

    It was trained on 48x48 crops, has no attention and so takes any size. Height and width should be multiples of 8,
    which :class:`DiffLoss` sees to. Its schedule is :meth:`NoiseSchedule.linear`, which is the default everywhere.

    Returns:
        A diffusers ``UNet2DModel`` in eval mode, float32, on the CPU. It reads and predicts 3 channels in [-1, 1].

    Raises:
        ImportError: If diffusers or safetensors is not installed.

    Example:
        >>> prior = small_prior()
        >>> sum(p.numel() for p in prior.parameters()) < 3_000_000
        True
        >>> loss = DiffLoss(prior)
    """
    diffusers = require("diffusers", purpose="small_prior()", install="diffusers")
    safetensors = require("safetensors.torch", purpose="small_prior()", install="safetensors")

    with as_file(files("restoreloss") / "data" / "small_prior") as folder:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = safetensors.load_file(folder / "diffusion_pytorch_model.fp16.safetensors")
    model: UNet2DModel = diffusers.UNet2DModel.from_config(config)
    model.load_state_dict(weights)  # The file is in half precision, the parameters are float32.
    return model.eval()
