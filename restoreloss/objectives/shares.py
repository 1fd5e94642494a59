"""RunningNorms: how strong the gradient of each objective was in the last calls, for weights that keep a share."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from restoreloss.distributed import world_size
from restoreloss.gradients import gradient_at, gradient_norm
from restoreloss.precision import ExactBuffers

_AVERAGED_CALLS = 100
_PENDING_CALLS = 8
_LEFT_OUT_CALLS = 16
FIRST_DRAWS = 8
"""How often losses that draw at random are measured in the first call."""


class RunningNorms(ExactBuffers):
    r"""Running means of the norms :math:`\|\partial L_k / \partial z\|` at the restored image z.

    They are read where the training's own backward pass goes through: a call costs one norm for each objective, and
    nothing waits for the device. The first call is measured directly, as no backward pass has been yet. The mean of an
    objective is over all calls so far that computed it, and from the hundredth on over the last hundred or so (an
    exponential average). With ``torch.distributed`` the norms are those of the whole batch over all processes, each of
    which has to call, and to run the backward pass.

    A backward pass through some terms alone, or through terms of one objective that were multiplied apart, is none to
    measure in: the means stay as they are.

    What has a share is divided by its mean, which may not fall to zero where it rests, as a hinge that is satisfied.
    Its calls without a gradient count once it has one again, and then so many of them as an objective that is computed
    now and then leaves out. It keeps its share on average, and at rest its weight.

    Each objective has buffers of its own, "mean_NAME" and so on, so that no state gives one the norm of another.

    Args:
        names: of the objectives.
        periods: of how many calls an objective computes one, as far as that is known; below 16 it need not be.
    """

    def __init__(self, names: Sequence[str], periods: Mapping[str, int]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.longest = {name: max(periods[name], _LEFT_OUT_CALLS) for name in names}
        for name in self.names:
            self.register_buffer(f"mean_{name}", torch.zeros(()))
            self.register_buffer(f"calls_{name}", torch.zeros((), dtype=torch.long))
            # calls without a gradient in a row; -1 for a fixed weight, whose mean is over those calls too
            self.register_buffer(f"idle_{name}", torch.zeros((), dtype=torch.long))
        self._reset()

    def _reset(self) -> None:
        self._settled: tuple[frozenset[str], frozenset[str]] | None = None
        self._pending: list[BackwardPass] = []

    def follow(self, device: torch.device) -> None:
        """Be where the images are, also for who never moved the loss: else each call would wait for the device."""
        if next(self.buffers()).device != device:
            self.to(device)

    def new(self, names: Collection[str], shared: Collection[str]) -> list[str]:
        """Those of ``names`` that have not been measured, what has a share as such.

        It asks the device once for each choice of names.
        """
        choice = frozenset(names), frozenset(shared)
        if self._settled == choice:
            return []
        calls, idle = (
            torch.stack([self.get_buffer(f"{kind}_{name}") for name in names]).tolist() for kind in ("calls", "idle")
        )
        new = [name for name, n, i in zip(names, calls, idle, strict=True) if n == 0 or (name in shared and i < 0)]
        if not new:
            self._settled = choice
        return new

    def forget(self, names: Collection[str]) -> None:
        """Begin anew with these."""
        for name in names:
            for kind in ("mean", "calls", "idle"):
                self.get_buffer(f"{kind}_{name}").zero_()

    def __getstate__(self) -> dict[str, object]:
        self._take_in_alone()
        return self.__dict__ | {"_pending": []}

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._take_in_alone()
        super()._save_to_state_dict(*arguments)

    def _take_in_alone(self) -> None:
        if world_size() == 1:  # else all processes would have to save, or to copy
            self.take_in()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # a checkpoint of before there was this loss, or of other objectives, is no error: what is new is measured
        own = {f"{prefix}{name}": buffer for name, buffer in self.named_buffers()}
        for name in [name for name in state_dict if name.startswith(prefix) and name not in own]:
            del state_dict[name]
        for name, buffer in own.items():
            state_dict.setdefault(name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._reset()

    @torch.no_grad()
    def over_processes(
        self, measured: Mapping[str, Tensor], reached: Collection[str]
    ) -> tuple[Tensor, Sequence[bool | Tensor]]:
        """The norms of one call, 0 where absent, and which objectives it reached: the same in all processes."""
        nothing = torch.zeros_like(next(self.buffers()))
        found = torch.stack([measured.get(name, nothing).to(nothing) for name in self.names])
        counted = [name in reached for name in self.names]
        if (processes := world_size()) == 1:
            return found, counted
        # the loss is the mean over processes, whose images are different ones; squares would underflow in float32
        sums = torch.stack([(found.double() / processes).square(), found.new_tensor(counted).double()])
        dist.all_reduce(sums)
        return sums[0].sqrt().to(found), (sums[1] > 0).unbind()

    @torch.no_grad()
    def update(self, found: Tensor, reached: Sequence[bool | Tensor], shared: Collection[str]) -> None:
        """Take the norms of one call into the means of what it reached, unless one is not finite or all are zero.

        Args:
            found: of all objectives, in their order.
            reached: whether the call computed each of them, and its backward pass went through it.
            shared: the names of those that have a share.
        """
        usable = found.isfinite().all() & (found > 0).any()
        for name, norm, was_reached in zip(self.names, found, reached, strict=True):
            if was_reached is not False:
                mean, calls = self.get_buffer(f"mean_{name}"), self.get_buffer(f"calls_{name}")
                idle = self.get_buffer(f"idle_{name}")
                used = usable & was_reached
                if name in shared:  # this call, and those left out before it
                    counts = used & (norm > 0)
                    run = (idle + 1).clamp(1, self.longest[name])
                    idle.copy_(torch.where(counts, 0, idle + used))
                else:
                    counts, run = used, torch.ones_like(calls)
                    idle.copy_(torch.where(used, -1, idle))
                calls += used
                part = (run / calls.clamp(1, _AVERAGED_CALLS)).clamp(max=1)
                mean += torch.where(counts, part * (norm / run - mean), 0)

    def begin(self, shared: Collection[str]) -> "BackwardPass":
        """The hooks of a call whose backward pass will tell the norms."""
        self._pending.append(BackwardPass(shared))
        return self._pending[-1]

    def take_in(self) -> None:
        """Take in the norms of the last calls now, as before a state is saved. Each process has to call."""
        # several calls may wait for one backward pass; the oldest may wait for none
        for call in self._pending:
            if call.norms:
                self.update(*self.over_processes(call.norms, call.reached()), call.shared)
                if self._settled is not None and not self._settled[1].isdisjoint({*call.computed} - {*call.shared}):
                    self._settled = None  # what has a share now had a fixed weight in that call
        self._pending = [call for call in self._pending if not call.norms][-_PENDING_CALLS:]

    def by_name(self) -> dict[str, Tensor]:
        """The mean norms."""
        return {name: self.get_buffer(f"mean_{name}") for name in self.names}


def take_in_norms(module: nn.Module) -> None:
    """:meth:`RunningNorms.take_in` for every loss within a module, before a checkpoint. Each process has to call."""
    for part in module.modules():
        if isinstance(part, RunningNorms):
            part.take_in()


class BackwardPass:
    """Hooks on what each objective reads and returns in one call, which tell the norm of its own gradient."""

    def __init__(self, shared: Collection[str]) -> None:
        self.shared = tuple(shared)
        self.norms: dict[str, Tensor] = {}
        self.computed: tuple[str, ...] = ()
        self._factors: dict[str, dict[str, Tensor]] = {}
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
                factors = torch.stack(list(self._factors[name].values()))
                # terms that were multiplied apart have no factor in common, and no mean takes in NaN; bfloat16 has two
                # digits of it
                alike = torch.isclose(factors, factors[0], rtol=1e-2).all()
                factor = torch.where(alike, factors[0], torch.nan)
                self.norms[name] = gradient_norm(gradient) / (factor * self._weights[name]).abs()
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

    def reached(self) -> list[str]:
        """The objectives that the call computed, but those whose terms the backward pass did not go through."""
        went_through = {*self.norms, *self._passed}  # the latter without an image behind
        return [name for name in self.computed if name in went_through or name not in self._terms]

    def terms(
        self, values: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor | float]
    ) -> dict[str, Tensor]:
        """The weighted terms, at which the factor behind them is read: that of a GradScaler, or of accumulation."""
        self._weights, self.computed = weights, tuple(values)
        weighted = {}
        for name, terms in values.items():

            def read(gradient: Tensor, name: str, key: str) -> None:
                self._factors.setdefault(name, {})[key] = gradient.detach().float().sum()
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
