"""What can be set, in a YAML file and on the command line?"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.common.options import DataOptions, Degradation, RunOptions

MethodName = Literal[
    "edtr", "conventional", "hlf_long", "hlf_from_noise", "no_pre", "no_hlf", "no_fm", "no_prior", "only_task",
    "only_reference", "frozen_decoder", "no_color_fix",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions, RunOptions):
    """One run of EDTR. The networks it starts from come from runs of their own: ``python -m examples.edtr.prepare``.

    Attributes:
        method: one of examples/edtr/methods.py.
        prior: a latent diffusion model: a folder in the layout of Stable Diffusion, or a name on the hub.
        pre: the pre-restoration network: a run directory of examples.sr4ir.train with the method "pretrain", or a file
            that spandrel reads.
        references: task networks trained on HQ pictures: a run directory of the method "oracle". For ``all_in_one``
            three, of classification, segmentation and detection.
        all_in_one: one restorer for three tasks, which take turns (Table 4).
        restorer: architecture of ``pre``, as in examples.sr4ir.
        n: denoising steps.
        long_steps: those of the methods that are named after them.
        t_p: timestep up to which pictures are made noisy.
        lr: of the ControlNet and the decoder (AdamW).
        h_optimizer: of the task network, "sgd" (momentum 0.9, weight decay 1e-4) or "adamw".
        h_lr: its learning rate.
        alpha: weight of the FM loss; the default is 1 for classification, 0.5 for segmentation, 0.2 for detection.
        restorer_share: part of the batch that the restorer trains on. The paper takes half of it for classification.
        layers: of the HLF and FM losses; the default is the last before the head.
        judge: run directory of an "oracle" of another seed, never used in training.
        smallest: pad smaller pictures to this before they are restored, and cut them back; 512 in the paper.
        checkpointing: compute activations of the diffusion model again in the backward pass, to save memory.
    """

    method: MethodName = "edtr"
    prior: Path
    pre: Path
    references: list[Path] = field(default_factory=list)
    all_in_one: bool = False
    restorer: str = "edsr-small"
    degradation: Degradation = "mixture_b"
    scale: int = 1
    n: int = 1
    long_steps: int = 50
    t_p: int = 200
    lr: float = 5e-4
    h_optimizer: Literal["sgd", "adamw"] = "adamw"
    h_lr: float = 5e-4
    alpha: float | None = None
    restorer_share: float = 0.5
    layers: list[str] | None = None
    judge: Path | None = None
    smallest: int = 0
    checkpointing: bool = False
