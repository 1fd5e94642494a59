"""FeatureExtractor: how images are normalized, lists of images, and what is refused."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.transforms._presets import ImageClassification

from restoreloss import FeatureExtractor
from tests.helpers.features import (
    CONTAINERS,
    IMAGENET,
    Pair,
    Returns,
    TakesLists,
    images,
    normalised,
    real,
    seen_in_a_full_pass,
    sequential,
)
from tests.helpers.networks import live_detector

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


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["layer5"], r"modules of ResNet, found 'layer5'; there is .*'layer4'"),
        (["layer4", "layr2.0.conv1"], r"found 'layr2.0.conv1'; there is .*'layer2.0.conv1'"),
        (["layer5/0"], r"found 'layer5'; there is .*'layer4'"),
        (["zzz"], r"found 'zzz'; there is 'conv1', 'bn1'.* and more"),
        (4, "`layers` should be a name or a list of names, found 4"),
        (nn.Sequential(nn.ReLU()), "`layers` should be a name or a list of names, found a Sequential"),
        (["0", nn.ReLU()], r"found \['0', a ReLU\]"),
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


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.sub_(0.5))


@pytest.mark.parametrize("normalize", [None, lambda images: images.mul_(2)], ids=["network", "normalize"])
def test_what_changes_its_input_in_place_does_not_change_the_images(normalize: Any) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    network = InPlace()
    seen = FeatureExtractor(network, ["layer"], normalize=normalize)(images)["layer"]
    assert torch.equal(images, before)
    torch.testing.assert_close(seen, network.layer((before if normalize is None else 2 * before) - 0.5))


@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning", "ignore:.*jit:DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(ValueError, match="`network` should be the Python module, found TorchScript"):
        FeatureExtractor(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), ["0"])
