"""FeatureMatchingLoss against Eq. (9) of EDTR."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from restoreloss import Alternation, FeatureExtractor, FeatureMatchingLoss, HLFLoss, Phase, TDPLoss
from tests.helpers.hlf_fm import MEAN, STD, everything, network, pair, same
from tests.helpers.networks import live_recogniser

# FM


def test_matching_is_equation_9() -> None:
    student, teacher, (z, x) = network(0).train(), network(1), pair()
    loss = FeatureMatchingLoss(student, teacher, ["4"])
    theirs, rested = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    wanted = (theirs[:5]((z.detach() - MEAN) / STD) - rested[:5]((x - MEAN) / STD).detach()).abs().mean()
    found = loss(z, x)
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    assert z.grad is None and all(p.grad is None for p in teacher.parameters())
    for mine, other in zip(student[:5].parameters(), theirs[:5].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert all(p.grad is None for p in student[5:].parameters())
    assert list(loss.terms(z, x)) == ["4"] and list(loss.parameters()) == [] and loss.state_dict() == {}


@pytest.mark.parametrize("train", [True, False])
def test_the_student_is_left_as_it_is(train: bool) -> None:
    student, (z, x) = network(0).train(train), pair()
    student[3].requires_grad_(False)
    student[1].eval()
    loss = FeatureMatchingLoss(student, network(1), ["4"])
    before = everything(student)
    loss(z, x)
    assert same(everything(student), before)
    with pytest.raises(ValueError, match="`target`|`student_images`|`restored`"):
        loss(z, x[:2])
    student[3].register_forward_hook(lambda *_: 1 / 0)
    before["hooks"][4] += 1
    with pytest.raises(ZeroDivisionError):
        loss(z, x)
    assert same(everything(student), before)


def test_a_recorded_pass_does_for_both_losses() -> None:
    student, teacher, (z, x) = network(0).train(), network(1), pair()
    loss = FeatureMatchingLoss(student, teacher, ["0", "4"])
    alone = loss(z, x)
    count = int(student[1].num_batches_tracked)
    with loss.student.recording() as seen:
        logits = student((z.detach() - MEAN) / STD)
    recorded = loss(seen, x)
    assert int(student[1].num_batches_tracked) == count + 1
    assert torch.equal(recorded, alone)
    (recorded + F.cross_entropy(logits, torch.tensor([0, 1, 0, 1]))).backward()
    assert all(p.grad is not None for p in student.parameters())
    with loss.student.recording() as seen:
        student(x)
        with pytest.raises(ValueError, match="they are there at the end of the block"):
            loss(seen, x)


def test_a_recording_without_a_graph_would_train_nothing_and_is_refused() -> None:
    student, teacher = live_recogniser(), live_recogniser()
    matching = FeatureMatchingLoss(student, teacher, ["stage"])
    images = torch.rand(2, 3, 32, 32)
    with matching.student.recording() as seen, torch.no_grad():
        student(images)
    with pytest.raises(ValueError, match="would train nothing"):
        matching(seen, images)
    with torch.no_grad():
        assert matching(seen, images) > 0  # to look at it is no mistake


def test_a_recording_is_of_the_networks_own_pass_also_where_a_loss_looks_first() -> None:
    student, teacher = live_recogniser().eval(), live_recogniser()
    extractor = FeatureExtractor(student, ["stage"])
    matching, tdp = FeatureMatchingLoss(extractor, teacher), TDPLoss(extractor)
    images = torch.rand(2, 3, 32, 32)
    with extractor.recording() as seen:
        tdp(torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32))
        student(images)
    with extractor.recording() as alone:
        student(images)
    assert all(torch.equal(seen[name], alone[name]) for name in alone)
    assert matching(seen, images).requires_grad


def test_a_recording_without_a_pass_is_refused_and_leaves_no_hook() -> None:
    net, (_, x) = network(), pair()
    extractor = FeatureExtractor(net, ["0", "7"])
    with pytest.raises(ValueError, match=r"did not call \['0', '7'\]"), extractor.recording():
        pass
    with pytest.raises(ZeroDivisionError), extractor.recording():
        1 / 0  # noqa: B018
    assert sum(len(module._forward_hooks) for module in net.modules()) == 0
    with extractor.recording() as seen:
        net((x - MEAN) / STD)
    for name, value in extractor(x).items():
        torch.testing.assert_close(seen[name], value)


def test_equal_networks_and_images_match() -> None:
    student, (_, x) = network().eval(), pair()
    for dtype in (torch.float32, torch.bfloat16):
        one = copy.deepcopy(student).to(dtype)
        for distance in ("l1", "mse", "rms", "l2"):
            loss = FeatureMatchingLoss(one, copy.deepcopy(one), ["4"], distance=distance)  # type: ignore[arg-type]
            value = loss(x.to(dtype), x.to(dtype))
            value.backward()
            assert float(value.detach()) == 0
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in one.parameters())


def test_autocast_copies_and_compilation() -> None:
    student, (z, x) = network().eval(), pair()
    loss = FeatureMatchingLoss(student, network(1), ["4"])
    expected = loss(z, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(z, x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.01)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(z, x), expected)
        assert not set(other.student.network.parameters()) & set(student.parameters())
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager")(z, x), expected)


def test_detectors_take_lists() -> None:
    torch.manual_seed(0)
    student = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)
    loss = FeatureMatchingLoss(student, copy.deepcopy(student))
    images = [torch.rand(3, 40, 50), torch.rand(3, 33, 64)]
    targets = [{"boxes": torch.tensor([[2.0, 2.0, 30.0, 30.0]]), "labels": torch.tensor([1])}] * 2
    student.eval()
    assert float(loss(images, images).detach()) == 0
    assert float(loss(images, [image.flip(-1) for image in images]).detach()) > 0
    student.train()
    with pytest.raises(ValueError, match="in train mode asks for boxes"):
        loss(images, images)
    with loss.student.recording() as seen:
        student(images, targets)
    assert set(loss.terms(seen, images)) == set(loss.layers)
    with pytest.raises(ValueError, match="as many images"):
        loss(images, images[:1])


def test_shapes_that_differ_are_told() -> None:
    wide = network(1)
    wide[3] = nn.Conv2d(4, 6, 3, stride=2)
    z, x = pair()
    with pytest.raises(ValueError, match="Layer '4' should return one shape"):
        FeatureMatchingLoss(network(0), wide, ["4"])(z, x)


def test_edtr_is_two_phases() -> None:
    """Eq. 10: HLF moves the restorer alone, then task and FM the task network alone."""
    torch.manual_seed(0)
    task = resnet18(num_classes=2)
    reference = copy.deepcopy(task)
    with torch.no_grad():
        reference.fc.weight.add_(0.1)
    restorer, (degraded, clean) = nn.Conv2d(3, 3, 3, padding=1), torch.rand(2, 2, 3, 40, 40)
    nn.init.normal_(restorer.weight, std=0.05)
    hlf, matching = HLFLoss(task, reference), FeatureMatchingLoss(task, reference)

    def restore(_: Any) -> dict[str, Tensor]:
        return hlf.terms(restorer(degraded), clean)

    def recognise(_: Any) -> dict[str, Tensor]:
        images = restorer(degraded)
        with matching.student.recording() as seen:
            logits = task((images - MEAN) / STD)
        return {"task": F.cross_entropy(logits, torch.tensor([0, 1])), "matching": 0.5 * matching(seen, clean)}

    training = Alternation(
        [
            Phase(
                "restorer",
                [restorer],
                lambda _: hlf.terms(restorer(degraded), clean),
                torch.optim.SGD(restorer.parameters(), 0.1),
            ),
            Phase("task", [task], recognise, torch.optim.SGD(task.parameters(), 0.1)),
        ]
    )
    states = [copy.deepcopy(net.state_dict()) for net in (restorer, task, reference)]
    logs = training.step(None)
    assert list(logs) == ["restorer/task/layer4", "restorer/reference/layer4", "task/task", "task/matching"]
    moved = [
        any(not torch.equal(value, net.state_dict()[name]) for name, value in before.items())
        for net, before in zip((restorer, task, reference), states, strict=True)
    ]
    assert moved == [True, True, False]


def test_a_student_that_several_processes_train_is_seen_in_its_own_pass(
    process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, (z, x) = nn.parallel.DistributedDataParallel(network(0)), pair()
    loss = FeatureMatchingLoss(student, network(1), ["4"], normalize=None)
    loss(z.detach(), x).backward()  # one process has nothing to average
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(
        ValueError, match="`student_images` should be what a student in DistributedDataParallel has seen"
    ):
        loss(z.detach(), x)
    with loss.student.recording() as seen:
        student(z.detach())
    loss(seen, x).backward()
    with torch.no_grad():
        assert loss(z.detach(), x) > 0
