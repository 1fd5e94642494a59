"""TimeConditioned, FiLM and TimeMoE: any restoration network as a function of the image and a timestep.

:class:`TimeConditioned` wraps a network and lets small blocks, given the timestep, act on the outputs of its layers:
:class:`FiLM`, which is all that generative pre-training needs, or :class:`TimeMoE`, a mixture of experts for several
degradations. Both begin as the identity, so that a wrapped network computes what it did before.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from restoreloss.blocks.layouts import as_map, channel_dim
from restoreloss.checks import check_choice, check_integer, check_map, check_time, describe
from restoreloss.features import FeatureExtractor
from restoreloss.frozen import frozen

MoEForm: TypeAlias = Literal["paper", "code"]


class FiLM(nn.Module):
    r"""Scale and shift channels by the timestep.

    .. math:: h \leftarrow h\,(1 + s(t)) + b(t)

    Zero at the start, so that h passes as it is.

    Args:
        channels: of h.
        time_dim: of the time embedding.

    Raises:
        ValueError: For numbers that are not whole or below 1; at a call for features or an embedding of another shape.

    Example:
        >>> h = torch.rand(2, 8, 4, 4)
        >>> torch.equal(FiLM(8, 16)(h, torch.rand(2, 16)), h)
        True

    Source: Perez et al. 2018; as in the residual blocks of Dhariwal & Nichol 2021.
    """

    def __init__(self, channels: int, time_dim: int = 64) -> None:
        super().__init__()
        self.channels, self.time_dim = check_integer("channels", channels), check_integer("time_dim", time_dim)
        self.to_scale_shift = nn.Linear(time_dim, 2 * channels)
        nn.init.zeros_(self.to_scale_shift.weight)
        nn.init.zeros_(self.to_scale_shift.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(N, C, H, W) and the embedding (N, time_dim) to (N, C, H, W)."""
        check_map("h", h, self.channels)
        _check_embedding(embedding, len(h), self.time_dim)
        scale, shift = self.to_scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        result: Tensor = h * (1 + scale) + shift
        return result


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
            for features or an embedding of another shape, and routers that are not told the timestep.

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
        _check_embedding(embedding, len(h), self.time_dim)
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


class _Routers(nn.Module):
    """A linear layer for each of several timesteps."""

    steps: Tensor

    def __init__(self, channels: int, experts: int, timesteps: int | Sequence[int]) -> None:
        super().__init__()
        if isinstance(timesteps, Sequence) and not isinstance(timesteps, str):
            chosen = sorted({check_integer("timesteps", step, low=0) for step in timesteps})
        else:
            chosen = list(range(1, check_integer("timesteps", timesteps) + 1))
        if not chosen:
            raise ValueError("`timesteps` should be at least one, found none.")
        self.register_buffer("steps", torch.tensor(chosen), persistent=False)
        bound = channels**-0.5  # as of nn.Linear
        self.weight = nn.Parameter(torch.empty(len(chosen), experts, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(chosen), experts).uniform_(-bound, bound))

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


class TimeConditioned(nn.Module):
    """A network with the timestep as a second argument: ``(image, t) -> what the network returns``.

    Blocks act on the outputs of named layers by hooks. The network is not edited, and :meth:`detach` removes them. A
    layer returns (N, C, H, W), or as transformers do (N, H, W, C) or (N, L, C).

    Args:
        network: any, called with the image alone.
        blocks: by name of the layer, modules called as ``block(h, embedding)``: :class:`FiLM` or your own, or a
            :class:`TimeMoE`, which is told the timestep as well.
        num_timesteps: T, which the embedding spreads over: timesteps are 0 to T.
        time_dim: of the embedding: sines and cosines, then two linear layers.
        passes_time: call the network with the timestep as well, for one that reads it itself.

    Raises:
        ValueError: For a layer that does not exist, a block that is no module or of another ``time_dim``, and numbers
            that are not whole.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
        >>> timed = TimeConditioned(network, {"0": FiLM(8), "1": TimeMoE(8)})
        >>> image = torch.rand(2, 3, 8, 8)
        >>> torch.equal(timed(image, 12), network(image))
        True

    The blocks act in calls of the wrapper only. Under activation checkpointing, which runs layers again in the backward
    pass, wrap the layers' checkpointing outside of the wrapper's call.

    Source: DTP, Section 2.1: "the IR network incorporates a time step parameter".
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Mapping[str, nn.Module] | nn.ModuleDict | None = None,
        *,
        num_timesteps: int = 50,
        time_dim: int = 64,
        passes_time: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(f"`network` should be a module, found {describe(network)}.")
        if not isinstance(passes_time, bool):
            raise ValueError(f"`passes_time` should be True or False, found {describe(passes_time)}.")
        self.network, self.passes_time = network, passes_time
        self.num_timesteps = check_integer("num_timesteps", num_timesteps)
        self.time_dim = check_integer("time_dim", time_dim, low=2)
        self.embed = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.blocks = nn.ModuleDict()
        self._handles: dict[str, RemovableHandle] = {}
        self._embedding: Tensor | None = None
        self._steps: Tensor | None = None
        self._sides: tuple[int, ...] = (1, 1)
        self.attach({} if blocks is None else blocks)

    @property
    def layers(self) -> list[str]:
        """The names of the layers that blocks act on."""
        return [key.rstrip("/").replace("/", ".") for key in self.blocks]

    def attach(self, blocks: Mapping[str, nn.Module] | nn.ModuleDict) -> None:
        """Let blocks act on more layers; where one has a block already, the new one acts after it.

        Raises:
            ValueError: For a layer that does not exist, and a block that is no module or of another ``time_dim``.
        """
        if not isinstance(blocks, Mapping | nn.ModuleDict):
            raise ValueError(f"`blocks` should be a mapping of layers to modules, found {describe(blocks)}.")
        modules = dict(self.network.named_modules())
        for layer, block in blocks.items():
            if not isinstance(block, nn.Module):
                raise ValueError(f"`blocks[{layer!r}]` should be a module, found {describe(block)}.")
            if isinstance(block, FiLM | TimeMoE) and block.time_dim != self.time_dim:
                raise ValueError(
                    f"`blocks[{layer!r}]` should have the `time_dim` of the wrapper ({self.time_dim}), found "
                    f"{block.time_dim}."
                )
            if layer not in modules or layer == "":
                some = ", ".join(list(modules)[1:31])
                raise ValueError(f"`blocks` should name layers of the network, found {layer!r}; there are {some}, ...")
        for layer, block in blocks.items():
            key = _key(layer)
            earlier = _parts(self.blocks[key]) if key in self.blocks else []
            self.blocks[key] = _Chain(*earlier, block) if earlier else block
        self._hook()

    def detach(self, *layers: str) -> None:
        """Remove the blocks of layers, or of all layers if none is named.

        Raises:
            ValueError: For a layer without one.
        """
        unknown = [layer for layer in layers if layer not in self.layers]
        if unknown:
            raise ValueError(f"`layers` should be among {self.layers}, found {unknown}.")
        for layer in layers or self.layers:
            del self.blocks[_key(layer)]
        self._hook()

    def at(self, t: int) -> nn.Module:
        """The network for one timestep as a module of the image alone, to be exported or handed to other code.

        It shares the parameters. An adapter that reads its input cannot be folded into weights: this keeps it.

        Raises:
            ValueError: For a timestep that is none.
        """
        check_time("t", t, self.num_timesteps)
        return _AtTimestep(self, t)

    def balance_loss(self) -> Tensor:
        """The mean :attr:`TimeMoE.balance` of the last call.

        Raises:
            ValueError: If there is no mixture, or no call yet.
        """
        found = [block.balance for block in self.modules() if isinstance(block, TimeMoE) and block.balance is not None]
        if not found:
            raise ValueError("`balance_loss` should follow a call of a network with a TimeMoE, found none.")
        return torch.stack(found).mean()

    def forward(self, image: Tensor, t: Tensor | int) -> Any:
        """What the network returns for the image at the timestep.

        Args:
            image: (N, C, H, W).
            t: timesteps within 0 to ``num_timesteps``, (N,) or one for all; fractions are welcome.

        Raises:
            ValueError: If there are neither one nor N timesteps, and for one out of range or NaN. Tensors on an
                accelerator are not read: no device sync.
        """
        if not isinstance(image, Tensor) or image.ndim == 0:
            raise ValueError(f"`image` should be a tensor (N, C, H, W), found {describe(image)}.")
        check_time("t", t, self.num_timesteps)
        steps = torch.as_tensor(t, device=image.device)
        if steps.numel() not in (1, len(image)):
            raise ValueError(f"`t` should be one timestep or {len(image)}, found shape {tuple(steps.shape)}.")
        steps = steps.reshape(-1).expand(len(image))
        dtype = next(self.embed.parameters()).dtype
        before = self._embedding, self._steps
        try:
            self._steps, self._sides = steps, tuple(image.shape[-2:])
            self._embedding = self.embed(time_features(steps, self.time_dim, self.num_timesteps).to(dtype))
            return self.network(image, steps) if self.passes_time else self.network(image)
        finally:
            self._embedding, self._steps = before

    def _hook(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        modules = dict(self.network.named_modules())
        self._handles = {layer: modules[layer].register_forward_hook(_Act(self, layer)) for layer in self.layers}


class _Act:
    """The hook of a layer. It is an object, so that a copy of the wrapper has hooks that act for the copy."""

    def __init__(self, owner: TimeConditioned, layer: str) -> None:
        self.owner, self.layer = owner, layer

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if getattr(_module, "_is_replica", False):
            raise ValueError("TimeConditioned cannot run in nn.DataParallel; use DistributedDataParallel.")
        embedding = self.owner._embedding
        if embedding is None:
            return output
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"The layer {self.layer!r} should return (N, C, H, W), (N, H, W, C) or (N, L, C) to be conditioned, "
                f"found {what}."
            )
        for part in _parts(self.owner.blocks[_key(self.layer)]):
            given = embedding.to(output.dtype)
            if not isinstance(part, FiLM | TimeMoE):
                output = part(output, given)
                continue
            found = as_map(output, part.channels, self.owner._sides, spatial=_is_spatial(part))
            if found is None:
                channels = output.shape[channel_dim(output.shape, self.owner._sides) or 1]
                hint = "`channels_of` finds them"
                if channels == part.channels:
                    hint = f'{tuple(output.shape)} is no whole image, which form="code" looks at'
                raise ValueError(
                    f"`blocks[{self.layer!r}]` should have the channels that its layer returns, {channels}, found "
                    f"{part.channels}: {hint}."
                )
            value, back = found
            output = back(part(value, given, self.owner._steps) if isinstance(part, TimeMoE) else part(value, given))
        return output


def _is_spatial(block: nn.Module) -> bool:
    return any(max(layer.kernel_size) > 1 for layer in block.modules() if isinstance(layer, nn.Conv2d))


def _key(layer: str) -> str:
    """The name of a block, which may hold no dot and not be that of a method of nn.ModuleDict."""
    key = layer.replace(".", "/")
    return f"{key}/" if hasattr(nn.ModuleDict, key) else key


def _check_embedding(embedding: Any, count: int, time_dim: int) -> None:
    if not isinstance(embedding, Tensor) or embedding.shape not in ((count, time_dim), (1, time_dim)):
        raise ValueError(
            f"`embedding` should be of the timestep, ({count}, {time_dim}), as `TimeConditioned` makes it, found "
            f"{describe(embedding)}."
        )


def time_features(t: Tensor, dim: int, num_timesteps: int) -> Tensor:
    """Sines and cosines of the timestep, (N, dim), at frequencies from 1 to 1 / 10,000 of a scale of 1000."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * (1000 / num_timesteps) * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def channels_of(network: nn.Module, layers: Iterable[str], image: Tensor) -> dict[str, int]:
    """The channels that layers return, found by running the network once: what blocks for them need to know.

    Args:
        network: left as it was.
        layers: their names, or one.
        image: what the network is called with, float (N, C, H, W).

    Raises:
        ValueError: For a layer that does not exist, or does not return (N, C, H, W), (N, H, W, C) or (N, L, C).

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> channels_of(network, ["0"], torch.zeros(1, 3, 8, 8))
        {'0': 8}
    """
    if not isinstance(network, nn.Module):
        raise ValueError(f"`network` should be a module, found {describe(network)}.")
    names = [layers] if isinstance(layers, str) else list(layers)
    with torch.no_grad(), frozen(network):
        found = FeatureExtractor(network, names, normalize=None)(image)
    dims = {name: channel_dim(feature.shape, image.shape[-2:]) for name, feature in found.items()}
    for name, dim in dims.items():
        if dim is None:
            raise ValueError(
                f"The layer {name!r} should return (N, C, H, W), (N, H, W, C) or (N, L, C), found "
                f"{tuple(found[name].shape)}."
            )
    return {name: found[name].shape[dim] for name, dim in dims.items() if dim is not None}


def count_parameters(module: nn.Module) -> int:
    """The trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class _Chain(nn.Module):
    """Blocks of one layer, the earlier ones first."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(blocks)


def _parts(block: nn.Module) -> list[nn.Module]:
    return list(block.steps) if isinstance(block, _Chain) else [block]


class _AtTimestep(nn.Module):
    def __init__(self, timed: TimeConditioned, t: int) -> None:
        super().__init__()
        self.timed, self.t = timed, t

    def forward(self, image: Tensor) -> Any:
        return self.timed(image, self.t)


def _stack(layers: list[nn.Module], name: str) -> Tensor:
    return torch.cat([getattr(layer, name) for layer in layers])


def _balance(weights: Tensor, used: Tensor) -> Tensor:
    """M times the sum of (share of the work) x (mean weight); the gradient goes through the weights."""
    return weights.shape[1] * (used.detach().mean(dim=0) * weights.mean(dim=0)).sum()
