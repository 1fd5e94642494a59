"""What does a network see in an image, layer by layer?

The network is borrowed, not owned: it is neither copied nor registered nor changed. It runs up to the deepest layer
that is asked for and no further.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from restoreloss.frozen import bare
from restoreloss.images import check_range

Images: TypeAlias = Tensor | Sequence[Tensor]
"""Float (N, C, H, W), or a list of (C, H, W) for networks that take lists (torchvision's detectors)."""
Normalize: TypeAlias = Any
"""How images in [0, 1] are normalised for the network; see :class:`FeatureExtractor`."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class FeatureExtractor:
    """The outputs of named layers of a network, by name.

    Args:
        network: any module. Wrappers of DDP, DataParallel and ``torch.compile`` are looked through.
        layers: names as in ``network.named_modules()``; "" is the network itself. Of a layer that returns a mapping,
            list or tuple (a feature pyramid), "backbone" stands for all its tensors and "backbone/0" for one. Default:
            :func:`default_layers`. A layer that runs more than once in a pass is seen at its first run.
        normalize: "imagenet" | "model" (what a timm model states in its ``pretrained_cfg``) | torchvision weights
            (``ResNet18_Weights.DEFAULT``) | ((mean, ...), (std, ...)) | None. A torchvision detector normalises its own
            input: with "imagenet" or "model" it is left to.
        input_range: what the caller's images span.

    Raises:
        ValueError: At construction for a layer that the network does not have, naming those that come near, and for a
            normalisation that cannot be told. At a call for images that do not fit, a layer that did not run, and one
            that returned no tensor.

    Example:
        >>> from torchvision.models import resnet18
        >>> features = FeatureExtractor(resnet18(), ["layer3", "layer4"])
        >>> {name: tuple(value.shape) for name, value in features(torch.rand(2, 3, 64, 64)).items()}
        {'layer3': (2, 256, 4, 4), 'layer4': (2, 512, 2, 2)}

    The network runs as it is found: in its mode, with its gradients. Use :func:`restoreloss.frozen` around a call to
    keep it at rest. The pass itself is never compiled: hooks added later would be ignored by a compiled network.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        normalize: Normalize = "imagenet",
        input_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if not isinstance(network, nn.Module):
            raise ValueError(f"The network should be an nn.Module, found {type(network).__name__}.")
        if isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers or ()):
            raise ValueError(f"`layers` should be a list of names, found {layers!r}.")
        self.network = network
        self.layers = tuple(default_layers(bare(network)) if layers is None else layers)
        if not self.layers:
            raise ValueError("`layers` should name at least one layer, found none.")
        wholes = {layer for layer in self.layers if "/" not in layer}
        twice = [n for n in self.layers if self.layers.count(n) > 1 or ("/" in n and n.partition("/")[0] in wholes)]
        if twice:
            raise ValueError(f"`layers` should name every tensor once, found {twice} twice.")
        self.input_range = check_range(input_range)
        self._statistics = _statistics(bare(network), normalize)
        self._paths = _group_by_module(bare(network), self.layers)
        self._overwritten: set[str] = set()
        self._looking = False
        self._memo: dict[tuple[object, ...], tuple[tuple[Tensor, ...], dict[str, Tensor]]] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, images: Images) -> dict[str, Tensor]:
        """The features, in the order in which the layers are named; a container's tensors as "layer/key".

        Args:
            images: float (N, C, H, W) in ``input_range``, or a list of (C, H, W) for networks that take lists.
        """
        if self._memo is None:
            return self._run(images)
        parts = (images,) if isinstance(images, Tensor) else tuple(images)
        if any(part.is_inference() for part in parts):  # it would not show if they were changed
            return self._run(images)
        key = self._key(parts)
        if key not in self._memo:
            self._memo[key] = (parts, self._run(images))  # holding the images keeps their id theirs
        return self._memo[key][1]

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Within this block the network's own next forward pass, in full and in its own mode, leaves its features here.

        So that one pass serves a task loss and a loss on features. After the block the mapping holds them, as calling
        the extractor would return them; your images are then yours to normalise.

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
                # a copy where a later layer may write into it
                outputs[path] = {name: value.clone() for name, value in _tensors(path, call[-1]).items()}

        network = bare(self.network)
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
        if self._memo is not None:  # already within one
            yield
            return
        self._memo = {}
        try:
            yield
        finally:
            self._memo = None

    def _key(self, images: tuple[Tensor, ...]) -> tuple[object, ...]:
        """What the features depend on. A pass without gradient must not stand in for one that needs it."""
        network = bare(self.network)
        return (
            *((id(image), image._version) for image in images),
            torch.is_grad_enabled(),
            any(parameter.requires_grad for parameter in network.parameters()),
            sum(weight._version for weight in (*network.parameters(), *network.buffers()) if not weight.is_inference()),
            network.training,
        )

    def _run(self, images: Images) -> dict[str, Tensor]:
        network = bare(self.network)
        prepared = self._prepare(images, network)
        outputs: dict[str, Any] = {}
        versions: dict[str, list[int]] = {}

        def record(path: str, *call: Any) -> None:
            if path in outputs:
                return
            found = _tensors(path, call[-1])
            last = len(outputs) + 1 == len(self._paths)
            # a pass in train mode cannot be repeated, and inference tensors do not tell that they were overwritten
            keeps = not last and (path in self._overwritten or network.training or torch.is_inference_mode_enabled())
            outputs[path] = found = {name: value.clone() if keeps else value for name, value in found.items()}
            versions[path] = [_version(value) for value in found.values()]
            if last:
                raise _Reached

        with ExitStack() as stack:
            for path in self._paths:
                handle = network.get_submodule(path).register_forward_hook(partial(record, path))
                stack.callback(handle.remove)
            stack.enter_context(_one_arithmetic())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(suppress(_Reached))
            stack.callback(setattr, self, "_looking", self._looking)
            self._looking = True
            network(prepared)
        self._check_ran(outputs)
        changed = {path for path in outputs if versions[path] != [_version(v) for v in outputs[path].values()]}
        if changed:  # by an in-place layer that follows, like VGG's ReLU: keep a copy, from now on
            self._overwritten |= changed
            return self._run(images)
        return self._chosen(outputs)

    def _check_ran(self, outputs: dict[str, Any]) -> None:
        silent = [path for path in self._paths if path not in outputs]
        if silent:
            raise ValueError(
                f"`layers` should be layers that run; the network did not call {silent} (or it is compiled and does "
                "not tell)."
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

    def _prepare(self, images: Images, network: nn.Module) -> Any:
        """The images as the network wants them: in [0, 1], normalised, in its dtype."""
        if not isinstance(images, Tensor):
            return [self._prepare(image[None], network)[0] for image in images]
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"The images should be float (N, C, H, W), or a list of (C, H, W), found {images.dtype} of "
                f"{tuple(images.shape)}."
            )
        weight = next((p for p in network.parameters() if p.is_floating_point()), images)
        if weight.device != images.device:
            raise ValueError(f"The images should be on the network's device {weight.device}, found {images.device}.")
        images = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        low, high = self.input_range
        if (low, high) != (0.0, 1.0):
            images = (images - low) / (high - low)
        if self._statistics is not None:
            mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in self._statistics)
            if images.shape[1] != mean.shape[1]:
                raise ValueError(
                    f"The images should have {mean.shape[1]} channels, as many as the normalisation, found "
                    f"{images.shape[1]}."
                )
            images = (images - mean) / std
        return images.to(weight.dtype)


def default_layers(network: nn.Module) -> tuple[str, ...]:
    """The last spatial features before the head: what a task is decided on.

    ===================================== =======================================
    torchvision and timm classifiers      the last stage before pooling ("layer4")
    torchvision DeepLabV3, FCN, LRASPP    the backbone's deepest output
    torchvision detectors                 the backbone's maps, "pool" excepted
    transformers                          the last hidden state below the head; of DETR, of its encoder
    ===================================== =======================================

    Raises:
        ValueError: For any other network.
    """
    children = dict(network.named_children())
    if "backbone" in children:
        backbone = children["backbone"]
        pyramid = getattr(getattr(backbone, "fpn", None), "inner_blocks", None)
        if isinstance(pyramid, nn.ModuleList):
            return tuple(f"backbone/{level}" for level in range(len(pyramid)))
        names = getattr(backbone, "return_layers", None)  # torchvision's IntermediateLayerGetter
        if names is not None:
            return (f"backbone/{'out' if 'out' in names.values() else list(names.values())[-1]}",)
        return ("backbone",)
    stages = getattr(network, "feature_info", None)  # timm
    if stages and hasattr(network, "pretrained_cfg"):
        return (stages[-1]["module"],)
    below = getattr(network, "base_model_prefix", "")  # transformers
    if below in children:
        parts = dict(children[below].named_children())
        return (f"{below}.encoder/last_hidden_state" if "decoder" in parts else f"{below}/last_hidden_state",)
    for name in _LAST_STAGES:
        if name in children:
            return (name,)
    raise ValueError(
        f"`layers` should name the layers of {type(network).__name__}, which has no known default; its children are "
        f"{list(children)}."
    )


# torchvision's names of the last stage before pooling, the telling ones first
_LAST_STAGES = (
    "layer4", "trunk_output", "Mixed_7c", "inception5b", "conv5", "features", "encoder", "blocks", "layers",
)  # fmt: skip


class _Reached(Exception):
    """All layers have been seen."""


@contextmanager
def _one_arithmetic() -> Iterator[None]:
    """Attention by the same kernels with and without gradient: torch's fast path for inference rounds otherwise."""
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
            near = difflib.get_close_matches(path, known, n=5, cutoff=0.4)
            candidates = near or [name for name, _ in network.named_children()]
            raise ValueError(
                f"`layers` should name modules of {type(network).__name__}, found {path!r}; there is "
                f"{', '.join(map(repr, candidates))} and more in `named_modules()`."
            )
    return tuple(paths)


def normalizes_itself(network: nn.Module) -> bool:
    """Whether this is a detector of torchvision."""
    return hasattr(getattr(network, "transform", None), "image_mean")


def _statistics(network: nn.Module, normalize: Normalize) -> tuple[Sequence[float], Sequence[float]] | None:
    """(mean, std) of images in [0, 1], or None."""
    by_itself = normalizes_itself(network)
    named = normalize if isinstance(normalize, str) else None
    if normalize is None or (by_itself and named in ("imagenet", "model")):
        return None
    if named == "imagenet":
        return IMAGENET
    if named == "model":
        config = getattr(network, "pretrained_cfg", None) or {}
        if "mean" not in config or "std" not in config:
            raise ValueError(
                f"`normalize` should be 'imagenet', (mean, std) or torchvision weights for {type(network).__name__}, "
                "which does not state its own; found 'model'."
            )
        return config["mean"], config["std"]
    if by_itself:
        raise ValueError(
            f"`normalize` should be None for {type(network).__name__}, whose `transform` normalises, found "
            f"{normalize!r}."
        )
    if hasattr(normalize, "transforms") and not isinstance(normalize, type):  # torchvision weights
        preset = normalize.transforms()
        if not hasattr(preset, "mean"):
            raise ValueError(f"`normalize` should be weights that state their mean and std, found {normalize}.")
        return preset.mean, preset.std
    try:
        mean, std = (tuple(float(value) for value in values) for values in normalize)
    except (TypeError, ValueError):
        raise ValueError(
            "`normalize` should be 'imagenet', 'model', None, torchvision weights or ((mean, ...), (std, ...)), found "
            f"{normalize!r}."
        ) from None
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ValueError(f"`normalize` should have as many positive std as mean, found {normalize!r}.")
    return mean, std
