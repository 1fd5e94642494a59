"""Subsampled: any objective on fewer calls or fewer samples, right on average."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from restoreloss.checks import caller_level, check_choice, check_integer
from restoreloss.distances import Reduction
from restoreloss.frozen import in_mode
from restoreloss.generators import Generators, check_generators, forked, permutation
from restoreloss.images import check_pair
from restoreloss.objectives.base import Objective, check_objective, check_sign, named_terms, total
from restoreloss.objectives.tiles import check_share


class Subsampled(Objective):
    r"""An objective that is computed on some samples of a batch, or on every k-th call, and counts for all.

    .. math:: \hat L = k\,\mathbb 1[\text{call} \equiv 0 \bmod k] \cdot L(z_S, x_S), \qquad \mathrm{E}\,\hat L = L

    with S a random subset of the samples. That holds for objectives that are means or sums over samples.

    It applies where a gradient is asked for in training mode: ``.eval()`` and inputs without gradient get the whole.
    Every other call counts: where ``terms`` are logged, the loss is ``sum(terms.values())``, and no second call.

    Args:
        objective: anything called with (restored, target); a module becomes a submodule.
        every: compute every k-th call only, and count it k times; the others return 0 with a gradient of 0.
        subset: how many samples, an integer, or which share of the batch, a float; at least one, at most all.
        reduction: what the objective does over samples, "mean" | "sum" | "none". Default: what it states as its
            ``reduction``, else "mean".

    Attributes:
        calls: how many calls there were that ``every`` counts; it is in the state dict.

    Raises:
        ValueError: For what is no objective, an ``every`` below 1, or a ``subset`` that is no number above 0.

    Example:
        >>> loss = Subsampled(nn.MSELoss(), every=2)
        >>> image = torch.ones(1, 3, 4, 4, requires_grad=True)
        >>> [loss(image.clone(), torch.zeros(1, 3, 4, 4)).item() for _ in range(4)]
        [2.0, 0.0, 2.0, 0.0]
        >>> cheap = Subsampled(DiffLoss(small_prior()), subset=0.25)  # a quarter of the time
    """

    _last: tuple[weakref.ref[Tensor], Any] | None = None
    """The image of a call that no backward pass has gone through."""
    _told = False

    def __init__(
        self,
        objective: Callable[[Tensor, Tensor], Tensor],
        *,
        every: int = 1,
        subset: int | float | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        super().__init__()
        check_objective("objective", objective)
        check_sign("objective", objective)
        self.every = check_integer("every", every)
        self.subset = None if subset is None else check_share("subset", subset)
        self.calls = 0
        self._function = None if isinstance(objective, nn.Module) else objective
        if isinstance(objective, nn.Module):
            self.inner = objective
        if reduction is not None:
            check_choice("reduction", reduction, Reduction)
        self.reduction: Reduction = getattr(objective, "reduction", "mean") if reduction is None else reduction
        self._names: tuple[str, ...] | None = None

    @property
    def objective(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What is computed."""
        return self.inner if self._function is None else self._function

    def get_extra_state(self) -> Tensor:
        """The number of calls."""
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on with the next call."""
        self.calls = check_integer("calls", int(state), low=0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # a checkpoint of before there was this loss says nothing of it, which is no error
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def terms(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> dict[str, Tensor]:
        """The objective's terms, or "loss" where it has none.

        Args:
            restored: float (N, C, H, W).
            target: the same shape.
            generator: for the samples, and then for the objective where it takes one; one, or one for each sample.

        Returns:
            Scalars, or (N,) each for an objective with ``reduction="none"``.

        Raises:
            ValueError: For images that do not fit.
        """
        check_pair(restored, target)
        check_generators(generator, len(restored))
        if not (self.training and restored.requires_grad and torch.is_grad_enabled()):
            return self._terms(restored, target, generator)
        count = len(restored)
        if self.every > 1 and not self._due(restored):
            shape = (count,) if self.reduction == "none" else ()
            names = self._names or self._names_of_terms(restored, target)  # the latter where a resumed training begins
            return self._followed({name: zeros_with_graph(restored, shape) for name in names})  # type: ignore[no-any-return]
        rows = self._rows(count, generator, restored.device)
        if rows is None:
            terms = self._terms(restored, target, generator)
        else:
            if isinstance(generator, Sequence):
                generator = [generator[row] for row in rows.tolist()]
            rows = rows.to(restored.device)
            chosen = self._terms(restored.index_select(0, rows), target.index_select(0, rows), generator)
            terms = {name: self._counted_for_all(value, rows, count) for name, value in chosen.items()}
        terms = {name: self.every * value for name, value in terms.items()}
        return self._followed(terms) if self.every > 1 else terms

    def forward(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> Tensor:
        """The sum of :meth:`terms`."""
        return total(self.terms(restored, target, generator=generator))

    def _terms(self, restored: Tensor, target: Tensor, generator: Generators) -> dict[str, Tensor]:
        named = named_terms("loss", self.objective, restored, target, generator)
        terms = {name.removeprefix("loss/"): value for name, value in named.items()}
        self._names = tuple(terms)
        return terms

    def _names_of_terms(self, restored: Tensor, target: Tensor) -> tuple[str, ...]:
        """One sample tells them, in a call that leaves no trace."""
        if not callable(getattr(self.objective, "terms", None)):
            return ("loss",)
        whole = nullcontext() if self._function is not None else in_mode(self.inner, "keep")
        with forked(restored.device), torch.no_grad(), whole:
            return tuple(self._terms(restored[:1], target[:1], None))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _due(self, restored: Tensor) -> bool:
        """Whether this call, of every k, is computed. It is not compiled, which would be done anew for every count."""
        image = restored if restored._base is None else restored._base  # a WeightedSum measures shares at a view
        place = restored.storage_offset(), restored.shape
        again = self._last is not None and self._last[0]() is image and self._last[1] == place
        if again and not self._told:
            self._told = True
            warnings.warn(
                f"Every call counts, of which one of {self.every} is computed, and this one is of the image of the "
                "last, which no backward pass has gone through. Where you log `terms`, the loss is "
                "`sum(terms.values())`; for another use take a loss of its own. This is said once.",
                stacklevel=caller_level(),
            )
        self._last = weakref.ref(image), place
        self.calls += 1
        return (self.calls - 1) % self.every == 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _followed(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms; a backward pass through one of them ends the call that it is of."""
        for term in terms.values():
            if term.requires_grad:
                term.register_hook(unserializable_hook(partial(self._end)))
        return terms

    def _end(self, _: Tensor) -> None:
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}  # neither copies nor pickles know the image

    def _rows(self, count: int, generator: Generators, device: torch.device) -> Tensor | None:
        """The samples to compute, or None for all of them."""
        if self.subset is None:
            return None
        wanted = self.subset if isinstance(self.subset, int) else round(self.subset * count)
        chosen = max(1, min(count, wanted))
        return None if chosen == count else permutation(count, generator, device)[:chosen]

    def _counted_for_all(self, value: Tensor, rows: Tensor, count: int) -> Tensor:
        share = count / len(rows)
        if value.ndim and value.shape != rows.shape:
            raise ValueError(
                f"`objective` should return a scalar or one number for each of {len(rows)} samples, found shape "
                f"{tuple(value.shape)}."
            )
        if value.ndim:  # There is one for each sample, and zero for the others.
            return value.new_zeros(count).index_copy(0, rows, share * value)
        return share * value if self.reduction == "sum" else value

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"every={self.every}, subset={self.subset}"


@contextmanager
def at_every_call(module: nn.Module) -> Iterator[bool]:
    """Let every `Subsampled` within a module compute at each call, without counting; tells whether there is one."""
    parts = [part for part in module.modules() if isinstance(part, Subsampled) and part.every > 1]
    every = [part.every for part in parts]
    try:
        for part in parts:
            part.every = 1
        yield bool(parts)
    finally:
        for part, number in zip(parts, every, strict=True):
            part.every = number


def period_of(objective: Any) -> int:
    """Of how many calls an objective computes one, by what is within it; of a plain function that is not known."""
    if not isinstance(objective, nn.Module):
        return 1
    within = max(map(period_of, objective.children()), default=1)
    return objective.every * within if isinstance(objective, Subsampled) else within


def zeros_with_graph(restored: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros that depend on the image, so that a backward pass finds its way and brings zero."""
    empty = restored.reshape(-1)[:0].sum()
    return empty.to(torch.promote_types(restored.dtype, torch.float32)).expand(shape)
