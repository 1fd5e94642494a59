"""How do images reach a prior that lives in a latent space?"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class LatentEncoder(nn.Module):
    r"""Images in [-1, 1] to the latents a diffusion model was trained on.

    .. math:: \big(\operatorname{mode} q(\cdot \mid u) - \text{shift}\big) \cdot \text{scale}

    The mode and never a sample: two draws would differ by more than two similar images do.

    Args:
        encoder: an ``AutoencoderKL`` (anything with ``encode(u).latent_dist`` and ``config.scaling_factor``), or any
            module or callable ``u -> latents``.

    Raises:
        ValueError: If it is none of these.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        if not callable(encoder):
            raise ValueError(f"`encoder` should be a module or a callable, found {type(encoder).__name__}.")
        self.encoder: Any = encoder
        config: Any = getattr(encoder, "config", None)
        self._is_autoencoder = hasattr(encoder, "encode") and hasattr(config, "scaling_factor")
        self._scale: float = config.scaling_factor if self._is_autoencoder else 1.0
        self._shift: float = getattr(config, "shift_factor", None) or 0.0
        # an odd size is cut silently by the strided convolutions of an AutoencoderKL
        self.multiple: int = 2 ** (len(config.block_out_channels) - 1) if self._is_autoencoder else 1

    def forward(self, image: Tensor) -> Tensor:
        """Latents in the dtype of ``image``, shape (N, c, h, w)."""
        weights = next(self.parameters(), image)
        if not self._is_autoencoder:
            latents: Tensor = self.encoder(image.to(weights.dtype))
            return latents.to(image.dtype)
        latents = self.encoder.encode(image.to(weights.dtype)).latent_dist.mode()
        return (latents.to(image.dtype) - self._shift) * self._scale
