"""Latents: from images to what a diffusion model was trained on, and back."""

import copy
import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from restoreloss.checks import check_callable, describe
from restoreloss.diffusion.adapt import wrap
from restoreloss.diffusion.denoisers import Conditioning, Denoiser
from restoreloss.precision import enter, leave, reference_weight


def normalize_latents(latents: Tensor, config: Any) -> Tensor:
    r"""What an autoencoder encodes, as its diffusion model was trained on it.

    .. math:: \hat z = (z - \text{mean}) / \text{std} \cdot \text{scaling}

    Args:
        latents: (N, c, h, w).
        config: of the autoencoder, with ``scaling_factor`` and, where it has them, ``latents_mean`` and ``latents_std``
            (one number for each channel) or ``shift_factor`` (the mean of all).

    Raises:
        ValueError: For statistics that are not complete, or do not fit the channels.
    """
    mean, deviation = _statistics(latents, config)
    normalized: Tensor = (latents - mean) / deviation * config.scaling_factor
    return normalized


def denormalize_latents(latents: Tensor, config: Any) -> Tensor:
    """The inverse of :func:`normalize_latents`: what an autoencoder decodes (arguments as there)."""
    mean, deviation = _statistics(latents, config)
    raw: Tensor = latents / config.scaling_factor * deviation + mean
    return raw


def _statistics(latents: Tensor, config: Any) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation of latents, shaped to go with them."""
    mean: Any = getattr(config, "latents_mean", None)
    deviation: Any = getattr(config, "latents_std", None)
    shift = getattr(config, "shift_factor", None) or 0.0
    if mean is None and deviation is None:
        return shift, 1.0
    channels = latents.shape[1]
    fits = all(isinstance(values, Sequence) and len(values) == channels for values in (mean, deviation))
    if (
        not fits
        or shift
        or not all(math.isfinite(m) and 0 < d < math.inf for m, d in zip(mean, deviation, strict=True))
    ):
        raise ValueError(
            f"The autoencoder's config should have `latents_mean` and `latents_std` of {channels} numbers each, the "
            f"latter above 0, and no `shift_factor` beside them, found {mean}, {deviation} and {shift}."
        )
    return latents.new_tensor(mean).view(-1, 1, 1), latents.new_tensor(deviation).view(-1, 1, 1)


_OF_DECODING = ("decoder", "post_quant_conv")


class LatentEncoder(nn.Module):
    """Images in [-1, 1] to the latents a diffusion model was trained on: the mode, by :func:`normalize_latents`.

    The mode and never a sample: two draws would differ by more than two similar images do.

    Args:
        encoder: an ``AutoencoderKL`` of diffusers, or an ``AutoencoderTiny``, ``AutoencoderDC`` or ``VQModel``
            (``encode(u)`` with ``latent_dist``, ``latents`` or ``latent``, and ``config.scaling_factor``), or any
            module or callable ``u -> latents``.
        name: of the argument, for the messages.

    Raises:
        ValueError: If it is none of these, or reads other channels than the images have.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor] | nn.Module, *, name: str = "encoder") -> None:
        super().__init__()
        said = f"`{name}` should be an autoencoder of diffusers, or a module or function u -> latents"
        if isinstance(encoder, str | os.PathLike):
            raise ValueError(f"{said}, found the name {str(encoder)!r}: AutoencoderKL.from_pretrained reads it.")
        if isinstance(encoder, type) or not callable(encoder):
            raise ValueError(f"{said}, found {describe(encoder)}.")
        self.encoder: Any = encoder
        self._name = name
        self._left_out: list[weakref.ref[nn.Module]] = []
        config: Any = getattr(encoder, "config", None)
        self._is_autoencoder = hasattr(encoder, "encode") and hasattr(config, "scaling_factor")
        self._channels: int | None = None
        self.latent_channels: int | None = None
        self.multiple: int = 1
        if self._is_autoencoder:
            self._channels = getattr(config, "in_channels", None)
            self.latent_channels = getattr(config, "vq_embed_dim", None) or getattr(config, "latent_channels", None)
            sides = ("encoder_block_out_channels", "down_block_out_channels", "block_out_channels")
            widths = next((getattr(config, side) for side in sides if hasattr(config, side)), None)
            if widths is None:
                raise ValueError(
                    f"{said}, found {describe(encoder)}, whose config does not say how often it halves the image "
                    "(`block_out_channels`): wrap it in a function."
                )
            # The strided convolutions of an AutoencoderKL would cut an odd size silently.
            self.multiple = 2 ** (len(widths) - 1)
        elif hasattr(encoder, "encode") and config is not None:
            raise ValueError(
                f"{said}, found {describe(encoder)}, whose config has no `scaling_factor`: wrap it in a function."
            )
        else:
            check_callable(name, encoder, "u")

    def without_decoder(self) -> "LatentEncoder":
        """The same with a shallow copy of an autoencoder of diffusers that has no decoder; other encoders as they are.

        The decoder is freed once nobody else holds the autoencoder. As long as somebody does, it moves along with the
        encoder, whose parameters are shared, so that the autoencoder stays on one device and in one dtype.
        """
        vae = self.encoder
        if not (self._is_autoencoder and isinstance(vae, nn.Module) and type(vae).__module__.startswith("diffusers.")):
            return self  # Nobody knows what others encode with.
        half, alone = copy.copy(vae), copy.copy(self)
        half._modules = {name: module for name, module in vae._modules.items() if name not in _OF_DECODING}
        alone._modules = {"encoder": half}
        left = [module for name, module in vae._modules.items() if name in _OF_DECODING and module is not None]
        alone._left_out = [weakref.ref(module) for module in left]
        return alone

    def _apply(self, fn: Any, recurse: bool = True) -> "LatentEncoder":
        for reference in self._left_out:
            if (module := reference()) is not None:
                module._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_left_out": []}  # A copy has parameters of its own.

    def forward(self, image: Tensor) -> Tensor:
        """Latents in the dtype of ``image``, shape (N, c, h, w)."""
        if self._channels not in (None, image.shape[1]):
            raise ValueError(
                f"`restored` should have {self._channels} channels for this encoder, found {image.shape[1]}."
            )
        weight = reference_weight(self)
        (cast,), door = enter([image], image.dtype if weight is None else weight.dtype, self)
        output = self.encoder.encode(cast) if self._is_autoencoder else self.encoder(cast)
        if not self._is_autoencoder:
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"`{self._name}` should return latents, found {describe(output)}: give an autoencoder of diffusers "
                    "itself rather than its `encode`."
                )
            latents: Tensor = output
        elif hasattr(output, "latent_dist"):
            latents = output.latent_dist.mode()
        else:
            latents = output.latents if hasattr(output, "latents") else output.latent
        (latents,) = leave(door, latents)
        latents = latents.to(image.dtype)
        return normalize_latents(latents, self.encoder.config) if self._is_autoencoder else latents


class LatentPrior(nn.Module):
    """A diffusion model and the autoencoder whose latents it lives in, as one thing to give to :class:`DiffLoss`.

    Neither is copied; :class:`DiffLoss` takes both over, but for the decoder, which it does not hold. The gradient
    reaches an image through the encoder.

    Args:
        vae: what :class:`LatentEncoder` takes, an ``AutoencoderKL``.
        unet: what :func:`as_denoiser` takes: the U-Net or the transformer.
        conditioning: that of the empty prompt, as :func:`as_denoiser` takes it; :func:`null_text` makes it.
        schedule: the scheduler of the model, or what else :func:`as_denoiser` takes.
        bottleneck: name of the layer whose output is the h-space.

    Raises:
        ValueError: If the channels of the two disagree, or one is not what it should be.

    Example:
        >>> from diffusers import AutoencoderKL, UNet2DModel
        >>> vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        >>> unet = UNet2DModel(in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        ...                    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> loss = DiffLoss(LatentPrior(vae, unet))
        >>> loss(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)).shape
        torch.Size([])
    """

    encoder: LatentEncoder
    denoiser: Denoiser

    def __init__(
        self,
        vae: Callable[[Tensor], Tensor] | nn.Module,
        unet: Callable[..., Any],
        conditioning: Conditioning | None = None,
        *,
        schedule: Any = None,
        bottleneck: str | None = None,
    ) -> None:
        super().__init__()
        encoder = LatentEncoder(vae, name="vae")
        channels = encoder.latent_channels
        denoiser = wrap("unet", unet, schedule, conditioning=conditioning, bottleneck=bottleneck)
        if None not in (channels, denoiser.in_channels) and channels != denoiser.in_channels:
            raise ValueError(
                f"`unet` should read the {channels} channels of the latents of `vae`, found one that reads "
                f"{denoiser.in_channels}."
            )
        self.encoder, self.denoiser = encoder, denoiser
