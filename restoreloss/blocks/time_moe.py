"""TimeMoE: a mixture of experts whose gate reads the features and the timestep."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss.checks import check_choice, check_embedding, check_integer, check_map, describe
from restoreloss.precision import ExactBuffers, same_integers

MoEForm: TypeAlias = Literal["paper", "code"]


class TimeMoE(nn.Module):
    r"""A mixture of convolutional experts whose gate reads the features and the timestep.

    .. math:: h + \alpha \sum_i w_i\, E_i(h), \qquad w = \mathrm{softmax}\bigl(W_t\, \mathrm{GAP}(h) + b_t\bigr)

    :math:`E_i` is a 1x1 convolution to max(C / 4, 16) channels, GELU, 1x1 back to C. Each of ``timesteps`` has a linear
    router :math:`W_t, b_t` of its own; others take the nearest. :math:`\alpha` is one learned number, 0 at the start:
    the adapter is the identity until it has learned to be something else.

    Args:
        channels: C of h.
        time_dim: of the time embedding, which the gate of "code" reads.
        experts: how many; 10 in the paper.
        top_k: run only the k experts of the largest weights of each sample, these weights scaled to sum to 1. The
            default runs all.
        form: "paper", as above. "code": what the authors' code became: 3x3 to max(C / 4, 16) channels, GELU, 3x3, GELU,
            1x1 back to C, and one gate for all timesteps,
            :math:`W_2\, \mathrm{GELU}(W_1 [\mathrm{GAP}(h);\, \mathrm{Emb}(t)])` in the place of the routers.
        timesteps: those that have a router, or their number T for 1 to T: with t* of every degradation of a data set
            there is one for each.

    Raises:
        ValueError: For numbers that are not whole or below 1, or a ``top_k`` that is not 1 to ``experts``; at a call
            for features or an embedding of another shape, and routers that are not given the timestep.

    Attributes:
        balance: after a call, the load-balancing loss :math:`M \sum_i f_i \bar w_i` of that batch: 1 where all experts
            are used alike, up to M. Add a small multiple (0.01) to the loss where ``top_k`` is set.

    Example:
        >>> adapter = TimeMoE(32)
        >>> h = torch.rand(2, 32, 8, 8)
        >>> torch.equal(adapter(h, torch.rand(2, 64), torch.tensor([4, 47])), h)
        True

    On NAFNet of 64 channels ten experts behind each decoder level have 1.753 million parameters and a router 0.010
    million; of "code" they have 10.68 million.

    Source: DTP, Section 3.3 and Fig. 6(d), as the first code that its authors published has them. The balance loss is
    that of Fedus et al. 2021.
    """

    balance: Tensor | None

    def __init__(
        self,
        channels: int,
        time_dim: int = 64,
        *,
        experts: int = 10,
        top_k: int | None = None,
        form: MoEForm = "paper",
        timesteps: int | Sequence[int] = 50,
    ) -> None:
        super().__init__()
        check_choice("form", form, MoEForm)
        self.form: MoEForm = form
        self.channels, self.time_dim = check_integer("channels", channels), check_integer("time_dim", time_dim)
        check_integer("experts", experts)
        self.top_k = None if top_k is None else check_integer("top_k", top_k, high=experts)
        hidden = max(channels // 4, 16)
        self.gate: nn.Module = (
            _Routers(channels, experts, timesteps)
            if form == "paper"
            else nn.Sequential(nn.Linear(channels + time_dim, hidden), nn.GELU(), nn.Linear(hidden, experts))
        )
        self.experts = nn.ModuleList(_expert(channels, hidden, form) for _ in range(experts))
        self.alpha = nn.Parameter(torch.zeros(()))
        self.balance = None

    def forward(self, h: Tensor, embedding: Tensor, t: Tensor | None = None) -> Tensor:
        """(N, C, H, W) to the same.

        Args:
            h: the features.
            embedding: (N, time_dim).
            t: the timesteps, (N,), for the routers of "paper".
        """
        check_map("h", h, self.channels)
        check_embedding(embedding, len(h), self.time_dim)
        means = h.mean(dim=(2, 3))
        logits = self.gate(means, t) if isinstance(self.gate, _Routers) else self.gate(torch.cat([means, embedding], 1))
        weights = logits.softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self.top_k is None:
            self.balance = _balance(weights, weights)
            mixed = self._dense(h, weights.to(h.dtype)) if self._plain() else self._one_by_one(h, weights.to(h.dtype))
        else:
            chosen = weights.topk(self.top_k, dim=1).indices
            used = torch.zeros_like(weights).scatter(1, chosen, 1.0)
            self.balance = _balance(weights, used / self.top_k)
            kept = weights * used
            mixed = self._sparse(h, (kept / kept.sum(dim=1, keepdim=True)).to(h.dtype), used > 0)
        return h + self.alpha.to(h.dtype) * mixed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "balance": None}  # It belongs to a call, and a copy was not called yet.

    def _dense(self, h: Tensor, weights: Tensor) -> Tensor:
        """All experts at once: the first layers are one convolution, those between grouped ones, and the last layers
        are linear, so that the weights go in before their sum.
        """
        first, *between, last = ([expert[layer] for expert in self.experts] for layer in self._convolutions())  # type: ignore[index]
        count = len(self.experts)
        x = F.gelu(F.conv2d(h, _stack(first, "weight"), _stack(first, "bias"), padding=first[0].padding))
        for layers in between:
            x = F.gelu(F.conv2d(x, _stack(layers, "weight"), _stack(layers, "bias"), padding=1, groups=count))
        x = (x.unflatten(1, (count, -1)) * weights[:, :, None, None, None]).flatten(1, 2)
        mixed = F.conv2d(x, torch.cat([layer.weight for layer in last], dim=1))
        bias = weights @ torch.stack([layer.bias for layer in last]).to(weights.dtype)
        return mixed + bias[:, :, None, None]

    def _convolutions(self) -> range:
        """The places of the convolutions in an expert: every other layer."""
        return range(0, len(self.experts[0]), 2)  # type: ignore[arg-type]

    def _plain(self) -> bool:
        """Whether all layers are plain convolutions, neither replaced nor with a hook."""
        return all(
            type(layer) is nn.Conv2d and not (layer._forward_hooks or layer._forward_pre_hooks)
            for expert in self.experts
            for layer in (expert[place] for place in self._convolutions())  # type: ignore[index]
        )

    def _one_by_one(self, h: Tensor, weights: Tensor) -> Tensor:
        answers = [weights[:, k, None, None, None] * expert(h) for k, expert in enumerate(self.experts)]
        return torch.stack(answers).sum(dim=0)

    def _sparse(self, h: Tensor, weights: Tensor, used: Tensor) -> Tensor:
        """Each expert on the samples that chose it."""
        mixed = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = used[:, number].nonzero().flatten()
            answer = expert(h[rows]) * weights[rows, number, None, None, None]
            mixed = mixed.index_add(0, rows, answer.to(mixed.dtype))
        return mixed


class _Routers(ExactBuffers):
    """A linear layer for each of several timesteps."""

    steps: Tensor
    """As floats, of which averages of weights can be taken."""

    def __init__(self, channels: int, experts: int, timesteps: int | Sequence[int]) -> None:
        super().__init__()
        if isinstance(timesteps, Sequence) and not isinstance(timesteps, str):
            chosen = sorted({check_integer("timesteps", step, low=0) for step in timesteps})
        else:
            chosen = list(range(1, check_integer("timesteps", timesteps) + 1))
        if not chosen:
            raise ValueError("`timesteps` should be at least one, found none.")
        self._chosen = tuple(chosen)
        self.register_buffer("steps", torch.tensor(chosen, dtype=torch.float32))
        bound = channels**-0.5  # as of nn.Linear
        self.weight = nn.Parameter(torch.empty(len(chosen), experts, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(chosen), experts).uniform_(-bound, bound))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        own = torch.tensor(self._chosen, dtype=torch.float32)
        saved = state_dict.get(f"{prefix}steps", own)
        own = own.to(saved.device)
        if not saved.is_meta and not same_integers(saved, own):
            wanted, found = ([f"{step:g}" for step in steps.tolist()] for steps in (saved, own))
            raise ValueError(
                f"`timesteps` should be [{', '.join(wanted)}], as in the state, found [{', '.join(found)}]."
            )
        # exact, where those of the state were cast, and where this module is on the meta device
        state_dict[f"{prefix}steps"] = own
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, means: Tensor, t: Tensor | None) -> Tensor:
        """(N, C) and timesteps (N,) to (N, experts)."""
        if not isinstance(t, Tensor) or t.numel() not in (1, len(means)):
            raise ValueError(
                f"`t` should be the timestep of each of {len(means)} samples, as `TimeConditioned` passes it, found "
                f"{describe(t)}."
            )
        nearest = (t.reshape(-1, 1).to(means.device) - self.steps).abs().argmin(dim=1)
        logits: Tensor = (self.weight[nearest] @ means[..., None])[..., 0] + self.bias[nearest]
        return logits


def _expert(channels: int, hidden: int, form: MoEForm) -> nn.Sequential:
    if form == "paper":
        return nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.GELU(), nn.Conv2d(hidden, channels, 1),
    )  # fmt: skip


def _stack(layers: list[nn.Module], name: str) -> Tensor:
    return torch.cat([getattr(layer, name) for layer in layers])


def _balance(weights: Tensor, used: Tensor) -> Tensor:
    """M times the sum of (share of the work) x (mean weight); the gradient goes through the weights."""
    return weights.shape[1] * (used.detach().mean(dim=0) * weights.mean(dim=0)).sum()
