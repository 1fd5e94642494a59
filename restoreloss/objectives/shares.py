"""RunningNorms: how strong the gradient of each objective was in the last calls, for weights that keep a share."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from restoreloss.gradients import gradient_at, gradient_norm
from restoreloss.precision import ExactBuffers

_AVERAGED_CALLS = 100
_PENDING_CALLS = 8
FIRST_DRAWS = 8
"""How often losses that draw at random are measured in the first call."""


class RunningNorms(ExactBuffers):
    r"""Running means of the norms :math:`\|\partial L_k / \partial z\|` at the restored image z.

    They are read where the training's own backward pass goes through: a call costs one norm for each objective, and
    nothing waits for the device. The first call is measured directly, as no backward pass has been yet. The mean is
    over all calls so far, and from the hundredth on over the last hundred or so (an exponential average). With
    ``torch.distributed`` the norms are those of the whole batch over all processes, each of which has to call.

    Args:
        names: of the objectives.
    """

    mean: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("mean", torch.zeros(len(self.names)))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self._reset()

    def _reset(self) -> None:
        self._known = False
        self._pending: list[BackwardPass] = []

    @property
    def known(self) -> bool:
        """Whether a call has been measured. Asks the device once."""
        if not self._known:
            self._known = bool(self.count > 0)
        return self._known

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_pending": []}

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if _world_size() == 1:  # else all processes would have to save
            self.take_in()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # a checkpoint of before there was this loss says nothing of it, which is no error: they are measured
        for name, buffer in self.named_buffers():
            state_dict.setdefault(f"{prefix}{name}", buffer)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._reset()

    @torch.no_grad()
    def over_processes(self, measured: Mapping[str, Tensor]) -> Tensor:
        """The norms of one call over all processes, the same numbers in each of them. What is absent is 0."""
        found = torch.stack(
            [measured[name].to(self.mean) if name in measured else 0 * self.mean[0] for name in self.names]
        )
        if (processes := _world_size()) > 1:
            # the loss is the mean over processes, whose images are different ones
            squares = (found / processes).square()
            dist.all_reduce(squares)
            found = squares.sqrt()
        return found

    @torch.no_grad()
    def update(self, found: Tensor) -> None:
        """Take the norms of one call into the mean, unless one is not finite or all are zero."""
        usable = found.isfinite().all() & (found > 0).any()
        self.count += usable
        step = 1 / self.count.clamp(1, _AVERAGED_CALLS)
        self.mean.copy_(torch.where(usable, self.mean + step * (found - self.mean), self.mean))

    def begin(self) -> "BackwardPass":
        """The hooks of a call whose backward pass will tell the norms. Takes in those of the calls before."""
        self.take_in()
        self._pending.append(BackwardPass())
        return self._pending[-1]

    def take_in(self) -> None:
        """Take in the norms of the last calls now, as before a state is saved. Each process has to call."""
        # several calls may wait for one backward pass; the oldest may wait for none
        for call in self._pending:
            if call.norms:
                self.update(self.over_processes(call.norms))
        self._pending = [call for call in self._pending if not call.norms][-_PENDING_CALLS:]

    def by_name(self) -> dict[str, Tensor]:
        """The mean norms."""
        return dict(zip(self.names, self.mean.unbind(), strict=True))


def take_in_norms(module: nn.Module) -> None:
    """:meth:`RunningNorms.take_in` for every loss within a module, before a checkpoint. Each process has to call."""
    for part in module.modules():
        if isinstance(part, RunningNorms):
            part.take_in()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class BackwardPass:
    """Hooks on what each objective reads and returns in one call, which tell the norm of its own gradient."""

    def __init__(self) -> None:
        self.norms: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._weights: Mapping[str, Tensor | float] = {}
        self._terms: dict[str, set[str]] = {}
        self._passed: dict[str, set[str]] = {}

    def image(self, name: str, restored: Tensor) -> Tensor:
        """The restored image for one objective, whose gradient is measured on its way back."""

        def measure(gradient: Tensor) -> None:
            passed = self._passed.pop(name, None)
            if passed is None:  # a second derivative, which came by no term
                return
            if passed == self._terms[name]:
                self.norms[name] = gradient_norm(gradient) / (self._factors[name] * self._weights[name]).abs()
                return
            self.norms[name] = torch.full_like(gradient_norm(gradient), torch.nan)  # which no mean takes in
            warnings.warn(
                "`shares` should be measured in one backward pass through the sum of all terms, found a pass through "
                "some of them: the weights stay as they are.",
                stacklevel=2,
            )

        alias = restored.view_as(restored)
        alias.register_hook(measure)
        return alias

    def terms(
        self, values: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor | float]
    ) -> dict[str, Tensor]:
        """The weighted terms, at which the factor behind them is read: that of a GradScaler, or of accumulation."""
        self._weights = weights
        weighted = {}
        for name, terms in values.items():

            def read(gradient: Tensor, name: str, key: str) -> None:
                self._factors[name] = gradient.detach().float().sum()
                self._passed.setdefault(name, set()).add(key)

            for key, value in terms.items():
                weighted[key] = weights[name] * value
                if weighted[key].requires_grad:
                    self._terms.setdefault(name, set()).add(key)
                    weighted[key].register_hook(partial(read, name=name, key=key))
        return weighted


def norm_at(image: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The norm of the gradient that the sum of these values has at the image."""
    gradient = gradient_at(image, torch.stack([value.mean() for value in values]).sum())
    return image.new_zeros((), dtype=torch.float32) if gradient is None else gradient_norm(gradient)


def weights_for(
    shares: Mapping[str, float], norms: Mapping[str, Tensor], fixed: Mapping[str, float]
) -> dict[str, Tensor]:
    r"""Weights that give objectives a share of the gradient, beside others of fixed weight.

    .. math:: w_k = \frac{s_k}{1 - \sum_j s_j} \cdot \frac{\sum_i |w_i| \|g_i\|}{\|g_k\|}

    with i over the objectives of fixed weight.
    """
    rest = torch.stack([abs(weight) * norms[name] for name, weight in fixed.items()]).sum() / (1 - sum(shares.values()))
    smallest = torch.finfo(torch.float32).tiny
    return {name: share * rest / norms[name].clamp(min=smallest) for name, share in shares.items()}
