"""WeightedSum: several named objectives as one loss, each still seen by itself."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from restoreloss.checks import caller_level, check_number, describe
from restoreloss.features import FeatureExtractor
from restoreloss.generators import Generators, check_generators
from restoreloss.images import check_pair
from restoreloss.objectives.base import Objective, check_objective, check_sign, named_terms, total
from restoreloss.objectives.shares import FIRST_DRAWS, BackwardPass, RunningNorms, norm_at, weights_for
from restoreloss.objectives.subsampled import at_every_call, period_of


class WeightedSum(Objective):
    r"""A weighted sum of named objectives, :math:`\sum_k w_k L_k(z, x)`, of given weights or of kept shares.

    A weight from a paper belongs to that paper's networks and loss scales; a share of the gradient at the restored
    image means the same everywhere, and stays what it is while the losses fall. With ``shares``

    .. math:: w_k = \frac{s_k}{1 - \sum_j s_j} \cdot \frac{\sum_i |w_i|\,\|g_i\|}{\|g_k\|}, \qquad
        g_k = \frac{\partial L_k}{\partial z}

    where i runs over the objectives of fixed weight and the norms are means over the last hundred calls or so, read
    where the training's own backward pass goes through; the first call looks at up to eight draws of the losses. They
    are buffers: the state dict of this module resumes them.
    Processes of ``torch.distributed`` measure together: each of them has to call, and to run the backward pass.

    Args:
        objectives: anything called with (restored, target), by name: torch losses, objectives, functions. Modules
            become submodules, so their parameters (a learned loss has some) are trained and saved with this one.
        weights: by name; what is absent weighs 1. An objective of weight 0 is not computed.
        shares: by name, each between 0 and 1, in sum below 1: of the sum of the norms of all weighted gradients, on
            average over the calls. While an objective has no gradient, as a hinge that is satisfied, it keeps its
            weight. What is computed in fewer than one of sixteen calls has its share by `Subsampled`, which says so,
            and less by a rule of its own, which cannot be told from rest. At least one objective has a fixed weight.
            Shares are measured in training mode, where a gradient is asked for; before the first such call an
            objective with a share weighs 1, of which a call in eval mode warns.

    Attributes:
        weights: those of fixed weight; may be changed between calls.
        shares: the shares; may be changed between calls, but not added to a sum that was made without any.
            What no call has computed, or only with a fixed weight, is measured directly in the next.
        norms: the running norms, a :class:`~restoreloss.objectives.shares.RunningNorms`; None without shares. Its
            ``take_in()``, called by all of several processes before the first saves, makes a resumed training equal to
            the digit; one process does so by itself.

    Raises:
        ValueError: At construction for an empty mapping, a name with "/", a weight of an unknown name or one that is
            not finite, and shares that leave nothing to the others; at a call for an objective that returns no tensor,
            or returns another shape than the others; in training, where one with a share is measured first, for a
            gradient at the restored image that is zero or not finite.

    Example:
        >>> loss = WeightedSum({"l1": nn.L1Loss(), "l2": nn.MSELoss()}, weights={"l2": 0.5})
        >>> loss(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
        tensor(1.5000)
        >>> loss
        WeightedSum(
          1 * l1: L1Loss()
          0.5 * l2: MSELoss()
        )
        >>> loss = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3})
        >>> loss(restored.requires_grad_(), clean).backward()
        >>> round(audit(loss, restored, clean)["other"].share, 3)
        0.3
    """

    _told = False

    def __init__(
        self,
        objectives: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
        weights: Mapping[str, float] | None = None,
        *,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        weights, shares = ({} if given is None else given for given in (weights, shares))
        for argument, given in (("weights", weights), ("shares", shares)):
            if not isinstance(given, Mapping):
                raise ValueError(f"`{argument}` should be a mapping by name, found {describe(given)}.")
        if not isinstance(objectives, Mapping):
            raise ValueError(f"`objectives` should be a mapping by name, found {type(objectives).__name__}.")
        if not objectives:
            raise ValueError("`objectives` should name at least one objective, found none.")
        self._names = tuple(objectives)
        self.weights: dict[str, float] = {name: 1.0 for name in objectives if name not in shares} | dict(weights)
        self.shares: dict[str, float] = dict(shares)
        for name, objective in objectives.items():
            check_objective(f"objectives[{name!r}]", objective)
            if not isinstance(name, str) or not name or "/" in name or "." in name:
                raise ValueError(f"`objectives` should have names without '/' and '.', found {name!r}.")
        self.norms = RunningNorms(self._names, {n: period_of(f) for n, f in objectives.items()}) if shares else None
        self._functions = {name: f for name, f in objectives.items() if not isinstance(f, nn.Module)}
        for name, objective in objectives.items():
            if isinstance(objective, nn.Module):
                # prefixed: a name like "train" or "type" must not shadow nn.Module's own
                self.add_module(f"objective_{name}", objective)
        self._check_weights()
        self.weights, self.shares = ({n: float(x) for n, x in given.items()} for given in (self.weights, self.shares))

    @property
    def reduction(self) -> str:
        """What all objectives do over samples; "mean" where they state nothing.

        Raises:
            ValueError: Where some are means and others are sums.
        """
        stated = {getattr(objective, "reduction", "mean") for objective in self.objectives.values()}
        if len(stated) > 1:
            raise ValueError(f"`objectives` should share one `reduction`, found {sorted(stated)}.")
        return str(stated.pop())

    @property
    def objectives(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The objectives by name, in the order given."""
        functions = self._functions
        return {
            name: functions[name] if name in functions else getattr(self, f"objective_{name}") for name in self._names
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # fixed weights may follow on shares, whose norms nobody asks for any more
        if self.norms is None:
            for name in [name for name in state_dict if name.startswith(f"{prefix}norms.")]:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def current_weights(self) -> dict[str, float]:
        """All weights by name: the fixed ones, and what the shares come to; these weigh 1 before they are measured."""
        weights = {**self.weights, **self._weights_of_shares()}
        return {name: float(weights[name]) for name in self._names}

    def unmeasured(self) -> list[str]:
        """What has a share that no call in training mode has measured, and so weighs 1."""
        return [] if self.norms is None else [name for name in self._new(self.norms) if name in self.shares]

    def _new(self, norms: RunningNorms) -> list[str]:
        """What is computed and has not been measured: weights and shares may have changed since the last call."""
        return norms.new([name for name in self._names if self.weights.get(name) != 0], self.shares)

    def _weights_of_shares(self) -> dict[str, Tensor | float]:
        """By what has been measured; the others weigh 1."""
        weights: dict[str, Tensor | float] = dict.fromkeys(self.shares, 1.0)
        if self.norms is None:
            return weights
        new = self._new(self.norms)
        shares, fixed = ({n: x for n, x in given.items() if n not in new} for given in (self.shares, self.weights))
        return {**weights, **(weights_for(shares, self.norms.by_name(), fixed) if any(fixed.values()) else {})}

    def _check_weights(self) -> None:
        if self.shares and self.norms is None:
            raise ValueError(f"`shares` should be given at construction, found {self.shares} in a sum without.")
        for argument, given, low, high in (
            ("weights", self.weights, -math.inf, math.inf),
            ("shares", self.shares, 0, 1),
        ):
            if unknown := [name for name in given if name not in self._names]:
                raise ValueError(f"`{argument}` should be named after objectives {list(self._names)}, found {unknown}.")
            for name, value in given.items():
                check_number(f"{argument}[{name!r}]", value, low=low, high=high)
        if missing := [name for name in self._names if name not in self.weights and name not in self.shares]:
            raise ValueError(f"`weights` or `shares` should name each objective, found no {missing}.")
        if twice := [name for name in self.weights if name in self.shares]:
            raise ValueError(f"`weights` should not name what has a share, found {twice} in both.")
        if not self.weights:
            raise ValueError(
                f"`shares` should leave out at least one objective, which has what is left of 1, found {self.shares}."
            )
        if not any(self.weights.values()):
            raise ValueError(
                f"`weights` should leave at least one objective a weight other than 0, found {self.weights}."
            )
        if not all(share > 0 for share in self.shares.values()) or sum(self.shares.values()) >= 1:
            raise ValueError(
                f"`shares` should each be above 0 and leave some of 1 to {list(self.weights)}, found {self.shares}."
            )
        for name, objective in self.objectives.items():
            check_sign(f"objectives[{name!r}]", objective, self.weights.get(name, 1.0))

    def terms(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> dict[str, Tensor]:
        """The weighted terms: "diff/noise" for a term of an objective that has terms, "pixel" for one that has none.

        Args:
            restored: float (N, C, H, W).
            target: the same shape.
            generator: handed to those objectives that take one, in order; one, or one for each sample.

        Returns:
            Scalars (or (N,) each, where all objectives have ``reduction="none"``), which sum to the call.

        Raises:
            ValueError: For images that do not fit, and objectives that return no tensor or different shapes.
        """
        check_pair(restored, target)
        check_generators(generator, len(restored))
        self._check_weights()
        target = target.detach()  # torch's own losses would differentiate it
        with ExitStack() as stack:
            for extractor in self._shared_extractors():
                stack.enter_context(extractor.shared())
            if self.norms is None:
                return self._weighted_terms(restored, target, generator, None)
            terms: dict[str, Tensor] = self._terms_with_shares(restored, target, generator, self.norms)
            return terms

    def _shared_extractors(self) -> list[FeatureExtractor]:
        """Those that several objectives look through: one pass will do for all."""
        found = [getattr(objective, "features", None) for objective in self.objectives.values()]
        extractors = [extractor for extractor in found if isinstance(extractor, FeatureExtractor)]
        return [extractor for n, extractor in enumerate(extractors) if extractor in extractors[:n]]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _terms_with_shares(
        self, restored: Tensor, target: Tensor, generator: Generators, norms: RunningNorms
    ) -> dict[str, Tensor]:
        """The terms, measured where they are trained with. Not compiled: hooks on the backward pass are not."""
        trains = restored.requires_grad and torch.is_grad_enabled() and not restored.is_meta
        if not (self.training and trains):
            if trains and not self._told:
                self._tell_unmeasured()
            return self._weighted_terms(restored, target, generator, None)
        norms.follow(restored.device)
        norms.take_in()
        new = self._new(norms)
        if not new:
            return self._weighted_terms(restored, target, generator, norms.begin(self.shares))
        values = self._values(restored, target, generator, None)
        first: Tensor | None = None
        with at_every_call(self) as changed:  # A call that is left out would be measured as zero.
            for draw in range(FIRST_DRAWS):  # A loss that draws timesteps may be far from its mean in one draw.
                drawn = self._values(restored, target, generator, None) if draw or changed else values
                own = {name: norm_at(restored, list(terms.values())) for name, terms in drawn.items()}
                found, of_new = norms.over_processes(own, new)
                if first is None:
                    self._check_norms(norms, dict(zip(norms.names, found.tolist(), strict=True)), new)
                    first = found
                    norms.forget(new)
                elif torch.equal(found, first):
                    break  # decided alike by all processes, which would wait for each other else
                norms.update(found, of_new, self.shares)
        return self._weigh(values, None)

    def _tell_unmeasured(self) -> None:
        if unmeasured := self.unmeasured():
            self._told = True
            warnings.warn(
                f"Shares are measured in training mode, and in `.eval()` the weight of {', '.join(unmeasured)} is 1. "
                "Call `.train()` on the loss, or say `weights`; this is said once.",
                stacklevel=caller_level(),
            )

    def _check_norms(self, norms: RunningNorms, found: Mapping[str, float], new: Sequence[str]) -> None:
        known = {name: float(mean) for name, mean in norms.by_name().items() if name not in new}
        fixed = sum(abs(weight) * {**found, **known}[name] for name, weight in self.weights.items())
        asked = [found[name] for name in self.shares if name in new]
        # where all are zero (the image is its target) there is nothing to measure yet
        if any(found.values()) and not all(0 < norm < math.inf for norm in (fixed, *asked)):
            raise ValueError(
                "Objectives with a share, and one of the others, should have a finite gradient above 0 at `restored`, "
                f"found the norms {found}."
            )

    def _weighted_terms(
        self, restored: Tensor, target: Tensor, generator: Generators, backward: BackwardPass | None
    ) -> dict[str, Tensor]:
        return self._weigh(self._values(restored, target, generator, backward), backward)

    def _values(
        self, restored: Tensor, target: Tensor, generator: Generators, backward: BackwardPass | None
    ) -> dict[str, dict[str, Tensor]]:
        """The terms of each objective, without its weight."""
        values = {}
        for name, objective in self.objectives.items():
            if self.weights.get(name) == 0:
                continue
            image = restored if backward is None else backward.image(name, restored)
            values[name] = named_terms(name, objective, image, target, generator)
            for value in values[name].values():
                if not isinstance(value, Tensor):
                    raise ValueError(f"Objective {name!r} should return a tensor, found {describe(value)}.")
                if value.ndim > 1:
                    raise ValueError(
                        f"Objective {name!r} should return a scalar, or one value for each sample, found "
                        f"{describe(value)}: is its `reduction` 'none'?"
                    )
        return values

    def _weigh(self, values: dict[str, dict[str, Tensor]], backward: BackwardPass | None) -> dict[str, Tensor]:
        weights: dict[str, Tensor | float] = {**self.weights, **self._weights_of_shares()}
        if backward is None:
            terms = {key: weights[name] * value for name in values for key, value in values[name].items()}
        else:
            terms = backward.terms(values, weights)
        shapes = {key: tuple(value.shape) for key, value in terms.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"Objectives should return one shape (the same `reduction`), found {shapes}.")
        return terms

    def forward(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> Tensor:
        """The weighted sum. Arguments as in :meth:`terms`."""
        return total(self.terms(restored, target, generator=generator))

    def __repr__(self) -> str:
        weights = {name: f"{weight:g}" for name, weight in self.weights.items()}
        weights |= {name: f"{share:.0%} of the gradient" for name, share in self.shares.items()}
        lines = [f"{weights[name]} * {name}: {objective!r}" for name, objective in self.objectives.items()]
        body = "\n".join(lines).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {body}\n)"
