"""Are the parameters that matter held in place, by the numbers of the paper and by nothing else?"""

import copy
import io
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from restoreloss import ParameterImportance
from tests.helpers.networks import tiny_unet
from tests.helpers.processes import ROOT

WORKER = ROOT / "tests" / "unit" / "regularizers" / "regularizers_worker.py"
ESTIMATORS: list[Any] = ["taylor2", "fisher", "mas", "gn"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def squared(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def answers(model: Any, batch: Tensor) -> Tensor:
    return model(batch)


def what(estimator: str) -> Callable[[Any, Any], Tensor]:
    return answers if estimator in ("mas", "gn") else squared


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Linear(2, 1, bias=False, dtype=dtype)
    nn.init.ones_(model.weight)
    return model


def network() -> nn.Sequential:
    """Smooth, with batch norm whose statistics are not those of a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.5), nn.Conv2d(3, 2, 1)
        )
    model[1].running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
    return model.train()


def shift(model: nn.Module, seed: int = 7) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=seed + number).to(parameter.dtype)


def see(model: nn.Module) -> tuple[Any, ...]:
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = see(model)
    assert after[:2] == before[:2]
    for one, other in zip(after[2], before[2], strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert all(torch.equal(value, before[3][name]) for name, value in after[3].items())


def written_out(model: nn.Module, batch: Tensor, estimator: str) -> dict[str, Tensor]:
    """Mean over samples in float64 (of "gn" without its signs: for outputs of one number they cancel)."""
    double = copy.deepcopy(model).double().eval()
    sums = {name: torch.zeros_like(p) for name, p in double.named_parameters()}
    for sample in batch.double():
        double.zero_grad()
        output = double(sample[None])
        value = {"taylor2": output.square().mean(), "fisher": output.square().mean(), "mas": output.square().sum(),
                 "gn": output.sum()}[estimator]  # fmt: skip
        value.backward()
        for name, p in double.named_parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            sums[name] += gradient.square() if estimator in ("fisher", "gn") else gradient.abs()
    return {name: value / len(batch) for name, value in sums.items()}


def charge(model: nn.Module, anchor: dict[str, Tensor], omega: dict[str, Tensor], estimator: str) -> float:
    total = 0.0
    for name, p in model.named_parameters():
        d, o = p.detach().double() - anchor[name].double(), omega[name]
        total += float(
            {
                "taylor2": o * d.abs() + 0.5 * o**2 * d**2,
                "fisher": 0.5 * o * d**2,
                "mas": o * d**2,
                "gn": 0.5 * o * d**2,
            }[estimator].sum()
        )
    return total


@pytest.mark.parametrize(
    ("estimator", "omega", "penalty", "gradient"),
    [
        ("taylor2", [1.0, 4.0], 2.125, [1.5, -8.0]),
        ("fisher", [2.0, 32.0], 0.5 * (2 / 4 + 32 / 16), [1.0, -8.0]),
        ("mas", [1.0, 4.0], 1 / 4 + 4 / 16, [1.0, -2.0]),
        ("gn", [0.5, 2.0], 0.5 * (0.5 / 4 + 2 / 16), [0.25, -0.5]),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 2, 32])
def test_the_closed_form(estimator: Any, omega: Any, penalty: float, gradient: Any, chunk_size: int) -> None:
    model = linear()
    importance = ParameterImportance(model, estimator=estimator, strength=1.0, chunk_size=chunk_size)
    assert importance.accumulate(what(estimator), [torch.tensor([[1.0, 0.0], [0.0, 2.0]])]) == 2
    torch.testing.assert_close(importance.importance()["weight"], torch.tensor([omega]))
    assert importance().item() == 0
    model.weight.data += torch.tensor([0.5, -0.25])
    loss = importance()
    loss.backward()
    assert loss.item() == pytest.approx(penalty)
    torch.testing.assert_close(model.weight.grad, torch.tensor([gradient]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2]])
def test_importance_and_penalty_are_those_of_a_loop_over_samples(estimator: Any, sizes: list[int]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    start, batch = copy.deepcopy(model.state_dict()), normal(6, 3)
    importance = ParameterImportance(model, estimator=estimator, strength=0.7, chunk_size=4)
    assert importance.accumulate(what(estimator), batch.split(sizes)) == 6
    expected = written_out(model, batch, estimator)
    for name, value in importance.importance().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
    shift(model)
    found = importance()
    assert found.item() == pytest.approx(0.7 * charge(model, start, expected, estimator), rel=1e-4)


def test_more_calls_refine_the_mean() -> None:
    model, batch = linear(), normal(7, 2)
    whole, parts = ParameterImportance(model), ParameterImportance(model)
    whole.accumulate(squared, [batch])
    assert [parts.accumulate(squared, [part]) for part in batch.split([1, 4, 2])] == [1, 5, 7]
    torch.testing.assert_close(parts.importance()["weight"], whole.importance()["weight"])


def test_the_signs_of_gn_are_drawn_anew_for_every_number_and_every_sample() -> None:
    """E (d v^T f)^2 for f = (w x, w x): v is (1, 1) half of the time, and then 4, else 0."""
    model = nn.Linear(1, 1, bias=False)
    importance = ParameterImportance(model, estimator="gn")
    importance.accumulate(
        lambda model, x: model(x).expand(-1, 2), [torch.ones(2000, 1)], generator=torch.Generator().manual_seed(0)
    )
    assert importance.importance()["weight"].item() == pytest.approx(2.0, abs=0.2)
    again = ParameterImportance(model, estimator="gn")
    before = torch.get_rng_state()
    again.accumulate(
        lambda model, x: model(x).expand(-1, 2), [torch.ones(2000, 1)], generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.importance()["weight"], importance.importance()["weight"])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(ESTIMATORS),
    st.sampled_from(["sum", "mean"]),
    st.floats(0, 3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
def test_apply_adds_the_gradient_of_the_penalty(
    estimator: Any, normalize: Any, strength: float, dtype: torch.dtype, fresh: bool
) -> None:
    model = nn.Linear(3, 2).to(dtype)
    importance = ParameterImportance(
        model, estimator=estimator, normalize=normalize, strength=strength, layer_weights={"bias": 0.5}
    )
    importance.accumulate(what(estimator), [normal(5, 3, dtype=dtype)])
    shift(model)
    importance.begin_task()
    importance.accumulate(what(estimator), [normal(5, 3, seed=3, dtype=dtype)])
    shift(model)
    results = []
    for way in (lambda: importance().backward(), importance.apply_):
        for p in model.parameters():
            p.grad = None if fresh else torch.ones_like(p)
        way()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(results[1]) == 2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)


def measured(model: nn.Module | None = None, **options: Any) -> ParameterImportance:
    model = linear() if model is None else model
    importance = ParameterImportance(model, **options)
    importance.accumulate(squared, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
    return importance


def test_a_closure_is_refused() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measured(model).attach(optimizer)
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(ValueError, match="closure computes the gradients anew"):
            call()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
def test_an_attached_penalty_trains_as_one_that_is_in_the_loss(options: dict[str, float]) -> None:
    trained = []
    for attached in (True, False):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.copy_(normal(2, 3)), model.bias.zero_()
        importance = ParameterImportance(model, strength=0.5)
        importance.accumulate(squared, [normal(4, 3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
        handle = importance.attach(optimizer) if attached else None
        for step in range(6):
            optimizer.zero_grad()
            loss = (model(normal(4, 3, seed=step)) - 1).square().mean()
            if step < 5:
                loss = loss if attached else loss + importance()
            elif handle is not None:
                handle.remove()
            loss.backward()
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*trained)
    assert (trained[0] - torch.cat([normal(2, 3).flatten(), torch.zeros(2)])).abs().max() > 0.01


@pytest.mark.parametrize("unscaled", [False, True])
def test_scaled_gradients_of_a_fused_optimizer_are_refused_until_they_are_unscaled(unscaled: bool) -> None:
    model, start = linear(), torch.ones(1, 2)
    importance = measured(model, strength=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    importance.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(squared(model, torch.ones(1, 2))).backward()
    if unscaled:
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert not torch.equal(model.weight, start)
    else:
        with pytest.raises(ValueError, match=r"call `scaler.unscale_\(optimizer\)`"):
            scaler.step(optimizer)
        assert torch.equal(model.weight, start)


def test_without_fusion_the_scaler_hands_out_true_gradients() -> None:
    weights = []
    for scaled in (True, False):
        model = linear()
        importance = measured(model, strength=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        importance.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(squared(model, torch.ones(1, 2))).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights)


class Untraceable(nn.Module):
    """Reads a number of its input, which ``torch.func`` cannot see."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Any:
        return self.inner(*inputs) * (1.0 if float(inputs[0].detach().sum()) > -1e9 else 0.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_by_one_gives_what_all_at_once_gives(estimator: Any, caplog: pytest.LogCaptureFixture) -> None:
    inner, batch = network(), normal(5, 2, 4, 3)
    found = []
    for model in (inner, Untraceable(inner)):
        caplog.clear()
        importance = ParameterImportance(model, estimator=estimator, chunk_size=3)
        with caplog.at_level(logging.INFO):
            importance.accumulate(what(estimator), [batch, batch[:1]], generator=torch.Generator().manual_seed(0))
        assert caplog.text.count("Gradients are taken one by one") == (model is not inner)
        found.append([*importance.importance().values()])
        assert any(bool(value.any()) for value in found[-1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_unet_is_measured_at_once_and_as_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    unet, images, t = tiny_unet().train(), normal(3, 3, 8, 8), torch.tensor([3, 20, 45])

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["image"], batch["t"]).sample - batch["image"]).abs().mean()

    importance = ParameterImportance(unet)
    with caplog.at_level(logging.INFO):
        importance.accumulate(loss, [{"image": images, "t": t, "note": "not a tensor"}])
    assert "one by one" not in caplog.text and unet.training
    unet.eval()
    expected = {name: torch.zeros_like(p) for name, p in unet.named_parameters()}
    for n in range(3):
        unet.zero_grad()
        loss(unet, {"image": images[n : n + 1], "t": t[n : n + 1]}).backward()
        for name, p in unet.named_parameters():
            assert p.grad is not None
            expected[name] += p.grad.abs() / 3
    for name, value in importance.importance().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(traceable: bool, fails: bool) -> None:
    inner = network()
    inner[2].eval()
    model = inner if traceable else Untraceable(inner)
    inner[0].bias.grad = torch.ones(3)
    importance = ParameterImportance(model)
    importance.accumulate(squared, [normal(2, 2, 3, 3, seed=5)])
    before, known = see(model), {name: value.clone() for name, value in importance.state_dict().items()}

    def batches() -> Any:
        yield normal(2, 2, 3, 3)
        if fails:
            assert not any(module.training for module in model.modules())
            raise KeyError("the disk is full")

    if fails:
        with pytest.raises(KeyError, match="disk"):
            importance.accumulate(squared, batches())
        assert all(torch.equal(value, known[name]) for name, value in importance.state_dict().items())
    else:
        assert importance.accumulate(squared, batches()) == 4
    assert_unchanged(model, before)
    assert list(importance.parameters()) == [] and list(importance.modules()) == [importance]


def test_gradients_are_taken_where_gradients_are_off() -> None:
    for model in (linear(), Untraceable(linear())):
        importance = ParameterImportance(model)
        with torch.no_grad():
            importance.accumulate(squared, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])])
        torch.testing.assert_close(next(iter(importance.importance().values())), torch.tensor([[1.0, 4.0]]))


BATCH = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("loss_fn", "batches", "estimator", "message"),
    [
        (squared, [], "taylor2", "`batches` should hold at least one batch, found none"),
        (answers, [BATCH], "taylor2", r"`loss_fn` should return a scalar, found a tensor of shape \(1, 1\)"),
        (lambda model, x: 0.5, [BATCH], "fisher", "`loss_fn` should return a scalar, found 0.5"),
        (squared, [BATCH], "mas", r"should return the output of the network, \(1, ...\), for the estimator 'mas'"),
        (squared, [BATCH], "gn", r"should return the output of the network, \(2, ...\), for the estimator 'gn'"),
        (lambda model, x: model(x).sum() * float("nan"), [BATCH], "taylor2", r"should be finite, .* in \['weight'\]"),
        (lambda model, x: model(x).sum() * float("inf"), [BATCH], "taylor2", "should be finite"),
        (squared, [torch.ones(0, 2)], "taylor2", r"tensors of N samples each .* found \[\(0, 2\)\]"),
        (squared, [torch.tensor(1.0)], "taylor2", "tensors of N samples"),
        (squared, [(BATCH, torch.ones(3, 2))], "taylor2", r"found \[\(2, 2\), \(3, 2\)\]"),
        (squared, ["text"], "taylor2", "found 'text'"),
        (squared, [BATCH.numpy()], "taylor2", r"found a numpy array of shape .*torch.from_numpy"),
        (squared, [(BATCH, BATCH.numpy())], "taylor2", r"found a numpy array"),
        (squared, BATCH, "taylor2", "`batches` should be an iterable of batches, found a tensor .* put a single one"),
        (squared, {"x": BATCH}, "taylor2", "`batches` should be an iterable of batches, found dict"),
        (squared, None, "taylor2", "`batches` should be an iterable of batches, found None"),
        (0.5, [BATCH], "taylor2", r"`loss_fn` should be callable as loss_fn\(model, batch\), found 0.5"),
        (nn.L1Loss, [BATCH], "taylor2", "`loss_fn` should be .* found the class L1Loss"),
        (nn.L1Loss(), [BATCH], "taylor2", "`loss_fn` should be .* found a L1Loss, which compares images"),
        (linear(), [BATCH], "taylor2", r"`loss_fn` should be .* found one that takes \(input"),
        (lambda batch: batch.mean(), [BATCH], "mas", r"`loss_fn` should be .* found one that takes \(batch\)"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_nothing_is_kept(
    loss_fn: Any, batches: Any, estimator: Any, message: str
) -> None:
    model = linear()
    importance = ParameterImportance(model, estimator=estimator)
    with pytest.raises(ValueError, match=message):
        importance.accumulate(loss_fn, batches)
    assert importance.importance() == {}
    with pytest.raises(ValueError, match="not measured"):
        importance()


def test_a_network_that_is_frozen_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="`model` should have parameters that require a gradient, found none"):
        ParameterImportance(linear().requires_grad_(False)).accumulate(squared, [BATCH])


def test_an_unmeasured_penalty_is_an_error() -> None:
    importance = ParameterImportance(linear())
    for call in (importance, importance.apply_, importance.begin_task):
        with pytest.raises(ValueError, match=r"not measured: call `accumulate\(loss_fn, batches\)`"):
            call()


def test_parameters_that_moved_between_two_measurements_are_an_error() -> None:
    model = linear()
    importance = ParameterImportance(model, strength=1.0)
    model.weight.data += 1  # the anchor is where the importance is measured
    importance.accumulate(squared, [BATCH])
    assert importance().item() == 0
    model.weight.data += 1
    assert importance().item() > 0
    with pytest.raises(ValueError, match=r"`weight` should be where .* has moved: call `begin_task\(\)`"):
        importance.accumulate(squared, [BATCH])


def test_importances_of_zero_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    importance = ParameterImportance(linear())
    with pytest.warns(UserWarning, match="`loss_fn` should depend on .*, found that all importances are 0"):
        importance.accumulate(squared, [torch.zeros(2, 2)])
    assert importance().item() == 0
    caplog.clear()
    measured()
    assert caplog.text == ""


def test_frozen_and_new_parameters_are_not_charged_and_missing_ones_not_missed() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 1)})
    model["b"].requires_grad_(False)
    importance = ParameterImportance(model, strength=1.0)
    importance.accumulate(lambda m, x: m["c"](m["b"](m["a"](x))).square().mean(), [normal(4, 2)])
    assert list(importance.importance()) == ["a.weight", "a.bias", "c.weight", "c.bias"]
    model["b"].requires_grad_(True)
    model["d"] = nn.Linear(1, 1)
    shift(model["b"]), shift(model["d"])
    assert importance().item() == 0
    importance.apply_()
    assert all(p.grad is None for name in "bd" for p in model[name].parameters())
    shift(model["c"])
    assert importance().item() > 0
    del model["c"]
    assert importance().item() == 0


def test_a_parameter_of_another_shape_is_an_error() -> None:
    model = linear()
    importance = measured(model)
    model.weight = nn.Parameter(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"`weight` should be of shape \(1, 2\), .* found \(1, 3\)"):
        importance()


def test_a_network_with_none_of_the_parameters_is_an_error() -> None:
    model = nn.Sequential(linear())
    importance = measured(model)
    del model[0]
    with pytest.raises(ValueError, match="`model` should have parameters that were measured, found none"):
        importance()
    with pytest.raises(ValueError, match="`model` should have parameters that were measured, found none"):
        importance.apply_()


def test_parameters_frozen_later_are_charged_and_get_no_gradient() -> None:
    model = nn.Linear(2, 1)
    importance = measured(model, strength=1.0)
    model.weight.data += 1
    charged = importance().item()
    model.weight.requires_grad_(False)
    assert importance().item() == charged
    importance.apply_()
    assert model.weight.grad is None and model.bias.grad is not None


def test_a_tied_parameter_counts_once() -> None:
    first, second = linear(), linear()
    second.weight = first.weight
    tied = nn.ModuleList([first, second])
    importance = ParameterImportance(tied, strength=1.0)
    importance.accumulate(lambda model, x: (model[0](x) + model[1](x)).square().mean(), [torch.tensor([[1.0, 0.0]])])
    # d (2 w x)^2 / dw = 8 w x^2
    assert {name: value.tolist() for name, value in importance.importance().items()} == {"0.weight": [[8.0, 0.0]]}
    first.weight.data += 0.25
    assert importance().item() == pytest.approx(8 / 4 + 0.5 * 64 / 16)


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


def test_the_mean_does_not_grow_with_the_network() -> None:
    penalties = []
    for copies in (1, 10):
        model = nn.ModuleList([linear() for _ in range(copies)])
        frozen = nn.Linear(50, 50).requires_grad_(False)
        model.append(frozen)
        importance = ParameterImportance(model, strength=1.0, normalize="mean")
        importance.accumulate(
            lambda model, x: sum(part(x).square().mean() for part in model[:-1]),
            [torch.tensor([[1.0, 0.0], [0.0, 2.0]])],
        )
        for part in model[:-1]:
            part.weight.data += torch.tensor([0.5, -0.25])
        penalties.append(importance().item())
    assert penalties == pytest.approx([2.125 / 2] * 2)


def test_the_longest_name_weighs_a_layer() -> None:
    model = nn.ModuleDict({name: nn.Sequential(linear(), linear()) for name in ("a", "ab", "c")})
    weights = {"": 0.5, "a": 2.0, "a.1": 3.0, "ab.0.weight": 0.0}
    importance = ParameterImportance(model, strength=1.0, layer_weights=weights)
    importance.accumulate(
        lambda model, x: sum(layer(x).square().mean() for part in model.values() for layer in part),
        [torch.tensor([[1.0, 0.0], [0.0, 2.0]])],
    )
    factors = {"a.0": 2.0, "a.1": 3.0, "ab.0": 0.0, "ab.1": 0.5, "c.0": 0.5, "c.1": 0.5}
    for name, factor in factors.items():
        weight = model.get_submodule(name).weight
        weight.data += torch.tensor([0.5, -0.25])
        assert importance().item() == pytest.approx(factor * 2.125)
        weight.data.fill_(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_half_precision_networks_importances_are_in_single(dtype: torch.dtype) -> None:
    model = linear(dtype)
    importance = ParameterImportance(model, strength=1.0)
    # the squares of these gradients leave float16
    importance.accumulate(lambda model, x: model(x).square().mean() * 2**-10, [torch.eye(2, dtype=dtype)])
    importance.half()
    value = importance.importance()["weight"]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.full((1, 2), 2.0**-10))
    model.weight.data += 0.5
    loss = importance()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(2 * (2**-11 + 2**-23), rel=1e-4)
    loss.backward()
    assert model.weight.grad is not None and model.weight.grad.dtype == dtype and bool(model.weight.grad.any())
    assert ParameterImportance(linear(torch.float64)).double().get_buffer("0/anchor/weight").dtype == torch.float64


def test_the_state_is_saved_and_loaded_with_any_number_of_tasks() -> None:
    model = linear()
    importance = measured(model, strength=1.0)
    model.weight.data += 1
    importance.begin_task()
    importance.accumulate(squared, [BATCH])
    file = io.BytesIO()
    torch.save(importance.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = nn.ModuleDict({"importance": ParameterImportance(copy.deepcopy(model), strength=1.0)})
    result = other.load_state_dict({f"importance.{name}": value for name, value in state.items()})
    assert result.missing_keys == result.unexpected_keys == []
    loaded = other["importance"]
    assert loaded.tasks == 2 and "2 samples" in repr(loaded)
    assert loaded().item() == importance().item() > 0
    fresh = ParameterImportance(copy.deepcopy(model), strength=1.0)
    fresh.accumulate(squared, [BATCH])
    loaded.load_state_dict(fresh.state_dict())  # and back to one
    assert loaded.tasks == 1 and loaded().item() == 0


def test_what_wraps_the_network_leaves_no_trace_in_names() -> None:
    def model() -> nn.Module:
        return nn.Sequential(linear(), nn.Sequential(linear()))

    def loss(model: Any, x: Tensor) -> Tensor:
        return sum((part(x).square().mean() for part in model), torch.zeros(()))

    plain = ParameterImportance(model(), strength=1.0)
    plain.accumulate(loss, [torch.eye(2)])
    inside = model()
    inside[1] = torch.compile(inside[1], backend="eager")
    wrapped: list[nn.Module] = [torch.compile(model(), backend="eager"), nn.DataParallel(model()), inside]
    wrapped.append(nn.DataParallel(torch.compile(model(), backend="eager")))
    for network in wrapped:
        importance = ParameterImportance(network, strength=1.0)
        assert importance.state_dict().keys() == {k for k in plain.state_dict() if "importance" not in k}
        importance.load_state_dict(plain.state_dict())
        assert list(importance.importance()) == ["0.weight", "1.0.weight"]
        assert importance().item() == 0
        for parameter in network.parameters():
            parameter.data += 0.5
        assert importance().item() == pytest.approx(4 * (0.5 + 0.5 * 0.25), rel=1e-5)


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_charges_the_copy_of_the_network(duplicate: Callable[[Any], Any]) -> None:
    model = linear()
    again, importance = duplicate((model, measured(model, strength=1.0)))
    model.weight.data += 1
    assert importance().item() == 0
    again.weight.data += torch.tensor([0.5, -0.25])
    assert importance().item() == 2.125


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "net"}, "`model` should be a module, found 'net'"),
        ({"estimator": "l2"}, "`estimator` should be one of .* found 'l2'"),
        ({"normalize": "max"}, "`normalize` should be one of .'sum', 'mean'., found 'max'"),
        ({"strength": -1.0}, "`strength` should be a finite number of at least 0, found -1"),
        ({"strength": float("nan")}, "`strength` should be a finite number of at least 0"),
        ({"strength": "1e-3"}, "`strength` should be .* found '1e-3' .YAML reads 1e-3 as text"),
        ({"strength": True}, "`strength` should be .* found True"),
        ({"strength": None}, "`strength` should be .* found None"),
        ({"chunk_size": 0}, "`chunk_size` should be a whole number of at least 1, found 0"),
        ({"chunk_size": "32"}, "`chunk_size` should be a whole number of at least 1, found '32'"),
        ({"chunk_size": 2.5}, "`chunk_size` should be a whole number of at least 1, found 2.5"),
        ({"model": nn.Linear}, "`model` should be a module, found the class Linear .an instance is needed"),
        ({"mode": "training"}, "`mode` should be one of .'eval', 'train', 'keep'., found 'training'"),
        ({"layer_weights": {"a": -1.0}}, r"`layer_weights\['a'\]` should be a finite number of at least 0, found -1.0"),
        ({"layer_weights": {"a": "1e-3"}}, r"`layer_weights\['a'\]` should be a finite number .* found '1e-3'"),
        ({"layer_weights": ["a"]}, "`layer_weights` should be a mapping of names to numbers, found list"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterImportance(**{"model": linear(), **arguments})


def test_two_processes_measure_what_one_does() -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER), "importance"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    for estimator in ESTIMATORS[:3]:
        assert f"{estimator}: equal" in done.stdout, done.stderr[-3000:]


class Slashed(nn.Module):
    """Parameters whose names hold what their buffers may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.blocks = nn.ModuleDict({"decoders/0": nn.Linear(2, 2), "100%2F": nn.Linear(2, 1)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks["100%2F"](self.blocks["decoders/0"](self.first(x)))
        return result


def test_every_name_of_a_parameter_is_found_again() -> None:
    model = Slashed()
    importance = ParameterImportance(model, strength=1.0)
    importance.accumulate(squared, [normal(4, 2)])
    assert set(importance.importance()) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        before = importance().item()
        with torch.no_grad():
            parameter += 0.5
        assert importance().item() > before, name
    again = ParameterImportance(model, strength=1.0)
    again.load_state_dict(importance.state_dict())
    assert again().item() == importance().item()


@pytest.mark.filterwarnings("ignore:.*meta parameter")
def test_what_was_measured_is_loaded_to_where_the_network_is() -> None:
    importance = measured(linear())
    elsewhere = ParameterImportance(linear().to("meta"))
    elsewhere.load_state_dict(importance.state_dict())
    assert {buffer.device.type for buffer in elsewhere.buffers()} == {"meta"}
