import copy
import functools
import pickle
import warnings
from collections import OrderedDict, namedtuple

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import models
from torchvision.models import detection, segmentation
from torchvision.transforms._presets import ImageClassification

from restoreloss import FeatureExtractor, frozen
from restoreloss.default_layers import default_layers
from restoreloss.frozen import bare
from tests.helpers.networks import live_detector, live_recogniser

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


@pytest.mark.parametrize("name", REAL)
def test_features_are_what_plain_hooks_on_the_full_network_see(name):
    network, layers, batch = real(name), REAL[name][2], images()
    expected = seen_in_a_full_pass(network, layers, batch if "rcnn" in name else normalised(batch, network=network))
    features = FeatureExtractor(network, layers)
    for _ in range(2):  # the first call finds out what is overwritten
        found = features(batch)
        assert list(found) == list(expected)
        for layer, value in found.items():
            assert value.isfinite().all()
            assert value.std() > 0
            torch.testing.assert_close(value, expected[layer])


@pytest.mark.parametrize("name", REAL)
def test_default_layers_are_the_last_spatial_features(name):
    network, layers = real(name), REAL[name][1]
    assert default_layers(network) == tuple(layers)
    found = FeatureExtractor(network)(images())
    assert {layer: tuple(value.shape) for layer, value in found.items()} == layers
    paths = list(dict.fromkeys(layer.partition("/")[0] for layer in layers))
    expected = seen_in_a_full_pass(
        network, paths, images() if "rcnn" in name else normalised(images(), network=network)
    )
    for layer, value in found.items():
        torch.testing.assert_close(value, expected[layer])


DEFAULTS = {
    "resnet50": "layer4",
    "resnext50_32x4d": "layer4",
    "wide_resnet50_2": "layer4",
    "vgg16_bn": "features",
    "alexnet": "features",
    "squeezenet1_1": "features",
    "densenet121": "features",
    "mobilenet_v2": "features",
    "mobilenet_v3_large": "features",
    "efficientnet_b0": "features",
    "convnext_tiny": "features",
    "swin_t": "features",
    "regnet_y_400mf": "trunk_output",
    "shufflenet_v2_x0_5": "conv5",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "vit_b_16": "encoder",
    "fcn_resnet50": "backbone/out",
    "lraspp_mobilenet_v3_large": "backbone/high",
    "fasterrcnn_resnet50_fpn": "backbone/0 backbone/1 backbone/2 backbone/3",
    "retinanet_resnet50_fpn": "backbone/0 backbone/1 backbone/2",
    "ssdlite320_mobilenet_v3_large": "backbone",
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_layers_of_torchvision(name):
    options = {"weights_backbone": None} if "backbone" in DEFAULTS[name] else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # where its widths are computed
        network = models.get_model(name, weights=None, **options)
    assert " ".join(default_layers(network)) == DEFAULTS[name]


def test_a_network_without_known_default_is_refused_with_its_children():
    with pytest.raises(ValueError, match=r"`layers`.*Recogniser.*\['stem', 'stage', 'head'\]"):
        FeatureExtractor(live_recogniser())


def test_default_layers_look_through_wrappers():
    assert FeatureExtractor(nn.DataParallel(real("resnet18"))).layers == ("layer4",)


# what is overwritten in place


def overwriting(*later):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), *later).eval()


@pytest.mark.parametrize("later", [(), (nn.Hardswish(inplace=True), nn.Identity())], ids=["stops there", "goes on"])
def test_an_overwritten_layer_is_seen_with_its_own_value_and_gradient(later):
    network, batch = overwriting(*later), images(1, 3, 6, 6).requires_grad_()
    layers = dict.fromkeys(["0", "2", str(len(network) - 1)])
    features = FeatureExtractor(network, list(layers), normalize=None)
    expected = network[0](batch)
    assert (expected < 0).any()
    (gradient,) = torch.autograd.grad(expected.square().sum(), batch)
    for _ in range(2):
        found = features(batch)
        assert torch.equal(found["0"], expected)
        assert torch.equal(found["2"], network[2](expected.relu()))
        torch.testing.assert_close(torch.autograd.grad(found["0"].square().sum(), batch)[0], gradient)


def test_an_overwritten_layer_costs_a_second_pass_only_once():
    network = overwriting()
    calls = count_calls(network)
    features = FeatureExtractor(network, ["0", "2"], normalize=None)
    for _ in range(3):
        features(images(1, 3, 6, 6))
    assert len(calls) == 2 + 1 + 1


def test_a_network_in_train_mode_runs_once():
    network, batch = overwriting().train(), images(1, 3, 6, 6)
    calls = count_calls(network)
    assert torch.equal(FeatureExtractor(network, ["0", "2"], normalize=None)(batch)["0"], network[0](batch))
    assert len(calls) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_features_may_be_changed_by_whoever_asked_for_them(mode):
    network = overwriting()
    features, batch = FeatureExtractor(network, ["0", "2"], normalize=None), images(1, 3, 6, 6)
    with mode():
        expected = {name: value.clone() for name, value in features(batch).items()}
        for value in features(batch).values():
            value.zero_()
        assert all(torch.equal(value, expected[name]) for name, value in features(batch).items())


def test_an_overwritten_layer_is_seen_with_its_own_value_in_inference_mode():
    network, batch = overwriting(), images(1, 3, 6, 6)
    expected = network[0](batch)
    with torch.inference_mode():
        found = FeatureExtractor(network, ["0", "2"], normalize=None)(batch)["0"]
        assert torch.equal(found, expected)


def test_an_overwritten_layer_moves_batch_norm_once():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Identity()).train()
    FeatureExtractor(network, ["0", "2"], normalize=None)(images())
    assert network[0].num_batches_tracked == 1


# where the pass stops


class Forbidden(nn.Module):
    def forward(self, x):
        raise AssertionError("nothing that was asked for is behind this layer")


@pytest.mark.parametrize("layers", [["1"], ["0", "1"], ["1", "0"], ["0"]], ids=str)
def test_the_pass_stops_behind_the_deepest_layer(layers):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), Forbidden(), nn.Tanh())
    calls = [count_calls(part) for part in network]
    found = FeatureExtractor(network, layers, normalize=None)(images())
    assert list(found) == layers
    assert [len(each) for each in calls] == [1, int("1" in layers), 0, 0]


def test_the_pass_stops_inside_a_network_within_the_network():
    network = nn.Sequential(nn.Sequential(nn.Tanh(), nn.Sequential(nn.Tanh(), Forbidden()), Forbidden()), Forbidden())
    found = FeatureExtractor(network, ["0.1.0"], normalize=None)(images())
    assert torch.equal(found["0.1.0"], images().tanh().tanh())


def test_the_network_itself_is_a_layer():
    network = live_recogniser().eval()
    found = FeatureExtractor(network, ["", "stem.0"])(images())
    assert list(found) == ["", "stem.0"]
    torch.testing.assert_close(found[""], network(normalised(images())))


class Twice(nn.Module):
    def __init__(self, last=None):
        super().__init__()
        self.twice, self.square, self.last = Scale(2), Square(), last or nn.Identity()

    def forward(self, x):
        return self.last(self.twice(self.square(self.twice(x))))


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Square(nn.Module):
    def forward(self, x):
        return x.square()


def test_a_layer_that_runs_twice_is_seen_at_its_first_run():
    x = images()
    assert torch.equal(FeatureExtractor(Twice(Forbidden()), ["twice"], normalize=None)(x)["twice"], 2 * x)
    found = FeatureExtractor(Twice(), ["last", "twice", "square"], normalize=None)(x)
    for name, expected in {"last": 8 * x**2, "twice": 2 * x, "square": 4 * x**2}.items():
        torch.testing.assert_close(found[name], expected)


def test_the_callers_hooks_stay_and_count():
    network, x = nn.Sequential(Scale(2), Scale(3), nn.Identity()), images()
    network[0].register_forward_hook(lambda _, __, output: output + 1)
    features = FeatureExtractor(network, ["0", "1"], normalize=None)
    found = features(x)
    torch.testing.assert_close(found["0"], 2 * x + 1)
    torch.testing.assert_close(found["1"], 3 * (2 * x + 1))
    assert [len(part._forward_hooks) for part in network.modules()] == [0, 1, 0, 0]


def test_no_hook_is_left_behind_when_the_network_raises():
    network = nn.Sequential(nn.Identity(), Forbidden(), nn.Identity())
    features = FeatureExtractor(network, ["0", "2"], normalize=None)
    with pytest.raises(AssertionError, match="nothing that was asked for"):
        features(images())
    assert not any(part._forward_hooks for part in network.modules())


def test_no_hook_is_left_behind_when_a_layer_is_gone():
    network = nn.Sequential(nn.Identity(), nn.Identity())
    features = FeatureExtractor(network, ["0", "1"], normalize=None)
    del network[1]
    with pytest.raises((ValueError, AttributeError)):
        features(images())
    assert not network[0]._forward_hooks


@pytest.mark.parametrize("caught", [False, True])
def test_a_network_that_catches_exceptions_is_seen_all_the_same(caught):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.risky = Scale(2)

        def forward(self, x):
            try:
                return self.risky(x)
            except Exception:
                if not caught:
                    raise
                return x

    assert torch.equal(FeatureExtractor(Careful(), ["risky"], normalize=None)(images())["risky"], 2 * images())


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


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_give_all_their_tensors_by_name(kind):
    make, expected = CONTAINERS[kind]
    found = FeatureExtractor(Returns(make), ["backbone"], normalize=None)(images())
    assert list(found) == [f"backbone{name}" for name in expected]
    for name, factor in expected.items():
        torch.testing.assert_close(found[f"backbone{name}"], factor * images())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["backbone/last"], {"/last": 4}),
        (["backbone/maps"], {"/maps/0": 1, "/maps/1/0": 2, "/maps/1/1/deep": 3}),
        (["backbone/maps/1"], {"/maps/1/0": 2, "/maps/1/1/deep": 3}),
        (["backbone/last", "backbone/maps/1/1/deep"], {"/last": 4, "/maps/1/1/deep": 3}),
    ],
    ids=str,
)
def test_containers_give_those_of_their_tensors_that_are_named(layers, expected):
    network = Returns(CONTAINERS["nested"][0])
    calls = count_calls(network.backbone)
    found = FeatureExtractor(network, layers, normalize=None)(images())
    assert list(found) == [f"backbone{name}" for name in expected]
    for name, factor in expected.items():
        torch.testing.assert_close(found[f"backbone{name}"], factor * images())
    assert len(calls) == 1


def test_a_key_does_not_stand_for_those_that_begin_like_it():
    network = Returns(lambda x: [k * x for k in range(12)])
    assert list(FeatureExtractor(network, ["backbone/1"], normalize=None)(images())) == ["backbone/1"]


# how images are normalised


def as_the_network_sees_them(batch, network=None, **options):
    return FeatureExtractor(network or nn.Identity(), [""], **options)(batch)[""]


def by_hand(batch, mean, std, low=0.0, high=1.0):
    """In Python, element by element."""
    rows = [
        [[((v - low) / (high - low) - mean[c]) / std[c] for v in plane] for c, plane in enumerate(image)]
        for image in batch.double().flatten(2).tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(batch.shape)


class Stated(nn.Identity):
    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


preset = functools.partial(ImageClassification, crop_size=8, mean=(0.3, 0.2, 0.1), std=(0.6, 0.5, 0.4))
NORMALISATIONS = {
    "default": ({}, *IMAGENET),
    "imagenet": ({"normalize": "imagenet"}, *IMAGENET),
    "pair": ({"normalize": ((0.1, 0.5, 0.2), (0.5, 0.25, 2))}, (0.1, 0.5, 0.2), (0.5, 0.25, 2)),
    "lists": ({"normalize": [[0, 0, 0], [1, 2, 4]]}, (0, 0, 0), (1, 2, 4)),
    "tensors": ({"normalize": torch.tensor([[0.5, 0.25, 0], [1, 2, 4]])}, (0.5, 0.25, 0), (1, 2, 4)),
    "torchvision": ({"normalize": models.ResNet18_Weights.DEFAULT}, *IMAGENET),
    "other torchvision": (
        {"normalize": models.Weights(url="", transforms=preset, meta={})},
        (0.3, 0.2, 0.1),
        (0.6, 0.5, 0.4),
    ),
    "model": ({"normalize": "model", "network": Stated()}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    "what the model states": ({"network": Stated()}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    "imagenet although the model states another": ({"normalize": "imagenet", "network": Stated()}, *IMAGENET),
    "none": ({"normalize": None}, (0, 0, 0), (1, 1, 1)),
}


@pytest.mark.parametrize("input_range", [(0, 1), (-1, 1), (0, 255), (-3.5, -1.25)], ids=str)
@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_images_are_normalised_as_by_hand(kind, input_range):
    options, mean, std = NORMALISATIONS[kind]
    low, high = input_range
    batch = low + (high - low) * (1.2 * images(2, 3, 2, 3, dtype=torch.float64) - 0.1)  # with overshoot
    found = as_the_network_sees_them(batch, input_range=input_range, **options)
    torch.testing.assert_close(found, by_hand(batch, mean, std, low, high), rtol=1e-12, atol=1e-12)


def test_a_timm_model_states_its_normalisation():
    network, batch = real("timm vit"), images()
    halves = ((0.5,) * 3, (0.5,) * 3)
    assert network.pretrained_cfg["mean"] == halves[0]
    for options in ({}, {"normalize": "model"}):
        found = FeatureExtractor(network, "patch_embed", **options)(batch)["patch_embed"]
        torch.testing.assert_close(found, network.patch_embed(normalised(batch, halves)))
    other = FeatureExtractor(network, "patch_embed", normalize="imagenet")(batch)["patch_embed"]
    assert not torch.allclose(found, other, atol=1e-2)


@pytest.mark.parametrize("normalize", ["imagenet", "model", None])
def test_a_detector_normalises_its_images_itself(normalize):
    network, batch = live_detector(size=12).eval(), images(2, 3, 12, 12)
    network.transform.image_mean, network.transform.image_std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    seen = []
    network.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for scale, input_range in ((1, (0, 1)), (255, (0, 255))):
        FeatureExtractor(network, normalize=normalize, input_range=input_range)(scale * batch)
        padded = seen.pop()[:, :, :12, :12]  # to a multiple of 32
        expected = by_hand(batch, network.transform.image_mean, network.transform.image_std)
        torch.testing.assert_close(padded, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [IMAGENET, models.ResNet18_Weights.DEFAULT], ids=["pair", "weights"])
def test_a_detector_is_not_normalised_twice(normalize):
    with pytest.raises(ValueError, match="`normalize` should be None for FasterRCNN"):
        FeatureExtractor(live_detector(), normalize=normalize)


def test_one_channel_needs_statistics_of_its_own():
    batch = images(2, 1, 2, 2, dtype=torch.float64)
    found = as_the_network_sees_them(batch, normalize=((0.25,), (0.5,)))
    torch.testing.assert_close(found, (batch - 0.25) / 0.5)


@pytest.mark.parametrize("image_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("network_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_images_come_in_the_dtype_of_the_network(image_dtype, network_dtype):
    batch = images(1, 3, 4, 4, dtype=image_dtype)
    network = nn.Sequential(nn.Identity(), nn.Conv2d(3, 2, 1)).to(network_dtype)
    found = FeatureExtractor(network, ["0", "1"])(batch)
    assert {value.dtype for value in found.values()} == {network_dtype}
    # an element of 2 loses 2**-8 in bfloat16, and once more
    tolerance = 3e-2 if torch.bfloat16 in (image_dtype, network_dtype) else 5e-3 if image_dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(found["0"].double(), by_hand(batch, *IMAGENET), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_are_normalised_in_single_precision(dtype):
    batch = images(1, 3, 4, 4, dtype=dtype)
    found = FeatureExtractor(nn.Sequential(nn.Identity(), nn.Conv2d(3, 2, 1)), ["0"])(batch)["0"]
    torch.testing.assert_close(found.double(), by_hand(batch, *IMAGENET), rtol=1e-5, atol=1e-5)


def test_a_network_without_parameters_sees_the_images_in_their_own_dtype():
    for dtype in (torch.float16, torch.float64):
        assert as_the_network_sees_them(images(1, 3, 2, 2, dtype=dtype)).dtype == dtype


def test_quantised_parameters_do_not_tell_the_dtype():
    network = nn.Sequential(nn.Identity(), nn.Conv2d(3, 2, 1))
    network.register_parameter("table", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    assert FeatureExtractor(network, ["0"])(images(1, 3, 2, 2))["0"].dtype == torch.float32


# lists of images


class TakesLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.sizes, self.stack = [], nn.Flatten()

    def forward(self, batch):
        assert isinstance(batch, list)
        self.sizes = [tuple(image.shape) for image in batch]
        return self.stack(torch.stack([image.mean(dim=(1, 2)) for image in batch]))


@pytest.mark.parametrize("container", [list, tuple])
def test_lists_are_normalised_image_by_image(container):
    batch = container(images(3, *size, dtype=torch.float64) for size in ((4, 4), (2, 6)))
    network = TakesLists()
    found = FeatureExtractor(network, ["stack"], input_range=(-1, 1))(batch)["stack"]
    expected = torch.stack([by_hand(image[None], *IMAGENET, -1, 1)[0].mean(dim=(1, 2)) for image in batch])
    assert network.sizes == [(3, 4, 4), (3, 2, 6)]
    torch.testing.assert_close(found, expected)


def test_a_detector_takes_lists_of_unequal_images():
    network, batch = real("fasterrcnn_mobilenet_v3_large_fpn"), [images(3, 32, 40), images(3, 24, 20)]
    found = FeatureExtractor(network)(batch)
    expected = seen_in_a_full_pass(network, ["backbone"], batch)
    for name, value in found.items():
        assert value.shape[0] == 2
        torch.testing.assert_close(value, expected[name])


def test_a_detector_sees_a_batch_as_the_list_of_its_images():
    features, batch = FeatureExtractor(live_detector().eval()), images(2, 3, 20, 16)
    one, other = features(batch), features(list(batch))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# what is refused


def sequential():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["layer5"], r"modules of ResNet, found 'layer5'; there is .*'layer4'"),
        (["layer4", "layr2.0.conv1"], r"found 'layr2.0.conv1'; there is .*'layer2.0.conv1'"),
        (["layer5/0"], r"found 'layer5'; there is .*'layer4'"),
        (["zzz"], r"found 'zzz'; there is 'conv1', 'bn1'.* and more"),
        (4, "`layers` should be a name or a list of names, found 4"),
        ([], "at least one layer, found none"),
        ((), "at least one layer, found none"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_are_refused_when_the_extractor_is_made(layers, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(real("resnet18"), layers)


KINDS = {"function": lambda x: x, "name": "resnet18", "none": None, "class": nn.Linear}


@pytest.mark.parametrize("network", KINDS.values(), ids=KINDS)
def test_what_is_no_module_is_refused(network):
    with pytest.raises(
        ValueError, match="`network` should be an nn.Module, found (the function|'resnet18'|None|the class)"
    ):
        FeatureExtractor(network, ["0"])


@pytest.mark.parametrize(
    "make", [lambda x: None, lambda x: "text", lambda x: {"a": 1, "b": [x > 0]}, lambda x: (), lambda x: Pair(None, 1)]
)
def test_a_layer_without_tensors_is_refused_with_what_it_returned(make):
    found = type(make(images())).__name__
    features = FeatureExtractor(Returns(make), ["backbone"], normalize=None)
    with pytest.raises(ValueError, match=f"Layer 'backbone' should return a floating-point tensor.*found {found}"):
        features(images())
    assert not any(part._forward_hooks for part in features.network.modules())


def test_a_tensor_that_a_layer_does_not_return_is_refused_with_those_it_does():
    with pytest.raises(
        ValueError, match=r"'backbone' returns, \['backbone/low', 'backbone/high'\], found 'backbone/7'"
    ):
        FeatureExtractor(Returns(CONTAINERS["dict"][0]), ["backbone/low", "backbone/7"], normalize=None)(images())


class WithAuxiliaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.aux_classifier = nn.Tanh(), nn.Tanh()

    def forward(self, x):
        x = self.body(x)
        return (x, self.aux_classifier(x)) if self.training else x


def test_a_layer_that_does_not_run_is_refused_by_name():
    network = WithAuxiliaryHead()
    features = FeatureExtractor(network, ["body", "aux_classifier"], normalize=None)
    assert list(features(images())) == ["body", "aux_classifier"]
    network.eval()
    with pytest.raises(ValueError, match=r"the network did not call \['aux_classifier'\]"):
        features(images())
    assert not any(part._forward_hooks for part in network.modules())


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        ("half", "'auto', 'model', 'imagenet', None, torchvision weights, .*, found 'half'"),
        ("model", "be 'imagenet', .* for Sequential, which does not state its own; found 'model'"),
        (0.5, "found 0.5"),
        ((0.5, 0.5), r"found \(0.5, 0.5\)"),
        (((0.5,) * 3,), "found"),
        (((0.5,) * 3, (0.5,) * 3, (0.5,) * 3), "found"),
        (((0.5, None, 0.5), (0.5,) * 3), "found"),
        (((0.5,) * 3, (0.5,)), "as many positive std as mean"),
        (((0.5,) * 3, (0.5, 0, 0.5)), "as many positive std as mean"),
        (((0.5,) * 3, (0.5, -1, 0.5)), "as many positive std as mean"),
        (((0.5,) * 3, (0.5, float("nan"), 0.5)), "as many positive std as mean"),
    ],
    ids=str,
)
def test_a_normalisation_that_cannot_be_told_is_refused(normalize, message):
    with pytest.raises(ValueError, match=f"`normalize` should .*{message}"):
        FeatureExtractor(sequential(), ["0"], normalize=normalize)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": models.ResNet18_Weights},  # .DEFAULT forgotten
        {"normalize": detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights.DEFAULT},  # which have no mean
        {"layers": [0]},
    ],
    ids=["class", "detector", "index"],
)
def test_near_misses_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        FeatureExtractor(sequential(), **{"layers": ["0"], **options})


@pytest.mark.parametrize("input_range", [(1, 0), (0, 0), (0, float("nan")), 255, "01x"], ids=str)
def test_a_range_that_does_not_rise_is_refused(input_range):
    with pytest.raises(ValueError, match="`input_range`"):
        FeatureExtractor(sequential(), ["0"], input_range=input_range)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels_that_do_not_fit_the_normalisation_are_refused(channels):
    with pytest.raises(ValueError, match=f"should have 3 channels, as many as the normalization, found {channels}"):
        FeatureExtractor(sequential(), ["0"])(images(2, channels, 4, 4))
    with pytest.raises(ValueError, match=f"should have 3 channels.*found {channels}"):
        FeatureExtractor(TakesLists(), ["stack"])([images(3, 4, 4), images(channels, 4, 4)])


def test_images_on_another_device_are_refused():
    with pytest.raises(ValueError, match="on the network's device cpu, found meta"):
        FeatureExtractor(sequential(), ["0"])(images().to("meta"))
    with pytest.raises(ValueError, match="on the network's device meta, found cpu"):
        FeatureExtractor(sequential().to("meta"), ["0"])(images())


def test_a_network_on_another_device_is_followed():
    network = sequential()
    features = FeatureExtractor(network, ["0"])
    network.to("meta")
    assert features(images().to("meta"))["0"].device.type == "meta"


@pytest.mark.parametrize("normalize", ["imagenet", None])
def test_integer_images_are_refused(normalize):
    batch = (255 * images()).to(torch.uint8)
    with pytest.raises(ValueError, match="float"):
        FeatureExtractor(sequential(), ["0"], normalize=normalize)(batch)


# a borrowed network: wrapped, compiled, trained


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "nothing": lambda network: network,
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "compiled": lambda network: torch.compile(network, backend="aot_eager"),
    "compiled DDP": lambda network: torch.compile(DistributedDataParallel(network), backend="aot_eager"),
    "DDP of compiled": lambda network: DistributedDataParallel(torch.compile(network, backend="aot_eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_looked_through(wrapper, process_group):
    network, batch = live_recogniser().eval(), images(2, 3, 8, 8)
    expected = FeatureExtractor(network, ["stem.1", "stage"])(batch)
    wrapped = WRAPPERS[wrapper](network)
    assert bare(wrapped) is network
    found = FeatureExtractor(wrapped, ["stem.1", "stage"])(batch)
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_bare_leaves_a_network_that_has_a_module_of_its_own():
    network = nn.Module()
    network.module = nn.Linear(1, 1)
    assert bare(network) is network


class CountingBackend:
    def __init__(self):
        self.compiled, self.run = 0, 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def forward(*args):
            self.run += 1
            return graph.forward(*args)

        return forward


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_tapped_and_stays_compiled(in_place):
    torch._dynamo.reset()
    network, batch = live_recogniser().eval(), images(2, 3, 8, 8)
    layers = ["stem.1", "stage"]
    expected = seen_in_a_full_pass(network, layers, normalised(batch))
    backend, compiled = CountingBackend(), network
    if in_place:
        network.compile(backend=backend)
    else:
        compiled = torch.compile(network, backend=backend)
    compiled(batch)
    before = backend.compiled, backend.run
    assert min(before) > 0
    features = FeatureExtractor(compiled, layers)
    for _ in range(2):
        found = features(batch)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert (backend.compiled, backend.run) == before
    compiled(batch)
    assert (backend.compiled, backend.run) == (before[0], 2 * before[1])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_network_compiled_ahead_of_time_is_tapped_after_it_ran(in_place):
    torch._dynamo.reset()
    network, batch = live_recogniser().eval(), images(2, 3, 8, 8)
    expected = seen_in_a_full_pass(network, ["stem.0"], normalised(batch))
    compiled = network if in_place else torch.compile(network, backend="aot_eager")
    if in_place:
        network.compile(backend="aot_eager")
    compiled(batch)
    assert torch.equal(FeatureExtractor(compiled, ["stem.0"])(batch)["stem.0"], expected["stem.0"])


def test_a_network_with_a_compiled_part_is_tapped():
    torch._dynamo.reset()
    network, x = nn.Sequential(nn.Sequential(Scale(2), Scale(3)), Scale(5), Forbidden()), images(1, 3, 4, 4)
    network[0].compile(backend="aot_eager")
    network[1] = torch.compile(network[1], backend="aot_eager")
    network[:2](x)
    found = FeatureExtractor(network, ["0.0", "0", "1"], normalize=None)(x)
    for name, factor in {"0.0": 2, "0": 6, "1": 30}.items():
        torch.testing.assert_close(found[name], factor * x)


def test_the_network_runs_as_it_is_found():
    network, batch = live_recogniser(), images(4, 3, 8, 8)
    features = FeatureExtractor(network, ["stem.0", "stage"])
    features(batch)["stage"].sum().backward()
    assert network.stem[0].weight.grad.abs().sum() > 0
    assert network.stem[1].num_batches_tracked == 1
    network.zero_grad()
    with frozen(network):
        found = features(batch)["stage"]
    assert not found.requires_grad
    assert network.stem[1].num_batches_tracked == 1
    assert torch.equal(found, network.eval().stage(network.stem(normalised(batch))))


def test_the_network_is_the_callers_own():
    network, batch = live_recogniser().eval(), images(2, 3, 8, 8)
    features = FeatureExtractor(network, ["stem.0"])
    before = features(batch)["stem.0"]
    with torch.no_grad():
        for parameter in network.stem[0].parameters():
            parameter.mul_(-2)
    torch.testing.assert_close(features(batch)["stem.0"], -2 * before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda features: pickle.loads(pickle.dumps(features))])
def test_copies_have_a_network_of_their_own(duplicate):
    network, batch = live_recogniser().eval(), images(2, 3, 8, 8)
    features = FeatureExtractor(network, ["stem.1", "stage"], normalize=((0.5,) * 3, (0.25,) * 3), input_range=(-1, 1))
    expected = features(batch)
    other = duplicate(features)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    found = other(batch)
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_features_are_seen_in_inference_mode():
    network, batch = live_recogniser().eval(), images(2, 3, 8, 8)
    features = FeatureExtractor(network, ["stem.0", "stage"])
    expected = features(batch)
    with torch.inference_mode():
        for x in (batch, batch.clone()):
            found = features(x)
            assert all(value.is_inference() and torch.equal(value, expected[name]) for name, value in found.items())
        made_in_inference_mode = batch.clone()
    found = features(made_in_inference_mode)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_seen_under_autocast(dtype):
    network, batch = live_recogniser().eval(), images(2, 3, 8, 8)
    features = FeatureExtractor(network, ["stem.0"])
    with torch.autocast("cpu", dtype):
        found = features(batch)["stem.0"]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), features(batch)["stem.0"], rtol=0.05, atol=0.05)


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureExtractor(real("resnet18"), ["layer2"])(images().requires_grad_())["layer2"].sum().backward()


# one pass for several


def counted():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh()).requires_grad_(False).eval()
    return FeatureExtractor(network, ["0", "1"], normalize=None), count_calls(network)


def test_within_shared_the_same_images_are_seen_once():
    features, calls = counted()
    one, other = images(1, 3, 4, 4).requires_grad_(), images(1, 3, 4, 4, seed=1)
    expected = features(one), features(other)
    calls.clear()
    with features.shared():
        for _ in range(3):
            for batch, values in zip((one, other), expected, strict=True):
                found = features(batch)
                assert list(found) == ["0", "1"]
                assert all(torch.equal(found[name], value) for name, value in values.items())
    assert len(calls) == 2
    features(one)
    features(one)
    assert len(calls) == 4


def test_within_shared_gradients_of_several_add_up():
    features, calls = counted()
    batch = images(1, 3, 4, 4).requires_grad_()
    (expected,) = torch.autograd.grad(features(batch)["0"].sum() + features(batch)["1"].square().sum(), batch)
    calls.clear()
    with features.shared():
        total = features(batch)["0"].sum() + features(batch)["1"].square().sum()
    total.backward()
    torch.testing.assert_close(batch.grad, expected)
    assert len(calls) == 1


def test_within_shared_changed_images_are_seen_again():
    features, calls = counted()
    batch = images(1, 3, 4, 4)
    with features.shared():
        features(batch)
        batch.add_(1)
        found = features(batch)["0"]
    assert torch.equal(found, features.network[0](batch))
    assert len(calls) == 2


def test_within_shared_changed_images_are_seen_again_in_inference_mode():
    features, _ = counted()
    with torch.inference_mode(), features.shared():
        batch = images(1, 3, 4, 4)
        features(batch)
        batch.add_(1)
        assert torch.equal(features(batch)["0"], features.network[0](batch))


def test_within_shared_equal_copies_are_seen_each():
    features, calls = counted()
    batch = images(1, 3, 4, 4)
    with features.shared():
        features(batch)
        features(batch.clone())
        features(batch[:])
    assert len(calls) == 3


def test_within_shared_a_pass_without_gradient_does_not_stand_in_for_one_with():
    features, calls = counted()
    batch = images(1, 3, 4, 4).requires_grad_()
    with features.shared():
        with torch.no_grad():
            assert not features(batch)["1"].requires_grad
        assert features(batch)["1"].requires_grad
        with torch.no_grad():
            assert not features(batch)["1"].requires_grad
    assert calls == [False, True]


def test_within_shared_a_pass_through_a_frozen_network_does_not_stand_in_for_one_that_trains():
    network, batch = live_recogniser(), images(2, 3, 8, 8)
    features = FeatureExtractor(network, ["stage"])
    calls = count_calls(network)
    with features.shared():
        with frozen(network):
            at_rest = features(batch)["stage"]
        network.eval()
        assert features(batch)["stage"].requires_grad
        network.requires_grad_(False).train()
        assert not torch.equal(features(batch)["stage"], at_rest)  # dropout, batch statistics
    assert not at_rest.requires_grad
    assert len(calls) == 3


def test_within_shared_images_that_are_gone_are_not_mistaken_for_others():
    features, calls = counted()
    with features.shared():
        for k in range(20):  # at the same address, were they not held
            batch = torch.full((1, 3, 2, 2), float(k))
            assert torch.equal(features(batch)["0"], features.network[0](batch))
            del batch
    assert len(calls) == 20


def test_within_shared_the_same_list_is_seen_once():
    network = TakesLists()
    features, calls = FeatureExtractor(network, ["stack"]), count_calls(network)
    batch = [images(3, 4, 4), images(3, 2, 2)]
    with features.shared():
        features(batch)
        features(list(batch))
        assert len(calls) == 1
        features(batch[::-1])
        features(batch[:1])
        assert len(calls) == 3
        batch[1].add_(1)
        features(batch)
        assert len(calls) == 4


def test_within_shared_a_list_with_other_images_is_seen_again():
    features = FeatureExtractor(TakesLists(), ["stack"], normalize=None)
    batch = [torch.zeros(3, 2, 2)]
    with features.shared():
        for k in range(20):
            batch.clear()
            batch.append(torch.full((3, 2, 2), float(k)))  # at the same address
            assert (features(batch)["stack"] == k).all()


def test_shared_blocks_nest_and_end_also_by_an_exception():
    features, calls = counted()
    batch = images(1, 3, 4, 4)
    with features.shared():
        features(batch)
        with features.shared():
            features(batch)
        features(batch)
        assert len(calls) == 1
        with pytest.raises(KeyError), features.shared():
            raise KeyError
        features(batch)
        assert len(calls) == 1
    with pytest.raises(KeyError), features.shared():
        raise KeyError(len(features(batch)))
    features(batch)
    features(batch)
    assert len(calls) == 4


# what the network sees in its own pass


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v3_small", "timm convnext", "timm vit"])
def test_a_recorded_pass_leaves_what_a_pass_for_its_own_sake_sees(name):
    network, layers, batch = real(name), REAL[name][2], images()
    features = FeatureExtractor(network, layers)
    with features.recording() as seen:
        output = network(normalised(batch, network=network))
    expected = features(batch)
    assert list(seen) == list(expected)
    assert all(torch.equal(seen[layer], value) for layer, value in expected.items())
    assert torch.equal(output, network(normalised(batch, network=network)))  # to its end, and undisturbed


@pytest.mark.parametrize("layers", [["backbone"], ["backbone/1", "rpn.head.conv"]])
def test_a_recorded_pass_leaves_named_tensors_of_a_container(layers):
    network, batch = real("fasterrcnn_mobilenet_v3_large_fpn"), images()
    features = FeatureExtractor(network, layers)
    with features.recording() as seen:
        network(list(batch))
    expected = features(batch)
    assert list(seen) == list(expected)
    assert all(torch.equal(seen[layer], value) for layer, value in expected.items())


def test_a_recorded_pass_is_in_the_mode_of_the_network_and_moves_it_once():
    network, plain, batch = live_recogniser(), live_recogniser(), images(4, 3, 8, 8)
    torch.manual_seed(0)
    expected = plain(batch)
    torch.manual_seed(0)
    with FeatureExtractor(network, ["stem.1", "stage"]).recording() as seen:
        found = network(batch)
    assert torch.equal(found, expected)  # dropout, batch statistics
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in network.state_dict().items())
    assert network.stem[1].num_batches_tracked == 1
    assert not torch.equal(seen["stem.1"], seen["stem.1"].relu())  # the ReLU behind it writes into it


def test_a_recorded_pass_carries_the_gradient_of_both():
    network, plain, batch = live_recogniser().eval(), live_recogniser().eval(), images(2, 3, 8, 8)
    with FeatureExtractor(network, ["stem.1", "stage"]).recording() as seen:
        logits = network(batch)
    (logits.sum() + seen["stage"].square().sum() + seen["stem.1"].square().sum()).backward()
    (plain(batch).sum() + plain.stage(plain.stem(batch)).square().sum()).backward()
    plain.stem[1](plain.stem[0](batch)).square().sum().backward()
    for (name, one), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_recorded_features_are_there_at_the_end_of_the_block():
    network, batch = sequential(), images(1, 3, 8, 8)
    with FeatureExtractor(network, ["0"]).recording() as seen:
        network(batch)
        assert not seen
    assert list(seen) == ["0"]


def test_the_first_of_several_passes_is_recorded():
    network, batch = nn.Sequential(Scale(2), Scale(3)), images(1, 3, 4, 4)
    with FeatureExtractor(network, ["1", "0"]).recording() as seen:
        network(batch)
        network(batch + 1)
    assert list(seen) == ["1", "0"]  # in the order in which they are named
    assert torch.equal(seen["0"], 2 * batch) and torch.equal(seen["1"], 6 * batch)


def test_recording_does_not_disturb_a_look_of_its_own():
    network, batch = nn.Sequential(Scale(2), Scale(3)), images(1, 3, 4, 4)
    features = FeatureExtractor(network, ["0"], normalize=None)
    with features.recording() as seen:
        assert torch.equal(features(batch)["0"], 2 * batch)
        network(3 * batch)
    assert torch.equal(seen["0"], 6 * batch)  # of the network's own pass
    with features.recording() as one, FeatureExtractor(network, ["1"]).recording() as other:
        network(batch)
    assert torch.equal(one["0"], 2 * batch) and torch.equal(other["1"], 6 * batch)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_recording_leaves_no_hook_behind(error):
    network = live_recogniser()
    features = FeatureExtractor(network, ["stem.1", "stage"])

    def hooks():
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules())

    with features.recording():
        assert hooks() == 2
        network(images(2, 3, 8, 8))
    assert hooks() == 0
    with pytest.raises(error), features.recording():
        raise error("out of memory, say")
    assert hooks() == 0
    with pytest.raises(ValueError, match=r"did not call \['stem.1', 'stage'\]"), features.recording():
        pass
    with pytest.raises(ValueError, match=r"did not call \['stage'\]"), features.recording():
        network.stem(images(2, 3, 8, 8))
    assert hooks() == 0


def test_recording_looks_through_wrappers_and_refuses_a_pass_that_does_not_tell():
    network, batch = nn.Sequential(Scale(2), Scale(3)), images(1, 3, 4, 4)
    with FeatureExtractor(nn.DataParallel(network), ["0"]).recording() as seen:
        network(batch)
    assert torch.equal(seen["0"], 2 * batch)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager")
    compiled(batch)  # hooks that come later are ignored
    with pytest.raises(ValueError, match="does not tell"), FeatureExtractor(compiled, ["0"]).recording():
        compiled(batch)


def test_recording_in_inference_mode_and_without_gradient():
    network, batch = live_recogniser().eval(), images(2, 3, 8, 8)
    features = FeatureExtractor(network, ["stem.1"])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), features.recording() as seen:
            network(normalised(batch))
        assert not seen["stem.1"].requires_grad
        assert torch.equal(seen["stem.1"], features(batch)["stem.1"])
