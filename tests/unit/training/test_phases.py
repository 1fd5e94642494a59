"""Alternation: what rests in a phase is frozen, in eval mode, and given back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW

from restoreloss import Alternation, Phase
from tests.helpers.phases import (
    assert_rests,
    assert_same_state,
    assert_untouched,
    changed,
    make_batch,
    make_batches,
    make_classifier,
    make_restorer,
    see,
)


def make_odd(network):
    """A network in the middle of somebody's work: modes, flags and gradients that no rule gives."""
    for number, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    first, *_, last = list(network.parameters())
    first.requires_grad_(False)
    last.grad = None
    next(part for part in network.modules() if isinstance(part, nn.BatchNorm2d)).eval()
    network.training = False
    return network


# What rests


@pytest.mark.parametrize("learner", ["restorer", "classifier"])
def test_only_the_trained_network_changes(learner):
    networks = {"restorer": make_restorer(), "classifier": make_classifier()}
    trained = networks.pop(learner)
    (resting,) = networks.values()
    make_odd(resting)
    networks[learner] = trained
    before, start = see(resting), see(trained)

    def objective(batch):
        assert_rests(resting)
        assert all(part.training for part in trained.modules())
        assert all(parameter.requires_grad for parameter in trained.parameters())
        restored = networks["restorer"](batch.degraded)
        return F.l1_loss(restored, batch.clean) + F.cross_entropy(networks["classifier"](restored), batch.label)

    training = Alternation([Phase("one", [trained], objective, SGD(trained.parameters(), lr=0.1), frozen=[resting])])
    for batch in make_batches(2):
        training.step(batch)
    assert_untouched(resting, before)
    assert changed(trained, start) == {name for name, _ in trained.named_parameters()}
    mean = next(name for name in start[3] if name.endswith("running_mean"))
    assert not torch.equal(trained.state_dict()[mean], start[3][mean])  # its batch norm did learn
    assert see(trained)[:2] == start[:2]
    assert all(parameter.grad is None for parameter in trained.parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_modes_and_flags_of_the_trained_are_put_back(mode):
    restorer = make_restorer().train(mode)
    restorer[2].training = not mode
    restorer[0].bias.requires_grad_(False)  # stays frozen, also while the network trains
    before = see(restorer)

    def objective(batch):
        assert all(part.training for part in restorer.modules())
        assert [name for name, p in restorer.named_parameters() if not p.requires_grad] == ["0.bias"]
        return F.l1_loss(restorer(batch.degraded), batch.clean)

    learning = [parameter for parameter in restorer.parameters() if parameter.requires_grad]
    Alternation([Phase("one", [restorer], objective, SGD(learning, lr=0.1))]).step(make_batch())
    assert see(restorer)[:2] == before[:2]
    assert changed(restorer, before) == {name for name, _ in restorer.named_parameters()} - {"0.bias"}


def test_parameter_in_the_optimizer_that_needs_no_gradient_stays():
    restorer = make_restorer(chance=False)
    restorer[0].weight.requires_grad_(False)
    before = see(restorer)
    optimizer = AdamW(restorer.parameters(), lr=0.1, weight_decay=0.1)
    Alternation([Phase("one", [restorer], lambda b: F.l1_loss(restorer(b.degraded), b.clean), optimizer)]).step(
        make_batch()
    )
    assert changed(restorer, before) == {name for name, _ in restorer.named_parameters()} - {"0.weight"}


def test_networks_of_all_phases_rest_in_each():
    networks = [make_restorer() for _ in range(3)]
    teacher, seen = make_restorer(), []

    def phase(index):
        def objective(batch):
            for other, network in enumerate(networks):
                if other != index:
                    assert_rests(network)
            assert_rests(teacher)
            seen.append(index)
            return sum(F.l1_loss(network(batch.degraded), batch.clean) for network in [*networks, teacher])

        rests = [teacher] if index == 2 else []  # named once, at rest everywhere
        return Phase(
            f"phase {index}", [networks[index]], objective, SGD(networks[index].parameters(), lr=0.1), frozen=rests
        )

    before = see(teacher)
    Alternation([phase(index) for index in range(3)]).step(make_batch())
    assert seen == [0, 1, 2]
    assert_untouched(teacher, before)


class Stumbling(SGD):
    fails = True

    def step(self, closure=None):
        if self.fails:
            raise RuntimeError("stumbled")
        return super().step(closure)


def fail(*args):
    raise RuntimeError("stumbled")


def make_stumbling(place, restorer, classifier, max_norm=None):
    """Training of the restorer that fails once, in ``place``, and what lets it walk again."""
    optimizer = Stumbling(restorer.parameters(), lr=0.1, momentum=0.9)
    optimizer.fails = place == "optimizer"
    failing = [True]

    def objective(batch):
        restored = restorer(batch.degraded)
        loss = F.l1_loss(restored, batch.clean) + F.cross_entropy(classifier(restored), batch.label)
        if place == "objective" and failing:
            fail()
        if place == "backward" and failing:
            restored.register_hook(fail)
        if place == "objective's value" and failing:
            return loss.expand(2)
        return loss

    def heal():
        failing.clear()
        optimizer.fails = False

    return Phase("one", [restorer], objective, optimizer, frozen=[classifier], max_norm=max_norm), heal


@pytest.mark.parametrize("place", ["objective", "objective's value", "backward", "optimizer"])
def test_an_exception_leaves_no_trace(place):
    restorer, classifier = make_restorer(), make_odd(make_classifier())
    restorer[1].eval()
    restorer[4].bias.requires_grad_(True)
    before, start = see(classifier), see(restorer)
    phase, _ = make_stumbling(place, restorer, classifier)
    with pytest.raises((RuntimeError, ValueError), match="stumbled|should return a scalar"):
        Alternation([phase]).step(make_batch())
    assert_untouched(classifier, before)
    assert see(restorer)[:2] == start[:2]
    assert not changed(restorer, start)


@pytest.mark.parametrize("place", ["objective", "objective's value", "backward", "optimizer"])
def test_the_step_after_an_exception_is_as_if_there_had_been_none(place):
    results = []
    for stumbles in (True, False):
        restorer, classifier = make_restorer(chance=False), make_classifier(chance=False)
        phase, heal = make_stumbling(place, restorer, classifier)
        training = Alternation([phase])
        if stumbles:
            with pytest.raises((RuntimeError, ValueError), match="stumbled|should return a scalar"):
                training.step(make_batch(seed=5), make_batch(seed=6))
        heal()
        training.step(make_batch())
        results.append(restorer.state_dict())
    assert_same_state(*results)


@pytest.mark.parametrize(
    "place",
    [
        "backward",
    ],
)
def test_a_scaler_works_on_after_an_exception(place):
    restorer, classifier = make_restorer(chance=False), make_classifier(chance=False)
    phase, heal = make_stumbling(place, restorer, classifier, max_norm=1.0)
    training = Alternation([phase], scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="stumbled"):
        training.step(make_batch())
    heal()
    training.step(make_batch())


def test_an_exception_in_a_later_phase_keeps_what_an_earlier_one_learned():
    restorer, classifier = make_restorer(), make_classifier()
    before = see(restorer), see(classifier)
    first = Phase(
        "first", [restorer], lambda b: F.l1_loss(restorer(b.degraded), b.clean), SGD(restorer.parameters(), lr=0.1)
    )
    training = Alternation([first, Phase("second", [classifier], fail, SGD(classifier.parameters(), lr=0.1))])
    with pytest.raises(RuntimeError, match="stumbled"):
        training.step(make_batch())
    # the gradient of the bias before a batch normalization is zero, and only by rounding another number
    assert {"0.weight", "1.weight", "1.bias", "4.weight", "4.bias"} <= set(changed(restorer, before[0]))
    assert see(restorer)[:2] == before[0][:2]
    assert_untouched(classifier, before[1])


def test_roles_can_be_taken_without_a_step():
    restorer, classifier = make_restorer().eval(), make_classifier()
    phases = [
        Phase(name, [network], fail, SGD(network.parameters(), lr=0.1))
        for name, network in (("restorer", restorer), ("classifier", classifier))
    ]
    before = see(restorer), see(classifier)
    training = Alternation(phases)
    with training.roles(training.phases[0]):
        assert restorer.training
        assert_rests(classifier)
    with training.roles(training.phases[1]):
        assert classifier.training
        assert_rests(restorer)
    assert_untouched(restorer, before[0])
    assert_untouched(classifier, before[1])
