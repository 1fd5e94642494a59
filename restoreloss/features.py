"""FeatureExtractor: the outputs of named layers of a network that is borrowed.

The network is borrowed, not owned: it is neither copied nor registered nor changed. It runs up to the deepest layer
that is asked for and no further.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from restoreloss.checks import describe
from restoreloss.default_layers import default_layers
from restoreloss.frozen import unwrap
from restoreloss.images import at_least_float32, check_range, into_range
from restoreloss.normalization import Images, Normalize, Statistics, normalization
from restoreloss.precision import enter, leave, reference_weight


class FeatureExtractor:
    """The outputs of named layers of a network, by name.

    Args:
        network: any module. Wrappers of DDP, DataParallel and ``torch.compile`` are looked through.
        layers: a name or several, as in ``network.named_modules()``; "" is the network itself. Of a layer that returns
            a mapping, list or tuple (a feature pyramid), "backbone" stands for all its tensors and "backbone/0" for
            one. Default: :func:`~restoreloss.default_layers.default_layers`. A layer that runs more than once in a pass
            is seen at its first run.
        normalize: "auto" (what the network states: a timm model in its ``pretrained_cfg``; else ImageNet's, with a
            warning for what is not torchvision's) | "imagenet" | "model" (what the network states, or an error) |
            torchvision weights (``ResNet18_Weights.DEFAULT``) | ((mean, ...), (std, ...)) | a callable, from images in
            [0, 1] to the network's input, of which a tuple is its positional arguments | None. A torchvision detector
            normalizes its own input: with a name it is left to.
        input_range: what the caller's images span.

    Raises:
        ValueError: At construction for a layer that the network does not have, naming similar ones, and for a
            normalization that cannot be told. At a call for images that do not fit, a layer that did not run, one that
            returned no tensor, and one that returned the network's own input among others.

    Example:
        >>> from torchvision.models import resnet18
        >>> features = FeatureExtractor(resnet18(), ["layer3", "layer4"])
        >>> {name: tuple(value.shape) for name, value in features(torch.rand(2, 3, 64, 64)).items()}
        {'layer3': (2, 256, 4, 4), 'layer4': (2, 512, 2, 2)}

    The network runs as it is found: in its mode, with its gradients. Use :func:`restoreloss.frozen` around a call to
    keep it at rest. Features of a frozen network in float16 are returned in float32, so that their gradients do not
    underflow. The pass itself is never compiled: hooks added later would be ignored by a compiled network.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: str | Sequence[str] | None = None,
        *,
        normalize: Normalize = "auto",
        input_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if not isinstance(network, nn.Module):
            raise ValueError(f"`network` should be an nn.Module, found {describe(network)}.")
        if isinstance(network, torch.jit.ScriptModule):
            raise ValueError("`network` should be the Python module, found TorchScript, whose layers cannot be hooked.")
        layers = [layers] if isinstance(layers, str) else layers
        if layers is not None and not (isinstance(layers, Sequence) and all(isinstance(one, str) for one in layers)):
            found = f"[{', '.join(map(describe, layers))}]" if isinstance(layers, list) else describe(layers)
            raise ValueError(f"`layers` should be a name or a list of names, found {found}.")
        self.network = network
        self.layers = tuple(default_layers(unwrap(network)) if layers is None else layers)
        if not self.layers:
            raise ValueError("`layers` should name at least one layer, found none.")
        modules = {layer for layer in self.layers if "/" not in layer}
        twice = [n for n in self.layers if self.layers.count(n) > 1 or ("/" in n and n.partition("/")[0] in modules)]
        if twice:
            raise ValueError(f"`layers` should name every tensor once, found {twice} twice.")
        self.input_range = check_range(input_range)
        self._normalization = normalization(unwrap(network), normalize)
        self._paths = _group_by_module(unwrap(network), self.layers)
        self._overwritten: set[str] = set()
        self._looking = False
        self._memo: dict[tuple[object, ...], tuple[tuple[Tensor, ...], dict[str, Tensor]]] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, images: Images) -> dict[str, Tensor]:
        """The features, in the order in which the layers are named; a container's tensors as "layer/key".

        Args:
            images: float (N, C, H, W) in ``input_range``, or a list of (C, H, W) for networks that take lists.
        """
        _check_images(images)
        if self._memo is None:
            return self._run(images)
        parts = (images,) if isinstance(images, Tensor) else tuple(images)
        if any(part.is_inference() for part in parts):  # Nothing would tell that they were changed.
            return self._run(images)
        key = self._key(parts)
        if key not in self._memo:
            self._memo[key] = (parts, self._run(images))  # The reference keeps id() unique.
        return self._memo[key][1]

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Within this block the network's own next forward pass, in full and in its own mode, leaves its features here.

        One pass then serves a task loss and a loss on features. After the block the mapping holds them, as calling
        the extractor would return them; normalizing your images is then left to you.

        Raises:
            ValueError: At the end of the block, if a layer did not run or returned no tensor.

        Example:
            >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
            >>> with FeatureExtractor(network, ["1"]).recording() as features:
            ...     logits = network(torch.rand(2, 3, 8, 8))
            >>> features["1"].shape
            torch.Size([2, 4, 6, 6])
        """
        features: dict[str, Tensor] = {}
        outputs: dict[str, dict[str, Tensor]] = {}

        def record(path: str, *call: Any) -> None:
            if path not in outputs and not self._looking:
                # A later layer may write into the tensor itself.
                outputs[path] = {name: value.clone() for name, value in _tensors(path, call[-1]).items()}

        network = unwrap(self.network)
        with ExitStack() as stack:
            for path in self._paths:
                handle = network.get_submodule(path).register_forward_hook(partial(record, path))
                stack.callback(handle.remove)
            yield features
        self._check_ran(outputs)
        features.update(self._chosen(outputs))

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within this block the same images pass through the network once, whoever asks.

        Two losses on one extractor share it; :class:`~restoreloss.WeightedSum` opens the block by itself.
        """
        if self._memo is not None:  # The block is open already.
            yield
            return
        self._memo = {}
        try:
            yield
        finally:
            self._memo = None

    def _key(self, images: tuple[Tensor, ...]) -> tuple[object, ...]:
        """What the features depend on. A pass without gradient must not stand in for one that needs it."""
        network, device = unwrap(self.network), images[0].device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return (
            *((id(image), image._version) for image in images),
            torch.is_grad_enabled(),
            torch.get_autocast_dtype(device) if casts else None,
            any(parameter.requires_grad for parameter in network.parameters()),
            sum(weight._version for weight in (*network.parameters(), *network.buffers()) if not weight.is_inference()),
            network.training,
        )

    def _run(self, images: Images) -> dict[str, Tensor]:
        network = unwrap(self.network)
        arguments, door = self._prepare(images, network)
        outputs: dict[str, Any] = {}
        versions: dict[str, list[int]] = {}

        def record(path: str, *call: Any) -> None:
            if path in outputs:
                return
            found = _tensors(path, call[-1])
            last = len(outputs) + 1 == len(self._paths)
            # A pass in train mode cannot be repeated, and inference tensors do not tell that they were overwritten.
            keeps = not last and (path in self._overwritten or network.training or torch.is_inference_mode_enabled())
            outputs[path] = found = {name: value.clone() if keeps else value for name, value in found.items()}
            versions[path] = [_version(value) for value in found.values()]
            if last:
                raise Reached

        with ExitStack() as stack:
            for path in self._paths:
                handle = network.get_submodule(path).register_forward_hook(partial(record, path))
                stack.callback(handle.remove)
            stack.enter_context(_one_arithmetic())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(suppress(Reached))
            stack.callback(setattr, self, "_looking", self._looking)
            self._looking = True
            try:
                network(*arguments)
            except AssertionError as error:
                if not re.search(r"\b(height|width|size)\b", str(error)):
                    raise  # of the network's own; transformers of timm and torchvision assert their size
                sizes = [tuple(part.shape[-2:]) for part in ([images] if isinstance(images, Tensor) else images)]
                raise ValueError(
                    f"The images should be of a size that {type(network).__name__} reads, found {sizes[0]}: {error} "
                    "timm makes its transformers for a size (`img_size=`; `image_size` in an options file)."
                ) from error
        self._check_ran(outputs)
        self._check_not_the_input(outputs, arguments)
        changed = {path for path in outputs if versions[path] != [_version(v) for v in outputs[path].values()]}
        if changed:  # A later in-place layer, like the ReLU of VGG, wrote into it: keep a copy from now on.
            self._overwritten |= changed
            return self._run(images)
        chosen = self._chosen(outputs)
        return dict(zip(chosen, leave(door, *chosen.values()), strict=True))

    def _check_not_the_input(self, outputs: dict[str, dict[str, Tensor]], arguments: Sequence[Any]) -> None:
        """Refuse a container that holds the input: a loss on it would in part be a pixel loss."""
        inputs = {id(part) for part in arguments if isinstance(part, Tensor)}
        for layer in self.layers:
            own = [name for name, value in outputs.get(layer, {}).items() if name != layer and id(value) in inputs]
            if own:
                others = [name for name in outputs[layer] if name not in own]
                raise ValueError(
                    f"`layers` should name the tensors of {layer!r} one by one, found that {own[0]!r} is the network's "
                    f"input itself: choose from {others}."
                )

    def _check_ran(self, outputs: dict[str, Any]) -> None:
        silent = [path for path in self._paths if path not in outputs]
        if silent:
            raise ValueError(
                f"`layers` should be layers that run, found that the network did not call {silent} (or it is compiled "
                "and does not tell)."
            )

    def _chosen(self, outputs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: value for layer in self.layers for name, value in self._select(layer, outputs).items()}

    @staticmethod
    def _select(layer: str, outputs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        path = layer.partition("/")[0]
        chosen = {name: value for name, value in outputs[path].items() if name == layer or name.startswith(f"{layer}/")}
        if not chosen:
            raise ValueError(
                f"`layers` should name tensors that {path!r} returns, {list(outputs[path])}, found {layer!r}."
            )
        return chosen

    def _prepare(self, images: Images, network: nn.Module) -> tuple[tuple[Any, ...], Tensor | None]:
        """The arguments of the network: images in [0, 1], normalized, in its dtype; and the door of half precision."""
        parts = [images] if isinstance(images, Tensor) else images
        weight = reference_weight(network)
        weight = parts[0] if weight is None else weight
        for part in parts:
            if weight.device != part.device:
                raise ValueError(f"The images should be on the network's device {weight.device}, found {part.device}.")
        unit = [self._unit(part) for part in parts]
        if callable(self._normalization):
            found = self._normalization(unit[0] if isinstance(images, Tensor) else unit)
            arguments = found if isinstance(found, tuple) else (found,)
            if not any(isinstance(part, Tensor) for part in tree_leaves(arguments)):
                raise ValueError(f"`normalize` should return the network's input, found {describe(found)}.")
        else:
            normalized = [self._normalized(part, self._normalization) for part in unit]
            arguments = (normalized[0] if isinstance(images, Tensor) else normalized,)
        floating = [part for part in tree_leaves(arguments) if isinstance(part, Tensor) and part.is_floating_point()]
        casts, door = enter(floating, weight.dtype, network)
        rest = iter(casts)
        return tree_map(
            lambda part: next(rest) if isinstance(part, Tensor) and part.is_floating_point() else part, arguments
        ), door

    def _unit(self, image: Tensor) -> Tensor:
        """In [0, 1], in float32 or higher; never the image itself, which what reads it may change in place."""
        unit = into_range(at_least_float32(image), self.input_range, (0.0, 1.0))
        return unit.clone() if unit is image else unit

    @staticmethod
    def _normalized(image: Tensor, statistics: Statistics | None) -> Tensor:
        if statistics is None:
            return image
        # (N, C, H, W) or (C, H, W)
        mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in statistics)
        if image.shape[-3] != len(mean):
            gray = "; of gray ones `images.expand(-1, 3, -1, -1)` makes three" if image.shape[-3] == 1 else ""
            last = "; are the channels last?" if image.shape[-1] == len(mean) else ""
            raise ValueError(
                f"The images should have {len(mean)} channels, as many as the normalization, found "
                f"{image.shape[-3]}{gray}{last}; give `normalize` if the network reads others."
            )
        return (image - mean) / std


def _check_images(images: Any) -> None:
    """Raise ``ValueError`` unless these are float (N, C, H, W), or a list of (C, H, W)."""
    several = isinstance(images, list | tuple)
    for image in images if several else [images]:
        fits = isinstance(image, Tensor) and image.ndim == (3 if several else 4) and image.is_floating_point()
        if not fits or image.numel() == 0:
            raise ValueError(
                f"The images should be float (N, C, H, W), or a list of (C, H, W), not empty, found {describe(image)}"
                f"{' in a list' if several else ''}."
            )
    if several and not images:
        raise ValueError("The images should be at least one, found an empty list.")


class Reached(Exception):
    """A hook has seen what was asked for, and the rest of the pass is not needed."""


@contextmanager
def _one_arithmetic() -> Iterator[None]:
    """Use the same kernels of attention with and without gradient: the fast path for inference rounds differently."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _tensors(path: str, output: Any) -> dict[str, Tensor]:
    """The floating-point tensors in what a layer returned."""
    if isinstance(output, Tensor):
        return {path: output} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, list | tuple):
        items = list(enumerate(output))
    else:
        items = []
    found = {name: value for key, item in items for name, value in _tensors(f"{path}/{key}", item).items()}
    if not found and "/" not in path:
        raise ValueError(
            f"Layer {path!r} should return a floating-point tensor, or a mapping, list or tuple of them, found "
            f"{type(output).__name__}."
        )
    return found


def _group_by_module(network: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    """The modules to listen to, each once."""
    known = dict(network.named_modules())
    paths = dict.fromkeys(layer.partition("/")[0] for layer in layers)
    for path in paths:
        if path not in known:
            close = difflib.get_close_matches(path, known, n=5, cutoff=0.4)
            candidates = close or [name for name, _ in network.named_children()]
            raise ValueError(
                f"`layers` should name modules of {type(network).__name__}, found {path!r}; there is "
                f"{', '.join(map(repr, candidates))} and more in `named_modules()`."
            )
    return tuple(paths)
