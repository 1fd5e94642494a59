"""Losses that make an image-restoration network better by what it is trained with.

>>> loss = DiffLoss(small_prior())
>>> total = nn.functional.l1_loss(restored, clean) + 0.1 * loss(restored, clean)
"""

from restoreloss.augmentations.cqmix import CQMix
from restoreloss.augmentations.mixtures import MixtureA, MixtureB
from restoreloss.blocks.wavelet import WaveletColorFix
from restoreloss.diffusion.denoisers import Denoiser, as_denoiser
from restoreloss.diffusion.partial import denoise, partial_diffusion, short_steps
from restoreloss.diffusion.prior import small_prior
from restoreloss.diffusion.schedule import NoiseSchedule
from restoreloss.features import FeatureExtractor
from restoreloss.frozen import frozen
from restoreloss.objectives.base import Objective
from restoreloss.objectives.diffloss import DiffLoss
from restoreloss.objectives.task_features import FeatureMatchingLoss, HLFLoss, TDPLoss
from restoreloss.objectives.weighted_sum import WeightedSum
from restoreloss.training.audit import AuditReport, TermAudit, audit, calibrate
from restoreloss.training.phases import Alternation, Phase

__version__ = "0.1.0"

__all__ = [
    "Alternation",
    "AuditReport",
    "CQMix",
    "Denoiser",
    "DiffLoss",
    "FeatureExtractor",
    "FeatureMatchingLoss",
    "HLFLoss",
    "MixtureA",
    "MixtureB",
    "NoiseSchedule",
    "Objective",
    "Phase",
    "TDPLoss",
    "TermAudit",
    "WaveletColorFix",
    "WeightedSum",
    "as_denoiser",
    "audit",
    "calibrate",
    "denoise",
    "frozen",
    "partial_diffusion",
    "short_steps",
    "small_prior",
]
