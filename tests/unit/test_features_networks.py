"""FeatureExtractor: borrowed, compiled and trained networks, and one pass for several looks."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from restoreloss import FeatureExtractor, frozen
from restoreloss.frozen import unwrap
from tests.helpers.features import (
    REAL,
    Forbidden,
    Scale,
    TakesLists,
    count_calls,
    images,
    normalised,
    real,
    seen_in_a_full_pass,
    sequential,
)
from tests.helpers.networks import live_recogniser

# a borrowed network: wrapped, compiled, trained


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
    assert unwrap(wrapped) is network
    found = FeatureExtractor(wrapped, ["stem.1", "stage"])(batch)
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_bare_leaves_a_network_that_has_a_module_of_its_own():
    network = nn.Module()
    network.module = nn.Linear(1, 1)
    assert unwrap(network) is network


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


def test_within_shared_a_pass_under_autocast_does_not_stand_in_for_one_without():
    features, _ = counted()
    image = images(1, 3, 4, 4)
    with features.shared():
        for dtype, expected in (
            (torch.bfloat16, torch.bfloat16),
            (None, torch.float32),
            (torch.float16, torch.float16),
        ):
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                assert features(image)["0"].dtype == expected


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
