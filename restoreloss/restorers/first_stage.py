"""The losses of UniRestore's first stage: restored features (Eq. 2) and restored latents (Eq. 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss.checks import check_number, describe
from restoreloss.generators import Generators, standard_normal
from restoreloss.images import check_pair
from restoreloss.restorers.unirestore import UniRestore
from restoreloss.sizes import fit_size

TIMESTEPS = (249, 499, 749, 999, 999, 999)
"""The timesteps that the authors draw the noise of this stage from, of 1000."""


class UniRestoreFirstStage(nn.Module):
    r"""Both losses of stage 1 in one forward pass, as DDP needs it: wrap this module.

    .. math::
        L_{CFRM} &= \sum_i \lambda_i\, \mathrm{MSE}\bigl(f_i^{clear}, f_i^{restored}\bigr) && \text{(Eq. 2)} \\
        L_{Control} &= \mathrm{MSE}\bigl(z_0, \hat z_0^t\bigr) && \text{(Eq. 3)}

    where :math:`f^{clear}` are the features of the encoder itself for the clean image, :math:`f^{restored}` those
    behind the CFRMs for the degraded one, and :math:`\hat z_0^t` is what the steered diffusion model finds in the
    latents of the clean image, noisy up to t.

    Args:
        model: the restorer, without adapters.
        cfrm_weights: :math:`\lambda`, one for each CFRM; the default is 0.1, ..., 0.1, 0.01.

    Raises:
        ValueError: For another kind of model, and weights that are not as many.

    Example:
        >>> from restoreloss.restorers import UniRestore, UniRestoreFirstStage, small_latent_prior
        >>> model = UniRestore(small_latent_prior(4), adapters=False, cfrm_blocks=[1], control_channels=8)
        >>> stage = UniRestoreFirstStage(model)
        >>> degraded, clean = torch.rand(2, 2, 3, 32, 32)
        >>> terms = stage(degraded, clean, torch.tensor([999, 249]))
        >>> list(terms)
        ['control', 'cfrm']
        >>> sum(terms.values()).backward()

    Source: Chen et al., "UniRestore: Unified Perceptual and Task-Oriented Image Restoration Model Using Diffusion
    Prior", Eqs. 2 and 3. The print of Eq. 2 lacks the norm.
    """

    def __init__(self, model: UniRestore, cfrm_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not isinstance(model, UniRestore):
            raise ValueError(f"`model` should be a UniRestore, found {describe(model)}.")
        self.model = model
        levels = 0 if model.cfrm is None else len(model.cfrm)
        weights = [*[0.1] * (levels - 1), 0.01][:levels] if cfrm_weights is None else list(cfrm_weights)
        if len(weights) != levels:
            raise ValueError(f"`cfrm_weights` should be {levels} numbers, found {weights}.")
        self.weights = [check_number("cfrm_weights", weight, low=0) for weight in weights]

    def forward(
        self, degraded: Tensor, clean: Tensor, timestep: Tensor | int, generator: Generators = None
    ) -> dict[str, Tensor]:
        """The terms "control" and, where there are CFRMs, "cfrm": scalars with a graph.

        Args:
            degraded: (N, 3, H, W) in [0, 1].
            clean: the same shape.
            timestep: one, or one for each image, (N,); the authors draw from :data:`TIMESTEPS`. Where the last level
                of the schedule is noise alone, the one below it takes its place.
            generator: for the noise: one, or one for each image.
        """
        check_pair(degraded, clean, names=("degraded", "clean"))
        model = self.model
        last = model.schedule.last_timestep
        timestep = timestep.clamp(max=last) if isinstance(timestep, Tensor) else min(timestep, last)
        degraded, clean = (fit_size(images, model.multiple, "pad") for images in (degraded, clean))
        with torch.no_grad():
            z_0, wanted = model.encode(clean, restored=False)
            z_t = model.schedule.add_noise(z_0, standard_normal(z_0, generator), timestep)
        condition, features = model.encode(degraded)
        terms = {"control": F.mse_loss(model.predict(z_t, condition, timestep), z_0)}
        if self.weights:
            levels = zip(self.weights, features, wanted, strict=True)
            terms["cfrm"] = torch.stack([weight * F.mse_loss(found, f) for weight, found, f in levels]).sum()
        return terms
