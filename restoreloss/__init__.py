"""Losses that make an image-restoration network better by what it is trained with.

>>> loss = DiffLoss(small_prior())
>>> total = nn.functional.l1_loss(restored, clean) + 0.1 * loss(restored, clean)
"""

from restoreloss.augmentations.corruptions import CORRUPTIONS as CORRUPTIONS
from restoreloss.augmentations.corruptions import Corruptions, corrupt
from restoreloss.augmentations.cqmix import CQMix
from restoreloss.augmentations.mixtures import MixtureA, MixtureB
from restoreloss.blocks.cfrm import CFRM
from restoreloss.blocks.controller import Controller, SCTuner
from restoreloss.blocks.film import FiLM
from restoreloss.blocks.tfa import TFA
from restoreloss.blocks.time_conditioned import TimeConditioned
from restoreloss.blocks.time_moe import TimeMoE
from restoreloss.blocks.wavelet import WaveletColorFix
from restoreloss.diffusion.adapt import as_denoiser
from restoreloss.diffusion.checkpoints import load_prior, null_text
from restoreloss.diffusion.denoisers import Denoiser
from restoreloss.diffusion.latents import LatentPrior
from restoreloss.diffusion.levels import FlowLevels, NoiseLevels
from restoreloss.diffusion.prior import small_prior
from restoreloss.diffusion.sampling import denoise, partial_diffusion, short_steps
from restoreloss.diffusion.schedule import NoiseSchedule
from restoreloss.features import FeatureExtractor
from restoreloss.frozen import frozen
from restoreloss.objectives.base import Objective
from restoreloss.objectives.denoising import DenoisingLoss
from restoreloss.objectives.diffloss import DiffLoss
from restoreloss.objectives.masked import Masked
from restoreloss.objectives.outputs import MultiOutput, NoReference
from restoreloss.objectives.subsampled import Subsampled
from restoreloss.objectives.task_features import FeatureMatchingLoss, HLFLoss, TDPLoss
from restoreloss.objectives.weighted_sum import WeightedSum
from restoreloss.regularizers.importance import ParameterImportance
from restoreloss.regularizers.orthogonality import GradientOrthogonality
from restoreloss.training.audit import AuditReport, TermAudit, audit, calibrate
from restoreloss.training.matching import TimestepMatch, match_timestep, order_by_timestep
from restoreloss.training.phases import Alternation, Phase
from restoreloss.training.timestep_audit import TimestepAudit, TimestepReport, audit_timesteps

__version__ = "0.1.0"

__all__ = [
    "Alternation",
    "AuditReport",
    "CFRM",
    "CQMix",
    "Controller",
    "Corruptions",
    "Denoiser",
    "DenoisingLoss",
    "DiffLoss",
    "FeatureExtractor",
    "FeatureMatchingLoss",
    "FiLM",
    "FlowLevels",
    "GradientOrthogonality",
    "HLFLoss",
    "LatentPrior",
    "Masked",
    "MixtureA",
    "MixtureB",
    "MultiOutput",
    "NoReference",
    "NoiseLevels",
    "NoiseSchedule",
    "Objective",
    "ParameterImportance",
    "Phase",
    "SCTuner",
    "Subsampled",
    "TFA",
    "TDPLoss",
    "TermAudit",
    "TimeConditioned",
    "TimeMoE",
    "TimestepAudit",
    "TimestepMatch",
    "TimestepReport",
    "WaveletColorFix",
    "WeightedSum",
    "as_denoiser",
    "audit",
    "audit_timesteps",
    "calibrate",
    "corrupt",
    "denoise",
    "frozen",
    "load_prior",
    "match_timestep",
    "null_text",
    "order_by_timestep",
    "partial_diffusion",
    "short_steps",
    "small_prior",
]
