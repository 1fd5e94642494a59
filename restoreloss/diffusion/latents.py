"""How do images reach a prior that lives in a latent space?"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from restoreloss.diffusion.denoisers import Conditioning, Denoiser, as_denoiser
from restoreloss.diffusion.weights import reference_weight


class LatentEncoder(nn.Module):
    r"""Images in [-1, 1] to the latents a diffusion model was trained on.

    .. math:: \big(\operatorname{mode} q(\cdot \mid u) - \text{shift}\big) \cdot \text{scale}

    The mode and never a sample: two draws would differ by more than two similar images do.

    Args:
        encoder: an ``AutoencoderKL`` or one of its kin in diffusers (``encode(u)`` with ``latent_dist`` or ``latents``,
            and ``config.scaling_factor``), or any module or callable ``u -> latents``.

    Raises:
        ValueError: If it is none of these, or reads other channels than the images have.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        if not callable(encoder):
            raise ValueError(f"`encoder` should be a module or a callable, found {type(encoder).__name__}.")
        self.encoder: Any = encoder
        config: Any = getattr(encoder, "config", None)
        self._is_autoencoder = hasattr(encoder, "encode") and hasattr(config, "scaling_factor")
        self._scale: float = config.scaling_factor if self._is_autoencoder else 1.0
        self._channels: int | None = getattr(config, "in_channels", None) if self._is_autoencoder else None
        self.latent_channels: int | None = getattr(config, "latent_channels", None) if self._is_autoencoder else None
        self._shift: float = getattr(config, "shift_factor", None) or 0.0
        # an odd size is cut silently by the strided convolutions of an AutoencoderKL
        self.multiple: int = 2 ** (len(config.block_out_channels) - 1) if self._is_autoencoder else 1

    def forward(self, image: Tensor) -> Tensor:
        """Latents in the dtype of ``image``, shape (N, c, h, w)."""
        if self._channels not in (None, image.shape[1]):
            raise ValueError(
                f"`restored` should have {self._channels} channels for this encoder, found {image.shape[1]}."
            )
        weight = reference_weight(self)
        cast = image if weight is None else image.to(weight.dtype)
        if not self._is_autoencoder:
            latents: Tensor = self.encoder(cast)
            return latents.to(image.dtype)
        output = self.encoder.encode(cast)
        latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
        return (latents.to(image.dtype) - self._shift) * self._scale


class LatentPrior(nn.Module):
    """A diffusion model and the autoencoder whose latents it lives in, as one thing to give to :class:`DiffLoss`.

    Neither is copied; :class:`DiffLoss` takes both over. The gradient reaches an image through the encoder.

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
        encoder = LatentEncoder(vae)
        channels = encoder.latent_channels
        denoiser = as_denoiser(unet, schedule, conditioning=conditioning, bottleneck=bottleneck)
        if None not in (channels, denoiser.in_channels) and channels != denoiser.in_channels:
            raise ValueError(
                f"`unet` should read the {channels} channels of the latents of `vae`, found one that reads "
                f"{denoiser.in_channels}."
            )
        self.encoder, self.denoiser = encoder, denoiser
