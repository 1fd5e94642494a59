"""Which options do all recipes share? Each recipe's Config adds its own, and fills in its defaults."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from examples.common.tasks import Task

Degradation = Literal["bicubic", "mixture_a", "mixture_b", "corruptions", "unseen_corruptions"]
DataName = Literal["generated", "photos", "cub200", "cars", "voc2012"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run goes.

    Attributes:
        out: the run directory; a killed run goes on there.
        steps: of every phase.
        batch: pictures a step, of all processes together.
        max_norm: clip the gradients to this norm.
        seed: of everything.
        precision: of accelerate's autocast.
        cpu: keep off the accelerator.
        workers: processes that read pictures.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations on the test pictures; 0 for the end only.
    """

    out: Path
    steps: int = 500
    batch: int = 16
    max_norm: float | None = None
    seed: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    cpu: bool = False
    workers: int = 0
    save_every: int = 250
    eval_every: int = 0

    def plain(self) -> dict[str, Any]:
        """What decides the result, as plain values for config.yaml."""
        return {**plain_values(asdict(self)), "out": self.out.name}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which pictures, and what happened to them.

    Attributes:
        task: what is read in the pictures.
        data: "generated" and "photos" are made on the spot; the others are read from ``root``.
        root: of the data set on disk.
        size: of the training pictures, in pixels; the default is the data set's own.
        train_count: training pictures of "generated" and "photos".
        test_count: test pictures of "generated" and "photos".
        data_seed: of "generated" and "photos"; the default is ``seed``.
        contrast: of the textures of "generated", lowest and highest amplitude.
        degradation: "bicubic" reduction by ``scale``, or what keeps the size: the mixtures of EDTR, one of the 15
            corruptions of ImageNet-C, or one of the four that it keeps for validation ("unseen_corruptions").
        scale: of the super-resolution.
        blur: standard deviation of a Gaussian blur before a bicubic reduction (SR4IR, Table S5).
        mixture_extent: of the mixtures' blur and reduction, as a fraction of what the paper does to 512 pixels.
        severities: of the corruptions, any of 1 to 5.
    """

    task: Task = "classification"
    data: DataName = "generated"
    root: Path | None = None
    size: int | None = None
    train_count: int = 1500
    test_count: int = 1000
    data_seed: int | None = None
    contrast: tuple[float, float] = (0.035, 0.1)
    degradation: Degradation = "bicubic"
    scale: int = 4
    blur: float = 0.0
    mixture_extent: float = 1.0
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])


def shared(config: Any) -> dict[str, Any]:
    """The options that all recipes share, of the config of one, to make that of another."""
    return {option.name: getattr(config, option.name) for kind in (RunOptions, DataOptions) for option in fields(kind)}


def plain_values(value: Any) -> Any:
    """As a YAML file holds it; a path that exists in full, so that the run can be used from elsewhere."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, Path):
        return str(value.resolve()) if value.exists() else str(value)
    return value
