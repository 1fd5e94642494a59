"""What keeps fine-tuning from forgetting: each method is one line."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from restoreloss.regularizers.importance import Estimator

Penalty = Estimator | Literal["l2sp"]
Conflict = Literal["project", "full", "orthogonality"]


@dataclass(frozen=True)
class Method:
    """How a pre-trained network is fine-tuned.

    Attributes:
        pretrained: begin with it.
        penalty: for moving away from it.
        replay: a tenth of the pictures goes on to train generation, in the shallow layers.
        conflict: what is done where the gradients of both objectives oppose each other.
        decay: penalty and replay fade towards the deep layers (w_l).
    """

    pretrained: bool = True
    penalty: Penalty | None = None
    replay: bool = False
    conflict: Conflict | None = None
    decay: bool = False


METHODS: Mapping[str, Method] = {
    "scratch": Method(pretrained=False),
    "plain": Method(),
    "l2sp": Method(penalty="l2sp"),
    "fisher": Method(penalty="fisher"),
    "mas": Method(penalty="mas"),
    "gn": Method(penalty="gn"),
    "taylor2": Method(penalty="taylor2"),
    "replay": Method(replay=True),
    "project": Method(replay=True, conflict="project"),
    "full": Method(replay=True, conflict="full"),
    "orthogonality": Method(replay=True, conflict="orthogonality"),
    "gef": Method(penalty="taylor2", replay=True, conflict="orthogonality", decay=True),
    "gef_project": Method(penalty="taylor2", replay=True, conflict="project", decay=True),
}
