"""Does half precision change where a loss pulls? On photographs, every objective and every recipe.

What each case is, and how it is measured, is in examples/benchmarks/mixed_precision.py.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.benchmarks import mixed_precision
from examples.benchmarks.mixed_precision import PRECISIONS, Batch, cosine, measure, seeded, value_and_gradients
from restoreloss import Alternation, DiffLoss, GradientOrthogonality, ParameterImportance, Phase, TDPLoss, small_prior
from tests.contract import objectives

CASES = mixed_precision.CASES
# in bfloat16 these fall short of 0.99 at the image: the network looks at two nearly equal pictures, and its own
# activations, rounded to 8 bits, differ by more than what the pictures differ by
SHORT = {
    "DiffLoss, timesteps from 750": 0.5,
    "TDPLoss(resnet18)": 0.9,
    "TDPLoss, mse": 0.9,
    "TDPLoss, four layers": 0.9,
    "HLFLoss(resnet18, resnet18)": 0.9,
    "WeightedSum of L1, DiffLoss, TDPLoss": 0.9,
    # small differences change sign; near 0.99, on the one side or the other as the processor rounds
    "DiffLoss, l1": 0.97,
    "DiffLoss-l1": 0.95,
    "TDPLoss-l1": 0.97,
    "HLFLoss-l1": 0.97,
    "DiffLoss-crop": 0.95,
}
SLOW_IN_FLOAT16 = [name for name in CASES if "Diff" in name]  # a CPU takes fifteen times as long for its convolutions


@pytest.fixture(scope="module")
def batch() -> Batch:
    return mixed_precision.photographs(2)


@pytest.fixture(scope="module")
def restorer() -> nn.Module:
    return mixed_precision.restorer()


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "bfloat16") for name in CASES]
    + [
        pytest.param(name, "float16", marks=[pytest.mark.slow] if name in SLOW_IN_FLOAT16 else [])
        for name in CASES
    ],
)  # fmt: skip
def test_every_objective_pulls_where_it_does_in_single_precision(
    name: str, precision: str, batch: Batch, restorer: nn.Module
) -> None:
    cosines = measure(CASES[name](), restorer, batch, {precision: PRECISIONS[precision]})[precision]
    enough = SHORT.get(name, 0.99) if precision == "bfloat16" else 0.99
    assert all(value >= enough for value in cosines), cosines  # a nan is not


@pytest.mark.parametrize("name", [name for name in SHORT if name in CASES])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_outside_autocast_it_is_that_of_single_precision(name: str, precision: torch.dtype, batch: Batch) -> None:
    loss = seeded(CASES[name]())
    image = batch.degraded.to(precision).requires_grad_()  # what a restorer under autocast gives
    same = image.detach().float().requires_grad_()

    def outside() -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return loss(image, batch.clean)

    (half,) = value_and_gradients(outside, [image], precision)[1]
    (exact,) = value_and_gradients(lambda: loss(same, batch.clean), [same], None)[1]
    assert cosine([half], [exact]) > 0.999


@pytest.mark.parametrize("case", objectives.CASES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_small_networks_of_the_contract_as_well(
    case: objectives.Case, precision: str, batch: Batch, restorer: nn.Module
) -> None:
    small = Batch(batch.degraded[:, :, :16, :16], batch.clean[:, :, :16, :16])
    cosines = measure(case.build(), restorer, small, {precision: PRECISIONS[precision]})[precision]
    enough = SHORT.get(case.name, 0.99) if precision == "bfloat16" else 0.99
    assert all(value >= enough for value in cosines), cosines


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    "precision", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=PRECISIONS
)
def test_what_trains_other_networks(number: int, precision: torch.dtype, batch: Batch, restorer: nn.Module) -> None:
    step, tensors = list(mixed_precision.others(restorer, batch).values())[number]
    _, exact = value_and_gradients(step, tensors, None)
    value, half = value_and_gradients(step, tensors, precision)
    enough = 0.99 if number else 0.98  # matched features, of which an L1 distance has the signs
    assert value.isfinite() and cosine(half, exact) >= enough


# the recipes


def moved(before: nn.Module, after: nn.Module) -> list[Tensor]:
    return [q.detach() - p.detach() for p, q in zip(before.parameters(), after.parameters(), strict=True)]


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_alternation(precision: torch.dtype, batch: Batch, restorer: nn.Module) -> None:
    steps = []
    for half in (None, precision):
        network, reader = copy.deepcopy(restorer), copy.deepcopy(mixed_precision.reader())
        tdp, pixel, task = TDPLoss(reader), nn.L1Loss(), nn.CrossEntropyLoss()

        def restore(batch: Batch, network: Any = network, tdp: Any = tdp, pixel: Any = pixel) -> dict[str, Tensor]:
            restored = network(batch.degraded)
            return {"pixel": pixel(restored, batch.clean), "tdp": 0.01 * tdp(restored, batch.clean)}

        def recognise(batch: Batch, reader: Any = reader, task: Any = task) -> Tensor:
            return task(reader(batch.clean), torch.tensor([3, 7]))

        training = Alternation(
            [
                Phase("restorer", [network], restore, torch.optim.SGD(network.parameters(), lr=0.1), max_norm=1.0),
                Phase("reader", [reader], recognise, torch.optim.SGD(reader.parameters(), lr=0.1)),
            ],
            precision=half,
            scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8) if half == torch.float16 else None,
        )
        logs = training.step(batch)
        assert all(value.isfinite() for value in logs.values())
        steps.append(moved(restorer, network))
    assert any(step.any() for step in steps[0]) and cosine(*steps) >= 0.99


def objective_pair(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """To take noise out, and to make dark pictures bright."""
    reconstruction = nn.functional.mse_loss(network(0.7 * batch.clean), batch.clean)
    return nn.functional.mse_loss(network(batch.degraded), batch.clean), reconstruction


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("policy", ["conflict", "full"])
def test_projection(policy: Any, precision: torch.dtype, batch: Batch, restorer: nn.Module) -> None:
    written = []
    for half in (None, precision):
        network = copy.deepcopy(restorer)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=half == torch.float16, init_scale=2.0**8)
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            losses = objective_pair(network, batch)
        GradientOrthogonality(network.parameters()).project(*map(scaler.scale, losses), policy=policy)
        scaler.unscale_(optimizer)
        written.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    lengths = [torch.cat([g.flatten() for g in side]).norm() for side in written]
    assert cosine(*written) >= 0.99 and lengths[1] == pytest.approx(float(lengths[0]), rel=0.05)  # unscaled


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_the_loss_that_turns_gradients_apart(precision: torch.dtype, batch: Batch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 3, 3, padding=1))
    weights = list(network.parameters())
    halves = [Batch(batch.degraded[k : k + 1], batch.clean[k : k + 1]) for k in range(2)]

    def penalty() -> Tensor:
        sides = zip(*(objective_pair(network, half) for half in halves), strict=True)
        return GradientOrthogonality(network[0].parameters())(*map(list, sides))

    one, exact = value_and_gradients(penalty, weights, None)
    other, half = value_and_gradients(penalty, weights, precision)
    assert other.item() == pytest.approx(one.item(), abs=0.02) and cosine(half, exact) >= 0.99


def test_importance_is_added_after_the_gradients_are_unscaled(batch: Batch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))
    importance = ParameterImportance(network, strength=1e3)

    def loss_fn(model: nn.Module, pictures: Tensor) -> Tensor:
        return (model(pictures) - pictures).square().mean()

    with torch.autocast("cpu", torch.float16):
        importance.accumulate(loss_fn, [batch.clean])
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in importance.importance().values())
    with torch.no_grad():
        for p in network.parameters():
            p += 0.01
    found = []
    for half in (None, torch.float16):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", enabled=half is not None, init_scale=2.0**8)
        with torch.autocast("cpu", torch.float16, enabled=half is not None):
            loss = loss_fn(network, batch.degraded)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        importance.apply_()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert cosine(*found) >= 0.999
    lengths = [torch.cat([g.flatten() for g in side]).norm() for side in found]
    assert lengths[1] == pytest.approx(float(lengths[0]), rel=0.02)  # before it, the penalty would be scaled down


def test_a_step_that_overflows_is_skipped_and_the_next_is_made(batch: Batch, restorer: nn.Module) -> None:
    network, loss = copy.deepcopy(restorer), TDPLoss(mixed_precision.reader())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    for finite in (False, True):
        before = copy.deepcopy(network)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss(network(batch.degraded), batch.clean)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update(2.0**4)
        assert any(step.any() for step in moved(before, network)) == finite
    assert all(p.isfinite().all() for p in network.parameters())


def test_a_frozen_prior_may_be_half_by_itself(batch: Batch) -> None:
    image = batch.degraded.clone().requires_grad_()
    gradients = []
    for dtype in (None, torch.bfloat16):
        loss = seeded(DiffLoss(small_prior().to(dtype)))
        gradients.append(value_and_gradients(lambda loss=loss: loss(image, batch.clean), [image], None)[1])  # type: ignore[misc]
    assert cosine(*gradients) >= 0.99
