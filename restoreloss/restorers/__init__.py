"""Whole restorers of papers, made of :mod:`restoreloss.blocks` and a latent diffusion model of diffusers.

>>> from restoreloss.restorers import EDTR, small_latent_prior
>>> edtr = EDTR(nn.Identity(), small_latent_prior(4))
>>> edtr.restore(torch.rand(1, 3, 30, 21)).shape
torch.Size([1, 3, 30, 21])
"""

from restoreloss.restorers.edtr import EDTR
from restoreloss.restorers.first_stage import UniRestoreFirstStage
from restoreloss.restorers.shapes import small_latent_prior, stable_diffusion_prior
from restoreloss.restorers.unirestore import UniRestore

__all__ = ["EDTR", "UniRestore", "UniRestoreFirstStage", "small_latent_prior", "stable_diffusion_prior"]
