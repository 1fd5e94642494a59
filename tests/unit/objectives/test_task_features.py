"""TDPLoss: Eq. (2), layers and weights, who is run and how often, several looks through one network."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import detection

from restoreloss import FeatureExtractor, TDPLoss, WeightedSum
from tests.helpers.networks import live_detector, live_recogniser
from tests.helpers.task_features import STD, normalised, pair, stage, value_and_gradient

DISTANCES = ("l1", "mse", "rms", "l2")


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


def count_calls(module):
    """A list that grows by True (with gradient) or False at each call of a module."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


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
    loss._range.warned = True  # 3 z is out of range
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


class Recurrent(nn.Module):
    """Gives (T, N, C), as readers of text do."""

    def __init__(self):
        super().__init__()
        self.steps = nn.LSTM(3, 4)

    def forward(self, images):
        return self.steps(images.mean(dim=2).permute(2, 0, 1))[0]


@pytest.mark.parametrize(("reduction", "distance"), [("none", "l1"), ("sum", "l1"), ("mean", "rms"), ("mean", "l2")])
def test_distances_of_samples_need_them_in_the_first_dimension(reduction, distance):
    loss = TDPLoss(Recurrent(), "steps", normalize=None, reduction=reduction, distance=distance)
    with pytest.raises(ValueError, match="the 2 images as its first dimension"):
        loss(*pair((2, 3, 8, 16)))
    assert TDPLoss(Recurrent(), "steps", normalize=None)(*pair((2, 3, 8, 16))) > 0
