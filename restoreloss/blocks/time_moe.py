"""TimeConditioned, FiLM and TimeMoE: any restoration network as a function of the image and a timestep.

:class:`TimeConditioned` wraps a network and lets small blocks, given the timestep, act on the outputs of its layers:
:class:`FiLM`, which is all that generative pre-training needs, or :class:`TimeMoE`, a mixture of experts for several
degradations. Both begin as the identity, so that a wrapped network computes what it did before.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from restoreloss.checks import check_integer, check_map, check_time, describe
from restoreloss.features import FeatureExtractor
from restoreloss.frozen import frozen


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

    .. math:: h + \alpha \sum_i w_i\, E_i(h), \qquad
        w = \mathrm{softmax}\bigl(W_2\, \mathrm{GELU}(W_1 [\mathrm{GAP}(h);\, \mathrm{Emb}(t)])\bigr)

    :math:`E_i` is a 3x3 convolution to max(C / 4, 16) channels, GELU, 3x3, GELU, 1x1 back to C. :math:`\alpha` is one
    learned number, 0 at the start: the adapter is the identity until it has learned to be something else.

    Args:
        channels: C of h.
        time_dim: of the time embedding.
        experts: how many; 10 in the paper.
        top_k: run only the k experts of the largest weights of each sample, these weights scaled to sum to 1. The
            default runs all.

    Raises:
        ValueError: For numbers that are not whole or below 1, or a ``top_k`` that is not 1 to ``experts``; at a call
            for features or an embedding of another shape.

    Attributes:
        balance: after a call, the load-balancing loss :math:`M \sum_i f_i \bar w_i` of that batch: 1 where all experts
            are used alike, up to M. Add a small multiple (0.01) to the loss where ``top_k`` is set.

    Example:
        >>> adapter = TimeMoE(32)
        >>> h = torch.rand(2, 32, 8, 8)
        >>> torch.equal(adapter(h, torch.rand(2, 64)), h)
        True

    Source: DTP, Section 3.3 and Fig. 6(d). The figure is lost in the text that we have: the form of gate and experts is
    inferred. The balance loss is that of Fedus et al. 2021.
    """

    balance: Tensor | None

    def __init__(self, channels: int, time_dim: int = 64, *, experts: int = 10, top_k: int | None = None) -> None:
        super().__init__()
        self.channels, self.time_dim = check_integer("channels", channels), check_integer("time_dim", time_dim)
        check_integer("experts", experts)
        self.top_k = None if top_k is None else check_integer("top_k", top_k, high=experts)
        hidden = max(channels // 4, 16)
        self.gate = nn.Sequential(nn.Linear(channels + time_dim, hidden), nn.GELU(), nn.Linear(hidden, experts))
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, hidden, 3, padding=1),
                nn.GELU(), nn.Conv2d(hidden, channels, 1),
            )
            for _ in range(experts)
        )  # fmt: skip
        self.alpha = nn.Parameter(torch.zeros(()))
        self.balance = None

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(N, C, H, W) and the embedding (N, time_dim) to (N, C, H, W)."""
        check_map("h", h, self.channels)
        _check_embedding(embedding, len(h), self.time_dim)
        logits = self.gate(torch.cat([h.mean(dim=(2, 3)), embedding], dim=1))
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
        """All experts at once: the first layers are one convolution, the second ones a grouped one, and the last layers
        are linear, so that the weights go in before their sum.
        """
        experts: list[Any] = list(self.experts)
        first, second, last = ([expert[layer] for expert in experts] for layer in (0, 2, 4))
        count = len(self.experts)
        x = F.gelu(F.conv2d(h, _stack(first, "weight"), _stack(first, "bias"), padding=1))
        x = F.gelu(F.conv2d(x, _stack(second, "weight"), _stack(second, "bias"), padding=1, groups=count))
        x = (x.unflatten(1, (count, -1)) * weights[:, :, None, None, None]).flatten(1, 2)
        mixed = F.conv2d(x, torch.cat([layer.weight for layer in last], dim=1))
        bias = weights @ torch.stack([layer.bias for layer in last]).to(weights.dtype)
        return mixed + bias[:, :, None, None]

    def _plain(self) -> bool:
        """Whether all layers are plain convolutions, neither replaced nor with a hook."""
        return all(
            type(layer) is nn.Conv2d and not (layer._forward_hooks or layer._forward_pre_hooks)
            for expert in self.experts
            for layer in (expert[0], expert[2], expert[4])  # type: ignore[index]
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


class TimeConditioned(nn.Module):
    """A network with the timestep as a second argument: ``(image, t) -> what the network returns``.

    Blocks act on the outputs of named layers by hooks. The network is not edited, and :meth:`detach` removes them.

    Args:
        network: any, called with the image alone.
        blocks: by name of the layer, modules called as ``block(h, embedding)``: :class:`FiLM`, :class:`TimeMoE` or your
            own.
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
            self.blocks[key] = block if key not in self.blocks else _Chain(self.blocks[key], block)
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
        before = self._embedding
        try:
            self._embedding = self.embed(time_features(steps, self.time_dim, self.num_timesteps).to(dtype))
            return self.network(image, steps) if self.passes_time else self.network(image)
        finally:
            self._embedding = before

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
        if not isinstance(output, Tensor) or output.ndim != 4:
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"The layer {self.layer!r} should return (N, C, H, W) to be conditioned, found {what}.")
        block = self.owner.blocks[_key(self.layer)]
        for part in block.steps if isinstance(block, _Chain) else [block]:
            if isinstance(part, FiLM | TimeMoE) and part.channels != output.shape[1]:
                raise ValueError(
                    f"`blocks[{self.layer!r}]` should have the channels that its layer returns, {output.shape[1]}, "
                    f"found {part.channels}: `channels_of` finds them."
                )
        return block(output, embedding.to(output.dtype))


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
        ValueError: For a layer that does not exist, or does not return (N, C, H, W).

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
    for name, feature in found.items():
        if feature.ndim != 4:
            raise ValueError(f"The layer {name!r} should return (N, C, H, W), found {tuple(feature.shape)}.")
    return {name: feature.shape[1] for name, feature in found.items()}


def count_parameters(module: nn.Module) -> int:
    """The trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class _Chain(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(blocks)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for block in self.steps:
            h = block(h, embedding)
        return h


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
