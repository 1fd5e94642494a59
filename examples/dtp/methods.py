"""The methods of fine-tuning, each one line that says what keeps it from forgetting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from restoreloss._optional import extra, require
from restoreloss.regularizers.per_sample import Estimator

Conflict = Literal["project", "full", "orthogonality"]
AggregatorName = Literal["upgrad", "dualproj", "pcgrad", "mgda"]


@dataclass(frozen=True)
class Method:
    """How a pre-trained network is fine-tuned.

    Attributes:
        pretrained: begin with it.
        penalty: for moving away from it.
        replay: a tenth of the images goes on to train generation, in the shallow layers.
        conflict: what is done where the gradients of both objectives oppose each other.
        decay: penalty and replay fade towards the deep layers (w_l).
        degraded_mean: noise is put on an image between the degraded and the clean one, the closer to the degraded one
            the more there is of it, as in the code that the authors published first.
    """

    pretrained: bool = True
    penalty: Estimator | None = None
    replay: bool = False
    conflict: Conflict | None = None
    decay: bool = False
    degraded_mean: bool = False


METHODS: Mapping[str, Method] = {
    "scratch": Method(pretrained=False),
    "plain": Method(),
    "l2sp": Method(penalty="l2sp"),
    "fisher": Method(penalty="fisher"),
    "mas": Method(penalty="mas"),
    "gn": Method(penalty="gn"),
    "taylor2": Method(penalty="taylor2"),
    "replay": Method(replay=True),
    "replay_degraded": Method(replay=True, degraded_mean=True),
    "project": Method(replay=True, conflict="project"),
    "full": Method(replay=True, conflict="full"),
    "orthogonality": Method(replay=True, conflict="orthogonality"),
    "gef": Method(penalty="taylor2", replay=True, conflict="orthogonality", decay=True),
    "gef_project": Method(penalty="taylor2", replay=True, conflict="project", decay=True),
}


def aggregator(name: AggregatorName) -> nn.Module:
    """One of TorchJD in the place of the projection. Those that would average both gradients add them, as it does."""
    jd = require("torchjd.aggregation", purpose="`aggregator`", install=extra("integrations"))
    found: nn.Module
    if name in ("upgrad", "dualproj"):
        linalg = require("torchjd.linalg", purpose="`aggregator`", install=extra("integrations"))
        # as it comes, it would take gradients as short as these for zeros, and free them of nothing
        projector = linalg.QuadprogProjector(norm_eps=1e-30)
        found = (jd.UPGrad if name == "upgrad" else jd.DualProj)(torch.ones(2), projector=projector)
    else:
        found = jd.PCGrad() if name == "pcgrad" else jd.MGDA()
    return found
