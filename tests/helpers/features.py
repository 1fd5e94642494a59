"""Small networks for the tests of FeatureExtractor."""

import functools
from collections import OrderedDict, namedtuple

import timm
import torch
from torch import nn
from torchvision import models
from torchvision.models import detection, segmentation

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def images(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape or (2, 3, 32, 32), generator=generator, dtype=torch.float64).to(dtype)


def normalised(batch, statistics=IMAGENET, network=None):
    """By the statistics, or by those that a network states."""
    if hasattr(network, "pretrained_cfg"):
        statistics = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    mean, std = (torch.tensor(values, dtype=batch.dtype).view(-1, 1, 1) for values in statistics)
    return (batch - mean) / std


def copied(output):
    """A copy, and flat names, of whatever a layer returned."""
    if isinstance(output, torch.Tensor):
        return {"": output.clone()}
    items = output.items() if isinstance(output, dict) else enumerate(output)
    return {f"/{key}{name}": value for key, item in items for name, value in copied(item).items()}


def seen_in_a_full_pass(network, paths, inputs):
    """What plain forward hooks see at the first run of each layer, copied before anything can overwrite it."""
    seen = {}

    def see(path, module, args, output):
        seen.setdefault(path, copied(output))

    handles = [network.get_submodule(path).register_forward_hook(functools.partial(see, path)) for path in paths]
    with torch.no_grad():
        network(inputs)
    for handle in handles:
        handle.remove()
    return {path + name: value for path in paths for name, value in seen[path].items()}


def count_calls(module):
    """A list that grows by True (with gradient) or False at each call of a module."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


def vgg11_without_its_classifier():
    with torch.device("meta"):
        network = models.vgg11(init_weights=False)  # 500 MB of classifier
    network.classifier = nn.Flatten()
    network.to_empty(device="cpu")
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, std=0.05) if name.endswith("weight") else nn.init.zeros_(parameter)
    return network


def mobilenet_detector():
    return detection.fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=32, max_size=48
    )


def mobilenet_segmenter(**options):
    return segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, **options)


def small_timm_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2)


def small_timm_convnext():
    return timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))


# network, its default layers, and layers of all kinds: overwritten in place, deep inside, of a head, containers
REAL = {
    "resnet18": (
        models.resnet18,
        {"layer4": (2, 512, 1, 1)},
        ["conv1", "bn1", "layer2.0.bn1", "layer3", "layer1.1", "avgpool", "fc"],
    ),
    "vgg11": (
        vgg11_without_its_classifier,
        {"features": (2, 512, 1, 1)},
        ["features.0", "features.3", "features.4", "features.18", "features.20"],
    ),
    "mobilenet_v3_small": (
        models.mobilenet_v3_small,
        {"features": (2, 576, 1, 1)},
        ["features.0", "features.0.1", "features.1.block.0.1", "features.4.block.2", "features.12", "classifier.0"],
    ),
    "deeplabv3_mobilenet_v3_large": (
        mobilenet_segmenter,
        {"backbone/out": (2, 960, 2, 2)},
        ["backbone", "backbone.4", "classifier.0.convs.1", "classifier"],
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": (
        mobilenet_detector,
        {"backbone/0": (2, 256, 1, 1), "backbone/1": (2, 256, 1, 1)},
        # the head of the RPN runs at every level
        ["backbone", "backbone.body", "backbone.body.4.block.0.1", "rpn.head.conv", "rpn.head"],
    ),
    "timm resnet": (
        lambda: timm.create_model("resnet10t"),
        {"layer4": (2, 512, 1, 1)},
        ["act1", "layer1.0.bn1", "layer3", "global_pool"],
    ),
    "timm convnext": (
        small_timm_convnext,
        {"stages.3": (2, 32, 1, 1)},
        ["stem", "stages.0", "stages.2.blocks.1.mlp.fc1", "head.norm"],
    ),
    "timm vit": (
        small_timm_vit,
        {"blocks.2": (2, 5, 32)},
        ["patch_embed", "blocks.0.attn", "blocks.1", "norm"],
    ),
}


@functools.cache
def real(name):
    """One of the networks above, at rest; to be left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return REAL[name][0]().eval()


# where the pass stops


class Forbidden(nn.Module):
    def forward(self, x):
        raise AssertionError("nothing that was asked for is behind this layer")


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


# what layers return

Pair = namedtuple("Pair", ["low", "high"])


class Returns(nn.Module):
    """A network whose backbone returns what a function makes of the image."""

    def __init__(self, make):
        super().__init__()
        self.backbone = Made(make)

    def forward(self, x):
        self.backbone(x + 0)
        return x


class Made(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


CONTAINERS = {
    "tensor": (lambda x: x, {"": 1}),
    "dict": (lambda x: {"low": x, "high": 2 * x}, {"/low": 1, "/high": 2}),
    "ordered dict": (lambda x: OrderedDict([("1", 2 * x), ("0", x)]), {"/1": 2, "/0": 1}),
    "keys that are no strings": (lambda x: {0: x, (1, 2): 2 * x}, {"/0": 1, "/(1, 2)": 2}),
    "list": (lambda x: [x, 2 * x], {"/0": 1, "/1": 2}),
    "tuple": (lambda x: (x, 2 * x, 3 * x), {"/0": 1, "/1": 2, "/2": 3}),
    "named tuple": (lambda x: Pair(x, 2 * x), {"/0": 1, "/1": 2}),
    "nested": (
        lambda x: {"maps": [x, (2 * x, {"deep": 3 * x})], "last": 4 * x},
        {"/maps/0": 1, "/maps/1/0": 2, "/maps/1/1/deep": 3, "/last": 4},
    ),
    "what is no image left out": (
        lambda x: {"a": x, "none": None, "index": x.long(), "text": "text", "b": [x > 0, 2 * x], "empty": []},
        {"/a": 1, "/b/1": 2},
    ),
}


# lists of images


class TakesLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.sizes, self.stack = [], nn.Flatten()

    def forward(self, batch):
        assert isinstance(batch, list)
        self.sizes = [tuple(image.shape) for image in batch]
        return self.stack(torch.stack([image.mean(dim=(1, 2)) for image in batch]))


# what is refused


def sequential():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
