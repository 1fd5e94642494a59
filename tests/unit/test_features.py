"""FeatureExtractor: default layers, what is overwritten in place, where the pass stops, what layers return."""

import pytest
import torch
from torch import nn
from torchvision import models

from restoreloss import FeatureExtractor
from restoreloss.default_layers import default_layers
from tests.helpers.features import (
    CONTAINERS,
    REAL,
    Forbidden,
    Returns,
    Scale,
    count_calls,
    images,
    normalised,
    real,
    seen_in_a_full_pass,
)
from tests.helpers.networks import live_recogniser


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
