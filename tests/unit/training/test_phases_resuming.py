"""Alternation: resuming, logs, errors, and two processes."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LinearLR, SequentialLR

from restoreloss import Alternation, Phase, TDPLoss, frozen
from tests.helpers.phases import (
    NETWORK,
    assert_same_state,
    changed,
    make_batch,
    make_batches,
    make_classifier,
    make_joint_phases,
    make_restorer,
    phase,
    see,
)
from tests.helpers.processes import launch
from tests.unit.training.phases_worker import CASES as CASES_OF_TWO

WORKER = "tests/unit/training/phases_worker.py"


# Resuming


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Everything:
    """A training whose every part has a state."""

    def __init__(self):
        self.restorer, self.classifier = make_restorer(), make_classifier()
        first = AdamW(self.restorer.parameters(), lr=1e-2)
        second = SGD(self.classifier.parameters(), lr=0.1, momentum=0.9)
        self.rates = first, second
        warm = SequentialLR(first, [LinearLR(first, 0.1, total_iters=2), CosineAnnealingLR(first, 4)], [2])
        restarted = CosineAnnealingWarmRestarts(second, 3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256, growth_interval=3)
        tdp = TDPLoss(self.classifier, ["features"])

        def restore(batch):
            restored = self.restorer(batch.degraded)
            return {"pixel": F.l1_loss(restored, batch.clean), "tdp": tdp(restored, batch.clean)}

        def recognise(batch):
            return F.cross_entropy(self.classifier(self.restorer(batch.degraded)), batch.label)

        self.training = Alternation(
            [
                Phase("restorer", [self.restorer], restore, first, warm, max_norm=0.5),
                Phase("classifier", [self.classifier], recognise, [second], [restarted]),
            ],
            scaler=self.scaler,
        )

    def run(self, batches):
        return [self.training.step(batch) for batch in batches]

    def state(self):
        return {
            "networks": [self.restorer.state_dict(), self.classifier.state_dict()],
            "training": self.training.state_dict(),
            "chance": torch.get_rng_state(),
        }

    def load(self, state):
        for network, values in zip((self.restorer, self.classifier), state["networks"], strict=True):
            network.load_state_dict(values)
        self.training.load_state_dict(state["training"])
        torch.set_rng_state(state["chance"])


def test_interrupted_and_resumed_is_uninterrupted():
    batches = list(make_batches(7))
    whole = Everything()
    torch.manual_seed(2)
    expected = whole.run(batches)
    first = Everything()
    torch.manual_seed(2)
    found = first.run(batches[:4])
    state = saved_and_loaded(first.state())
    first.run(batches[4:])  # what is saved is not what goes on changing
    second = Everything()
    torch.manual_seed(99)
    second.load(state)
    found += second.run(batches[4:])
    for one, other in zip(found, expected, strict=True):
        assert_same_state(one, other)
    assert_same_state(second.restorer.state_dict(), whole.restorer.state_dict())
    assert_same_state(second.classifier.state_dict(), whole.classifier.state_dict())
    assert second.scaler.get_scale() == whole.scaler.get_scale() > 256
    rates = [[optimizer.param_groups[0]["lr"] for optimizer in run.rates] for run in (second, whole)]
    assert rates[0] == rates[1] != [1e-2, 0.1]


@pytest.mark.parametrize("forgotten", ["optimizers", "schedulers", "scaler"])
def test_every_part_of_the_state_matters(forgotten):
    """The test above would notice each of them."""
    run = Everything()
    run.run(make_batches(4))
    state, fresh = run.training.state_dict(), Everything().training.state_dict()
    if forgotten == "scaler":
        assert state["scaler"] != fresh["scaler"]
    else:
        for name in ("restorer", "classifier"):
            assert repr(state["phases"][name][forgotten]) != repr(fresh["phases"][name][forgotten])


def test_state_of_an_alternation_without_a_scaler():
    networks = make_restorer(chance=False), make_classifier(chance=False)
    training = Alternation(make_joint_phases(*networks))
    training.step(make_batch())
    state = saved_and_loaded(training.state_dict())
    assert state["scaler"] is None and list(state["phases"]) == ["restorer", "classifier"]
    momentum = state["phases"]["restorer"]["optimizers"][0]["state"][0]["momentum_buffer"]
    assert momentum.shape == networks[0][0].weight.shape
    training.load_state_dict(state)


def test_state_of_other_phases_is_refused():
    training = Alternation(make_joint_phases(make_restorer(), make_classifier()))
    state = training.state_dict()
    for other in (
        {"classifier": state["phases"]["classifier"]},
        {"restorer": {"optimizers": [], "schedulers": []}, "classifier": state["phases"]["classifier"]},
    ):
        with pytest.raises(ValueError, match="`state` should be of these phases"):
            training.load_state_dict({"phases": other, "scaler": None})


# Logs


def test_logs_are_detached_scalars_named_after_phase_and_term():
    restorer, classifier = make_restorer(chance=False), make_classifier(chance=False)
    training = Alternation(make_joint_phases(restorer, classifier, max_norm=1.0))
    logs = training.step(make_batch())
    assert list(logs) == ["restorer/pixel", "restorer/task", "restorer/grad_norm", "classifier/loss"]
    assert all(isinstance(value, Tensor) and value.ndim == 0 for value in logs.values())
    assert not any(value.requires_grad for value in logs.values())


def test_logs_are_the_mean_over_micro_batches():
    weight = nn.Parameter(torch.tensor(2.0))
    phase = Phase("one", [weight], lambda x: {"a": x * weight, "b": weight.detach() + x}, SGD([weight], lr=0.5))
    logs = Alternation([phase]).step(torch.tensor(1.0), torch.tensor(3.0), torch.tensor(8.0))
    torch.testing.assert_close([value.item() for value in logs.values()], [2.0 * 4, 2.0 + 4])
    assert weight.item() == pytest.approx(2 - 0.5 * 4)


def test_terms_of_different_precision_are_summed():
    weight = nn.Parameter(torch.tensor(2.0))

    def objective(batch):
        return {"half": weight.half(), "single": 2 * weight, "double": 3 * weight.double()}

    logs = Alternation([Phase("one", [weight], objective, SGD([weight], lr=0.5))]).step(None)
    assert weight.item() == 2 - 0.5 * 6
    assert [value.item() for value in logs.values()] == [2, 4, 6]


# Errors

PARAMETER = nn.Parameter(torch.tensor(1.0))
OTHER = nn.Linear(2, 1)
FROZEN = nn.Linear(2, 1).requires_grad_(False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Alternation([]), "`phases` should hold at least one phase, found none"),
        (
            lambda: Alternation([phase(), phase("two"), phase()]),
            r"`phases` should have names of their own, found \['one', 'two', 'one'\]",
        ),
        (
            lambda: Alternation([phase()], precision=torch.bfloat16, accelerator=object()),
            "`precision` and `scaler` should be left to the `accelerator`",
        ),
        (
            lambda: Alternation([phase()], scaler=torch.amp.GradScaler("cpu"), accelerator=object()),
            "`precision` and `scaler` should be left to the `accelerator`",
        ),
        (
            lambda: Alternation([phase(trains=())]),
            "`trains` of phase 'one' should name at least one network, found none",
        ),
        (
            lambda: Alternation([phase(frozen=[OTHER, NETWORK])]),
            "`frozen` of phase 'one' should name nothing that it trains",
        ),
        (
            lambda: Alternation([phase(frozen=[torch.compile(NETWORK, backend="eager")])]),
            "`frozen` of phase 'one' should name nothing that it trains",
        ),
        (
            lambda: Alternation([phase(modes={NETWORK: "train", OTHER: "rest"}, frozen=[OTHER])]),
            r"`modes` of phase 'one' should be 'train' or 'eval', found \['train', 'rest'\]",
        ),
        (
            lambda: Alternation([phase(optimizers=[])]),
            "`optimizers` of phase 'one' should be at least one, found none",
        ),
        (
            lambda: Alternation([phase(optimizers=SGD([*NETWORK.parameters(), *OTHER.parameters()], lr=0.1))]),
            "`optimizers` of phase 'one' should hold parameters of `trains` only, found 2 others",
        ),
        (
            lambda: Alternation([phase(optimizers=[SGD(NETWORK.parameters(), lr=0.1), SGD([PARAMETER], lr=0.1)])]),
            "hold parameters of `trains` only, found 1 others",
        ),
        (
            lambda: Alternation([phase(optimizers=SGD([NETWORK.weight], lr=0.1))]),
            "`optimizers` of phase 'one' should hold all parameters of `trains` that need a gradient, found 1 in none",
        ),
        (
            lambda: Alternation([phase("first"), phase("second", trains=[NETWORK, OTHER, PARAMETER])]),
            "`optimizers` of phase 'second' should hold all parameters.* found 3 in none",
        ),
        (lambda: Alternation([phase()]).step(), "`micro_batches` should be at least one batch, found none"),
    ],
)
def test_contradictions_are_refused_with_what_was_found(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_parameters_that_need_no_gradient_need_no_optimizer():
    training = Alternation([phase(trains=[NETWORK, FROZEN])])
    training.step(torch.rand(2, 2))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda b: NETWORK(b), r"objective of phase 'one' should return a scalar.*found \{'loss': \(2, 1\)\}"),
        (lambda b: NETWORK(b).mean(dim=0), r"found \{'loss': \(1,\)\}"),
        (lambda b: 0.5, r"found \{'loss': 'float'\}"),
        (lambda b: None, r"found \{'loss': 'NoneType'\}"),
        (lambda b: [NETWORK(b).mean()], r"found \{'loss': 'list'\}"),
        (lambda b: {}, r"found \{\}"),
        (lambda b: {"a": NETWORK(b).mean(), "b": NETWORK(b)}, r"found \{'a': \(\), 'b': \(2, 1\)\}"),
        (lambda b: {"a": NETWORK(b).mean(), "b": 1.0}, r"found \{'a': \(\), 'b': 'float'\}"),
        (lambda b: NETWORK(b).mean().detach(), "objective of phase 'one' should depend on what the phase trains"),
        (lambda b: OTHER(b).mean(), "should depend on what the phase trains, found a loss without gradient"),
    ],
)
def test_objectives_without_a_scalar_or_a_gradient_are_refused_by_name(result, message):
    before = see(NETWORK)
    with pytest.raises(ValueError, match=message):
        Alternation([phase(objective=result, frozen=[OTHER])]).step(torch.rand(2, 2))
    assert see(NETWORK)[:2] == before[:2]
    assert not changed(NETWORK, before)


# Two processes


@pytest.fixture(scope="module")
def two_processes():
    return launch(WORKER)


@pytest.mark.parametrize("case", CASES_OF_TWO)
def test_two_processes_give_what_one_gives(two_processes, case):
    assert f"{case}: equal" in two_processes.stdout, two_processes.stderr[-3000:]


@pytest.mark.parametrize("case", CASES_OF_TWO)
def test_two_processes_average_once_a_step(two_processes, case):
    assert f"{case}: averaged once a step" in two_processes.stdout, two_processes.stdout + two_processes.stderr[-3000:]


@pytest.mark.parametrize("max_norm", [None, 10.0])
def test_a_scaler_of_accelerate_serves_two_optimizers_of_a_phase(accelerate, max_norm, monkeypatch):
    moved = []
    for scaled in (False, True):
        accelerator = accelerate.Accelerator(cpu=True)
        if scaled:  # as mixed_precision="fp16" makes it on an accelerator
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            monkeypatch.setattr(
                accelerator, "backward", lambda loss, scaler=accelerator.scaler: scaler.scale(loss).backward()
            )
        torch.manual_seed(0)
        networks = [nn.Linear(4, 4), nn.Linear(4, 2)]
        start = [copy.deepcopy(network.state_dict()) for network in networks]
        optimizers = [
            accelerate.optimizer.AcceleratedOptimizer(SGD(network.parameters(), lr=0.1), scaler=accelerator.scaler)
            for network in networks
        ]

        def objective(batch, networks=networks):
            return networks[1](networks[0](batch)).square().mean()

        training = Alternation(
            [Phase("both", networks, objective, optimizers, max_norm=max_norm)], accelerator=accelerator
        )
        logs = [training.step(torch.rand(3, 4, generator=torch.Generator().manual_seed(k))) for k in range(2)]
        moved.append([net.state_dict()[k] - old[k] for net, old in zip(networks, start, strict=True) for k in old])
        if max_norm:
            moved[-1].append(logs[-1]["both/grad_norm"])
        assert (training.state_dict()["scaler"] is not None) == scaled
        if scaled:
            state = training.state_dict()
            state["scaler"]["scale"] = 64.0
            training.load_state_dict(state)
            assert accelerator.scaler.get_scale() == 64.0
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": nn.Linear(2, 1)}, "`trains` of phase 'fit' should be a list of networks, found Linear"),
        ({"trains": nn.Sequential(nn.Linear(2, 1))}, "found Sequential"),
        ({"trains": ["net"]}, r"found \['str'\]"),
        ({"frozen": nn.Sequential(nn.Linear(2, 1))}, "`frozen` of phase 'fit' should be a list of networks"),
        ({"optimizers": nn.Linear(2, 1).parameters()}, "`optimizers` of phase 'fit' should be optimizers"),
        ({"objective": None}, "`objective` of phase 'fit' should be callable as .*, found None"),
    ],
)
def test_a_phase_names_what_it_was_given(changes, message):
    network = nn.Linear(2, 1)
    given = {"trains": [network], "objective": network, "optimizers": SGD(network.parameters(), lr=0.1), **changes}
    with pytest.raises(ValueError, match=message):
        Phase("fit", **given)


def test_an_alternation_is_a_list_of_phases():
    network = nn.Linear(2, 1)
    phase = Phase("fit", [network], network, SGD(network.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="`phases` should be a list of phases"):
        Alternation(phase)
    with pytest.raises(ValueError, match="should be modules, one argument each, found list"), frozen([network]):
        pass
