"""The task networks that the recipes train: those of the papers, classifiers of timm, and small ones."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from urllib.error import URLError

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from examples.common.data.tasks import Task
from examples.common.networks.own import own_network
from examples.common.networks.text_readers import EnglishG2, english_g2

logger = logging.getLogger(__name__)


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
    """Faster R-CNN of torchvision on :class:`SmallBackbone`, for images of about 48 pixels with a few objects."""
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


def recognizer(name: str, task: Task, num_classes: int, *, pretrained: bool = True, aux: bool = False) -> nn.Module:
    """A task network; those of torchvision and timm start from ImageNet where its weights can be had, and it says so.

    Args:
        name: "small" | "paper" (ResNet18, DeepLabV3 or Faster R-CNN on MobileNetV3) | "timm/NAME" for classifiers |
            "module:Class", called with ``num_classes``; "english_g2", with EasyOCR's weights, for reading.
        task: what it reads.
        num_classes: of detection and segmentation with the background.
        pretrained: False where other weights will follow.
        aux: DeepLabV3 with an auxiliary head.
    """
    if (name == "english_g2") != (task == "reading"):
        raise ValueError(f"`recognizer` should be 'english_g2' for reading and for nothing else, found {name!r}.")
    if name == "english_g2":
        return english_g2().requires_grad_(True) if pretrained else EnglishG2()
    if name == "small":
        builders: dict[str, Callable[[int], nn.Module]] = {
            "classification": SmallClassifier,
            "segmentation": SmallSegmenter,
            "detection": small_detector,
        }
        return builders[task](num_classes)
    if name == "paper":
        return _with_weights_if_possible(
            f"the {task} network", lambda weights: _of_the_paper(task, num_classes, weights, aux), pretrained
        )
    if ":" in name:
        return own_network(name, "recognizer", num_classes=num_classes)
    if name.startswith("timm/") and task == "classification":
        import timm

        if not timm.is_model(name.removeprefix("timm/")):
            raise ValueError(f"`recognizer` should be a model of timm, found {name!r}.")

        def build(weights: bool) -> nn.Module:
            network: nn.Module = timm.create_model(
                name.removeprefix("timm/"), pretrained=weights, num_classes=num_classes
            )
            return network

        return _with_weights_if_possible(name, build, pretrained)
    raise ValueError(
        f"`recognizer` should be 'small', 'paper', 'module:Class' or, for classification, 'timm/NAME', found {name!r}."
    )


def _of_the_paper(task: Task, num_classes: int, weights: bool, aux: bool) -> nn.Module:
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
        network = deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=backbone, num_classes=num_classes, aux_loss=aux
        )
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
