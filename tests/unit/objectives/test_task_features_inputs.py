"""TDPLoss: lists of images, refusals, ranges, and networks in every state."""

import copy
import math
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import densenet, vision_transformer

from restoreloss import FeatureExtractor, FeatureMatchingLoss, TDPLoss, WeightedSum, audit, frozen
from tests.helpers.networks import live_detector, live_recogniser
from tests.helpers.task_features import pair, stage, value_and_gradient

# lists of images


class PerImage(nn.Module):
    """Takes a list of images of any sizes, as detectors do, and means of each."""

    def __init__(self):
        super().__init__()
        self.pool = nn.Identity()

    def forward(self, images):
        return self.pool(torch.stack([image.square().mean(dim=(1, 2)) for image in images]))


def test_lists_of_unequal_images_are_compared_one_by_one():
    sizes = [(4, 4), (2, 6), (5, 1)]
    z, x = zip(*(pair((3, *size), seed=k, dtype=torch.float64) for k, size in enumerate(sizes)), strict=True)
    loss = TDPLoss(PerImage(), ["pool"], normalize=None, reduction="none")
    found = loss(list(z), tuple(x))
    for value, a, b in zip(found, z, x, strict=True):
        expected = (a.square().mean(dim=(1, 2)) - b.square().mean(dim=(1, 2))).abs().mean()
        torch.testing.assert_close(value, expected)


def test_detectors_take_lists_and_the_gradient_reaches_every_image():
    sizes = [(20, 14), (12, 24)]
    z, x = zip(*(pair((3, *size), seed=k) for k, size in enumerate(sizes)), strict=True)
    for image in z:
        image.requires_grad_()
    detector = live_detector()
    loss = TDPLoss(detector, reduction="none")
    values = loss(z, x)
    assert values.shape == (2,)
    values[0].backward(retain_graph=True)
    assert z[0].grad.abs().sum() > 0
    assert z[1].grad is None or not z[1].grad.any()
    values[1].backward()
    assert z[1].grad.abs().sum() > 0
    assert detector.training


def test_lists_of_equal_images_are_a_batch():
    z, x = pair((2, 3, 16, 16))
    loss = TDPLoss(live_detector())
    assert torch.equal(loss(list(z), list(x)), loss(z, x))


# what is refused


@pytest.mark.parametrize(
    ("restored", "target", "message"),
    [
        ([(3, 4, 4)], [(3, 4, 4), (3, 4, 4)], "`target` should be as many images as `restored`.*found 2 and 1"),
        ([], [], "at least 1, found 0 and 0"),
        (
            [(3, 4, 4), (3, 4, 4)],
            [(3, 4, 4), (3, 4, 5)],
            r"`target` should have the shape of `restored` \(1, 3, 4, 4\)",
        ),
        ([(1, 3, 4, 4)], [(1, 3, 4, 4)], "`restored` should have shape"),
        ((1, 3, 4, 4), [(3, 4, 4)], "`target` should be a tensor, found list"),
        ([(3, 4, 4)], (1, 3, 4, 4), "`restored` should be a tensor, found list"),
        ((3, 4, 4), (3, 4, 4), r"`restored` should have shape \(N, C, H, W\)"),
        ((2, 3, 4, 4), (1, 3, 4, 4), "`target` should have the shape of `restored`"),
        ((0, 3, 4, 4), (0, 3, 4, 4), "at least one image"),
        ((2, 1, 4, 4), (2, 1, 4, 4), "should have 3 channels"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused(restored, target, message):
    def build(shapes):
        return [torch.rand(shape) for shape in shapes] if isinstance(shapes, list) else torch.rand(shapes)

    with pytest.raises(ValueError, match=message):
        TDPLoss(PerImage(), ["pool"])(build(restored), build(target))


@pytest.mark.parametrize("wrong", ["restored", "target"])
@pytest.mark.parametrize(
    "kind", [torch.Tensor.long, torch.Tensor.double, lambda image: image.to("meta"), lambda _: None]
)
def test_images_of_another_kind_are_refused(wrong, kind):
    images = dict(zip(("restored", "target"), pair(), strict=True))
    images[wrong] = kind(images[wrong])
    with pytest.raises(ValueError, match="`(restored|target)` should"):
        TDPLoss(live_recogniser(), ["stage"])(**images)


def test_a_network_on_another_device_is_refused():
    with pytest.raises(ValueError, match="on the network's device meta, found cpu"):
        TDPLoss(live_recogniser().to("meta"), ["stage"])(*pair())


class Cropped(nn.Module):
    """What it returns depends on what it sees."""

    def __init__(self):
        super().__init__()
        self.crop = nn.Identity()

    def forward(self, images):
        return self.crop(images[..., : 2 + int(images.mean() > 0.5)])


def test_features_of_unequal_shape_are_refused_by_layer():
    dark, bright = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"Layer 'crop' .* one shape.*\(1, 3, 4, 3\) for `restored` and \(1, 3, 4, 2\) for `target`"
    ):
        TDPLoss(Cropped(), ["crop"], normalize=None)(bright, dark)


def test_features_that_only_the_target_has_are_refused_by_name():
    class Levelled(nn.Module):
        def forward(self, images):
            return [images + 0] * (1 + int(images.mean() > 0.5))

    network = nn.Sequential(Levelled())
    with pytest.raises(ValueError, match=r"Layer '0/1' .* found \(0, 3, 4, 4\) for `restored`"):
        TDPLoss(network, ["0"], normalize=None)(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "L1"}, "`distance` should be one of"),
        ({"reduction": "max"}, "`reduction` should be one of"),
        ({"layers": 3}, "`layers` should be a name or a list of names, found 3"),
        ({"layers": []}, "at least one layer"),
        ({"layers": ["stag"]}, "found 'stag'; there is 'stage'"),
        ({"layers": None}, "`layers` should name the layers of Recogniser"),
        ({"layer_weights": {"stem": 1.0}}, r"mapping of the layers \['stage', 'head'\], found \['stem'\]"),
        ({"layer_weights": {"stage": 1.0}}, r"mapping of the layers .*, found \['stage'\]"),
        ({"layer_weights": [1.0, 0.5]}, "mapping of the layers .*, found list"),
        ({"layer_weights": {"stage": -1.0, "head": 1}}, "at least 0|not all 0"),
        ({"layer_weights": {"stage": math.nan, "head": 1}}, "at least 0|not all 0"),
        ({"layer_weights": {"stage": math.inf, "head": 1}}, "at least 0|not all 0"),
        ({"layer_weights": {"stage": 0, "head": 0}}, "at least 0|not all 0"),
        ({"normalize": "model"}, "`normalize`"),
        ({"input_range": (1, 0)}, "`input_range`"),
    ],
    ids=str,
)
def test_bad_options_are_refused_when_the_loss_is_made(options, message):
    network = live_recogniser()
    with pytest.raises(ValueError, match=message):
        TDPLoss(network, **{"layers": ["stage", "head"], **options})
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_what_is_no_network_is_refused():
    with pytest.raises(ValueError, match="`task` should be a network or a FeatureExtractor, found the function"):
        TDPLoss(stage, ["stage"])


# ranges, and what is said about them


@pytest.mark.parametrize("input_range", [(-1, 1), (0, 255), (-0.5, 0.5)], ids=str)
def test_a_range_of_ones_own_changes_nothing(input_range):
    low, high = input_range
    network, (z, x) = live_recogniser().double(), pair(dtype=torch.float64)
    found = TDPLoss(network, ["stage"], input_range=input_range)(*(low + (high - low) * image for image in (z, x)))
    torch.testing.assert_close(found, TDPLoss(network, ["stage"])(z, x))


@pytest.mark.parametrize("as_list", [False, True])
def test_a_wrong_range_is_said_once(as_list):
    z, x = (list(255 * image) if as_list else 255 * image for image in pair())
    loss = TDPLoss(PerImage(), ["pool"])
    with pytest.warns(UserWarning, match=r"`target` spans \[.*\] while `input_range` says \(0, 1\)"):
        loss(z, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(z, x)
        loss.terms(x, z)


def test_overshoot_is_no_wrong_range():
    z, x = (1.2 * image - 0.1 for image in pair())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, gradient = value_and_gradient(TDPLoss(live_recogniser(), ["stage"], normalize="imagenet"), z, x)
    assert value.isfinite()
    assert gradient.isfinite().all()


# dead or alive


class Broken(TDPLoss):
    """The mistake that the paper's ablation is about: a term that is computed, logged, and teaches nothing."""

    def terms(self, restored, target):
        return super().terms(restored.detach(), target)


def test_audit_shows_the_loss_alive_and_a_detached_one_dead():
    network, (z, x) = live_recogniser(), pair()
    objectives = {"pixel": nn.L1Loss(), "tdp": TDPLoss(network, ["stage"]), "broken": Broken(network, ["stage"])}
    report = audit(objectives, z, x)
    alive, dead = report["tdp/stage"], report["broken/stage"]
    assert alive.value == dead.value > 0
    assert "DEAD" not in alive.flags
    assert alive.share > 0.01
    assert dead.flags == ("DEAD",)
    assert dead.gradient_norm == 0
    _, gradient = value_and_gradient(objectives["tdp"], z, x)
    assert alive.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_audit_takes_a_sum_on_a_shared_extractor_apart():
    network, (z, x) = live_recogniser(), pair()
    extractor = FeatureExtractor(network, ["stem.1", "stage"])
    report = audit(WeightedSum({"pixel": nn.L1Loss(), "one": TDPLoss(extractor), "two": TDPLoss(extractor)}), z, x)
    names = ["pixel", "one/stem.1", "one/stage", "two/stem.1", "two/stage"]
    assert [term.name for term in report.terms] == names
    assert not [term.name for term in report.terms if term.flags]
    assert network.training


def test_repr_tells_the_network_the_layers_and_their_weights():
    loss = TDPLoss(live_recogniser(), ["stem.0", "stage"], layer_weights={"stage": 2, "stem.0": 0.25}, distance="rms")
    assert repr(loss) == "TDPLoss(Recogniser: 0.25 * stem.0, 2 * stage, distance='rms')"


# networks that run differently with and without gradient


def small_torchvision_vit():
    network = vision_transformer.VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=4)
    nn.init.normal_(network.conv_proj.weight, std=0.2)
    return network, ["encoder"]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.patches, self.encoder = nn.Conv2d(3, 16, 4, 4), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images):
        return self.encoder(self.patches(images).flatten(2).mT)


ATTENTION = {
    "torchvision": small_torchvision_vit,
    "torch": lambda: (Encoder(), ["encoder"]),
    "timm": lambda: (
        timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2),
        ["blocks.1"],
    ),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_gives_zero_with_zero_gradient_on_equals(kind):
    torch.manual_seed(0)
    network, layers = ATTENTION[kind]()
    size = 32 if kind == "timm" else 16
    z, x = pair((2, 3, size, size))
    loss = TDPLoss(network, layers)
    assert loss(z, x) > 0.01
    value, gradient = value_and_gradient(loss, z, z)
    assert value == 0
    assert not gradient.any()


def test_a_layer_without_gradient_is_refused():
    z, x = pair()
    for make in (lambda: checkpointed(True, "middle"), lambda: checkpointed(True, "middle.0")):
        network, layers, _ = make()
        with pytest.raises(ValueError, match="should pass a gradient to `restored`, found none"):
            TDPLoss(network, layers)(z.requires_grad_(), x)
        with torch.no_grad():
            assert TDPLoss(network, layers)(z, x) > 0


class Checkpointed(nn.Module):
    """Computes its middle again in the backward, when its owner has it back."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), reentrant
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Tanh())

    def forward(self, images):
        x = self.first(images)
        if self.reentrant is None:
            return self.last(self.middle(x))
        return self.last(checkpoint(self.middle, x, use_reentrant=self.reentrant))


def checkpointed_timm(name, layers, **options):
    network = timm.create_model(name, **options)
    network.set_grad_checkpointing(True)
    return network, layers, lambda: network.set_grad_checkpointing(False)


def checkpointed(reentrant, *layers):
    network = Checkpointed(reentrant)
    return network, layers, lambda: setattr(network, "reentrant", None)


def memory_efficient_densenet():
    network = densenet.DenseNet(4, (2, 2), 8, memory_efficient=True)
    dense = [part for part in network.modules() if hasattr(part, "memory_efficient")]
    return network, ["features"], lambda: [setattr(part, "memory_efficient", False) for part in dense]


# network, layers, and how it is made to compute as others do
CHECKPOINTED = {
    "reentrant, inside": lambda: checkpointed(True, "middle.0"),
    "reentrant, its end": lambda: checkpointed(True, "middle"),
    "reentrant, behind": lambda: checkpointed(True, "last"),
    "inside": lambda: checkpointed(False, "middle.0"),
    "its end": lambda: checkpointed(False, "middle"),
    "behind": lambda: checkpointed(False, "last"),
    "densenet": memory_efficient_densenet,
    "timm vit": lambda: checkpointed_timm(
        "vit_tiny_patch16_224", ["blocks.1"], img_size=32, embed_dim=32, depth=2, num_heads=2
    ),
    "timm resnet": lambda: checkpointed_timm("resnet10t", ["layer4"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_checkpointed_networks_are_seen_as_others_while_they_rest_in_the_backward(kind):
    torch.manual_seed(0)
    network, layers, compute_as_others = CHECKPOINTED[kind]()
    network.train()
    z, x = pair((2, 3, 32, 32))
    loss = TDPLoss(network, layers)
    before = copy.deepcopy(network.state_dict())
    try:
        with frozen(network):
            found = value_and_gradient(loss, z, x)
    except ValueError:
        older = not hasattr(timm.layers, "use_reentrant_ckpt")  # a timm all of whose checkpoints are reentrant
        assert kind in ("reentrant, inside", "reentrant, its end", "timm resnet", *(["timm vit"] if older else []))
        found = None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    compute_as_others()
    expected = value_and_gradient(loss, z, x)
    if found is not None:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["timm vit", "timm resnet"])
def test_a_live_network_is_looked_through_without_its_checkpointing(kind):
    torch.manual_seed(0)
    network, layers, compute_as_others = CHECKPOINTED[kind]()
    teacher = copy.deepcopy(network)
    teacher.set_grad_checkpointing(False)
    network.train()
    z, x = pair((2, 3, 32, 32))
    loss, matching = TDPLoss(network, layers), FeatureMatchingLoss(network, teacher, layers)

    def results():
        network.zero_grad()
        matching(z, x).backward()
        return value_and_gradient(loss, z, x), [parameter.grad for parameter in network.parameters()]

    found = results()
    assert any(getattr(module, "grad_checkpointing", False) for module in network.modules())
    compute_as_others()
    torch.testing.assert_close(found, results())


def test_features_taken_elsewhere_are_compared_with_their_gradient():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    loss = TDPLoss(network, ["0", "2"], normalize=None, layer_weights={"0": 0.25, "2": 2.0})
    one, other = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(2, 3, 8, 8)
    found = loss.compare(loss.features(one), loss.features(other))
    expected = loss.terms(one, other)
    assert list(found) == ["0", "2"] and all(torch.equal(found[name], expected[name]) for name in found)
    sum(found.values()).backward()
    by_hand = (
        0.25 * (network[0](one) - network[0](other)).abs().mean() + 2 * (network(one) - network(other)).abs().mean()
    )
    weights = list(network.parameters())
    gradients = [weight.grad.clone() for weight in weights]
    torch.testing.assert_close(gradients, list(torch.autograd.grad(by_hand, weights)))
    with pytest.raises(ValueError, match="Layer '0' should return one shape for both images, found .* for `seen`"):
        loss.compare(loss.features(one), loss.features(other[:1]))
