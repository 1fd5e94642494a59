import copy
import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import densenet, detection, vision_transformer

from restoreloss import FeatureExtractor, TDPLoss, WeightedSum, audit, frozen
from tests.helpers.networks import live_detector, live_recogniser

DISTANCES = ("l1", "mse", "rms", "l2")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pair(shape=(2, 3, 8, 8), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def by_loop(features, references, distance):
    """d(H(z), H(x)) of each sample, element by element in Python."""
    values = []
    for a, b in zip(features.double().flatten(1).tolist(), references.double().flatten(1).tolist(), strict=True):
        differences = [p - q for p, q in zip(a, b, strict=True)]
        squares = math.fsum(d * d for d in differences)
        values.append(
            {
                "l1": math.fsum(map(abs, differences)) / len(differences),
                "mse": squares / len(differences),
                "rms": math.sqrt(squares / len(differences)),
                "l2": math.sqrt(squares),
            }[distance]
        )
    return values


def normalised(images):
    mean, std = (torch.tensor(values, dtype=images.dtype).view(-1, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def stage(network, images):
    """What ``live_recogniser().stage`` returns at rest, written out."""
    network = network.eval()
    return network.stage(network.stem(normalised(images)))


def count_calls(module):
    """A list that grows by True (with gradient) or False at each call of a module."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


def value_and_gradient(loss, restored, target):
    restored = restored.detach().clone().requires_grad_()
    value = loss(restored, target)
    value.backward()
    return value.detach(), restored.grad


# Eq. 2


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_value_is_a_float64_loop_over_the_features(distance, reduction):
    network, (z, x) = live_recogniser().double(), pair((3, 3, 7, 6), dtype=torch.float64)
    found = TDPLoss(network, ["stage"], distance=distance, reduction=reduction)(z, x)
    values = by_loop(stage(network, z), stage(network, x), distance)
    expected = {"mean": math.fsum(values) / 3, "sum": math.fsum(values), "none": values}[reduction]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


def test_the_default_is_the_mean_of_absolute_differences():
    network, (z, x) = live_recogniser().double(), pair(dtype=torch.float64)
    found = TDPLoss(network, ["stage"])(z, x)
    torch.testing.assert_close(found, F.l1_loss(stage(network, z), stage(network, x)))


class Mix(nn.Module):
    """A 1x1 convolution with known weights."""

    weight = ((1.0, 0.0, 0.0), (0.0, -2.0, 1.0))

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1).double()
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor(self.weight).view(2, 3, 1, 1))

    def forward(self, images):
        return self.conv(images)


SHIFT = (0.1, -0.2, 0.3)  # of each channel
# what Mix makes of it: 0.1 / 0.229 and -2 * -0.2 / 0.224 + 0.3 / 0.225
FEATURE_SHIFT = (0.4366812227074236, 3.119047619047619)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("l1", (0.4366812227074236 + 3.119047619047619) / 2),
        ("mse", (0.4366812227074236**2 + 3.119047619047619**2) / 2),
        ("rms", math.sqrt((0.4366812227074236**2 + 3.119047619047619**2) / 2)),
        ("l2", math.sqrt(20 * (0.4366812227074236**2 + 3.119047619047619**2))),
    ],
)
def test_value_and_gradient_of_a_linear_network_have_their_closed_form(distance, expected):
    _, x = pair((2, 3, 4, 5), dtype=torch.float64)
    z = x + torch.tensor(SHIFT, dtype=torch.float64).view(3, 1, 1)
    value, gradient = value_and_gradient(TDPLoss(Mix(), ["conv"], distance=distance), z, x)
    assert float(value) == pytest.approx(expected, rel=1e-9)
    # d value / d feature, of 2 samples with 2 * 4 * 5 elements each
    slopes = {
        "l1": [1 / 80, 1 / 80],
        "mse": [d / 40 for d in FEATURE_SHIFT],
        "rms": [d / 80 / expected for d in FEATURE_SHIFT],
        "l2": [d / 2 / expected for d in FEATURE_SHIFT],
    }[distance]
    for channel in range(3):
        slope = sum(slopes[row] * Mix.weight[row][channel] for row in range(2)) / STD[channel]
        assert gradient[:, channel].flatten().tolist() == pytest.approx([slope] * 40, rel=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_is_that_of_finite_differences(distance):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(), nn.Conv2d(4, 2, 3, stride=2)
    ).double()
    z, x = pair((2, 3, 5, 4), dtype=torch.float64)
    loss = TDPLoss(network, ["2", "4"], layer_weights={"2": 0.5, "4": 2}, distance=distance, reduction="none")
    loss._range.told = True  # 3 z is out of range
    # far enough from x that no |d| changes sign
    assert torch.autograd.gradcheck(lambda image: loss(image, x), (3 * z).requires_grad_(), eps=1e-7, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 6), st.integers(1, 6)),
    low=st.sampled_from([0.0, -1.0, -0.5, 0.25]),
    span=st.sampled_from([1.0, 2.0, 255.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    distance=st.sampled_from(DISTANCES),
    seed=st.integers(0, 1000),
)
def test_any_shape_range_and_dtype_gives_the_value_of_the_loop(shape, low, span, dtype, distance, seed):
    z, x = (low + span * image for image in pair(shape, seed, torch.float64))
    z, x = z.to(dtype), x.to(dtype)
    network = Mix() if dtype == torch.float64 else Mix().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these ranges are dubious
        found = TDPLoss(network, ["conv"], distance=distance, input_range=(low, low + span))(z, x)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weight = torch.tensor(Mix.weight, dtype=torch.float64)
    seen = [torch.einsum("oc,nchw->nohw", weight, normalised((image.double() - low) / span)) for image in (z, x)]
    expected = math.fsum(by_loop(*seen, distance)) / shape[0]
    # normalised images span 5, and have lost 2**-8 or 2**-11 of that in half precision
    loss = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    scale = math.sqrt(2 * shape[2] * shape[3]) if distance == "l2" else 5 + expected if distance == "mse" else 1
    assert float(found) == pytest.approx(expected, rel=loss, abs=2 * loss * scale)


# layers and their weights


def test_layers_weigh_what_they_are_told():
    network, (z, x) = live_recogniser().double(), pair(dtype=torch.float64)
    weights = {"stem.0": 0.25, "stage": 3.0, "head": 0.0}
    terms = TDPLoss(network, list(weights), layer_weights=weights).terms(z, x)
    assert list(terms) == ["stem.0", "stage", "head"]
    network.eval()
    stem = [network.stem[0](normalised(image)) for image in (z, x)]
    torch.testing.assert_close(terms["stem.0"], 0.25 * F.l1_loss(*stem))
    torch.testing.assert_close(terms["stage"], 3 * F.l1_loss(stage(network, z), stage(network, x)))
    assert terms["head"] == 0


def test_layers_weigh_the_same_by_default_and_one_in_all():
    network, (z, x) = live_recogniser().double(), pair(dtype=torch.float64)
    layers = ["stem.0", "stage", "head", "stem.1"]
    terms = TDPLoss(network, layers).terms(z, x)
    for layer in layers:
        torch.testing.assert_close(terms[layer], TDPLoss(network, [layer])(z, x) / 4)


class Levels(nn.Module):
    """A backbone that returns the image, and multiples of it."""

    def __init__(self, *factors, kind=dict):
        super().__init__()
        self.backbone = Multiples(factors, kind)
        self.head = nn.Identity()

    def forward(self, images):
        self.backbone(images)
        return self.head(images)


class Multiples(nn.Module):
    def __init__(self, factors, kind):
        super().__init__()
        self.factors, self.kind = factors, kind

    def forward(self, images):
        levels = [factor * images for factor in self.factors]
        return dict(zip("abcdef", levels, strict=False)) if self.kind is dict else self.kind(levels)


@pytest.mark.parametrize(("kind", "keys"), [(dict, "abc"), (list, "012"), (tuple, "012")])
def test_tensors_of_a_layer_share_its_weight_evenly(kind, keys):
    z, x = pair(dtype=torch.float64)
    network = Levels(1, 10, 100, kind=kind)
    terms = TDPLoss(network, ["backbone", "head"], layer_weights={"backbone": 6, "head": 0.5}, normalize=None).terms(
        z, x
    )
    distance = F.l1_loss(z, x)
    assert list(terms) == [f"backbone/{key}" for key in keys] + ["head"]
    for value, weight in zip(terms.values(), (2 * 1, 2 * 10, 2 * 100, 0.5), strict=True):
        torch.testing.assert_close(value, weight * distance)


def test_named_tensors_of_a_layer_have_weights_of_their_own():
    z, x = pair(dtype=torch.float64)
    layers = {"backbone/c": 0.3, "backbone/a": 0.7}
    terms = TDPLoss(Levels(1, 10, 100), list(layers), layer_weights=layers, normalize=None).terms(z, x)
    assert list(terms) == list(layers)
    torch.testing.assert_close(terms["backbone/c"], 30 * F.l1_loss(z, x))
    torch.testing.assert_close(terms["backbone/a"], 0.7 * F.l1_loss(z, x))


def test_detectors_weigh_the_levels_of_the_pyramid_by_halves_as_in_the_paper():
    detector = detection.fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=32, max_size=32
    )
    assert TDPLoss(detector).layer_weights == {"backbone/0": 0.5, "backbone/1": 0.5}


@pytest.mark.parametrize("layers", [["head", "head"], ["backbone", "backbone/a"], ["backbone/a", "backbone"]], ids=str)
def test_layers_named_twice_are_refused(layers):
    with pytest.raises(ValueError, match="`layers`"):
        TDPLoss(Levels(1, 10), layers, normalize=None)


# who is run, how often, with which gradient


@pytest.mark.parametrize("use", [lambda loss, z, x: loss(z, x), lambda loss, z, x: loss.terms(z, x)])
def test_each_image_passes_once_and_the_target_without_gradient(use):
    network, (z, x) = live_recogniser(), pair()
    loss = TDPLoss(network, ["stem.0", "stage"])
    network_calls, conv_calls = count_calls(network), count_calls(network.stage[1])
    for _ in range(3):
        use(loss, z.requires_grad_(), x)
    assert network_calls == conv_calls == [False, True] * 3


def test_nothing_is_kept_for_the_target():
    network, (z, x) = live_recogniser(), pair()
    seen = []
    network.stage.register_forward_hook(lambda _, __, output: seen.append((output.requires_grad, network.training)))
    loss = TDPLoss(network, ["stage"])
    loss(z.requires_grad_(), x.requires_grad_()).backward()
    assert seen == [(False, False), (True, False)]
    assert x.grad is None
    assert z.grad.abs().sum() > 0
    with torch.no_grad():
        assert not loss(z, x).requires_grad
    assert not loss(z.detach(), x.detach()).requires_grad


def test_only_what_is_behind_the_restored_image_is_saved_for_backward():
    network, (z, x) = live_recogniser(), pair()
    loss = TDPLoss(network, ["stage"], normalize=None)

    def saved(restored):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(tensors.append, lambda kept: kept):
            loss(restored, x)
        return len(tensors)

    assert saved(z) == 0
    both = saved(z.requires_grad_())
    with torch.no_grad():
        reference = loss.features(x)["stage"]
    network.eval().requires_grad_(False)
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(tensors.append, lambda kept: kept):
        (network.stage(network.stem(z)) - reference).flatten(1).abs().mean(dim=1).mean()
    assert both == len(tensors) > 0


def test_layers_behind_the_last_are_not_run():
    network, (z, x) = live_recogniser(), pair()
    calls = count_calls(network.head)
    TDPLoss(network, ["stage"])(z, x)
    assert calls == []


def test_gradient_is_added_to_restored_and_through_it_to_the_restorer():
    restorer, network, (z, x) = nn.Conv2d(3, 3, 1), live_recogniser(), pair()
    loss = TDPLoss(network, ["stage"])
    loss(restorer(z), x).backward()
    expected = [parameter.grad.clone() for parameter in restorer.parameters()]
    loss(restorer(z), x).backward()
    for parameter, once in zip(restorer.parameters(), expected, strict=True):
        assert once.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, 2 * once)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("build", [live_recogniser, live_detector])
def test_following_the_gradient_brings_the_features_together(build, distance):
    network, (z, x) = build(), pair((2, 3, 16, 16))
    loss = TDPLoss(network, ["stage"] if build is live_recogniser else None, distance=distance)
    z = z.requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.02)
    values = []
    for _ in range(30):
        optimiser.zero_grad()
        value = loss(z, x)
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    # squares fall twice as fast
    assert values[-1] < (0.2 if distance == "mse" else 0.45) * values[0]


def test_the_task_network_may_learn_between_two_calls():
    network, (z, x) = live_recogniser(), pair()
    loss = TDPLoss(network, ["stage"])
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    values = []
    for _ in range(3):
        values.append(float(loss(z, x)))
        optimiser.zero_grad()
        network(x).square().mean().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimiser.step()
    assert len(set(values)) == 3
    assert network.stem[1].num_batches_tracked == 3


def test_a_loss_taken_before_the_task_learns_may_be_differentiated_after():
    network, (z, x) = live_recogniser(), pair()
    expected = value_and_gradient(TDPLoss(network, ["stem.0"]), z, x)[1]
    loss = TDPLoss(network, ["stem.0"])(z.requires_grad_(), x)
    network(x).sum().backward()
    assert network.stem[0].weight.grad is not None
    loss.backward()
    torch.testing.assert_close(z.grad, expected)


# several looks through one network


def looks(network, layers=("stem.1", "stage")):
    """Three losses, each with the extractor it is given or one of its own."""

    def build(extractor=None):
        own = {"layers": list(layers)} if extractor is None else {}
        near = {"layers": ["stem.1"], "distance": "rms"}
        return {
            "pixel": nn.L1Loss(),
            "all": TDPLoss(extractor or network, **own),
            "near": TDPLoss(extractor or network, **near),
            "far": TDPLoss(extractor or network, ["stage"], distance="mse"),
        }

    return build


def test_losses_on_one_extractor_pass_each_image_once_and_give_what_they_give_alone():
    network, (z, x) = live_recogniser(), pair()
    build, weights = looks(network), {"near": 0.5, "far": 2}
    separate = WeightedSum(build(), weights)
    shared = WeightedSum(build(FeatureExtractor(network, ["stem.1", "stage"])), weights)
    value, gradient = value_and_gradient(separate, z, x)
    terms = separate.terms(z, x)
    shared(z, x)  # finds out that the in-place ReLU overwrites a layer
    calls = count_calls(network)
    found_value, found_gradient = value_and_gradient(shared, z, x)
    assert calls == [False, True]
    found_terms = shared.terms(z, x)
    assert calls == [False, True] * 2
    assert torch.equal(found_value, value)
    torch.testing.assert_close(found_gradient, gradient)
    assert list(found_terms) == list(terms) == ["pixel", "all/stem.1", "all/stage", "near/stem.1", "far/stage"]
    assert all(torch.equal(found_terms[name], term) for name, term in terms.items())
    separate(z, x)
    assert len(calls) == 4 + 6


def test_terms_of_a_shared_extractor_have_gradients_of_their_own():
    network, (z, x) = live_recogniser(), pair()
    build = looks(network)
    z.requires_grad_()
    separate = WeightedSum(build()).terms(z, x)
    shared = WeightedSum(build(FeatureExtractor(network, ["stem.1", "stage"]))).terms(z, x)
    for name, term in separate.items():
        (expected,) = torch.autograd.grad(term, z, retain_graph=True)
        (found,) = torch.autograd.grad(shared[name], z, retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_a_shared_extractor_sees_new_images_and_new_weights_at_the_next_call():
    network, (z, x) = live_recogniser(), pair()
    extractor = FeatureExtractor(network, ["stage"])
    loss = WeightedSum({"one": TDPLoss(extractor), "two": TDPLoss(extractor)})
    for change in (z.add_, x.mul_, network.stage[1].weight.data.mul_):
        change(0.5)
        torch.testing.assert_close(loss(z, x), 2 * TDPLoss(network, ["stage"])(z, x))
    assert extractor._memo is None


def test_a_shared_extractor_is_let_go_when_an_objective_raises():
    network, (z, x) = live_recogniser(), pair()
    extractor = FeatureExtractor(network, ["stage"])

    def fail(restored, target):
        raise KeyError

    loss = WeightedSum({"one": TDPLoss(extractor), "two": TDPLoss(extractor), "fails": fail})
    with pytest.raises(KeyError):
        loss(z, x)
    calls = count_calls(network)
    extractor(x)
    extractor(x)
    assert len(calls) == 2


def test_a_loss_with_one_extractor_and_one_of_weight_zero_is_as_alone():
    network, (z, x) = live_recogniser(), pair()
    extractor = FeatureExtractor(network, ["stage"])
    loss = WeightedSum({"one": TDPLoss(extractor), "two": TDPLoss(extractor)}, {"two": 0})
    assert torch.equal(loss(z, x), TDPLoss(extractor)(z, x))
    assert list(loss.terms(z, x)) == ["one/stage"]


def test_a_shared_extractor_brings_its_own_range_and_normalisation():
    network, (z, x) = Levels(1), pair(dtype=torch.float64)
    extractor = FeatureExtractor(network, ["head"], normalize=((0.0,) * 3, (0.5,) * 3), input_range=(-1, 1))
    torch.testing.assert_close(TDPLoss(extractor)(2 * z - 1, 2 * x - 1), 2 * F.l1_loss(z, x))


@pytest.mark.parametrize("options", [{"normalize": None}, {"input_range": (0, 255)}], ids=str)
def test_options_that_contradict_a_shared_extractor_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        TDPLoss(FeatureExtractor(Levels(1), ["head"]), **options)


@pytest.mark.parametrize("layers", [["stem.1"], ["stage", "stem"], []], ids=str)
def test_layers_that_a_shared_extractor_lacks_are_refused(layers):
    with pytest.raises(ValueError, match=r"`layers` should be of the shared extractor, \['stage', 'head'\]"):
        TDPLoss(FeatureExtractor(live_recogniser(), ["stage", "head"]), layers)


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
        value, gradient = value_and_gradient(TDPLoss(live_recogniser(), ["stage"]), z, x)
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
        assert kind in ("reentrant, inside", "reentrant, its end", "timm resnet")
        found = None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    compute_as_others()
    expected = value_and_gradient(loss, z, x)
    if found is not None:
        torch.testing.assert_close(found, expected)


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
