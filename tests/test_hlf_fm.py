"""HLFLoss and FeatureMatchingLoss: equations 7 and 9, and who is left alone."""

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

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3, stride=2),
        nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip


def pair(seed: int = 1) -> tuple[Tensor, Tensor]:
    z, x = torch.rand(2, 4, 3, 9, 11, generator=torch.Generator().manual_seed(seed))
    return z.requires_grad_(), x


def everything(net: nn.Module) -> dict[str, Any]:
    """What a loss could disturb."""
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "modes": [module.training for module in net.modules()],
        "tracks": [getattr(module, "track_running_stats", None) for module in net.modules()],
        "flags": [parameter.requires_grad for parameter in net.parameters()],
        "hooks": [len(module._forward_hooks) for module in net.modules()],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


# HLF


def test_hlf_is_equation_7() -> None:
    task, reference, (z, x) = network(0).train(), network(1).train(), pair()
    loss = HLFLoss(task, reference, ["4"])
    terms = loss.terms(z, x)
    expected = []
    for net in (copy.deepcopy(task).eval(), copy.deepcopy(reference).eval()):
        seen = [net[:5]((image - MEAN) / STD) for image in (z, x)]
        expected.append((seen[0] - seen[1]).abs().mean() / 2)
    assert list(terms) == ["task/4", "reference/4"]
    for found, wanted in zip(terms.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(loss(z, x), expected[0] + expected[1])
    (mine,) = torch.autograd.grad(loss(z, x), z)
    (theirs,) = torch.autograd.grad(expected[0] + expected[1], z)
    torch.testing.assert_close(mine, theirs)
    assert all(p.grad is None for p in (*task.parameters(), *reference.parameters()))


def test_hlf_is_half_of_two_tdp_losses_with_its_options() -> None:
    task, reference, (z, x) = network(0), network(1), pair()
    options: dict[str, Any] = {
        "layers": ["0", "4"], "normalize": None, "distance": "rms", "layer_weights": {"0": 0.3, "4": 2.0},
        "reduction": "none", "input_range": (-1.0, 1.0),
    }  # fmt: skip
    z, x = 2 * z - 1, 2 * x - 1
    found = HLFLoss(task, reference, **options)(z, x)
    expected = sum(TDPLoss(net, **options)(z, x) for net in (task, reference)) / 2
    assert found.shape == (4,)
    torch.testing.assert_close(found, expected)


def test_the_task_network_is_left_as_it_is_and_the_reference_is_frozen() -> None:
    task, reference, (z, x) = network(0).train(), network(1).train(), pair()
    task[0].requires_grad_(False)
    before = everything(task)
    loss = HLFLoss(task, reference, ["4"])
    parent = nn.ModuleDict({"loss": loss}).train().requires_grad_(True)
    loss(z, x).backward()
    with pytest.raises(ValueError, match="`target`"):
        loss(z, x[:2])
    assert same(everything(task), before)
    _ = loss(z, x)
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    assert list(parent.parameters()) == [] and parent.state_dict() == {}
    reference.train().requires_grad_(True)  # by somebody who holds it too
    loss(z, x)
    assert not any(module.training for module in reference.modules())
    parent.to(torch.float64)
    assert reference[0].weight.dtype == torch.float64 and task[0].weight.dtype == torch.float32


def test_the_reference_sees_the_targets_once_for_all_losses() -> None:
    task, reference, (z, x) = network(0), FeatureExtractor(network(1), ["4"]), pair()
    hlf, matching = HLFLoss(FeatureExtractor(task, ["4"]), reference), FeatureMatchingLoss(task, reference, ["4"])
    alone = (hlf(z, x), matching(z, x))
    seen: list[bool] = []
    reference.network[0].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with reference.shared():
        shared = (hlf(z, x), matching(z, x))
    assert seen == [False, True]  # x once, z once
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def test_one_network_cannot_be_both() -> None:
    net = network()
    for other in (net, nn.Sequential(net), FeatureExtractor(net, ["4"])):
        with pytest.raises(ValueError, match="`reference` should be another network than `task`"):
            HLFLoss(net, other, ["4"])
        with pytest.raises(ValueError, match="`teacher` should be another network than `student`"):
            FeatureMatchingLoss(net, other, ["4"])
    with pytest.raises(ValueError, match=r"nn\.Module"):
        HLFLoss(net, "resnet18", ["4"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`layers` should name modules"):
        HLFLoss(net, network(1), ["9"])
    with pytest.raises(ValueError, match="`distance`"):
        FeatureMatchingLoss(net, network(1), ["4"], distance="cosine")  # type: ignore[arg-type]


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
    assert float(loss(images, images)) == 0
    assert float(loss(images, [image.flip(-1) for image in images])) > 0
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
