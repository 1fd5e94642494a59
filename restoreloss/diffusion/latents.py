"""How do images reach a prior that lives in a latent space?"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

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
