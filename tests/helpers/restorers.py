"""Small restorers, and the numbers that their tests begin with."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from examples.unirestore.adapters import build_adapters
from restoreloss import LatentPrior, NoiseSchedule
from restoreloss.restorers import EDTR, UniRestore, small_latent_prior


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def learned(module: nn.Module, std: float = 0.1) -> Any:
    """As if it had been trained: nothing is the identity any more."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(std * normal(*parameter.shape, seed=number))
    return module


def unirestore(prior: LatentPrior, tasks: Any, adapter: Any, **options: Any) -> UniRestore:
    """With the TFA, or with one of the adapters that the recipe compares it to, or with none."""
    if adapter in ("prompts", None):
        return UniRestore(prior, tasks=() if adapter is None else tasks, adapters=adapter is not None, **options)
    model = UniRestore(prior, adapters=False, **options)
    model.tfa = build_adapters(adapter, *model.adapter_channels, tasks, model.gate)
    return model


def small(
    *, tasks: Any = ("look", "classify"), prediction: Any = "epsilon", adapter: Any = "prompts", **options: Any
) -> UniRestore:
    """A small UniRestore of three levels."""
    torch.manual_seed(0)
    options = {"cfrm_blocks": [1, 1], "control_channels": 8, **options}
    return unirestore(small_latent_prior(4, 3, prediction_type=prediction), tasks, adapter, **options)


def small_like(model: UniRestore, steps: int) -> UniRestore:
    """A small UniRestore with the weights of another one, and other steps."""
    other = small(prediction=model.schedule.prediction_type, steps=steps)
    other.load_state_dict(model.state_dict())
    return other


def stable_diffusion(*, tasks: Any = ("look", "classify"), adapter: Any = "prompts", **options: Any) -> UniRestore:
    """In the layout of Stable Diffusion 2.1, with few channels."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 16, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3), block_out_channels=(8, 16, 32, 32),
        attention_head_dim=(1, 2, 4, 4), cross_attention_dim=8, use_linear_projection=True, norm_num_groups=4,
    )  # fmt: skip
    options = {"cfrm_blocks": [1, 1, 1], "control_channels": 8, **options}
    prior = LatentPrior(vae, unet, normal(1, 3, 8), schedule=NoiseSchedule.scaled_linear())
    return unirestore(prior, tasks, adapter, **options)


MODELS: tuple[Callable[..., UniRestore], ...] = (small, stable_diffusion)


def networks(model: UniRestore) -> tuple[AutoencoderKL, UNet2DConditionModel]:
    return model._vae.network, model._unet.network


def latents_of(model: UniRestore, count: int = 2, size: int = 8) -> tuple[Tensor, Tensor]:
    """Latents, and noise for them."""
    return normal(count, 4, size, size, seed=1), normal(count, 4, size, size, seed=2)


def answers(model: UniRestore, tasks: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(uniform(1, 3, 16, 16), task, noise=normal(1, 4, 4, 4)) for task in tasks])


def small_edtr(kind: type[EDTR] = EDTR, **options: Any) -> EDTR:
    torch.manual_seed(0)
    prior, pre = small_latent_prior(8), nn.Conv2d(3, 3, 1)
    edtr = kind(pre, prior, **options)
    for block in (*edtr.controlnet.controlnet_down_blocks, edtr.controlnet.controlnet_mid_block):
        nn.init.normal_(block.weight, std=0.1)  # they begin at zero, and would hide what is told
    return edtr
