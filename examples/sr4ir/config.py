"""The options of SR4IR, in a YAML file and on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.common.data.options import DataOptions
from examples.common.engine.options import TrainerOptions
from examples.sr4ir.methods import METHODS

MethodName = Literal[
    "oracle", "l_to_t", "s_to_t", "t_to_s", "joint", "sr4ir", "no_tdp", "sr_only", "hr_only", "no_cqmix",
    "fixed_foreign", "fixed_task", "tdp_joint", "tdsr", "rsrssn", "pretrain", "l_to_t_3x", "s_to_t_3x", "tdp_detached",
    "no_tdp_no_cqmix", "more_cqmix", "h_fixed", "squared", "gradients", "squared_tdp",
    "sr4ir_squared",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions, TrainerOptions):
    """One run. The defaults train on two cores in about a minute.

    Attributes:
        method: training method, one of examples/sr4ir/methods.py.
        restorer: "edsr", "edsr-small", "swinir", "swinir-light", "swinir-small", "module:Class", or "file" for what
            spandrel finds in ``s_weights``; of scale 1 any of examples/common/networks/restorers.py.
        s_weights: weights that the restorer starts from: a file, or a run directory.
        recognizer: "small", "paper", "module:Class" or, for classification, "timm/NAME"; "english_g2" for reading.
        start: what the recognizer starts from: "scratch", its own initialization, or "hr", ``h_weights`` trained on HR
            images.
        h_weights: run directory of the method "oracle".
        layers: layers of the TDP loss; the default is the last before the head.
        tdp_weight: factor of the TDP loss.
        grid: cells of CQMix on a side; the default is 4 for classification and 8 otherwise.
        mix: share of restored pixels in CQMix.
        separate: run the recognizer once for each kind of input, as in the authors' code, instead of once for their
            concatenation, as in the paper. Batch normalization tells them apart.
        s_lr: learning rate of the restorer (AdamW without weight decay).
        h_optimizer: optimizer of the recognizer, "sgd" (momentum 0.9) or "adamw".
        h_lr: learning rate of the recognizer.
        h_weight_decay: weight decay of the recognizer by SGD; the authors' code has 1e-6 for some.
        s_lr_min: where the cosine of the restorer's learning rate ends; 1e-6 in the authors' code.
        h_lr_min: likewise of the recognizer's; 1e-4 in the authors' code.
        warm_up: steps in which both learning rates rise linearly.
        restart: fraction of the training after which the cosine of both learning rates begins anew. The authors' code
            does so for methods with a TDP loss alone: 0 is what it has for the others.
        aux_weight: weight of the loss of DeepLab's auxiliary head, which "paper" then has, and which learns ten times
            as fast; 0.5 in the authors' code.
        align_corners: how L->T enlarges LR images; true in the authors' code.
        lite0: test with a perceptual distance by EfficientNet-Lite0 too, where its package is installed.
        pad_tests: continue test images to multiples of ``scale`` and cut what was restored back, instead of cutting
            them; so in the authors' code.
        fixed_hr: run directory of an "oracle" that also reads the restored images (and whose features the TDP loss of
            fixed_task, h_fixed and squared_tdp compares), or "english_g2", as EasyOCR has it.
        judge: run directory of another one, of another seed, never used in training, or "pp_ocr".
        foreign: for fixed_foreign, the run directory of an "oracle" on other data, "imagenet" (torchvision's ResNet18)
            or "vgg" (its VGG19, as in Table 6, A).
    """

    method: MethodName = "sr4ir"
    restorer: str = "edsr-small"
    s_weights: Path | None = None
    recognizer: str = "small"
    start: Literal["scratch", "hr"] = "scratch"
    h_weights: Path | None = None
    layers: list[str] | None = None
    tdp_weight: float = 1.0
    grid: int | None = None
    mix: float = 0.5
    separate: bool = False
    s_lr: float = 1e-3
    h_optimizer: Literal["sgd", "adamw"] = "adamw"
    h_lr: float = 2e-3
    h_weight_decay: float = 1e-4
    s_lr_min: float = 0.0
    h_lr_min: float = 0.0
    warm_up: int = 0
    restart: float = 0.1
    aux_weight: float = 0.0
    align_corners: bool = False
    lite0: bool = False
    pad_tests: bool = False
    fixed_hr: Path | None = None
    judge: Path | None = None
    foreign: Path | None = None

    def looked_at(self) -> dict[str, bool]:
        """Whether this run looks at an option, of those that only some look at."""
        method = METHODS[self.method]
        tdp, mixes = "tdp" in method.restorer_terms, "mix" in method.recognizer_inputs
        return {
            "s_weights": bool(method.restorer_terms) or self.restorer == "file",
            "layers": tdp and method.features != "foreign",
            "tdp_weight": tdp,
            **dict.fromkeys(("grid", "mix"), mixes),
            "separate": len(method.recognizer_inputs) > 1,
            "h_weight_decay": self.h_optimizer == "sgd" and bool(method.recognizer_inputs),
        }
