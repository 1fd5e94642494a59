"""ParameterImportance: closed forms of every estimator, one by one and all at once."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from restoreloss import ParameterImportance
from tests.helpers.importance import BATCH, ESTIMATORS, Untraceable, linear, measured, network, normal, shift, squared
from tests.helpers.networks import tiny_unet


def answers(model: Any, batch: Tensor) -> Tensor:
    return model(batch)


def what(estimator: str) -> Callable[[Any, Any], Tensor]:
    return answers if estimator in ("mas", "gn") else squared


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
