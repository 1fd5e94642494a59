"""ParameterImportance over several trainings: a penalty for each, or one that decays."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from restoreloss import ParameterImportance
from tests.helpers.importance import BATCH, ESTIMATORS, Untraceable, linear, measured, normal, shift, squared


@pytest.mark.parametrize("traceable", [True, False])
def test_penalties_of_all_tasks_add_up(traceable: bool) -> None:
    inner = linear()
    model = inner if traceable else Untraceable(inner)
    importance = ParameterImportance(model, strength=1.0)
    importance.accumulate(squared, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])])  # (1, 4) at (1, 1)
    inner.weight.data.copy_(torch.tensor([[2.0, 1.0]]))
    importance.begin_task()
    assert importance.tasks == 2
    importance.accumulate(squared, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])])  # (2, 4) at (2, 1)
    inner.weight.data.copy_(torch.tensor([[2.0, 1.5]]))
    # of the first task d = (1, .5), of the second (0, .5)
    expected = (1 + 0.5) + (4 * 0.5 + 0.5 * 16 / 4) + (4 * 0.5 + 0.5 * 16 / 4)
    assert importance().item() == pytest.approx(expected)
    assert [next(iter(importance.importance(task).values())).tolist() for task in (0, 1)] == [[[1, 4]], [[2, 4]]]
    importance.apply_()
    torch.testing.assert_close(inner.weight.grad, torch.tensor([[1.0 + 1.0, 2 * (4 + 16 * 0.5)]]))


def double(seed: int = 0) -> nn.Module:
    """Two layers in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def gradients(model: nn.Module, sample: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(squared(model, sample[None]), list(model.parameters())))


@pytest.mark.parametrize(("estimator", "power"), [("taylor2", 1), ("fisher", 2)])
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_online_importances_decay_around_the_newest_parameters(estimator: Any, power: int, decay: float) -> None:
    """After each of three trainings F* becomes decay F* + F, by a loop of its own over samples."""
    model = double()
    importance = ParameterImportance(model, estimator=estimator, strength=1.5)
    omega = [torch.zeros_like(p) for p in model.parameters()]
    for task in range(3):
        shift(model, seed=10 * task)
        data = normal(5, 3, seed=task, dtype=torch.float64)
        if task:
            importance.begin_task(decay=decay)
        importance.accumulate(squared, [data[:2]])
        assert importance.accumulate(squared, [data[2:4], data[4:]]) == 5  # The past counts once, not once a call.
        own = [
            torch.stack(one).abs().pow(power).mean(0) for one in zip(*(gradients(model, x) for x in data), strict=True)
        ]
        omega = [decay * past + new for past, new in zip(omega, own, strict=True)]
        torch.testing.assert_close(list(importance.importance().values()), omega, rtol=1e-12, atol=0.0)
    assert importance.tasks == 1 and importance().item() == 0
    anchors = [p.detach().clone() for p in model.parameters()]
    shift(model, seed=50)
    moved = [p.detach() - anchor for p, anchor in zip(model.parameters(), anchors, strict=True)]
    pairs = list(zip(omega, moved, strict=True))
    expected = sum(float((0.5 * o * d**2).sum()) for o, d in pairs)
    if estimator == "taylor2":
        expected = sum(float((o * d.abs() + 0.5 * (o * d) ** 2).sum()) for o, d in pairs)
    penalty = importance()
    assert penalty.item() == pytest.approx(1.5 * expected, rel=1e-12)
    closed = torch.autograd.grad(penalty, list(model.parameters()))
    importance.apply_()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(closed), rtol=1e-10, atol=1e-14)


def test_what_decays_needs_a_measurement_of_the_new_task() -> None:
    importance = measured()
    importance.begin_task(decay=0.5)
    for call in (importance, importance.apply_, importance.begin_task):
        with pytest.raises(ValueError, match="not measured"):
            call()
    for wrong in (1.5, -0.1, "0.9", True, float("nan")):
        with pytest.raises(ValueError, match="`decay` should be a finite number of at least 0 and at most 1, found"):
            measured().begin_task(decay=wrong)  # type: ignore[arg-type]


def test_a_decayed_penalty_stands_beside_an_older_one() -> None:
    """Only the newest is folded; the first keeps its own anchor."""
    model = linear()
    importance = measured(model, strength=1.0, estimator="fisher")
    first = importance.importance(0)["weight"].clone()
    model.weight.data += 1
    importance.begin_task()
    importance.accumulate(squared, [BATCH])
    second = importance.importance(1)["weight"].clone()
    model.weight.data += 1
    importance.begin_task(decay=0.5)
    importance.accumulate(squared, [BATCH])
    assert importance.tasks == 2
    torch.testing.assert_close(importance.importance(0)["weight"], first, rtol=0, atol=0)
    alone = ParameterImportance(model, estimator="fisher")
    alone.accumulate(squared, [BATCH])
    torch.testing.assert_close(importance.importance(1)["weight"], 0.5 * second + alone.importance()["weight"])
    assert importance().item() == pytest.approx(0.5 * 4 * first.sum().item())  # Only the first has moved, by 2.


def test_frozen_parameters_keep_what_decayed_and_new_ones_begin_with_their_own() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1)})
    importance = ParameterImportance(model, strength=1.0)

    def through(model: Any, x: Tensor) -> Tensor:
        result: Tensor = sum(part(model["a"](x)).square().mean() for name, part in model.items() if name != "a")
        return result

    importance.accumulate(through, [normal(4, 2)])
    before = importance.importance()
    model["a"].requires_grad_(False)
    model["c"] = nn.Linear(2, 1)
    importance.begin_task(decay=0.25)
    importance.accumulate(through, [normal(4, 2, seed=1)])
    after = importance.importance()
    torch.testing.assert_close(after["a.weight"], 0.25 * before["a.weight"], rtol=0, atol=0)
    assert set(after) == {*before, "c.weight", "c.bias"}
    fresh = ParameterImportance(model)
    fresh.accumulate(through, [normal(4, 2, seed=1)])
    torch.testing.assert_close(after["c.weight"], fresh.importance()["c.weight"], rtol=0, atol=0)


def test_a_head_that_has_grown_is_an_error_or_begins_anew() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    importance = measured(model)
    model[1] = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"`1.weight` should be of shape \(1, 2\), .* found \(3, 2\)"):
        importance.begin_task(decay=0.5)
    assert importance.tasks == 1 and importance.importance()["1.weight"].shape == (1, 2)
    importance.layer_weights = {"1": 0.0}
    importance.begin_task(decay=0.5)
    importance.accumulate(squared, [BATCH])
    assert importance.importance()["1.weight"].shape == (3, 2) and importance().item() == 0


def test_l2sp_adds_itself_to_what_decayed() -> None:
    model = linear()
    importance = ParameterImportance(model, estimator="l2sp", strength=1.0)
    importance.begin_task(decay=0.5)
    importance.begin_task(decay=0.5)
    model.weight.data += 1
    assert importance().item() == pytest.approx(0.5 * 2 * (1 + 0.5 + 0.25))


@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
def test_what_decays_is_saved_loaded_and_refined(estimator: Any) -> None:
    model = linear()
    importance = measured(model, strength=1.0, estimator=estimator)
    model.weight.data += 1
    importance.begin_task(decay=0.5)
    importance.accumulate(squared, [BATCH])
    again = ParameterImportance(copy.deepcopy(model), strength=1.0, estimator=estimator)
    result = again.load_state_dict(importance.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    for one in (importance, again):
        one.accumulate(squared, [2 * BATCH])
        one._model[0].weight.data += 1
    assert again.importance()["weight"].tolist() == importance.importance()["weight"].tolist()
    assert again().item() == importance().item() > 0


def test_importances_of_another_estimator_are_refused() -> None:
    fisher, taylor = (ParameterImportance(linear(), estimator=kind) for kind in ("fisher", "taylor2"))
    fisher.accumulate(squared, [BATCH])
    with pytest.raises(ValueError, match="importances of 'taylor2', found those of 'fisher'"):
        taylor.load_state_dict(fisher.state_dict())
