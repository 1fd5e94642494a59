"""The options that all recipes share, and the range of every number; each recipe's Config adds its own options."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from examples.common.data.options import DataOptions


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The course of a run.

    Attributes:
        out: run directory; the same command resumes a run that was killed.
        steps: steps of every phase. A finished run of one stage goes on if there are more than before: its learning
            rate, which has fallen, then jumps to where the longer schedule is at that step.
        batch: images in a step, of all processes together.
        max_norm: norm that gradients are clipped to; they are not clipped by default.
        seed: seed of all randomness.
        precision: precision of accelerate's autocast.
        cpu: train on the CPU even where there is an accelerator.
        workers: processes that read images.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations on the test images; 0 evaluates at the end alone.
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
        """The options that decide the result, as plain values for config.yaml."""
        values = {**plain_values(asdict(self)), "out": self.out.name}
        for option in ("data_sets", "pairs", "shifted_pairs", "paired_tests", "clean"):
            if values.get(option):
                values[option] = _absolute(values[option])
        return values

    def looked_at(self) -> dict[str, bool]:
        """Whether this run looks at an option, of those that only some look at; not of those that one file of options
        has for all methods and stages, as the configs of the papers do.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(RunOptions):
    """The course of a run of a recipe, which may be the evaluation of a finished one.

    Attributes:
        evaluate: directory of a finished run, which is evaluated on the data of the other options instead of being
            trained. On the command line all options that are not given are those of that run, but for
            data in whose place others are given.
    """

    evaluate: Path | None = None

    def plain(self) -> dict[str, Any]:
        """The options that decide the result, as plain values for config.yaml."""
        values = super().plain()
        if self.evaluate is None:
            del values["evaluate"]
        return values


_AT_LEAST_1 = (
    "steps", "batch", "save_every", "size", "train_count", "test_count", "patch", "scale", "grid", "n", "long_steps",
    "draws", "color_levels", "t_p", "experts", "importance_samples", "orthogonality_every", "control_channels",
    "prior_steps", "pre_batch", "pre_steps", "width", "levels", "accumulate", "adversarial.width", "severities", "jpeg",
)  # fmt: skip
LOWEST: dict[str, float] = {
    **dict.fromkeys(_AT_LEAST_1, 1), "test_size": 6, "corruption_side": 8, "num_timesteps": 2,
    "diff.snr_power": -math.inf, "max_norm": -math.inf, "shallow": 0.01,
}  # fmt: skip
"""The lowest value of an option, where it is not 0; SSIM needs a side of 6 pixels, and `max_norm` is above 0."""
HIGHEST: dict[str, float] = {
    "jpeg": 100,
    "betas": 1,
    "mix": 1,
    "restart": 1,
    "shallow": 1,
    "contrast": 1,
    "severities": 5,
}


def check_numbers(config: Any) -> None:
    """Raise ``ValueError`` for a number out of its range, or not finite, in the options of a recipe."""
    found = [*_numbers(config)]
    numbers = dict(found)
    for name, value in numbers.items():
        rate = numbers.get(name.removesuffix("_min"), 0)
        if name.endswith("lr_min") and value > rate > 0:  # at a rate of 0 a network does not learn
            raise ValueError(f"`{name}` should be at most `{name.removesuffix('_min')}`, {rate:g}, found {value:g}.")
    for name, value in found:
        if not math.isfinite(value):
            raise ValueError(f"`{name}` should be finite, found {value}.")
        if value < (lowest := LOWEST.get(name, 0)):
            raise ValueError(f"`{name}` should be at least {lowest:g}, found {value}.")
        if value > HIGHEST.get(name, math.inf):
            raise ValueError(f"`{name}` should be at most {HIGHEST[name]:g}, found {value}.")
    check_tile(getattr(config, "tile", 0))
    if getattr(config, "severities", None) == []:
        raise ValueError("`severities` should be at least one, found [].")


def check_tile(tile: int) -> None:
    """Raise ``ValueError`` for tiles that are smaller than what networks take."""
    if 0 < tile < 32:
        raise ValueError(f"`tile` should be at least 32, or 0 for no tiles, found {tile}.")


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for option in fields(config):
        value, name = getattr(config, option.name), f"{prefix}{option.name}"
        if is_dataclass(value):
            yield from _numbers(value, f"{name}.")
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield name, number


def unused(config: RunOptions) -> list[str]:
    """The options that were given and that this run does not look at."""
    default = type(config)(out=config.out)
    idle = [name for name, used in config.looked_at().items() if not used]
    return [name for name in idle if getattr(config, name) != getattr(default, name)]


def shared_options(config: Any) -> dict[str, Any]:
    """The options that all recipes share, of the config of one, to make that of another."""
    return {option.name: getattr(config, option.name) for kind in (RunOptions, DataOptions) for option in fields(kind)}


def _absolute(data: Any) -> Any:
    """NAME:ROOT, or several, with an absolute root, if it exists."""
    if isinstance(data, dict):
        return {key: _absolute(item) for key, item in data.items()}
    name, colon, root = data.partition(":")
    return f"{name}:{plain_values(Path(root))}" if colon else data


def plain_values(value: Any) -> Any:
    """A value as a YAML file holds it; paths that exist are absolute, so that the run can be used from elsewhere."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, Path):
        return str(value.resolve()) if value.exists() else str(value)
    return value
