"""Which restoration and task networks do the recipes train?

The ones of the papers (EDSR, SwinIR; ResNet18, DeepLabV3 and Faster R-CNN on MobileNetV3), any that spandrel reads from
a file, any classifier of timm, and small ones that train on two cores.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from examples.common.data.tasks import Task
from examples.common.networks.restormer import Restormer
from restoreloss.objectives.sizes import pad_to
from restoreloss.weights import load_state, read_weights

logger = logging.getLogger(__name__)


class EDSR(nn.Module):
    """Residual blocks at low resolution, then PixelShuffle (Lim et al., "Enhanced Deep Residual Networks", baseline).

    Args:
        scale: 1, 2, 3, 4 or 8.
        features: channels of the body.
        blocks: residual blocks.
        light: enlarge by one PixelShuffle straight to the picture and add the bilinearly enlarged input: a small one
            is fast and need only learn the detail.
    """

    def __init__(self, scale: int, *, features: int = 64, blocks: int = 16, light: bool = False) -> None:
        super().__init__()
        factors = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}
        if scale not in factors:
            raise ValueError(f"`scale` should be one of {tuple(factors)}, found {scale}.")
        self.scale, self.light = scale, light
        self.head = nn.Conv2d(3, features, 3, padding=1)
        self.body = nn.Sequential(*(_ResidualBlock(features) for _ in range(blocks)))
        self.after_body = nn.Conv2d(features, features, 3, padding=1)
        if light:
            self.upsample = nn.Sequential(_enlarge(features, 3, scale))
            self.tail: nn.Module = nn.Identity()
        else:
            self.upsample = nn.Sequential(*(_enlarge(features, features, factor) for factor in factors[scale]))
            self.tail = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, 3, scale H, scale W)."""
        centred = image - 0.5
        features = self.head(centred)
        features = features + self.after_body(self.body(features))
        restored: Tensor = self.tail(self.upsample(features))
        base = F.interpolate(centred, scale_factor=float(self.scale), mode="bilinear") if self.light else 0
        return restored + base + 0.5


def _enlarge(inputs: int, outputs: int, factor: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs * factor**2, 3, padding=1), nn.PixelShuffle(factor))


class _ResidualBlock(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(self.conv1(x).relu())
        return x + residual


def restorer(name: str, scale: int, weights: Path | None = None, *, option: str = "restorer") -> nn.Module:
    """A restoration network that enlarges by ``scale``.

    Args:
        name: "edsr" | "edsr-small" | "swinir" | "swinir-light"; of scale 1 also "nafnet" | "nafnet-small" |
            "restormer" | "restormer-small" | "spandrel/NAME", an architecture of spandrel as it is by default; "file"
            for whatever spandrel finds in ``weights``.
        scale: of the super-resolution.
        weights: a state dict, or for "file" any checkpoint that spandrel reads.
        option: that the name was given as, for messages.

    Raises:
        ValueError: For an unknown name, and weights of another scale.
    """
    if name == "file":
        from spandrel import ImageModelDescriptor, ModelLoader

        if weights is None or not weights.is_file():
            raise ValueError(f"The restorer 'file' should be given a file of weights, found {weights}.")
        state = read_weights(weights)
        try:
            described = ModelLoader(device="cpu").load_from_state_dict(state)
        except Exception as error:  # each architecture has errors of its own
            cause = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{weights} should hold a network that spandrel knows, found one that begins with {list(state)[:3]}: "
                f"{type(error).__name__}: {cause}"
            ) from error
        if not isinstance(described, ImageModelDescriptor) or described.scale != scale:
            raise ValueError(f"{weights} should hold a network of scale {scale}, found {described}.")
        model: nn.Module = described.model
        return fit_sizes(model.requires_grad_(True), described.size_requirements, scale)
    if name.startswith("spandrel/"):
        network = _same_size(_of_spandrel, scale)(name.removeprefix("spandrel/"))
    elif name in _RESTORERS:
        network = _RESTORERS[name](scale)
    else:
        raise ValueError(f"`{option}` should be one of {(*_RESTORERS, 'file', 'spandrel/NAME')}, found {name!r}.")
    if weights is not None:
        load_weights(network, weights)
    return network


def _swinir(scale: int, **size: Any) -> nn.Module:
    from spandrel.architectures.SwinIR import SwinIR

    if scale == 1:  # nothing to enlarge: as in the paper's denoiser
        size["upsampler"] = ""
    network: nn.Module = SwinIR(upscale=scale, window_size=8, mlp_ratio=2, img_size=64, **size)
    return network


def _of_spandrel(name: str) -> nn.Module:
    """An architecture of spandrel by its name, with the sizes that it has there by default."""
    from importlib import import_module

    try:
        network: nn.Module = getattr(import_module(f"spandrel.architectures.{name}"), name)()
    except (ModuleNotFoundError, AttributeError, TypeError) as error:
        raise ValueError(
            "The restoration network should be an architecture of spandrel that needs no options, found "
            f"{name!r}: {error}."
        ) from error
    return fit_sizes(network, _requirements(network))


def _requirements(network: nn.Module) -> Any:
    """Which sizes spandrel says that one of its networks takes; None where it does not recognize it."""
    from spandrel import MAIN_REGISTRY

    try:
        return MAIN_REGISTRY.load(network.state_dict()).size_requirements
    except Exception as error:  # each architecture has errors of its own
        logger.info("spandrel does not say which sizes %s takes (%s)", type(network).__name__, error)
        return None


def fit_sizes(network: nn.Module, requirements: Any, scale: int = 1) -> nn.Module:
    """Let a network take images of any size: they are continued to a size that it takes, and its output is cut back.

    Its weights and their names stay as they are.

    Args:
        network: images (N, C, H, W) to images (N, C, scale H, scale W).
        requirements: spandrel's ``size_requirements`` of it, or None for a network that takes any size.
        scale: of the super-resolution.
    """
    if requirements is None or requirements.none:
        return network
    given: list[tuple[int, int]] = []

    def pad(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        image = arguments[0]
        height, width = image.shape[2:]
        right, below = requirements.get_padding(width, height)
        given[:] = [(height, width)]
        return (pad_to(image, (height + below, width + right)) if right or below else image,)

    def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        ((height, width),) = given
        return output[..., : height * scale, : width * scale]

    network.register_forward_pre_hook(pad)
    network.register_forward_hook(cut)
    return network


def nafnet(width: int, encoders: tuple[int, ...], middle: int, decoders: tuple[int, ...]) -> nn.Module:
    """NAFNet (Chen et al. 2022)."""
    from spandrel.architectures.NAFNet import NAFNet

    network: nn.Module = NAFNet(
        img_channel=3, width=width, enc_blk_nums=list(encoders), middle_blk_num=middle, dec_blk_nums=list(decoders)
    )
    return network


def _same_size(build: Callable[..., nn.Module], scale: int) -> Callable[..., nn.Module]:
    if scale != 1:
        raise ValueError(f"`scale` should be 1 for a {build.__name__}, which keeps the size, found {scale}.")
    return build


_RESTORERS: dict[str, Callable[[int], nn.Module]] = {
    "edsr": EDSR,
    "edsr-small": lambda scale: EDSR(scale, features=24, blocks=4, light=True),
    "swinir": lambda scale: _swinir(scale, embed_dim=180, depths=[6] * 6, num_heads=[6] * 6, upsampler="pixelshuffle"),
    "nafnet": lambda scale: _same_size(nafnet, scale)(64, (1, 1, 1, 28), 1, (1, 1, 1, 1)),
    "nafnet-small": lambda scale: _same_size(nafnet, scale)(16, (1, 1), 1, (1, 1)),
    "restormer": lambda scale: _same_size(Restormer, scale)(48, (4, 6, 6, 8), (1, 2, 4, 8)),
    "restormer-small": lambda scale: _same_size(Restormer, scale)(12),
    "swinir-light": lambda scale: _swinir(
        scale, embed_dim=60, depths=[6] * 4, num_heads=[6] * 4, upsampler="pixelshuffledirect"
    ),
}


class SmallBackbone(nn.Sequential):
    """A stem of stride 2 and three residual stages, two of them of stride 2: 3 channels to the last of ``widths``."""

    def __init__(
        self, widths: tuple[int, int, int, int] = (12, 16, 32, 48), strides: tuple[int, ...] = (1, 2, 2)
    ) -> None:
        stem, *stages = widths
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(nn.Conv2d(3, stem, 5, 2, 2, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True))
        )
        for number, (width, stride) in enumerate(zip(stages, strides, strict=True), start=1):
            layers[f"stage{number}"] = _BasicBlock(stem, width, stride)
            stem = width
        super().__init__(layers)
        self.out_channels = stem


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (self.residual(x) + self.shortcut(x)).relu()
        return result


class SmallClassifier(nn.Module):
    """57 thousand parameters: :class:`SmallBackbone`, global average, one linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = SmallBackbone()
        self.fc = nn.Linear(self.backbone.out_channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.fc(self.backbone(image).mean(dim=(2, 3)))
        return logits


class SmallSegmenter(nn.Module):
    """:class:`SmallBackbone` of stride 4, a 1x1 classifier, bilinear enlargement; returns {"out": logits}."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = SmallBackbone(strides=(1, 2, 1))
        self.classifier = nn.Conv2d(self.backbone.out_channels, num_classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) to logits (N, num_classes, H, W)."""
        logits = self.classifier(self.backbone(image))
        return {"out": F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=False)}


def small_detector(num_classes: int) -> FasterRCNN:
    """Faster R-CNN of torchvision on :class:`SmallBackbone`, for pictures of about 48 pixels with a few objects."""
    return FasterRCNN(
        SmallBackbone(),
        min_size=48,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(sizes=((16, 24, 32),), aspect_ratios=((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(featmap_names=["0"], output_size=5, sampling_ratio=2),
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(48 * 25, 64), nn.ReLU()),
        box_predictor=_BoxPredictor(64, num_classes),
        rpn_pre_nms_top_n_train=64,
        rpn_post_nms_top_n_train=32,
        rpn_pre_nms_top_n_test=64,
        rpn_post_nms_top_n_test=16,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=16,
        box_detections_per_img=5,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


class _BoxPredictor(nn.Module):
    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(inputs, num_classes)
        self.bbox_pred = nn.Linear(inputs, 4 * num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


def recogniser(name: str, task: Task, num_classes: int, *, pretrained: bool = True) -> nn.Module:
    """A task network; those of torchvision and timm start from ImageNet where its weights can be had, and it says so.

    Args:
        name: "small" | "paper" (ResNet18, DeepLabV3 or Faster R-CNN on MobileNetV3) | "timm/NAME" for classifiers.
        task: what it reads.
        num_classes: of detection and segmentation with the background.
        pretrained: False where other weights will follow.
    """
    if name == "small":
        builders: dict[str, Callable[[int], nn.Module]] = {
            "classification": SmallClassifier,
            "segmentation": SmallSegmenter,
            "detection": small_detector,
        }
        return builders[task](num_classes)
    if name == "paper":
        return _with_weights_if_possible(
            f"the {task} network", lambda weights: _of_the_paper(task, num_classes, weights), pretrained
        )
    if name.startswith("timm/") and task == "classification":
        import timm

        if not timm.is_model(name.removeprefix("timm/")):
            raise ValueError(f"`recogniser` should be a model of timm, found {name!r}.")

        def build(weights: bool) -> nn.Module:
            network: nn.Module = timm.create_model(
                name.removeprefix("timm/"), pretrained=weights, num_classes=num_classes
            )
            return network

        return _with_weights_if_possible(name, build, pretrained)
    raise ValueError(f"`recogniser` should be 'small', 'paper' or, for classification, 'timm/NAME', found {name!r}.")


def _of_the_paper(task: Task, num_classes: int, weights: bool) -> nn.Module:
    from torchvision.models import MobileNet_V3_Large_Weights, ResNet18_Weights, resnet18
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    if task == "classification":
        classifier: nn.Module = resnet18(weights=ResNet18_Weights.DEFAULT if weights else None)
        classifier.fc = nn.Linear(512, num_classes)
        return classifier
    backbone = MobileNet_V3_Large_Weights.DEFAULT if weights else None
    network: nn.Module
    if task == "segmentation":
        network = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=backbone, num_classes=num_classes)
        return network
    network = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=backbone, num_classes=num_classes)
    return network.requires_grad_(True)  # the whole backbone, whether or not it starts from weights


def _with_weights_if_possible(what: str, build: Callable[[bool], nn.Module], pretrained: bool) -> nn.Module:
    if not pretrained:
        return build(False)
    try:
        network = build(True)
    except (URLError, OSError, RuntimeError) as error:  # no network, no space, no such weights
        logger.warning("%s starts from scratch: its ImageNet weights cannot be had (%s)", what, error)
        return build(False)
    logger.info("%s starts from ImageNet weights", what)
    return network


def _freeze_norms(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Frozen normalisation where the weights come from it: torchvision's detectors have it if they began with ImageNet.

    Batch normalisation would load such weights without a word, and then count on.
    """
    for name, module in list(network.named_modules()):
        counts = f"{name}.num_batches_tracked" in state or f"{name}.running_mean" not in state
        if isinstance(module, nn.BatchNorm2d) and not counts:
            network.set_submodule(name, FrozenBatchNorm2d(module.num_features, eps=module.eps))


def load_weights(network: nn.Module, path: Path) -> None:
    """A file of weights, as :func:`restoreloss.weights.read_weights` reads it, into a network.

    An :class:`EDSR` also takes the files of other repositories, whose tensors have other names and the same order.

    Raises:
        ValueError: If the file is not there, cannot be read, or is of another network.
    """
    if not path.is_file():
        raise ValueError(f"The weights of {type(network).__name__} should be in {path}, found no such file.")
    state = read_weights(path)
    if isinstance(network, EDSR) and not set(state) <= set(network.state_dict()):
        state = _named_as_here(network, state, path)
    _freeze_norms(network, state)
    load_state(network, state, path)


def load_saved(network: nn.Module, path: Path) -> None:
    """The weights that ``RunDirectory.save_weights`` wrote, into a network that may share some between its parts.

    Raises:
        ValueError: If the file is not there, cannot be read, or is of another network.
    """
    what = f"{path} should hold the weights of this {type(network).__name__}"
    if not path.is_file():
        raise ValueError(f"{what}, found no such file.")
    try:
        _freeze_norms(network, load_file(path))
        load_model(network, path)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{what}, found {' '.join(str(error).split())[:300]}") from error


def _named_as_here(network: EDSR, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of an EDSR by the names that they have here, if there are as many, of the same shapes in order.

    Files of its authors' code also say which mean is subtracted from the input and by how much it is multiplied:
    biases are scaled and shifted to do the same. At the border, where padding is another gray, that is not exact.
    """
    shift = {name: value for name, value in state.items() if name.startswith(("sub_mean.", "add_mean."))}
    others, own = [value for name, value in state.items() if name not in shift], network.state_dict()
    if [value.shape for value in others] != [value.shape for value in own.values()] or len(shift) not in (0, 4):
        return state  # whose names say what is wrong
    state = dict(zip(own, others, strict=True))
    if not shift:
        logger.warning(
            "%s: read in its order, for the names are of another EDSR. How it scales its input is not in the file: "
            "here it is [0, 1] less 0.5. Where it was 255 times that (img_range=255), divide its biases by 255 first.",
            path,
        )
        return state
    mean = shift["add_mean.bias"].double()
    multiplied = 255.0 if float(mean.max()) > 1 else 1.0
    state = {name: value / multiplied if name.endswith("bias") else value for name, value in state.items()}
    offset = (0.5 - mean / multiplied).to(state["head.weight"])
    state["head.bias"] = state["head.bias"] + state["head.weight"].sum(dim=(2, 3)) @ offset
    state["tail.bias"] = state["tail.bias"] - offset
    logger.info("%s: read in its order as an EDSR whose input is %g times the image less its mean", path, multiplied)
    return state
