"""The contract of objectives for FeatureMatchingLoss, whose gradient reaches the weights of the student."""

import copy
import functools
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from restoreloss import FeatureExtractor, FeatureMatchingLoss, HLFLoss, TDPLoss
from tests.helpers.hlf_fm import MEAN, STD, everything, matching, network, pair, same
from tests.helpers.networks import as_if_trained, live_detector, live_recogniser

# the contract of FM, as test_contract.py has it of the others: the gradient reaches the student's weights

DISTANCES = ("l1", "mse", "rms", "l2")


def value_and_gradients(loss: FeatureMatchingLoss, z: Any, x: Any, seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
    parameters = list(loss.student.network.parameters())
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(seed)  # the student's dropout
    value = loss(z, x)
    value.backward()
    return value.detach(), [None if p.grad is None else p.grad.clone() for p in parameters]


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_reaches_the_weights_of_the_student_and_nothing_else(distance: str) -> None:
    (loss, student, teacher), (z, x) = matching(distance), pair()
    x.requires_grad_()
    assert loss(z, x).isfinite() and loss(z, x) > 0
    terms = loss.terms(z, x)
    assert list(terms) == ["stem.1", "stage"]
    for term in terms.values():
        (gradient,) = torch.autograd.grad(term, student.stem[0].weight, retain_graph=True)
        assert gradient.isfinite().all() and gradient.any()
    loss(z, x).backward()
    assert z.grad is None and x.grad is None and all(p.grad is None for p in teacher.parameters())
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, _ in student.named_parameters() if not name.startswith("head")}
    with torch.no_grad():
        assert not loss(z, x).requires_grad


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matching_is_a_float64_loop_over_the_features(distance: str, reduction: Any) -> None:
    loss, student, teacher = matching(distance, reduction=reduction, layer_weights={"stem.1": 0.3, "stage": 2.0})
    student.double().eval(), teacher.double()
    statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in statistics)
    z, x = (image.detach().double() for image in pair())
    found, expected = loss(z, x), torch.zeros(4, dtype=torch.float64)
    for depth, weight in ((2, 0.3), (3, 2.0)):
        for n in range(4):
            one, other = (
                nn.Sequential(*net.stem[:2], *([net.stem[2], net.stage] if depth == 3 else []))(
                    (image[n : n + 1] - mean) / std
                )
                for net, image in ((student, z), (teacher, x))
            )
            d = [a - b for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)]
            squares = math.fsum(e * e for e in d)
            expected[n] += (
                weight
                * {
                    "l1": math.fsum(map(abs, d)) / len(d),
                    "mse": squares / len(d),
                    "rms": math.sqrt(squares / len(d)),
                    "l2": math.sqrt(squares),
                }[distance]
            )
    wanted = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-9, atol=0)


def test_gradient_of_the_weights_is_that_of_finite_differences() -> None:
    student = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Tanh(), nn.Conv2d(2, 2, 2)).double()
    loss = FeatureMatchingLoss(student, copy.deepcopy(student), ["2", "3"], distance="rms", normalize=None)
    z, x = (image.detach().double()[:2, :, :3, :3] for image in pair())

    def of(weight: Tensor) -> Tensor:
        return functional_call(Holder(loss), {"student.0.weight": weight}, (z, x))

    assert torch.autograd.gradcheck(of, student[0].weight.detach().clone().requires_grad_())


class Holder(nn.Module):
    """Shows the student to ``functional_call``."""

    def __init__(self, loss: FeatureMatchingLoss) -> None:
        super().__init__()
        self.student, self.loss = loss.student.network, loss

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.loss(z, x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, functools.partial(nn.InstanceNorm2d, track_running_stats=True)])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_statistics_of_the_student_rest_and_its_mode_is_kept(norm: Any, error: type[BaseException] | None) -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4, momentum=0.5), nn.Dropout(), nn.Conv2d(4, 2, 1)).train()
    loss, (z, x) = FeatureMatchingLoss(student, copy.deepcopy(student), ["3"]), pair()
    student[2].eval()
    student[3].bias.requires_grad_(False)
    plain = copy.deepcopy(student)
    before = everything(student)
    if error is not None:

        def fail(*_: Any) -> None:
            raise error("out of memory, say")

        handle = student[3].register_forward_pre_hook(fail)
        with pytest.raises(error):
            loss(z, x)
        handle.remove()
    found = loss.terms(z, x)["3"]
    assert same(everything(student), before)
    # all the same it is the batch by which the student normalises
    wanted = (plain((z - MEAN) / STD) - loss.teacher.network((x - MEAN) / STD)).abs().mean()
    torch.testing.assert_close(found, wanted)
    student(z)
    assert not same(everything(student), before)  # and it goes on counting


@pytest.mark.parametrize("point", ["equal", "zeros", "constants"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_finite_and_zero_at_singular_points(distance: Any, dtype: torch.dtype, point: str) -> None:
    student = live_recogniser().eval()
    loss = FeatureMatchingLoss(student, copy.deepcopy(student), ["stage"], distance=distance)
    x = pair()[1].to(dtype)
    x = {"equal": x, "zeros": torch.zeros_like(x), "constants": torch.full_like(x, 0.5)}[point]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        value, gradients = value_and_gradients(loss, x, x.clone())
    assert value == 0 and value.dtype == torch.float32
    assert all(g is None or not g.any() for g in gradients)  # a NaN is something
    other, gradients = value_and_gradients(loss, x, x + 0.01)
    assert other.isfinite() and all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (16, 11)], ids=str)
def test_matching_takes_any_size(size: tuple[int, int]) -> None:
    loss, *_ = matching("rms")
    z, x = torch.rand(2, 2, 3, *size, generator=torch.Generator().manual_seed(0))
    value, gradients = value_and_gradients(loss, z, x)
    assert value.isfinite() and value > 0
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_train_students_of_their_own(copied: Any) -> None:
    (loss, student, teacher), (z, x) = matching(), pair()
    expected = value_and_gradients(loss, z, x)
    student.zero_grad()
    other = copied(loss)
    value, gradients = value_and_gradients(other, z, x)
    assert torch.equal(value, expected[0]) and same(dict(enumerate(gradients)), dict(enumerate(expected[1])))
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))
    other.teacher.network.train()  # its teacher too is held at rest
    assert torch.equal(value_and_gradients(other, z, x)[0], value)


def test_compiled_matching_gives_the_same_gradients() -> None:
    torch._dynamo.reset()
    (loss, student, _), (z, x) = matching(), pair()
    expected, before = value_and_gradients(loss, z, x), everything(student)
    compiled = torch.compile(loss, backend="aot_eager")
    student.zero_grad()
    torch.manual_seed(0)
    value = compiled(z, x)
    value.backward()
    torch.testing.assert_close(value.detach(), expected[0])
    for parameter, wanted in zip(student.parameters(), expected[1], strict=True):
        assert (parameter.grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-7)
    assert same(everything(student), before)


def test_a_recorded_pass_gives_the_gradients_of_a_direct_one() -> None:
    (loss, student, _), (z, x) = matching(), pair()
    expected = value_and_gradients(loss, z, x)
    student.zero_grad()
    torch.manual_seed(0)
    with loss.student.recording() as seen:
        student((z.detach() - MEAN) / STD)
    value = loss(seen, x)
    value.backward()
    assert torch.equal(value.detach(), expected[0])
    assert same({n: p.grad for n, p in enumerate(student.parameters())}, dict(enumerate(expected[1])))
    assert [student.stem[1].num_batches_tracked, student.stage[2].num_batches_tracked] == [1, 1]


def test_the_teacher_is_frozen_for_good_and_the_student_is_borrowed() -> None:
    (loss, student, teacher), (z, x) = matching(), pair()
    parent = nn.Sequential(loss).train().requires_grad_(True)
    assert (
        not list(parent.parameters()) and not parent.state_dict() and not set(student.modules()) & {*parent.modules()}
    )
    teacher.train().requires_grad_(True)  # by somebody who holds it too
    state = copy.deepcopy(teacher.state_dict())
    value, _ = value_and_gradients(loss, z, x)
    assert not any(part.training for part in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert same(dict(teacher.state_dict()), dict(state)) and student.training
    parent.eval().double()
    assert student.training and student.head.weight.dtype == torch.float32
    assert teacher.head.weight.dtype == torch.float64
    torch.testing.assert_close(value_and_gradients(loss, z, x)[0].float(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_following_the_gradient_brings_the_student_to_its_teacher(distance: Any) -> None:
    (loss, student, _), (_, x) = matching(distance), pair()
    student.eval()
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(x, x)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.4 * values[0]


def test_extractors_may_watch_more_than_is_matched() -> None:
    student, teacher, (z, x) = network(0).eval(), network(1), pair()
    expected = FeatureMatchingLoss(student, teacher, ["4"])(z, x)
    watching = [FeatureExtractor(net, ["0", "4"]) for net in (student, teacher)]
    for one, other, layers in (
        (watching[0], watching[1], ["4"]),
        (student, watching[1], ["4"]),
        (watching[0], teacher, ["4"]),
        (FeatureExtractor(student, ["4"]), watching[1], None),
        (FeatureExtractor(student, ["4"]), teacher, None),  # the student's layers are the teacher's
    ):
        loss = FeatureMatchingLoss(one, other, layers)
        assert list(loss.terms(z, x)) == ["4"] and torch.equal(loss(z, x), expected)
    with watching[0].recording() as seen:
        student((z.detach() - MEAN) / STD)
    assert torch.equal(FeatureMatchingLoss(*watching, ["4"])(seen, x), expected)
    with pytest.raises(ValueError, match=r"`layers` should be of the shared extractor, \['0'\]"):
        FeatureMatchingLoss(FeatureExtractor(student, ["4"]), FeatureExtractor(teacher, ["0"]))


IMAGE = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("student_images", "teacher_images", "message"),
    [
        (IMAGE, IMAGE[:1], "`teacher_images` should have the shape of `student_images`"),
        (IMAGE.byte(), IMAGE, "`student_images` should be floating point"),
        (IMAGE, IMAGE.byte(), "`teacher_images` should be floating point"),
        (IMAGE[0], IMAGE[0], r"`student_images` should have shape \(N, C, H, W\)"),
        (IMAGE, IMAGE.double(), "`teacher_images` should have the dtype of `student_images`"),
        (IMAGE, IMAGE.to("meta"), "`teacher_images` should be on the device of `student_images`"),
        (list(IMAGE), [IMAGE[0]], "`teacher_images` should be as many images as `student_images`"),
        ([], [], "`teacher_images` should be as many images as `student_images`, at least 1"),
        ({}, IMAGE, r"`student_images` should hold features of \['stem.1', 'stage'\], found \[\]"),
        ({"stem.1": IMAGE, "stage": IMAGE}, IMAGE, "Layer 'stem.1' should return one shape"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_name(student_images: Any, teacher_images: Any, message: str) -> None:
    loss, student, _ = matching()
    before = everything(student)
    with pytest.raises(ValueError, match=message):
        loss(student_images, teacher_images)
    assert same(everything(student), before)


@pytest.mark.parametrize("build", [HLFLoss, FeatureMatchingLoss])
def test_a_wrong_range_is_said_once(build: Any) -> None:
    loss, (z, x) = build(network(0), network(1), ["4"]), pair()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            loss(255 * z, 255 * x)
    messages = [str(warning.message) for warning in said if "input_range" in str(warning.message)]
    assert len(messages) == 1
    names = ("restored", "target") if build is HLFLoss else ("teacher_images", "student_images")
    assert all(f"`{name}` spans" in messages[0] for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        networks = [as_if_trained(network(seed)) for seed in (0, 1)]
        build(*networks, ["4"], normalize="imagenet")(z, x)
        build(*networks, ["4"], normalize="imagenet", input_range=(0, 255))(255 * z, 255 * x)


def test_lists_of_images_get_no_gradient_from_matching_and_theirs_from_hlf() -> None:
    student, teacher = live_detector().eval(), live_detector()
    teacher.backbone.body.stem[0].weight.data.mul_(1.5)
    images, targets = ([torch.rand(3, 20, 17), torch.rand(3, 16, 30)] for _ in range(2))
    for image in images:
        image.requires_grad_()
    FeatureMatchingLoss(student, teacher)(images, [image.detach() for image in images]).backward()
    assert all(image.grad is None for image in images)
    assert student.backbone.body.stem[0].weight.grad.any()
    loss = HLFLoss(student.train(), teacher)
    before = everything(student)
    value = loss(images, targets)
    torch.testing.assert_close(value, (TDPLoss(student)(images, targets) + TDPLoss(teacher)(images, targets)) / 2)
    value.backward()
    assert all(image.grad is not None and image.grad.any() for image in images)
    assert same(everything(student), before)
