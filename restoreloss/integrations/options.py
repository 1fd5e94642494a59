"""Objectives in an options file: a type and plain values, which become a module.

::

    type: DiffLoss
    prior: small             # or a folder, a file or a hub name, as load_prior reads them
    timesteps: [100, 600]
    loss_weight: 0.1

Frameworks that build their losses from YAML or TOML register these classes, each in its own way.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

import restoreloss
from restoreloss.checks import check_integer, named
from restoreloss.diffusion.checkpoints import load_prior
from restoreloss.diffusion.prior import small_prior
from restoreloss.distances import Distance
from restoreloss.frozen import FrozenNetwork
from restoreloss.generators import Generators
from restoreloss.integrations.checks import build_from, check_kind
from restoreloss.integrations.task_networks import normalization, task_network
from restoreloss.objectives.base import Objective, named_terms, total
from restoreloss.objectives.diffloss import Compare
from restoreloss.objectives.sizes import SizePolicy

Number = TypeVar("Number", int, float)


@dataclass(kw_only=True, eq=False, repr=False)
class Criterion(Objective):
    """An objective that is built from plain values, times its weight.

    Attributes:
        loss_weight: multiplies the objective.
    """

    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__init__()
        for option in fields(self):
            if option.name not in ("objectives", "shares"):  # Its parts are checked when they are built.
                check_kind(option.name, getattr(self, option.name), option.type)
        self.objective = self.build()

    @abstractmethod
    def build(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The objective that these values describe, with the weight 1."""

    def terms(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> dict[str, Tensor]:
        """The weighted terms of the objective, from two float (N, C, H, W); ``generator`` for one that draws."""
        terms = named_terms("loss", self.objective, restored, target, generator)
        return {name.removeprefix("loss/"): self.loss_weight * value for name, value in terms.items()}

    def forward(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> Tensor:
        """The sum of :meth:`terms`."""
        return total(self.terms(restored, target, generator=generator))


@dataclass(kw_only=True, eq=False, repr=False)
class DiffLoss(Criterion):
    """:class:`restoreloss.DiffLoss`, whose options these are, with the prior by name.

    Attributes:
        prior: "small" for the one that ships, or what :func:`restoreloss.load_prior` reads.
        dtype: to convert the prior to, "bfloat16" or "float16".

    Example:
        >>> loss = criterion({"type": "DiffLoss", "timesteps": [100, 600], "loss_weight": 0.1})
        >>> loss(restored, clean) > 0
        tensor(True)
    """

    prior: str = "small"
    revision: str | None = None
    local_files_only: bool = False
    head_channels: int | None = None
    grouped_heads: bool | None = None
    noise_weight: float = 1.0
    h_space_weight: float = 0.01
    timesteps: Sequence[int] | None = None
    distance: Distance = "mse"
    size: SizePolicy = "pad"
    compare: Compare = "noise"
    snr_power: float = 0.0
    crop: int | float | None = None
    subset: int | float | None = None
    every: int = 1
    dtype: str | None = None
    jacobian: bool = True
    checkpointing: bool = False
    input_range: Sequence[float] = (0.0, 1.0)

    def build(self) -> Objective:
        """The loss."""
        prior: Any
        if self.head_channels is not None:
            check_integer("head_channels", self.head_channels)
        if self.prior == "small":
            for name in ("revision", "head_channels", "grouped_heads"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"`{name}` should be left out for the prior 'small', found {value!r}.")
            prior = small_prior()
        else:
            with named("source", "prior"):
                prior = load_prior(
                    self.prior, revision=self.revision, local_files_only=self.local_files_only,
                    head_channels=self.head_channels, grouped_heads=self.grouped_heads,
                )  # fmt: skip
        dtype = None if self.dtype is None else getattr(torch, self.dtype.removeprefix("torch."), None)
        if self.dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"`dtype` should be a floating-point dtype of torch, as 'bfloat16', found {self.dtype!r}.")
        if dtype is not None:
            prior.to(dtype)
        loss = restoreloss.DiffLoss(
            prior, noise_weight=self.noise_weight, h_space_weight=self.h_space_weight,
            timesteps=None if self.timesteps is None else _pair("timesteps", self.timesteps),
            distance=self.distance, input_range=_pair("input_range", self.input_range), size=self.size,
            compare=self.compare, snr_power=self.snr_power, crop=self.crop,
            jacobian=self.jacobian, checkpointing=self.checkpointing,
        )  # fmt: skip
        if self.every == 1 and self.subset is None:
            return loss
        return restoreloss.Subsampled(loss, every=self.every, subset=self.subset)


@dataclass(kw_only=True, eq=False, repr=False)
class TDPLoss(Criterion):
    """:class:`restoreloss.TDPLoss`, whose options these are, with the task network by name and at rest.

    Attributes:
        task: "library/name", as :func:`~restoreloss.integrations.task_networks.task_network` takes it.
        weights: "pretrained", a file, or "random".
        num_classes: where the head is not that of the pretrained network.
        image_size: for timm's transformers that read one size.
        normalize: (mean, std); the default is what the network wants.

    Example:
        >>> loss = criterion({"type": "TDPLoss", "task": "torchvision/resnet18", "weights": "random"})
        >>> loss(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)) > 0
        tensor(True)
    """

    task: str
    weights: str
    num_classes: int | None = None
    image_size: int | None = None
    layers: Sequence[str] | None = None
    normalize: Sequence[Sequence[float]] | None = None
    distance: Distance = "l1"
    layer_weights: Mapping[str, float] | None = None
    input_range: Sequence[float] = (0.0, 1.0)

    def build(self) -> Objective:
        """The loss."""
        for name, size in (("num_classes", self.num_classes), ("image_size", self.image_size)):
            if size is not None:
                check_integer(name, size)
        with named("name", "task"):
            network = task_network(
                self.task, weights=self.weights, num_classes=self.num_classes, image_size=self.image_size
            )
            normalize = normalization(self.task) if self.normalize is None else self.normalize
        self.network = FrozenNetwork(network)  # The loss only borrows it; this one follows `.to()`.
        return restoreloss.TDPLoss(
            network, self.layers, normalize=normalize, distance=self.distance, layer_weights=self.layer_weights,
            input_range=_pair("input_range", self.input_range),
        )  # fmt: skip

    def terms(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> dict[str, Tensor]:
        """The weighted terms.

        Raises:
            ValueError: Also for images of a size that a transformer does not read.
        """
        try:
            return super().terms(restored, target, generator=generator)
        except AssertionError as error:  # timm and torchvision raise it.
            size = "x".join(map(str, restored.shape[2:]))
            raise ValueError(
                f"`task` should read images of {size}, found that {self.task} does not: {error} Of timm's, "
                "`image_size` makes one for a size."
            ) from error


@dataclass(kw_only=True, eq=False, repr=False)
class WeightedSum(Criterion):
    """:class:`restoreloss.WeightedSum` of objectives that are options themselves, for frameworks with one slot.

    Attributes:
        objectives: by name, each a mapping with a ``type``: one of these classes, or a loss of torch.nn ("L1Loss").
            Their ``loss_weight`` weighs them.
        shares: of the gradient, by name, of those whose ``loss_weight`` is left out.

    Example:
        >>> parts = {"pixel": {"type": "L1Loss"}, "diff": {"type": "DiffLoss", "loss_weight": 0.1}}
        >>> loss = criterion({"type": "WeightedSum", "objectives": parts})
        >>> sorted(loss.terms(restored, clean))
        ['diff/h_space', 'diff/noise', 'pixel/loss']
    """

    objectives: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shares: Mapping[str, float] | None = None

    def build(self) -> Objective:
        """The sum."""
        if not isinstance(self.objectives, Mapping) or not self.objectives:
            raise ValueError(f"`objectives` should be a mapping of names to options, found {self.objectives!r}.")
        parts = {name: criterion(options) for name, options in self.objectives.items()}
        if all(part.loss_weight == 0 for part in parts.values()):
            raise ValueError("`objectives` should leave at least one a `loss_weight` other than 0, found all 0.")
        if self.shares is not None and not isinstance(self.shares, Mapping):
            raise ValueError(f"`shares` should be a mapping by name, found {self.shares!r}.")
        if twice := [name for name in self.shares or () if name in parts and parts[name].loss_weight != 1]:
            raise ValueError(f"`loss_weight` should be left out of what has a share, found one for {twice}.")
        # An objective of weight 0 is not computed.
        without = {name: 0.0 for name, part in parts.items() if part.loss_weight == 0}
        return restoreloss.WeightedSum(parts, without, shares=self.shares)


TYPES: Mapping[str, type[Criterion]] = {cls.__name__: cls for cls in (DiffLoss, TDPLoss, WeightedSum)}
_PIXELS = ("L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss")


def criterion(options: Mapping[str, Any]) -> Criterion:
    """The objective that options describe.

    Args:
        options: "type" and the options of that type: a class of this file, or "L1Loss", "MSELoss", "SmoothL1Loss" or
            "HuberLoss" of torch, with a ``loss_weight``.

    Returns:
        A module called with (restored, target).

    Raises:
        ValueError: For an unknown type or option, naming similar ones.

    Example:
        >>> criterion({"type": "DiffLoss", "prior": "small", "timestep": [100, 600]})
        Traceback (most recent call last):
        ValueError: `DiffLoss` has no option 'timestep'; did you mean 'timesteps'?
    """
    if not isinstance(options, Mapping) or "type" not in options:
        raise ValueError(f"An objective should be a mapping with a `type`, found {options!r}.")
    given = {name: value for name, value in options.items() if name != "type"}
    kind = options["type"]
    if not isinstance(kind, str):
        raise ValueError(f"`type` should be the name of one of {[*TYPES, *_PIXELS]}, found {kind!r}.")
    if kind in _PIXELS:
        return build_from(partial(Pixel, kind), kind, given)
    if kind not in TYPES:
        raise ValueError(f"`type` should be one of {[*TYPES, *_PIXELS]}, found {kind!r}.")
    return build_from(TYPES[kind], kind, given)


class Pixel(Criterion):
    """A loss of torch on the pixels, by its name in torch.nn."""

    def __init__(self, kind: str, *, loss_weight: float = 1.0, reduction: Literal["mean", "sum"] = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`reduction` should be 'mean' or 'sum', found {reduction!r}.")
        self.kind, self.reduction = kind, reduction
        super().__init__(loss_weight=loss_weight)

    def build(self) -> nn.Module:
        """The loss."""
        loss: nn.Module = getattr(nn, self.kind)(reduction=self.reduction)
        return loss


def _pair(name: str, values: Sequence[Number]) -> tuple[Number, Number]:
    if not isinstance(values, Sequence) or len(values) != 2:
        raise ValueError(f"`{name}` should be (low, high), found {values!r}.")
    return values[0], values[1]
