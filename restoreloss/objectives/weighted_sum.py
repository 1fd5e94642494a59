"""WeightedSum: several named objectives as one loss, each still seen by itself."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from restoreloss.checks import check_callable, check_number, describe
from restoreloss.features import FeatureExtractor
from restoreloss.generators import Generators, check_generators
from restoreloss.images import check_pair
from restoreloss.objectives.base import Objective, named_terms, total


class WeightedSum(Objective):
    r"""A weighted sum of named objectives, :math:`\sum_k w_k L_k(z, x)`.

    Args:
        objectives: anything called with (restored, target), by name: torch losses, objectives, functions. Modules
            become submodules, so their parameters (a learned loss has some) are trained and saved with this one.
        weights: by name; what is absent weighs 1. An objective of weight 0 is not computed.

    Raises:
        ValueError: At construction for an empty mapping, a name with "/", a weight of an unknown name or one that is
            not finite; at a call for an objective that returns no tensor, or returns another shape than the others.

    Example:
        >>> loss = WeightedSum({"l1": nn.L1Loss(), "l2": nn.MSELoss()}, weights={"l2": 0.5})
        >>> loss(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
        tensor(1.5000)
        >>> loss
        WeightedSum(
          1 * l1: L1Loss()
          0.5 * l2: MSELoss()
        )
    """

    def __init__(
        self,
        objectives: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        weights = {} if weights is None else weights
        if not isinstance(weights, Mapping):
            raise ValueError(f"`weights` should be a mapping by name, found {describe(weights)}.")
        if not isinstance(objectives, Mapping):
            raise ValueError(f"`objectives` should be a mapping by name, found {type(objectives).__name__}.")
        if not objectives:
            raise ValueError("`objectives` should name at least one objective, found none.")
        unknown = [name for name in weights if name not in objectives]
        if unknown:
            raise ValueError(f"`weights` should be named after objectives {list(objectives)}, found {unknown}.")
        self.weights = {name: check_number(f"weights[{name!r}]", weights.get(name, 1.0)) for name in objectives}
        for name, objective in objectives.items():
            check_callable(f"objectives[{name!r}]", objective, "restored", "target")
            if not isinstance(name, str) or not name or "/" in name or "." in name:
                raise ValueError(f"`objectives` should have names without '/' and '.', found {name!r}.")
        if not any(self.weights.values()):
            raise ValueError("`weights` should leave at least one objective a weight other than 0, found all 0.")
        self._functions = {name: f for name, f in objectives.items() if not isinstance(f, nn.Module)}
        for name, objective in objectives.items():
            if isinstance(objective, nn.Module):
                # prefixed: a name like "train" or "type" must not shadow nn.Module's own
                self.add_module(f"objective_{name}", objective)

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
            name: functions[name] if name in functions else getattr(self, f"objective_{name}") for name in self.weights
        }

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
        target = target.detach()  # torch's own losses would differentiate it
        extractors = self._shared_extractors()
        if not extractors:
            return self._weighted_terms(restored, target, generator)
        with ExitStack() as stack:
            for extractor in extractors:
                stack.enter_context(extractor.shared())
            return self._weighted_terms(restored, target, generator)

    def _shared_extractors(self) -> list[FeatureExtractor]:
        """Those that several objectives look through: one pass will do for all."""
        found = [getattr(objective, "features", None) for objective in self.objectives.values()]
        extractors = [extractor for extractor in found if isinstance(extractor, FeatureExtractor)]
        return [extractor for n, extractor in enumerate(extractors) if extractor in extractors[:n]]

    def _weighted_terms(self, restored: Tensor, target: Tensor, generator: Generators) -> dict[str, Tensor]:
        if not any(self.weights.values()):
            raise ValueError("`weights` should leave at least one objective a weight other than 0, found all set to 0.")
        terms: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            weight = self.weights[name]
            if weight == 0:
                continue
            for key, value in named_terms(name, objective, restored, target, generator).items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"Objective {name!r} should return a tensor, found {describe(value)}.")
                if value.ndim > 1:
                    raise ValueError(
                        f"Objective {name!r} should return a scalar, or one value for each sample, found "
                        f"{describe(value)}: is its `reduction` 'none'?"
                    )
                terms[key] = weight * value
        shapes = {key: tuple(value.shape) for key, value in terms.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"Objectives should return one shape (the same `reduction`), found {shapes}.")
        return terms

    def forward(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> Tensor:
        """The weighted sum. Arguments as in :meth:`terms`."""
        return total(self.terms(restored, target, generator=generator))

    def __repr__(self) -> str:
        lines = [f"{self.weights[name]:g} * {name}: {objective!r}" for name, objective in self.objectives.items()]
        body = "\n".join(lines).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {body}\n)"
