"""Alternation: its numbers are those of a loop written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

from restoreloss import Alternation, CQMix, Phase, TDPLoss
from tests.helpers.phases import (
    Batch,
    assert_rests,
    assert_same_state,
    assert_untouched,
    changed,
    make_batch,
    make_batches,
    make_classifier,
    make_joint_phases,
    make_restorer,
    see,
)

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
