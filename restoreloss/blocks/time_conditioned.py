"""TimeConditioned: any restoration network as a function of the image and a timestep.

It lets small blocks, given the timestep, act on the outputs of a network's layers: :class:`FiLM`, which is all that
generative pre-training needs, or :class:`TimeMoE`, a mixture of experts for several degradations. Both begin as the
identity, so that a wrapped network computes what it did before.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from restoreloss.blocks.film import FiLM
from restoreloss.blocks.layouts import as_map, channel_dim, has_channels_last
from restoreloss.blocks.time_moe import TimeMoE
from restoreloss.checks import caller_level, check_integer, check_time, describe
from restoreloss.features import FeatureExtractor
from restoreloss.frozen import frozen
from restoreloss.precision import same_integers


class TimeConditioned(nn.Module):
    """A network with the timestep as a second argument: ``(image, t) -> what the network returns``.

    Blocks act on the outputs of named layers by hooks. The network is not edited, and :meth:`detach` removes them. A
    layer returns (N, C, H, W), or as transformers do (N, H, W, C) or (N, L, C). Of a map that may be either, as high as
    it has channels, they are taken to come first, but after an ``nn.Linear`` or an ``nn.LayerNorm`` over one
    dimension.

    Args:
        network: any, called with the image alone.
        blocks: by name of the layer, modules called as ``block(h, embedding)``: :class:`FiLM` or your own, or a
            :class:`TimeMoE`, which receives the timestep as well.
        num_timesteps: T, which the embedding spreads over: timesteps are 0 to T.
        time_dim: of the embedding: sines and cosines, then two linear layers (``embed``). They are frozen as long as no
            block reads it.
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
        self._embedding_is_read = True
        self.blocks = nn.ModuleDict()
        self._handles: dict[str, RemovableHandle] = {}
        self._embedding: Tensor | None = None
        self._steps: Tensor | None = None
        self._sides: tuple[int, ...] = (1, 1)
        self._acted: set[str] = set()
        self._told: set[str] = set()
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
            if any(getattr(module, "_compiled_call_impl", None) for module in self._above(layer)):
                warnings.warn(
                    f"The layer {layer!r} was compiled before it got a block: if it was called since, newer torch runs "
                    "no hook of a later time, and the block does nothing. Wrap the network first, and compile it then.",
                    stacklevel=caller_level(),
                )
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
        before, self._acted = (self._embedding, self._steps), set()
        try:
            self._steps, self._sides = steps, tuple(image.shape[-2:])
            self._embedding = self.embed(time_features(steps, self.time_dim, self.num_timesteps).to(dtype))
            found = self.network(image, steps) if self.passes_time else self.network(image)
        finally:
            self._embedding, self._steps = before
        if not torch.compiler.is_compiling():
            self._tell_of_idle()
        return found

    def get_extra_state(self) -> Tensor:
        """T: a timestep means nothing without it."""
        return torch.tensor(float(self.num_timesteps))

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the weights of another T.

        Raises:
            ValueError: For a state of another ``num_timesteps``.
        """
        if not same_integers(state, torch.tensor(self.num_timesteps)):
            raise ValueError(
                f"`num_timesteps` should be {float(state):g}, as in the state, found {self.num_timesteps}: the "
                "same timestep would be another."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # a state that was put together by hand need not say it
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _tell_of_idle(self) -> None:
        """Warn once of layers that were not passed, so that their blocks did nothing. Compiled ones do not say."""
        idle = {
            layer
            for layer in set(self.layers) - self._acted - self._told
            if not any(_is_compiled(module) for module in self._above(layer))
        }
        if idle:
            self._told |= idle
            warnings.warn(
                f"The network ran without passing {sorted(idle)}, so that the blocks there did nothing. (A list of "
                "modules is not called itself.)",
                stacklevel=caller_level(),
            )

    def _above(self, layer: str) -> list[nn.Module]:
        """The layer, and what it lies in."""
        names, modules = layer.split("."), dict(self.network.named_modules())
        paths = [".".join(names[:number]) for number in range(len(names) + 1)]
        return [modules[path] for path in paths if path in modules]

    def _hook(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        modules = dict(self.network.named_modules())
        self._handles = {layer: modules[layer].register_forward_hook(_Act(self, layer)) for layer in self.layers}
        # weights that nothing reads get no gradient, which DDP takes for an error
        is_read = any(_reads_embedding(part) for block in self.blocks.values() for part in _parts(block))
        if is_read != self._embedding_is_read:
            self.embed.requires_grad_(is_read)
        self._embedding_is_read = is_read


class _Act:
    """The hook of a layer. It is an object, so that a copy of the wrapper has hooks that act for the copy."""

    def __init__(self, owner: TimeConditioned, layer: str) -> None:
        self.owner, self.layer = owner, layer

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if getattr(module, "_is_replica", False):
            raise ValueError("TimeConditioned cannot run in nn.DataParallel; use DistributedDataParallel.")
        embedding = self.owner._embedding
        if embedding is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise ValueError(
                    f"The layer {self.layer!r} should not be recomputed within a backward pass, where the timestep is "
                    "not known any more, found activation checkpointing inside of the network: checkpoint the whole "
                    "TimeConditioned."
                )
            return output
        if not torch.compiler.is_compiling():
            self.owner._acted.add(self.layer)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"The layer {self.layer!r} should return (N, C, H, W), (N, H, W, C) or (N, L, C) to be conditioned, "
                f"found {what}."
            )
        last = has_channels_last(module)
        for part in _parts(self.owner.blocks[_key(self.layer)]):
            given = embedding.to(output.dtype)
            if not isinstance(part, FiLM | TimeMoE):
                output = part(output, given)
                continue
            found = as_map(output, part.channels, self.owner._sides, spatial=_is_spatial(part), last=last)
            if found is None:
                channels = output.shape[channel_dim(output.shape, self.owner._sides, last=last) or 1]
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


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled: in place, by ``torch.compile``, or in its ``forward``."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or "_orig_mod" in module._modules or hasattr(module.forward, "_torchdynamo_orig_callable")


def _reads_embedding(block: nn.Module) -> bool:
    return not isinstance(block, TimeMoE) or block.form == "code"


def _is_spatial(block: nn.Module) -> bool:
    return any(max(layer.kernel_size) > 1 for layer in block.modules() if isinstance(layer, nn.Conv2d))


def _key(layer: str) -> str:
    """The name of a block, which may hold no dot and not be that of a method of nn.ModuleDict."""
    key = layer.replace(".", "/")
    return f"{key}/" if hasattr(nn.ModuleDict, key) else key


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
    modules = dict(network.named_modules())
    dims = {
        name: channel_dim(feature.shape, image.shape[-2:], last=name in modules and has_channels_last(modules[name]))
        for name, feature in found.items()
    }
    for name, dim in dims.items():
        if dim is None:
            raise ValueError(
                f"The layer {name!r} should return (N, C, H, W), (N, H, W, C) or (N, L, C), found "
                f"{tuple(found[name].shape)}."
            )
    return {name: found[name].shape[dim] for name, dim in dims.items() if dim is not None}


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
