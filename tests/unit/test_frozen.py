import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from restoreloss import TDPLoss
from restoreloss.frozen import FrozenNetwork, frozen, in_mode, serving, warn_before_freezing, warn_if_untrained
from tests.helpers.networks import as_if_trained


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 3, 1))


def image():
    return torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def trains(module):
    return any(part.training for part in module.modules()) or any(p.requires_grad for p in module.parameters())


def state(module):
    """Everything that a borrower has to leave as it was."""
    return (
        [part.training for part in module.modules()],
        [parameter.requires_grad for parameter in module.parameters()],
        {name: value.clone() for name, value in module.state_dict().items()},
    )


def same(one, other):
    return (
        one[:2] == other[:2]
        and one[2].keys() == other[2].keys()
        and all(torch.equal(value, other[2][name]) for name, value in one[2].items())
    )


def torch_saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": torch_saved,
}
ATTEMPTS = {
    "train": lambda module: module.train(),
    "requires_grad": lambda module: module.requires_grad_(True),
    "apply": lambda module: module.apply(lambda part: part.train().requires_grad_(True)),
    "one submodule": lambda module: list(module.modules())[-1].train(),
    "one parameter": lambda module: [p.requires_grad_(True) for p in list(module.parameters())[-1:]],
}


def test_a_held_network_is_the_callers_own_and_locked():
    net = network()
    held = FrozenNetwork(net)
    assert held.network is net
    assert not trains(net)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_held_network_stays_locked_whatever_a_parent_does(attempt):
    net = network()
    ATTEMPTS[attempt](nn.ModuleList([nn.Sequential(FrozenNetwork(net))]))
    assert not trains(net)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_held_network_is_locked_again_where_its_owner_unlocks_it(attempt):
    net = network()
    owner = nn.ModuleDict({"loss": nn.Sequential(FrozenNetwork(net)), "net": net})
    ATTEMPTS[attempt](owner)
    assert trains(net)
    assert not trains(owner["loss"][0].network)


def test_an_unlocked_owner_changes_neither_output_nor_statistics():
    net = network()
    held = FrozenNetwork(net)
    expected, before = held.network(image()), state(net)
    nn.ModuleList([net, held]).train().requires_grad_(True)
    assert torch.equal(held.network(image()), expected)
    assert same(state(net), before)


def test_gradients_pass_through_a_held_network_and_stop_at_its_weights():
    held, x = FrozenNetwork(network()), image().requires_grad_()
    held.network(x).square().mean().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in held.network.parameters())


def test_a_held_network_is_hidden_from_its_parents():
    held = FrozenNetwork(network())
    parent = nn.Sequential(held, nn.Linear(2, 1))
    inside = set(held.network.modules())
    assert not inside & set(parent.modules())
    assert [name for name, _ in parent.named_parameters()] == ["1.weight", "1.bias"]
    assert list(parent.state_dict()) == ["1.weight", "1.bias"]
    assert not list(parent.buffers())
    assert not list(held.named_children())
    parent.load_state_dict(nn.Sequential(nn.Identity(), nn.Linear(2, 1)).state_dict(), strict=True)


@pytest.mark.parametrize("registered_too", [False, True])
@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda module: module.to(torch.float64), torch.float64),
        (lambda module: module.half(), torch.float16),
        (lambda module: module.bfloat16(), torch.bfloat16),
    ],
)
def test_a_held_network_follows_the_dtype_of_a_parent(convert, dtype, registered_too):
    net = network()
    parent = nn.ModuleList([nn.Sequential(FrozenNetwork(net))] + [net] * registered_too)
    convert(parent)
    floating = [value for value in net.state_dict().values() if value.is_floating_point()]
    assert {value.dtype for value in floating} == {dtype}
    assert not trains(parent[0][0].network)


def test_a_held_network_follows_the_device_of_a_parent():
    held = FrozenNetwork(network())
    nn.Sequential(held).to("meta")
    assert {value.device.type for value in held.network.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_hold_their_own_network_locked_and_hidden(duplicate):
    parent = nn.Sequential(FrozenNetwork(network()))
    other = DUPLICATES[duplicate](parent)
    mine, theirs = parent[0].network, other.train()[0].network
    assert torch.equal(mine(image()), theirs(image()))
    assert not trains(theirs)
    assert not list(other.parameters())
    with torch.no_grad():
        theirs[0].weight.zero_()
    assert mine[0].weight.abs().sum() > 0


def test_a_copy_of_an_owner_shares_the_network_within_itself():
    net = network()
    other = copy.deepcopy(nn.ModuleList([FrozenNetwork(net), net]))
    assert other[0].network is other[1]
    assert other[1] is not net


def test_repr_tells_what_is_hidden():
    assert "Linear, 6 parameters, hidden" in repr(FrozenNetwork(nn.Linear(2, 2)))


def mixed_network():
    net = network().train()
    net[0].weight.requires_grad_(False)
    net[1].eval()
    net[3].bias.requires_grad_(False)
    return net


BORROWED = {
    "training": lambda: network().train(),
    "eval": lambda: network().eval(),
    "already frozen": lambda: network().eval().requires_grad_(False),
    "mixed": mixed_network,
    "parent in eval over training children": lambda: nn.Sequential(network()).train(),
}


@pytest.mark.parametrize("kind", BORROWED)
def test_frozen_borrows_and_returns_a_network_as_it_was(kind):
    net = BORROWED[kind]()
    if kind.startswith("parent"):
        net.training = False
    before = state(net)
    with frozen(net):
        assert not trains(net)
        net(image())
    assert same(state(net), before)


@pytest.mark.parametrize("kind", BORROWED)
def test_frozen_returns_a_network_as_it_was_after_an_exception(kind):
    net = BORROWED[kind]()
    before = state(net)
    with pytest.raises(RuntimeError, match="channels"), frozen(net):
        net(torch.rand(2, 5, 6, 6))
    assert same(state(net), before)


def test_frozen_undoes_what_the_block_itself_changed():
    net = mixed_network()
    before = state(net)
    with frozen(net):
        net.train().requires_grad_(True)
    assert same(state(net), before)


def test_batch_norm_statistics_rest_within_frozen_and_move_without():
    net = network().train()
    before = state(net)
    with frozen(net):
        net(image())
    assert same(state(net), before)
    net(image())
    assert net[1].num_batches_tracked == 1


def test_frozen_uses_the_running_statistics_and_no_dropout():
    net = network().train()
    expected = copy.deepcopy(net).eval()(image())
    with frozen(net):
        assert torch.equal(net(image()), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", [frozen, lambda network: in_mode(network, "eval")])
def test_a_network_may_train_on_before_the_backward_pass(block, training):
    norm = nn.BatchNorm2d(3).train(training)
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    image, weights = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4)
    mean, var = norm.running_mean, norm.running_var
    slope = (var + norm.eps).rsqrt()[:, None, None]  # the derivative of what the norm did in eval mode
    with block(norm):
        value = (weights * norm(image)).sum()
    assert norm.running_mean is mean and norm.running_var is var
    norm.train()(5 * torch.rand(2, 3, 4, 4))
    value.backward()
    torch.testing.assert_close(image.grad, weights * slope)


def test_in_mode_leaves_the_buffers_of_a_mixed_network_and_its_gradient():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.1)).train()
    net[0].eval()
    mean, image = net[0].running_mean, torch.rand(2, 3, 4, 4, requires_grad=True)
    with in_mode(net, "keep"):
        value = net(image).sum()
    assert net[0].running_mean is mean
    value.backward()


@torch.inference_mode()
def test_in_mode_takes_networks_that_no_flag_can_be_set_of():
    net = nn.Sequential(nn.BatchNorm2d(3)).train()
    with in_mode(net, "eval"):
        assert not net[0].training
    with in_mode(nn.Sequential(nn.LazyBatchNorm2d()), "eval"), torch.enable_grad():
        pass


def test_a_part_that_is_put_back_to_work_within_frozen_learns_its_statistics():
    norm = nn.BatchNorm2d(3).train()
    mean, batch = norm.running_mean, 5 + torch.rand(2, 3, 4, 4)
    with frozen(norm):
        norm.train()
        norm(batch)
    assert norm.running_mean is mean
    torch.testing.assert_close(mean, norm.momentum * batch.mean((0, 2, 3)))


def test_what_is_loaded_within_frozen_stays():
    norm, other = nn.BatchNorm2d(3).train(), nn.BatchNorm2d(3)
    other.running_mean.fill_(2)
    with frozen(norm):
        norm.load_state_dict(other.state_dict())
    assert torch.equal(norm.running_mean, other.running_mean)
    with frozen(norm):
        norm.double()
    assert norm.running_mean.dtype == torch.float64


@pytest.mark.parametrize("backward_inside", [True, False])
def test_within_frozen_the_gradient_reaches_the_image_and_not_the_weights(backward_inside):
    net, x = network().train(), image().requires_grad_()
    net(image()).mean().backward()
    accumulated = [parameter.grad.clone() for parameter in net.parameters()]
    with frozen(net):
        loss = net(x).square().mean()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert x.grad.abs().sum() > 0
    for parameter, before in zip(net.parameters(), accumulated, strict=True):
        assert torch.equal(parameter.grad, before)


def test_nested_frozen_returns_the_network_at_the_outermost_end():
    net = mixed_network()
    before = state(net)
    with frozen(net):
        with frozen(net):
            assert not trains(net)
        assert not trains(net)
    assert same(state(net), before)


def test_nested_frozen_returns_the_network_when_the_inner_block_raises():
    net = mixed_network()
    before = state(net)
    with frozen(net):
        with pytest.raises(KeyError), frozen(net[3]):
            raise KeyError
        assert not trains(net)
    assert same(state(net), before)


def test_frozen_takes_several_networks_that_share_parts():
    shared = nn.Conv2d(3, 3, 1)
    shared.bias.requires_grad_(False)
    first, second = nn.Sequential(shared, nn.BatchNorm2d(3)), nn.Sequential(nn.Dropout(), shared).eval()
    second[0].train()
    shared.train()
    before = state(first), state(second)
    with frozen(first, second):
        assert not trains(first)
        assert not trains(second)
    assert same(state(first), before[0])
    assert same(state(second), before[1])


def test_frozen_keeps_tied_weights_tied_and_trainable():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with frozen(net):
        assert not net[0].weight.requires_grad
    assert net[0].weight is net[1].weight
    assert net[0].weight.requires_grad


def test_frozen_leaves_other_networks_alone():
    net, other = network().train(), network().train()
    with frozen(net):
        assert other.training
        assert all(parameter.requires_grad for parameter in other.parameters())


# recurrent networks, networks in training, and failures


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, sequence):
        return self.drop(self.rnn(sequence)[0])


@pytest.mark.parametrize("mode", [True, False])
def test_a_recurrent_network_rests_in_train_mode_without_dropout(mode):
    reader, sequence = Reader().train(mode), torch.rand(2, 3, 4)
    expected = copy.deepcopy(reader).eval()(sequence)
    with frozen(reader):
        # cuDNN has no backward through an RNN in eval mode
        assert (reader.rnn.training, reader.rnn.dropout, reader.drop.training) == (True, 0.0, False)
        assert torch.equal(reader(sequence), expected)
    assert (reader.rnn.training, reader.rnn.dropout, reader.drop.training) == (mode, 0.5, mode)
    held = FrozenNetwork(reader)
    nn.Sequential(held).train()
    assert (held.network.rnn.training, held.network.rnn.dropout, held.network.drop.training) == (True, 0.0, False)
    assert torch.equal(held.network(sequence), expected)


def test_a_first_use_that_fails_gives_the_network_back():
    net = network().train()
    before, held = state(net), FrozenNetwork(net)
    with pytest.raises(KeyError), serving(held):
        raise KeyError
    assert same(state(net), before)
    with serving(held):
        assert not trains(held.network)
    with pytest.raises(KeyError), serving(held):  # later failures have other reasons
        raise KeyError
    assert not trains(net)


def test_a_network_in_training_is_told_when_it_is_frozen():
    with_gradients, with_an_optimizer = network(), network()
    with_gradients(image()).sum().backward()
    optimizer = torch.optim.Adam(with_an_optimizer.parameters())
    for net, reason in ((with_gradients, "its parameters hold"), (with_an_optimizer, "an optimizer")):
        with pytest.warns(UserWarning, match=rf"`teacher` \(Sequential\) is frozen from now on, and {reason}"):
            warn_before_freezing(net, "teacher")
    assert optimizer.param_groups


@pytest.mark.filterwarnings("error")
def test_a_network_that_only_could_be_trained_is_not_told():
    optimizer, fresh = torch.optim.Adam(network().parameters()), as_if_trained(network())
    warn_before_freezing(fresh, "teacher")
    trained = as_if_trained(network())
    trained(image()).sum().backward()
    optimizer.add_param_group({"params": list(trained.parameters())})
    warn_before_freezing(trained.requires_grad_(False), "teacher")


class Normalize(nn.Module):
    """No layer that learns."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]))


MADE = [
    nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.RMSNorm(4),
    nn.InstanceNorm2d(4, track_running_stats=True),
]  # fmt: skip


@pytest.mark.parametrize("norm", MADE, ids=str)
def test_an_untrained_network_is_told(norm):
    with pytest.warns(UserWarning, match=r"`task` \(Sequential\) seems to be untrained, .* \(2\) are as they are made"):
        warn_if_untrained(nn.Sequential(Normalize(), nn.Conv2d(3, 4, 1), norm, copy.deepcopy(norm)), "task")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", [*MADE, nn.GroupNorm(2, 4, affine=False), nn.ReLU()], ids=str)
def test_a_network_is_not_told_where_one_layer_has_learned_or_nothing_can_be_known(norm):
    changed = copy.deepcopy(norm)
    for values in (*changed.parameters(), *changed.buffers()):
        if values.ndim:
            values.data[0] += 0.1  # a weight that is not that of the others
    warn_if_untrained(nn.Sequential(norm, changed), "task")
    with torch.device("meta"):
        warn_if_untrained(nn.Sequential(nn.BatchNorm2d(4)), "task")


def test_a_loss_tells_once_of_an_untrained_network():
    loss = TDPLoss(network().train(), "1", normalize=None)
    with pytest.warns(UserWarning, match="`task`.* untrained"):
        loss(image(), image())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(image(), image())
