"""The options of EDTR, in a YAML file and on the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.common.data.options import DataOptions, Degradation
from examples.common.engine.options import TrainerOptions
from examples.edtr.methods import METHODS

MethodName = Literal[
    "edtr", "conventional", "hlf_long", "hlf_from_noise", "no_pre", "no_hlf", "no_fm", "no_prior",
    "no_prior_noise", "only_task", "only_reference", "frozen_decoder", "no_color_fix",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions, TrainerOptions):
    """One run of EDTR. Half of each batch is restored; the task network reads the other half as it is.

    Attributes:
        method: training method, one of examples/edtr/methods.py.
        prepared: folder that examples.edtr.prepare wrote: prior, pre, references and judges, where they are not named.
        prior: latent diffusion model: a folder in the layout of Stable Diffusion, or a name on the hub.
        pre: weights of the pre-restoration network: a run directory of examples.sr4ir.train with the method "pretrain",
            or a file.
        references: task networks trained on HQ images: a run directory of the method "oracle". For ``all_in_one``
            three, of classification, segmentation and detection.
        all_in_one: train one restorer for three tasks, which take turns (Table 4).
        restorer: architecture of the pre-restoration network, as in examples.sr4ir.
        n: number of denoising steps.
        long_steps: number of denoising steps of the methods that are named after them.
        t_p: timestep up to which images are made noisy.
        draws: number of draws of the noise that a score is the mean of; 4 in the paper.
        color_levels: levels of the color fix; the default is what fits the size of the images, 5 for 512 pixels.
        whole_batch: the restorer learns from the whole batch, as in the authors' code for segmentation and detection,
            and not from the half that the task network reads restored.
        clamp: the task network learns from restored images within [0, 1]; those of the authors' code are not clamped.
        lr: learning rate of the ControlNet and the decoder (AdamW).
        weight_decay: weight decay of the ControlNet and the decoder.
        lr_min: where the cosine of all learning rates ends.
        h_optimizer: optimizer of the task network, "sgd" (momentum 0.9, weight decay 1e-4) or "adamw".
        h_lr: learning rate of the task network.
        alpha: weight of the FM loss; the default is 1 for classification, 0.5 for segmentation, 0.2 for detection.
        layers: layers of the HLF and FM losses; the default is the last before the head.
        judges: as ``references``, of another seed, never used in training.
        smallest: side that smaller images are padded to before they are restored; 512 in the paper.
        checkpointing: compute activations of the diffusion model again in the backward pass, to save memory.
    """

    method: MethodName = "edtr"
    prepared: Path | None = None
    prior: Path | None = None
    pre: Path | None = None
    references: list[Path] = field(default_factory=list)
    all_in_one: bool = False
    restorer: str = "edsr-small"
    degradation: Degradation = "mixture_b"
    scale: int = 1
    n: int = 1
    long_steps: int = 50
    t_p: int = 200
    draws: int = 4
    color_levels: int | None = None
    whole_batch: bool = False
    clamp: bool = True
    lr: float = 5e-4
    weight_decay: float = 0.0
    lr_min: float = 0.0
    h_optimizer: Literal["sgd", "adamw"] = "adamw"
    h_lr: float = 5e-4
    alpha: float | None = None
    layers: list[str] | None = None
    judges: list[Path] = field(default_factory=list)
    smallest: int = 0
    checkpointing: bool = False

    def looked_at(self) -> dict[str, bool]:
        """Whether this run looks at an option, of those that only some look at."""
        method = METHODS[self.method]
        return {
            "n": method.prior and not method.long,
            "long_steps": method.long,
            "t_p": method.partial,
            "draws": method.prior or method.noise,
            "alpha": method.matching,
        }
