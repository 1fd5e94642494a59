"""What a training step refuses: parts of the wrong kind, parts of a batch for micro-batches, and what is not finite."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from restoreloss import Alternation, Phase


def make_network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))


def rows(count=4, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def make_phase(network, objective=None, name="fit", optimizer=None, **options):
    optimizer = SGD(network.parameters(), lr=0.1) if optimizer is None else optimizer
    return Phase(name, [network], objective or (lambda batch: network(batch).square().mean()), optimizer, **options)


def state_of(network):
    return copy.deepcopy(network.state_dict())


def assert_same(one, other):
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# Parts of the wrong kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": SGD}, "`optimizers` of phase 'fit' should be optimizers, found the class SGD"),
        ({"optimizers": [AdamW]}, "`optimizers` of phase 'fit' .* found the class AdamW"),
        ({"optimizers": nn.Linear(2, 1)}, "`optimizers` of phase 'fit' should be optimizers, found a Linear"),
        ({"schedulers": StepLR}, "`schedulers` of phase 'fit' should be schedulers, found the class StepLR"),
        ({"schedulers": 0.1}, "`schedulers` of phase 'fit' should be schedulers, found 0.1"),
        ({"schedulers": SGD([nn.Parameter(torch.ones(1))])}, "should be schedulers, found SGD"),
        ({"objective": nn.L1Loss}, "`objective` of phase 'fit' .* found the class L1Loss"),
        ({"objective": nn.L1Loss()}, r"`objective` of phase 'fit' .*objective\(batch\), found one that takes \(input"),
        ({"objective": lambda: 0}, r"`objective` of phase 'fit' .* found one that takes \(\)"),
        ({"objective": torch.ones(())}, "`objective` of phase 'fit' .* found a tensor"),
        ({"max_norm": "1.0"}, "`max_norm` should be a finite number above 0, found '1.0'"),
        ({"max_norm": -1.0}, "`max_norm` should be a finite number above 0, found -1.0"),
        ({"max_norm": 0}, "`max_norm` should be a finite number above 0, found 0"),
        ({"max_norm": math.nan}, "`max_norm` should be a finite number above 0, found nan"),
        ({"modes": "train"}, "`modes` of phase 'fit' should be a mapping of networks to modes, found 'train'"),
        ({"modes": {"net": "train"}}, "`modes` of phase 'fit' should be a mapping of networks to modes, found dict"),
    ],
)
def test_a_phase_names_the_part_that_is_of_another_kind(changes, message):
    network = make_network()
    given = {"trains": [network], "objective": network, "optimizers": SGD(network.parameters(), lr=0.1), **changes}
    with pytest.raises(ValueError, match=message):
        Phase("fit", **given)


def test_an_infinite_norm_measures_and_clips_nothing():
    networks = [make_network(), make_network()]
    logs = Alternation([make_phase(networks[0], max_norm=math.inf)]).step(rows())
    Alternation([make_phase(networks[1])]).step(rows())
    assert logs["fit/grad_norm"] > 0
    assert_same(networks[0].state_dict(), networks[1].state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bfloat16"}, "`precision` should be a dtype, as torch.bfloat16, found 'bfloat16'"),
        ({"precision": torch.int8}, "`precision` should be a dtype, .* found torch.int8"),
        ({"scaler": True}, "`scaler` should be a torch.amp.GradScaler, found True"),
        ({"scaler": torch.amp.GradScaler}, "`scaler` should be .* found the class GradScaler"),
        ({"accelerator": "cuda"}, "`accelerator` should be an accelerate.Accelerator, found 'cuda'"),
        ({"on_non_finite": "skip"}, "`on_non_finite` should be one of .'raise', 'ignore'., found 'skip'"),
    ],
)
def test_an_alternation_names_the_option_that_is_of_another_kind(options, message):
    with pytest.raises(ValueError, match=message):
        Alternation([make_phase(make_network())], **options)


@pytest.mark.parametrize("phases", [[Phase], Phase, {"fit": 1}, None, [SGD([nn.Parameter(torch.ones(1))])]])
def test_phases_are_phases(phases):
    with pytest.raises(ValueError, match="`phases` should be a list of phases, found"):
        Alternation(phases)


def test_what_cannot_step_by_itself_is_refused_before_anything_moves():
    network = make_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"found a ReduceLROnPlateau, which needs `metrics`: .* `step\(metrics\)` yours"
    ):
        make_phase(network, optimizer=optimizer, schedulers=ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match="found a LBFGS, which needs `closure`: a phase computes its gradient once"):
        make_phase(network, optimizer=LBFGS(network.parameters()))
    make_phase(network, optimizer=optimizer, schedulers=[StepLR(optimizer, 1)])


def test_accelerates_wrappers_are_looked_into():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    network = make_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    prepared, schedule = accelerator.prepare(optimizer, ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match="found a AcceleratedScheduler, which needs `metrics`"):
        make_phase(network, optimizer=prepared, schedulers=schedule)
    with pytest.raises(ValueError, match="found a AcceleratedOptimizer, which needs `closure`"):
        make_phase(network, optimizer=accelerator.prepare(LBFGS(network.parameters())))
    make_phase(network, optimizer=prepared, schedulers=accelerator.prepare(StepLR(optimizer, 1)))


# Micro-batches


@dataclass
class Sample:
    image: Tensor


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ((rows(), rows()), "found 2 single tensors: one batch of several parts is one argument, .*accumulate=True"),
        ((rows(), rows(2)), "found 2 single tensors"),
        ((rows(), rows(), torch.arange(4)), "found 3 single tensors"),
        ((rows().numpy(), rows().numpy()), "found 2 single tensors"),
        ((rows(), [1, 2]), "`micro_batches` should be alike, found Tensor, list of int: one batch of several parts is"),
        ((rows(), {"label": 1}), "`micro_batches` should be alike, found Tensor, dict"),
        (([rows()], [{"boxes": rows()}]), "should be alike, found list of Tensor, list of dict"),
        ((rows(), rows().numpy()), "should be alike, found Tensor, ndarray"),
    ],
)
def test_the_parts_of_a_batch_are_no_micro_batches(batches, message):
    network = make_network()
    before = state_of(network)
    with pytest.raises(ValueError, match=message):
        Alternation([make_phase(network)]).step(*batches)
    assert_same(network.state_dict(), before)


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda part: part, {"accumulate": True}),
        (lambda part: (part, part), {}),
        (lambda part: [part], {}),
        (lambda part: {"image": part}, {}),
        (Sample, {}),
    ],
)
def test_micro_batches_of_every_kind_are_accumulated(wrap, options):
    def unwrap(batch):
        return batch if isinstance(batch, Tensor) else getattr(batch, "image", None) if isinstance(batch, Sample) else (
            batch["image"] if isinstance(batch, dict) else batch[0]
        )  # fmt: skip

    results = []
    for parts in (1, 2):
        network = make_network()
        phase = make_phase(network, lambda batch, network=network: network(unwrap(batch)).square().mean())
        given = [wrap(part) for part in rows().chunk(parts)]
        Alternation([phase]).step(*given, **(options if parts > 1 else {}))
        results.append(network.state_dict())
    torch.testing.assert_close(*results)


def test_one_bare_tensor_is_a_batch():
    network = make_network()
    assert Alternation([make_phase(network)]).step(rows())["fit/loss"] > 0


# What is not finite


def nan_in(part):
    """An objective of two terms, the later broken in a micro-batch; the gradient then is as well."""

    def objective(network, batch):
        pixel = network(batch[0]).square().mean()
        bad = math.nan if batch[1] == part else 1.0
        return {"pixel": pixel, "tdp": bad * network(batch[0]).mean()}

    return objective


@pytest.mark.parametrize("max_norm", [None, 1.0, math.inf])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_term_that_is_not_finite_stops_before_the_weights(scaled, max_norm):
    network, resting = make_network(), make_network(1)
    network[2].bias.requires_grad_(False)
    optimizer = AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    objective = nan_in(1)
    phase = make_phase(
        network, lambda batch: objective(network, batch), "restorer", optimizer,
        frozen=[resting], max_norm=max_norm, schedulers=scheduler,
    )  # fmt: skip
    training = Alternation([phase], scaler=torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None)
    before = state_of(network)
    with pytest.raises(FloatingPointError, match=r"Phase 'restorer' should .* found term 'tdp' = nan: no optimizer"):
        training.step((rows(), 0), (rows(seed=1), 1))
    assert_same(network.state_dict(), before)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1
    assert all(p.grad is None for p in network.parameters())
    assert [p.requires_grad for p in network.parameters()] == [True, True, True, False]
    assert all(p.requires_grad for p in resting.parameters()) and resting.training
    training.step((rows(), 0), (rows(seed=1), 0))  # and goes on
    assert not torch.equal(network[0].weight, before["0.weight"])
    assert all(bool(value.isfinite().all()) for value in network.state_dict().values())


def root(x):
    """Of zero: its value is fine and its gradient is not."""
    return (x - x.detach()).abs().sum().sqrt()


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_and_is_named(max_norm):
    network = make_network()
    before = state_of(network)
    phase = make_phase(network, lambda batch: root(network[2].weight) + network(batch).mean(), max_norm=max_norm)
    training = Alternation([phase])
    with pytest.raises(FloatingPointError, match=r"found NaN or infinity in the gradient of `2.weight`: no optimizer"):
        training.step(rows())
    assert_same(network.state_dict(), before)
    assert all(p.grad is None for p in network.parameters())


def test_parameters_of_several_parts_are_named_by_their_place():
    one, other, single = make_network(), make_network(), nn.Parameter(torch.ones(2))
    optimizer = SGD([*one.parameters(), *other.parameters(), single], lr=0.1)
    phase = Phase("fit", [one, other, single], lambda batch: one(other(batch)).mean() + root(single), optimizer)
    with pytest.raises(FloatingPointError, match=r"gradient of `trains\[2\]`: no"):
        Alternation([phase]).step(rows())
    phase = Phase(
        "fit", [one, other, single], lambda batch: math.inf * one(other(batch)).mean() + single.sum(), optimizer
    )
    with pytest.raises(FloatingPointError, match=r"term 'loss' = -?inf"):
        Alternation([phase]).step(rows())
    phase = Phase("fit", [one, other, single], lambda batch: sum(map(root, [*one.parameters(), single])), optimizer)
    with pytest.raises(FloatingPointError, match=r"of `trains\[0\].0.weight`, `trains\[0\].0.bias`, .* and 2 more: no"):
        Alternation([phase]).step(rows())


def test_an_earlier_phase_keeps_what_it_learned():
    first, second = make_network(), make_network(1)
    before = state_of(first)
    phases = [make_phase(first, name="a"), make_phase(second, lambda batch: math.nan * second(batch).mean(), name="b")]
    training = Alternation(phases)
    with pytest.raises(FloatingPointError, match="Phase 'b' should"):
        training.step(rows())
    assert not torch.equal(first[0].weight, before["0.weight"])
    assert all(bool(value.isfinite().all()) for value in second.state_dict().values())


def test_whoever_wants_to_go_on_may():
    network = make_network()
    phase = make_phase(network, lambda batch: math.nan * network(batch).mean())
    logs = Alternation([phase], on_non_finite="ignore").step(rows())
    assert logs["fit/loss"].isnan() and network[0].weight.isnan().all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_gradient_of_any_finite_size_goes_on(size):
    network = make_network()
    before = state_of(network)
    phase = make_phase(network, lambda batch: size * network(batch).mean(), optimizer=AdamW(network.parameters()))
    logs = Alternation([phase]).step(rows())  # its square leaves float32
    assert logs["fit/loss"].isfinite()
    assert not torch.equal(network[0].weight, before["0.weight"])


def test_a_norm_that_overflows_is_refused_where_it_would_clip_all_to_nothing():
    network = make_network()
    phase = make_phase(network, lambda batch: 1e30 * network(batch).mean(), max_norm=1.0)
    with pytest.raises(FloatingPointError, match="a gradient whose norm is inf, by which clipping divides"):
        Alternation([phase]).step(rows())


def test_gradients_that_are_sparse_or_empty_or_none_are_looked_at():
    table, empty, idle = nn.Embedding(3, 2, sparse=True), nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(1))

    def objective(batch):
        return table(batch).sum() + empty.sum()

    phase = Phase("fit", [table, empty, idle], objective, SGD([*table.parameters(), empty, idle], lr=0.5))
    before = state_of(table)
    training = Alternation([phase])
    training.step(torch.tensor([1]))
    torch.testing.assert_close(table.weight[1], before["weight"][1] - 0.5)
    table.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"gradient of `trains\[0\].weight`: no"):
        training.step(torch.tensor([1]))


# Steps that a scaler skips


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scheduler_rests_where_a_step_was_skipped(kind, fused):
    first, second = make_network(), make_network(1)
    factor = [1e10]  # times the scale is more than float32 holds
    optimizers = [kind(network.parameters(), lr=0.1, fused=fused) for network in (first, second)]
    schedulers = [StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers]
    phases = [
        make_phase(first, lambda b: factor[0] * first(b).square().mean(), "a", optimizers[0], schedulers=schedulers[0]),
        make_phase(second, None, "b", optimizers[1], schedulers=[schedulers[1]]),
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    training = Alternation(phases, scaler=scaler)
    before = state_of(first)
    logs = training.step(rows())
    assert logs["a/loss"].isfinite()
    assert_same(first.state_dict(), before)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.1, 0.05]
    factor[0] = 1.0
    training.step(rows())
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.05, 0.025]
    assert not torch.equal(first[0].weight, before["0.weight"])


def test_a_scheduler_rests_where_accelerates_scaler_skipped():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    accelerator.backward = lambda loss: accelerator.scaler.scale(loss).backward()
    network, factor = make_network(), [1e10]
    optimizer = SGD(network.parameters(), lr=0.1)
    schedule = accelerate.scheduler.AcceleratedScheduler(StepLR(optimizer, 1, gamma=0.5), optimizer)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=accelerator.scaler)
    schedule.optimizers = [optimizer]
    phase = make_phase(
        network, lambda b: factor[0] * network(b).square().mean(), optimizer=optimizer, schedulers=schedule
    )
    training = Alternation([phase], accelerator=accelerator)
    training.step(rows())
    assert optimizer.param_groups[0]["lr"] == 0.1
    factor[0] = 1.0
    training.step(rows())
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_scaler_that_is_off_is_none():
    network = make_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    phase = make_phase(network, optimizer=optimizer, schedulers=StepLR(optimizer, 1, gamma=0.5))
    training = Alternation([phase], scaler=torch.amp.GradScaler("cpu", enabled=False))
    training.step(rows())
    assert optimizer.param_groups[0]["lr"] == 0.05
    broken = make_phase(network, lambda batch: root(network[2].weight) + F.mse_loss(network(batch), batch))
    with pytest.raises(FloatingPointError, match="gradient of `2.weight`"):
        Alternation([broken], scaler=torch.amp.GradScaler("cpu", enabled=False)).step(rows())


def test_float16_without_a_scaler_is_refused():
    network = nn.Linear(2, 1)
    phase = Phase("fit", [network], lambda batch: network(batch).mean(), SGD(network.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="`scaler` should be given for float16"):
        Alternation([phase], precision=torch.float16)
