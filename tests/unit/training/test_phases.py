import copy
import io
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LinearLR, SequentialLR, StepLR

from restoreloss import Alternation, CQMix, Phase, TDPLoss, frozen
from tests.helpers.processes import ROOT
from tests.unit.training.phases_worker import CASES as CASES_OF_TWO

WORKER = ROOT / "tests" / "unit" / "training" / "phases_worker.py"


class Batch(NamedTuple):
    degraded: Tensor
    clean: Tensor
    label: Tensor


def make_batches(count, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        clean = torch.rand(size, 3, 8, 9, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        label = torch.randint(0, 2, (size,), generator=generator)
        yield Batch((clean + 0.3 * noise).clamp(0, 1), clean, label)


def make_batch(size=4, seed=0):
    return next(make_batches(1, size, seed))


def make_restorer(chance=True):
    """``chance``: with what a network keeps and draws by itself, batch norm and dropout."""
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(4), nn.Dropout(0.2)] if chance else []
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))


class Classifier(nn.Module):
    def __init__(self, chance=True):
        super().__init__()
        middle = [nn.BatchNorm2d(5), nn.Dropout(0.2)] if chance else []
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3), *middle, nn.Tanh())
        self.head = nn.Linear(5, 2)

    def forward(self, images):
        return self.head(self.features(images).mean(dim=(2, 3)))


def make_classifier(chance=True):
    torch.manual_seed(1)
    return Classifier(chance)


def see(network):
    """What a phase has to leave of a network that it does not train."""
    return (
        [part.training for part in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in network.parameters()],
        {name: value.clone() for name, value in network.state_dict().items()},
    )


def assert_untouched(network, before):
    modes, flags, gradients, state = see(network)
    assert modes == before[0]
    assert flags == before[1]
    for found, expected in zip(gradients, before[2], strict=True):
        assert (found is None) == (expected is None) and (found is None or torch.equal(found, expected))
    assert_same_state(state, before[3])


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_rests(network):
    assert not any(part.training for part in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def changed(network, before):
    """Names of the parameters that are not what they were."""
    return {name for name, value in network.named_parameters() if not torch.equal(value, before[3][name])}


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
    assert len(changed(restorer, before[0])) == 6
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


# Which numbers


def test_sr4ir_is_the_loop_written_by_hand():
    def run(steps):
        restorer, classifier = make_restorer(), make_classifier()
        tdp, mix, generator = TDPLoss(classifier, ["features"]), CQMix((2, 2)), torch.Generator().manual_seed(4)
        first = AdamW(restorer.parameters(), lr=1e-2, weight_decay=0)
        second = SGD(classifier.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        torch.manual_seed(2)
        logs = steps(restorer, classifier, tdp, mix, generator, first, second)
        return logs, restorer.state_dict(), classifier.state_dict()

    def by_hand(restorer, classifier, tdp, mix, generator, first, second):
        logs = []
        for batch in make_batches(3):
            classifier.eval().requires_grad_(False)
            restorer.train().requires_grad_(True)
            first.zero_grad()
            restored = restorer(batch.degraded)
            pixel, seen = F.l1_loss(restored, batch.clean), tdp(restored, batch.clean)
            (pixel + seen).backward()
            first.step()
            classifier.train().requires_grad_(True)
            restorer.eval().requires_grad_(False)
            second.zero_grad()
            restored = restorer(batch.degraded).detach()
            images = torch.cat([restored, batch.clean, mix(restored, batch.clean, generator=generator)])
            task = F.cross_entropy(classifier(images), batch.label.repeat(3))
            task.backward()
            second.step()
            logs.append({"restorer/pixel": pixel, "restorer/tdp": seen, "classifier/loss": task})
        return logs

    def by_phases(restorer, classifier, tdp, mix, generator, first, second):
        def restore(batch):
            restored = restorer(batch.degraded)
            return {"pixel": F.l1_loss(restored, batch.clean), "tdp": tdp(restored, batch.clean)}

        def recognise(batch):
            restored = restorer(batch.degraded)
            images = torch.cat([restored, batch.clean, mix(restored, batch.clean, generator=generator)])
            return F.cross_entropy(classifier(images), batch.label.repeat(3))

        training = Alternation(
            [Phase("restorer", [restorer], restore, first), Phase("classifier", [classifier], recognise, second)]
        )
        return [training.step(batch) for batch in make_batches(3)]

    expected, found = run(by_hand), run(by_phases)
    assert [list(logs) for logs in found[0]] == [list(logs) for logs in expected[0]]
    for one, other in zip(found[0], expected[0], strict=True):
        assert_same_state(one, {key: value.detach() for key, value in other.items()})
    assert_same_state(found[1], expected[1])
    assert_same_state(found[2], expected[2])


class Diffusing(nn.Module):
    """EDTR's parts: a resting U-Net between a control and a decoder that learn."""

    def __init__(self):
        super().__init__()
        self.unet = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.control, self.decoder = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        return self.decoder(self.unet(images) + self.control(images))


def make_edtr():
    torch.manual_seed(3)
    restorer, student = Diffusing(), make_classifier()
    return restorer, student, copy.deepcopy(student)


def test_edtr_is_the_loop_written_by_hand():
    def losses(student, teacher):
        return [TDPLoss(network, ["features"], normalize=None) for network in (student, teacher)]

    def half_restored(restorer, batch):
        return torch.cat([restorer(batch.degraded[:2]), batch.clean[2:]])

    def by_hand(restorer, student, teacher):
        live, high = losses(student, teacher)
        learning = [*restorer.control.parameters(), *restorer.decoder.parameters()]
        first, second = AdamW(learning, lr=1e-2), SGD(student.parameters(), lr=0.1)
        restorer.unet.eval().requires_grad_(False)
        teacher.eval().requires_grad_(False)
        for batch in make_batches(3):
            restored = restorer(batch.degraded)
            first.zero_grad()
            (0.5 * live(restored, batch.clean) + 0.5 * high(restored, batch.clean)).backward()
            first.step()
            with torch.no_grad():
                images = half_restored(restorer, batch)
                wanted = teacher.features(batch.clean)
            second.zero_grad()
            student.train()
            task = F.cross_entropy(student(images), batch.label)
            (task + 0.5 * F.l1_loss(student.features(images), wanted)).backward()
            second.step()

    def by_phases(restorer, student, teacher):
        live, high = losses(student, teacher)
        parts = [restorer.control, restorer.decoder]

        def restore(batch):
            assert not restorer.unet.training and restorer.control.training
            restored = restorer(batch.degraded)
            return {"live": 0.5 * live(restored, batch.clean), "high": 0.5 * high(restored, batch.clean)}

        def recognise(batch):
            assert_rests(restorer)
            images = half_restored(restorer, batch)
            task = F.cross_entropy(student(images), batch.label)
            matching = F.l1_loss(student.features(images), teacher.features(batch.clean))
            return {"task": task, "matching": 0.5 * matching}

        training = Alternation(
            [
                Phase(
                    "edtr",
                    parts,
                    restore,
                    AdamW([p for part in parts for p in part.parameters()], lr=1e-2),
                    frozen=[restorer, teacher],
                ),
                Phase("task", [student], recognise, SGD(student.parameters(), lr=0.1)),
            ]
        )
        for batch in make_batches(3):
            logs = training.step(batch)
        assert list(logs) == ["edtr/live", "edtr/high", "task/task", "task/matching"]

    networks = []
    for loop in (by_hand, by_phases):
        restorer, student, teacher = make_edtr()
        before = see(restorer.unet), see(teacher)
        torch.manual_seed(5)
        loop(restorer, student, teacher)
        if loop is by_phases:
            assert_untouched(restorer.unet, before[0])
            assert_untouched(teacher, before[1])
        networks.append([network.state_dict() for network in (restorer, student, teacher)])
    for found, expected in zip(*networks, strict=True):
        assert_same_state(found, expected)


class Prompted(nn.Module):
    """UniRestore's parts: a backbone, an adapter for all tasks, a prompt for each."""

    def __init__(self):
        super().__init__()
        self.backbone, self.adapter = make_restorer(), nn.Conv2d(3, 3, 1)
        self.prompts = nn.ParameterDict({"restoration": torch.full((3, 1, 1), 0.1)})

    def forward(self, images, task):
        return self.adapter(self.backbone(images) * self.prompts[task])


def test_unirestore_stage_two_trains_one_part_and_the_prompts_of_a_frozen_restorer():
    torch.manual_seed(0)
    network, recogniser = Prompted(), make_classifier()
    before, backbone = (see(network), see(recogniser)), see(network.backbone)

    def objective(batch):
        assert_rests(network.backbone)
        assert_rests(recogniser)
        assert network.adapter.training and not network.training
        restored = network(batch.degraded, "restoration")
        return {
            "pixel": F.mse_loss(restored, batch.clean),
            "task": F.cross_entropy(recogniser(restored), batch.label),
        }

    learning = [network.adapter, *network.prompts.values()]
    optimizer = AdamW([*network.adapter.parameters(), *network.prompts.values()], lr=1e-2)
    training = Alternation([Phase("two", learning, objective, optimizer, frozen=[network, recogniser])])
    for batch in make_batches(2):
        training.step(batch)
    assert changed(network, before[0]) == {"adapter.weight", "adapter.bias", "prompts.restoration"}
    assert see(network)[:3] == before[0][:3]
    assert_untouched(network.backbone, backbone)
    assert_untouched(recogniser, before[1])


def test_unirestore_stage_three_trains_a_new_prompt_and_nothing_else():
    torch.manual_seed(0)
    network, detector = Prompted(), make_classifier()
    images = make_batch().clean
    network.eval()
    old = network(images, "restoration")
    network.train()
    network.prompts["detection"] = nn.Parameter(torch.full((3, 1, 1), 0.3))
    before = see(network), see(detector)

    def objective(batch):
        assert_rests(network.backbone)
        assert [name for name, p in network.named_parameters() if p.requires_grad] == ["prompts.detection"]
        return F.cross_entropy(detector(network(batch.degraded, "detection")), batch.label)

    prompt = network.prompts["detection"]
    training = Alternation(
        [Phase("three", [prompt], objective, AdamW([prompt], weight_decay=0.1), frozen=[network, detector])]
    )
    for batch in make_batches(2):
        training.step(batch)
    assert changed(network, before[0]) == {"prompts.detection"}
    assert see(network)[:3] == before[0][:3]
    assert_untouched(detector, before[1])
    network.eval()
    assert torch.equal(network(images, "restoration"), old)


def test_single_parameters_of_other_phases_rest_too():
    p, q = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
    q.grad = torch.tensor(7.0)

    def first(batch):
        assert p.requires_grad and not q.requires_grad
        assert q.grad == 7
        return p * q

    def second(batch):
        assert q.requires_grad and not p.requires_grad
        return p * q

    logs = Alternation(
        [Phase("first", [p], first, SGD([p], lr=0.1)), Phase("second", [q], second, SGD([q], lr=0.1))]
    ).step(None)
    # p <- 1 - 0.1 * 2, then q <- 2 - 0.1 * 0.8
    torch.testing.assert_close([p.item(), q.item()], [0.8, 1.92])
    torch.testing.assert_close([logs["first/loss"].item(), logs["second/loss"].item()], [2.0, 1.6])
    assert p.requires_grad and q.requires_grad


def test_phases_run_in_order_and_see_what_the_earlier_ones_learned():
    restorer, classifier = make_restorer(chance=False), make_classifier(chance=False)
    batch, order = make_batch(), []
    expected = copy.deepcopy(restorer)
    F.l1_loss(expected(batch.degraded), batch.clean).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.5 * parameter.grad

    def restore(part):
        order.append("restorer")
        return F.l1_loss(restorer(part.degraded), part.clean)

    def recognise(part):
        order.append("classifier")
        assert_same_state(restorer.state_dict(), expected.state_dict())
        return F.cross_entropy(classifier(restorer(part.degraded)), part.label)

    phases = [
        Phase("restorer", [restorer], restore, SGD(restorer.parameters(), lr=0.5)),
        Phase("classifier", [classifier], recognise, SGD(classifier.parameters(), lr=0.5)),
    ]
    Alternation(phases).step(batch)
    assert order == ["restorer", "classifier"]


def make_joint_phases(restorer, classifier, max_norm=None):
    def restore(batch):
        restored = restorer(batch.degraded)
        return {"pixel": F.l1_loss(restored, batch.clean), "task": F.cross_entropy(classifier(restored), batch.label)}

    def recognise(batch):
        return F.cross_entropy(classifier(torch.cat([restorer(batch.degraded), batch.clean])), batch.label.repeat(2))

    return [
        Phase("restorer", [restorer], restore, SGD(restorer.parameters(), lr=0.5, momentum=0.9), max_norm=max_norm),
        Phase("classifier", [classifier], recognise, SGD(classifier.parameters(), lr=0.5, momentum=0.9)),
    ]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_micro_batches_are_one_large_batch(max_norm, scaled):
    results = []
    for parts in (1, 3):
        networks = make_restorer(chance=False), make_classifier(chance=False)
        start = [copy.deepcopy(network.state_dict()) for network in networks]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024) if scaled else None
        training = Alternation(make_joint_phases(*networks, max_norm), scaler=scaler)
        logs = [
            training.step(*(Batch(*part) for part in zip(*(u.chunk(parts) for u in batch), strict=True)))
            for batch in make_batches(3, size=6)
        ]
        results.append((logs, [network.state_dict() for network in networks]))
    (logs, whole), (other_logs, parts) = results
    assert ("restorer/grad_norm" in logs[0]) == (max_norm is not None)
    for one, other in zip(logs, other_logs, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    for one, other, fresh in zip(whole, parts, start, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
        assert all((one[name] - fresh[name]).abs().max() > 1e-4 for name in one)


def test_every_phase_sees_all_micro_batches_before_the_next_begins():
    restorer, classifier = make_restorer(), make_classifier()
    order = []

    def note(name, network):
        def objective(batch):
            order.append((name, batch))
            return sum(p.sum() for p in network.parameters())

        return Phase(name, [network], objective, SGD(network.parameters(), lr=0.1))

    Alternation([note("a", restorer), note("b", classifier)]).step(1, 2, 3)
    assert order == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]


def test_gradient_is_clipped_to_the_norm_and_logged_before():
    restorer, batch = make_restorer(chance=False), make_batch()
    reference = copy.deepcopy(restorer)
    (100 * F.l1_loss(reference(batch.degraded), batch.clean)).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()])
    assert gradients.norm() > 1

    def run(max_norm):
        network = copy.deepcopy(restorer)
        phase = Phase(
            "one",
            [network],
            lambda b: 100 * F.l1_loss(network(b.degraded), b.clean),
            SGD(network.parameters(), lr=1.0),
            max_norm=max_norm,
        )
        logs = Alternation([phase]).step(batch)
        moved = [(p - q).detach().flatten() for p, q in zip(restorer.parameters(), network.parameters(), strict=True)]
        return torch.cat(moved), logs

    moved, logs = run(0.25)
    torch.testing.assert_close(logs["one/grad_norm"], gradients.norm())
    torch.testing.assert_close(moved, 0.25 * gradients / gradients.norm(), rtol=1e-4, atol=1e-6)
    moved, logs = run(1e6)
    torch.testing.assert_close(logs["one/grad_norm"], gradients.norm())
    torch.testing.assert_close(moved, gradients, rtol=1e-4, atol=1e-5)
    moved, logs = run(None)
    assert list(logs) == ["one/loss"]
    torch.testing.assert_close(moved, gradients, rtol=1e-4, atol=1e-5)


def test_term_called_grad_norm_is_not_lost():
    weight = nn.Parameter(torch.tensor(2.0))
    phase = Phase("one", [weight], lambda batch: {"grad_norm": 3 * weight}, SGD([weight], lr=0.1), max_norm=1.0)
    try:
        logs = Alternation([phase]).step(None)
    except ValueError:
        return
    assert 6.0 in [value.item() for value in logs.values()]


def test_several_optimizers_serve_one_phase():
    def build():
        restorer, classifier = make_restorer(), make_classifier()
        return restorer, classifier, [AdamW(restorer.parameters(), lr=1e-2), SGD(classifier.parameters(), lr=0.1)]

    def total(restorer, classifier, batch):
        restored = restorer(batch.degraded)
        return F.l1_loss(restored, batch.clean), F.cross_entropy(classifier(restored), batch.label)

    restorer, classifier, optimizers = build()
    torch.manual_seed(2)
    for batch in make_batches(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(total(restorer, classifier, batch)).backward()
        nn.utils.clip_grad_norm_([*restorer.parameters(), *classifier.parameters()], 0.1)
        for optimizer in optimizers:
            optimizer.step()
    expected = restorer.state_dict(), classifier.state_dict()

    restorer, classifier, optimizers = build()
    torch.manual_seed(2)
    joint = Phase(
        "joint",
        [restorer, classifier],
        lambda batch: dict(zip(("pixel", "task"), total(restorer, classifier, batch), strict=True)),
        optimizers,
        max_norm=0.1,
    )
    training = Alternation([joint])
    for batch in make_batches(3):
        training.step(batch)
    for found, wanted in zip((restorer, classifier), expected, strict=True):
        assert_same_state(found.state_dict(), wanted)


@pytest.mark.parametrize("count", [1, 2])
def test_schedulers_step_once_a_step(count):
    p, q = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    optimizers = [SGD([p], lr=1.0), SGD([q], lr=2.0)]
    schedulers = [StepLR(optimizer, 2, gamma=0.1) for optimizer in optimizers][:count]
    phase = Phase("one", [p, q], lambda batch: p + q, optimizers, schedulers if count > 1 else schedulers[0])
    training, rates = Alternation([phase]), []
    for _ in range(4):
        training.step(None, None)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
    second = [2.0, 0.2, 0.2, 0.02] if count > 1 else [2.0] * 4
    torch.testing.assert_close(rates, [[a, b] for a, b in zip([1.0, 0.1, 0.1, 0.01], second, strict=True)])
    # steps of 1, 1, 0.1 and 0.1: a rate counts from the step after
    assert p.item() == pytest.approx(1 - 1 - 1 - 0.1 - 0.1)


def test_a_compiled_network_is_looked_through():
    torch._dynamo.reset()
    results = []
    for wrap in (lambda network: network, lambda network: torch.compile(network, backend="eager")):
        restorer, classifier = make_restorer(chance=False), make_classifier()
        networks = wrap(restorer), wrap(classifier)

        def restore(batch, networks=networks, classifier=classifier):
            assert_rests(classifier)
            restored = networks[0](batch.degraded)
            return F.l1_loss(restored, batch.clean) + F.cross_entropy(networks[1](restored), batch.label)

        before = see(classifier)
        phase = Phase("one", networks[:1], restore, SGD(networks[0].parameters(), lr=0.1), frozen=networks[1:])
        training = Alternation([phase])
        for batch in make_batches(2):
            training.step(batch)
        assert_untouched(classifier, before)
        results.append(restorer.state_dict())
    torch.testing.assert_close(*results)


# Modes


class TwoFaced(nn.Module):
    """Like torchvision's detectors: a loss in train mode, a prediction in eval mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Dropout2d(0.5))
        self.body.append(nn.InstanceNorm2d(4, track_running_stats=True))

    def forward(self, images, label=None):
        scores = self.body(images).mean(dim=(2, 3))
        return F.cross_entropy(scores, label) if self.training else scores


def test_resting_network_in_train_mode_gives_its_loss_and_keeps_its_statistics():
    restorer, network = make_restorer(chance=False), TwoFaced()
    network.body[2].eval()
    before, start, values = see(network), see(restorer), []

    def objective(batch):
        assert network.training and network.body.training
        assert not any(part.training for part in network.body[1:])
        assert not any(parameter.requires_grad for parameter in network.parameters())
        restored = restorer(batch.degraded)
        values.append([network(restored, batch.label) for _ in range(2)])
        return values[-1][0]

    phase = Phase(
        "one",
        [restorer],
        objective,
        SGD(restorer.parameters(), lr=0.1),
        frozen=[network],
        modes={network: "train"},
    )
    Alternation([phase]).step(make_batch())
    assert torch.equal(*values[0])  # dropout would show
    assert_untouched(network, before)
    assert len(changed(restorer, start)) == 4


def make_detector():
    detection = pytest.importorskip("torchvision.models.detection")
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.Dropout(0.2), nn.ReLU())
    backbone.out_channels = 6
    return detection.FasterRCNN(
        backbone,
        min_size=32,
        max_size=48,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(((8, 16),), ((1.0,),)),
        box_roi_pool=pytest.importorskip("torchvision.ops").MultiScaleRoIAlign(["0"], 3, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(6 * 9, 8),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 2),
        rpn_post_nms_top_n_train=20,
    )


def test_restorer_learns_from_the_losses_of_a_resting_detector():
    torch.manual_seed(0)
    restorer, detector = make_restorer(), make_detector()
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]]), "labels": torch.tensor([1])}] * 2
    before, start = see(detector), see(restorer)

    def restore(batch):
        kept = [part for part in detector.modules() if isinstance(part, nn.BatchNorm2d | nn.Dropout)]
        assert len(kept) == 2 and not any(part.training for part in kept)
        assert detector.training and detector.rpn.training and detector.roi_heads.training
        return detector(list(restorer(batch)), targets)

    def detect(batch):
        assert all(part.training for part in detector.modules())
        return detector(list(restorer(batch)), targets)

    images = torch.rand(2, 3, 32, 32)
    first = Phase(
        "restorer",
        [restorer],
        restore,
        SGD(restorer.parameters(), lr=1e-3),
        frozen=[detector],
        modes={detector: "train"},
    )
    logs = Alternation([first]).step(images)
    names = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
    assert list(logs) == [f"restorer/{name}" for name in names]
    assert all(value.isfinite() for value in logs.values())
    assert_untouched(detector, before)
    assert {"0.weight", "4.weight", "4.bias"} <= changed(restorer, start)
    second = Phase("detector", [detector], detect, SGD(detector.parameters(), lr=1e-3))
    assert len(Alternation([first, second]).step(images)) == 8
    assert {"backbone.0.weight", "rpn.head.cls_logits.weight"} <= changed(detector, before)
    assert see(detector)[:2] == before[:2]


def test_modes_hold_for_parts_of_the_trained_and_in_the_order_given():
    classifier = make_classifier()
    norm, before = classifier.features[1], see(classifier)

    def objective(batch):
        modes = {name for name, part in classifier.named_modules() if not part.training}
        assert modes == {"features", "features.0", "features.1", "features.3"}
        return F.cross_entropy(classifier(batch.clean), batch.label)

    phase = Phase(
        "one",
        [classifier],
        objective,
        SGD(classifier.parameters(), lr=0.1),
        modes={classifier.features: "eval", classifier.features[2]: "train"},
    )
    Alternation([phase]).step(make_batch())
    assert torch.equal(norm.running_mean, before[3]["features.1.running_mean"])
    assert changed(classifier, before) == {name for name, _ in classifier.named_parameters()}
    assert see(classifier)[0] == before[0]


def test_trained_part_of_a_resting_network_in_train_mode_learns_with_its_statistics():
    network = TwoFaced()
    before = see(network)
    norm = network.body[1]

    def objective(batch):
        assert network.training and norm.training and not network.body[2].training
        return network(batch.clean, batch.label)

    phase = Phase("one", [norm], objective, SGD(norm.parameters(), lr=0.1), frozen=[network], modes={network: "train"})
    Alternation([phase]).step(make_batch())
    assert not torch.equal(norm.running_mean, before[3]["body.1.running_mean"])
    assert changed(network, before) <= {"body.1.weight", "body.1.bias"}
    assert see(network)[:2] == before[:2]


def test_network_that_only_modes_mention_is_put_back_and_rests():
    restorer, network = make_restorer(), TwoFaced().eval()
    before = see(network)
    phase = Phase(
        "one",
        [restorer],
        lambda batch: network(restorer(batch.degraded), batch.label),
        SGD(restorer.parameters(), lr=0.1),
        modes={network: "train"},
    )
    try:
        Alternation([phase]).step(make_batch())
    except ValueError:
        return
    assert_untouched(network, before)


def test_part_of_the_trained_that_is_called_frozen_is_refused_or_rests():
    classifier = make_classifier()
    before = see(classifier)
    try:
        phase = Phase(
            "one",
            [classifier],
            lambda batch: F.cross_entropy(classifier(batch.clean), batch.label),
            SGD(classifier.parameters(), lr=0.1),
            frozen=[classifier.features],
        )
        Alternation([phase]).step(make_batch())
    except ValueError:
        return
    assert changed(classifier, before) == {"head.weight", "head.bias"}


# Precision


def test_precision_is_that_of_the_objective_and_of_nothing_else():
    def build():
        restorer, classifier = make_restorer(), make_classifier()
        return restorer, classifier, TDPLoss(classifier, ["features"]), AdamW(restorer.parameters(), lr=1e-2)

    def objective(restorer, tdp, batch):
        restored = restorer(batch.degraded)
        assert restored.dtype == torch.bfloat16
        return {"pixel": F.l1_loss(restored, batch.clean), "tdp": tdp(restored, batch.clean)}

    restorer, classifier, tdp, optimizer = build()
    torch.manual_seed(2)
    for batch in make_batches(2):
        optimizer.zero_grad()
        classifier.eval().requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(objective(restorer, tdp, batch).values())
        loss.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in restorer.parameters())
        optimizer.step()
    expected = restorer.state_dict()

    restorer, classifier, tdp, optimizer = build()
    torch.manual_seed(2)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append(torch.is_autocast_enabled("cpu")))
    restorer[0].weight.register_hook(lambda grad: seen.append((grad.dtype, torch.is_autocast_enabled("cpu"))))
    phase = Phase("one", [restorer], lambda b: objective(restorer, tdp, b), optimizer, frozen=[classifier])
    training = Alternation([phase], precision=torch.bfloat16)
    for batch in make_batches(2):
        logs = training.step(batch)
    assert_same_state(restorer.state_dict(), expected)
    assert seen == [(torch.float32, False), False] * 2
    assert all(value.isfinite() for value in logs.values())
    assert not torch.is_autocast_enabled("cpu")


def test_scaler_gives_the_gradient_of_the_loss_itself():
    results = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2), None):
        networks = make_restorer(chance=False), make_classifier(chance=False)
        training = Alternation(make_joint_phases(*networks, max_norm=0.05), scaler=scaler)
        logs = [training.step(batch) for batch in make_batches(3)]
        results.append([logs, [network.state_dict() for network in networks]])
        if scaler is not None:
            assert scaler.get_scale() == 2.0**15  # doubled with every second phase
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_float16_with_a_scaler_is_the_loop_written_by_hand():
    batches = list(make_batches(3))

    def objective(restorer, batch):
        restored = restorer(batch.degraded)
        assert restored.dtype == torch.float16
        return F.l1_loss(restored.float(), batch.clean)

    restorer, scaler = make_restorer(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = SGD(restorer.parameters(), lr=0.1)
    torch.manual_seed(2)
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = objective(restorer, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(restorer.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    expected = restorer.state_dict()

    restorer, scaler = make_restorer(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(2)
    phase = Phase("one", [restorer], lambda b: objective(restorer, b), SGD(restorer.parameters(), lr=0.1), max_norm=0.1)
    training = Alternation([phase], precision=torch.float16, scaler=scaler)
    logs = [training.step(batch) for batch in batches]
    assert_same_state(restorer.state_dict(), expected)
    assert torch.equal(logs[-1]["one/grad_norm"], norm)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_step_with_an_infinite_gradient_is_skipped_for_its_phase_alone(max_norm):
    restorer, classifier = make_restorer(chance=False), make_classifier(chance=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    optimizer = AdamW(restorer.parameters(), lr=1e-2)
    factor = [1e10]  # times the scale is more than float32 holds
    training = Alternation(
        [
            Phase(
                "restorer",
                [restorer],
                lambda b: factor[0] * F.l1_loss(restorer(b.degraded), b.clean),
                optimizer,
                max_norm=max_norm,
            ),
            Phase(
                "classifier",
                [classifier],
                lambda b: F.cross_entropy(classifier(b.clean), b.label),
                SGD(classifier.parameters(), lr=0.1),
            ),
        ],
        scaler=scaler,
    )
    before = see(restorer), see(classifier)
    logs = training.step(make_batch())
    assert not changed(restorer, before[0]) and not optimizer.state
    assert len(changed(classifier, before[1])) == 4
    assert scaler.get_scale() == 2.0**119
    assert logs["restorer/loss"].isfinite()
    assert max_norm is None or not logs["restorer/grad_norm"].isfinite()
    factor[0] = 1.0
    training.step(make_batch())
    assert len(changed(restorer, before[0])) == 4
    assert all(parameter.isfinite().all() for parameter in restorer.parameters())
    assert scaler.get_scale() == 2.0**119


@pytest.fixture
def accelerate():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield accelerate
    reset()


def test_accelerator_changes_no_number(accelerate):
    results = []
    for accelerator in (None, accelerate.Accelerator(cpu=True)):
        restorer, classifier = make_restorer(), make_classifier()
        first, second = AdamW(restorer.parameters(), lr=1e-2), SGD(classifier.parameters(), lr=0.1, momentum=0.9)
        schedulers = [StepLR(first, 1, gamma=0.5), StepLR(second, 1, gamma=0.5)]
        own = restorer, classifier
        if accelerator is not None:
            restorer, classifier, first, second, *schedulers = accelerator.prepare(*own, first, second, *schedulers)
        tdp = TDPLoss(classifier, ["features"])

        def restore(batch, restorer=restorer, tdp=tdp):
            restored = restorer(batch.degraded)
            return {"pixel": F.l1_loss(restored, batch.clean), "tdp": tdp(restored, batch.clean)}

        def recognise(batch, restorer=restorer, classifier=classifier):
            return F.cross_entropy(classifier(restorer(batch.degraded)), batch.label)

        training = Alternation(
            [
                Phase("restorer", [restorer], restore, first, schedulers[0], max_norm=0.05),
                Phase("classifier", [classifier], recognise, second, schedulers[1]),
            ],
            accelerator=accelerator,
        )
        torch.manual_seed(2)
        logs = [training.step(*make_batches(2, seed=step)) for step in range(3)]
        assert logs[0]["restorer/grad_norm"] > 0.05
        assert [each.param_groups[0]["lr"] for each in (first, second)] == [1e-2 / 8, 0.1 / 8]
        results.append([*logs, *(network.state_dict() for network in own)])
    for found, expected in zip(*results, strict=True):
        assert_same_state(found, expected)


def test_accelerator_does_the_autocast_and_the_backward(accelerate):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    restorer, classifier = make_restorer(), make_classifier()
    own, tdp = restorer, TDPLoss(classifier, ["features"])
    restorer, optimizer = accelerator.prepare(restorer, SGD(restorer.parameters(), lr=0.1))
    before, seen = see(own), []

    def objective(batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        restored = restorer(batch.degraded)
        return {"pixel": F.l1_loss(restored, batch.clean), "tdp": tdp(restored, batch.clean)}

    backward, losses = accelerator.backward, []
    accelerator.backward = lambda loss, **options: (losses.append(loss), backward(loss, **options))
    phase = Phase("one", [restorer], objective, optimizer, frozen=[classifier])
    logs = Alternation([phase], accelerator=accelerator).step(make_batch())
    assert seen == [True] and len(losses) == 1
    torch.testing.assert_close(losses[0].detach().float(), (logs["one/pixel"] + logs["one/tdp"]).float())
    assert len(changed(own, before)) == 6


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
NETWORK = nn.Linear(2, 1)
OTHER = nn.Linear(2, 1)
FROZEN = nn.Linear(2, 1).requires_grad_(False)


def phase(name="one", trains=(NETWORK,), objective=lambda batch: NETWORK(batch).mean(), optimizers=None, **options):
    if optimizers is None:
        optimizers = SGD(NETWORK.parameters(), lr=0.1)
    return Phase(name, trains, objective, optimizers, **options)


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
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )


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
