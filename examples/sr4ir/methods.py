"""The methods: every one and every ablation of the paper, each as a few facts about who trains when, on what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.common.engine.run_directory import settings_of

Image = Literal["hr", "bilinear", "restored"]
Input = Literal["hr", "bilinear", "restored", "mix"]
Features = Literal["training", "task", "foreign", "detached"]
PhaseName = Literal["restorer", "recognizer", "both"]
Stages = tuple[tuple[PhaseName, ...], ...]
"""Stages, one after the other; in each, phases that take turns on every batch."""


@dataclass(frozen=True)
class Method:
    """A way to train the restorer S and the recognizer H.

    Attributes:
        stages: who trains: "restorer", "recognizer", or "both" by one loss.
        restorer_terms: weights of the losses of S: "pixel" (L1), "squared" (mean squared error), "gradients" (that of
            the differences between neighboring pixels), "tdp" and "task" (the task loss, through H). "both" has these
            alone: H learns from "task".
        recognizer_inputs: what H trains on, in equal shares: HR images, bilinearly enlarged LR ones, S's output, or
            CQMix of S's output and HR.
        reads: what H reads in the end.
        features: of the TDP loss: those of H in training, of a fixed network trained on the same task, or on another
            ("foreign", the paper's ImageNet network). "detached" cuts the gradient: a control that must do nothing.
        begins: fraction of the training before a term of S is switched on.
        length: multiplies the number of steps.
    """

    stages: Stages
    restorer_terms: Mapping[str, float] = field(default_factory=dict)
    recognizer_inputs: tuple[Input, ...] = ()
    reads: Image = "restored"
    features: Features = "training"
    begins: Mapping[str, float] = field(default_factory=dict)
    length: int = 1


_S: Stages = (("restorer",),)
_H: Stages = (("recognizer",),)
_IN_TURN: Stages = (("restorer", "recognizer"),)
_TOGETHER: Stages = (("both",),)
_PIXEL = {"pixel": 1.0}
_TDP = {"pixel": 1.0, "tdp": 1.0}
_SQUARED = {"pixel": 1.0, "squared": 130.0}
_TENTH = {"tdp": 0.1}
_ALL: tuple[Input, ...] = ("restored", "hr", "mix")

METHODS: dict[str, Method] = {
    # Tables 1-3; notation of the paper in the comments
    "oracle": Method(_H, recognizer_inputs=("hr",), reads="hr"),
    "l_to_t": Method(_H, recognizer_inputs=("bilinear",), reads="bilinear"),  # L -> T
    "s_to_t": Method(_S + _H, _PIXEL, ("restored",)),  # S -> T
    "t_to_s": Method(_H + _S, {"pixel": 1.0, "task": 1.0}, ("hr",)),  # T -> S
    "joint": Method(_TOGETHER, {"pixel": 1.0, "task": 1.0}, ("restored",)),  # S + T
    "sr4ir": Method(_IN_TURN, _TDP, _ALL, begins=_TENTH),
    # Table 4: without TDP loss
    "no_tdp": Method(_IN_TURN, _PIXEL, _ALL),
    # Table 5: what H trains on
    "sr_only": Method(_IN_TURN, _TDP, ("restored",), begins=_TENTH),
    "hr_only": Method(_IN_TURN, _TDP, ("hr",), begins=_TENTH),
    "no_cqmix": Method(_IN_TURN, _TDP, ("restored", "hr"), begins=_TENTH),
    # Table 6: whose features
    "fixed_foreign": Method(_IN_TURN, _TDP, _ALL, features="foreign", begins=_TENTH),  # (A)
    "fixed_task": Method(_IN_TURN, _TDP, _ALL, features="task", begins=_TENTH),  # (B)
    "tdp_joint": Method(_TOGETHER, {**_TDP, "task": 1.0}, ("restored",), begins=_TENTH),  # (C)
    # Table 7: TDSR-0.01
    "tdsr": Method(_IN_TURN, {"pixel": 1.0, "task": 0.01}, ("restored",), begins={"task": 1 / 3}),
    # EDTR's baseline RSRSSN: end to end, features 0.1 and task 1
    "rsrssn": Method(_TOGETHER, {"pixel": 1.0, "tdp": 0.1, "task": 1.0}, ("restored",)),
    # Not in the paper. A restorer that the others start from:
    "pretrain": Method(_S, _PIXEL),
    # TDP for a recognizer that never changes, alone and beside squared error:
    "h_fixed": Method(_S, _TDP, features="task"),
    "squared_tdp": Method(_S, {"pixel": 1.0, "squared": 4.0, "tdp": 2.0}, features="task"),
    # Losses that know no recognizer, with 97 % of the gradient, and one of them in TDP's place:
    "squared": Method(_S, _SQUARED),
    "gradients": Method(_S, {"pixel": 1.0, "gradients": 100.0}),
    "sr4ir_squared": Method(_IN_TURN, _SQUARED, _ALL),
    # As many images for H as SR4IR shows it:
    "l_to_t_3x": Method(_H, recognizer_inputs=("bilinear",), reads="bilinear", length=3),
    "s_to_t_3x": Method(_S + _H, _PIXEL, ("restored",), length=3),
    # TDP without its gradient, neither TDP nor CQMix, twice the share of CQMix:
    "tdp_detached": Method(_IN_TURN, _TDP, _ALL, features="detached", begins=_TENTH),
    "no_tdp_no_cqmix": Method(_IN_TURN, _PIXEL, ("restored", "hr")),
    "more_cqmix": Method(_IN_TURN, _TDP, ("restored", "hr", "mix", "mix"), begins=_TENTH),
}


def check_trained_restorer(run: Path | None, option: str) -> None:
    """Raise ``ValueError`` for the run directory of a method that leaves its restorer as it began."""
    method = settings_of(run).get("method")
    if method in METHODS and not METHODS[method].restorer_terms:
        raise ValueError(f"`{option}` should be a run that trains a restorer, found one of {method!r}: {run}.")
