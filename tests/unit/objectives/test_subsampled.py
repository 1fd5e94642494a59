"""Objectives on fewer samples and calls: exact for a given choice, right on average."""

import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from restoreloss import DiffLoss, Objective, Subsampled, WeightedSum
from restoreloss.distances import reduce_samples
from tests.helpers.networks import tiny_unet


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Errors(Objective):
    """The mean squared and the mean absolute error of each sample."""

    def __init__(self, reduction: Any = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def terms(self, restored: Tensor, target: Tensor) -> dict[str, Tensor]:
        difference = (restored - target).float().flatten(1)
        each = {"squared": difference.square().mean(1), "absolute": difference.abs().mean(1)}
        return {name: reduce_samples(value, self.reduction) for name, value in each.items()}


def value_and_gradient(loss: nn.Module, z: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = loss(z, x, **options)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


@pytest.mark.parametrize(("subset", "chosen"), [(0.5, 3), (2, 2), (0.01, 1), (1.0, 6), (9, 6)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_subset_counts_for_all(subset: Any, chosen: int, reduction: Any) -> None:
    z, x = uniform(6, 3, 8, 8).requires_grad_(), uniform(6, 3, 8, 8, seed=1)
    each = Errors("none")(z.detach(), x)
    order = torch.randperm(6, generator=seeded(3))[:chosen]
    expected = torch.zeros(6)
    expected[order] = each[order] * 6 / chosen
    found = Subsampled(Errors(reduction), subset=subset)(z, x, generator=seeded(3))
    wanted = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert z.grad is not None
    assert [bool(row.any()) for row in z.grad] == [n in order for n in range(6)]


def test_losses_of_torch_and_functions_are_subsampled_too() -> None:
    z, x = uniform(4, 3, 8, 8), uniform(4, 3, 8, 8, seed=1)
    order = torch.randperm(4, generator=seeded(0))[:1]
    for reduction, factor in (("mean", 1), ("sum", 4)):
        whole: Any = nn.MSELoss(reduction=reduction)
        found, _ = value_and_gradient(Subsampled(whole, subset=0.25), z, x, generator=seeded(0))
        torch.testing.assert_close(found, factor * whole(z[order], x[order]))
    function = Subsampled(lambda restored, target: (restored - target).abs().mean(), subset=1)
    torch.testing.assert_close(value_and_gradient(function, z, x, generator=seeded(0))[0], (z - x)[order].abs().mean())
    assert list(function.terms(z, x)) == ["loss"]


def test_sums_of_several_losses_are_scaled_and_mixtures_refused() -> None:
    z, x = uniform(4, 3, 8, 8), uniform(4, 3, 8, 8, seed=1)
    order = torch.randperm(4, generator=seeded(0))[:1]
    both = WeightedSum({"one": Errors("sum"), "other": nn.MSELoss(reduction="sum")})
    found, _ = value_and_gradient(Subsampled(both, subset=1), z, x, generator=seeded(0))
    torch.testing.assert_close(found, 4 * both(z[order], x[order]))
    with pytest.raises(ValueError, match=r"`objectives` should share one `reduction`, found \['mean', 'sum'\]"):
        Subsampled(WeightedSum({"one": Errors("sum"), "other": nn.MSELoss()}), subset=1)
    function = Subsampled(lambda restored, target: (restored - target).square().sum(), subset=1, reduction="sum")
    torch.testing.assert_close(
        value_and_gradient(function, z, x, generator=seeded(0))[0], 4 * (z - x)[order].square().sum()
    )
    with pytest.raises(ValueError, match="`objective` should return a scalar or one number for each of 2 samples"):
        value_and_gradient(Subsampled(nn.MSELoss(reduction="none"), subset=2), z, x)


def test_subsets_are_right_on_average() -> None:
    z, x = uniform(4, 3, 8, 8).requires_grad_(), uniform(4, 3, 8, 8, seed=1)
    loss, generator = Subsampled(Errors(), subset=1), seeded(0)
    found = torch.stack([loss(z, x, generator=generator).detach() for _ in range(800)])
    assert abs(found.mean() - Errors()(z, x)) < 4 * found.std() / len(found) ** 0.5


def test_a_generator_for_each_sample_goes_on_to_the_objective() -> None:
    z, x = uniform(4, 3, 16, 16).requires_grad_(), uniform(4, 3, 16, 16, seed=1)
    loss = Subsampled(DiffLoss(tiny_unet(), reduction="none"), subset=2)
    found = loss(z, x, generator=[seeded(n) for n in range(4)])
    rows = found.nonzero().flatten()
    rest = [seeded(int(n)) for n in rows]
    for one in rest:
        torch.rand(1, generator=one)  # what the choice has drawn
    whole = DiffLoss(tiny_unet(), reduction="none")(z[rows], x[rows], generator=rest)
    torch.testing.assert_close(found[rows], 2 * whole)


def test_every_kth_call_counts_k_times() -> None:
    loss, whole = Subsampled(Errors(), every=3), Errors()
    z, x = uniform(2, 3, 8, 8), uniform(2, 3, 8, 8, seed=1)
    value, gradient = value_and_gradient(whole, z, x)
    for call in range(7):
        found, of_z = value_and_gradient(loss, z, x)
        factor = 3 if call % 3 == 0 else 0
        torch.testing.assert_close(found, factor * value)
        torch.testing.assert_close(of_z, factor * gradient)
        # these do not count
        for same in (loss(z, x), loss.eval()(z.clone().requires_grad_(), x)):
            assert torch.equal(same, value)
        loss.train()
        with torch.no_grad():
            assert torch.equal(loss(z.clone().requires_grad_(), x), value)
    assert loss.calls == 7
    loss.calls = 3
    assert value_and_gradient(loss, z, x)[0] > 0


def test_a_state_has_the_calls() -> None:
    def new() -> WeightedSum:
        return WeightedSum({"pixel": nn.L1Loss(), "errors": Subsampled(Errors(), every=3)})

    z, x = uniform(1, 3, 8, 8).requires_grad_(), uniform(1, 3, 8, 8, seed=1)
    loss, resumed = new(), new()
    for _ in range(2):
        loss(z, x)
    resumed.load_state_dict(loss.state_dict())
    assert [float(resumed(z, x)) for _ in range(3)] == [float(loss(z, x)) for _ in range(3)]
    before = resumed.state_dict()
    resumed.load_state_dict({})  # of before there was this loss
    assert resumed.state_dict() == before
    with pytest.raises(ValueError, match="`calls` should be a whole number of at least 0, found -1"):
        resumed.load_state_dict({"objective_errors._extra_state": torch.tensor(-1)})


class Normalized(nn.Module):
    """A loss with state, and with terms or without."""

    def __init__(self, has_terms: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        if has_terms:
            self.terms = lambda restored, target: {"a": self(restored, target)}

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        value: Tensor = (self.norm(restored) - target).square().mean()
        return value


@pytest.mark.parametrize("has_terms", [False, True])
def test_the_names_of_a_resumed_call_that_is_left_out_leave_no_trace(has_terms: bool) -> None:
    z, x = uniform(2, 3, 8, 8).requires_grad_(), uniform(2, 3, 8, 8, seed=1)
    loss, resumed = (Subsampled(Normalized(has_terms), every=3) for _ in range(2))
    loss(z, x)
    resumed.load_state_dict(loss.state_dict())
    assert {name: float(value) for name, value in resumed.terms(z, x).items()} == {"a" if has_terms else "loss": 0.0}
    assert resumed.training and resumed.objective.norm.training
    assert torch.equal(resumed.objective.norm.running_mean, loss.objective.norm.running_mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_call_that_is_left_out_is_zero_whatever_it_is_given(dtype: torch.dtype) -> None:
    loss = Subsampled(Errors("none"), every=2)
    z = torch.full((2, 1, 4, 4), 0.5, dtype=dtype, requires_grad=True)
    assert set(loss.terms(z, torch.zeros_like(z))) == {"squared", "absolute"}
    wild = torch.full((2, 1, 4, 4), math.inf, dtype=dtype, requires_grad=True)
    terms = loss.terms(wild, torch.zeros_like(wild))
    assert set(terms) == {"squared", "absolute"}
    total: Any = sum(terms.values())
    assert torch.equal(total.double(), torch.zeros(2).double())
    total.sum().backward()
    assert wild.grad is not None and not wild.grad.any() and bool(wild.grad.isfinite().all())


def test_a_compiled_loss_counts_its_calls() -> None:
    torch._dynamo.reset()
    loss = Subsampled(Errors(), every=2)
    compiled: Any = torch.compile(loss, backend="aot_eager")
    z, x = uniform(1, 3, 8, 8), uniform(1, 3, 8, 8, seed=1)
    expected = value_and_gradient(Errors(), z, x)
    for call in range(6):
        found = value_and_gradient(compiled, z, x)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, (0 if call % 2 else 2) * other, rtol=1e-5, atol=1e-7)
    assert loss.calls == 6


def test_within_a_sum_it_keeps_the_names_of_its_terms() -> None:
    z, x = uniform(2, 3, 8, 8).requires_grad_(), uniform(2, 3, 8, 8, seed=1)
    loss = WeightedSum({"pixel": nn.L1Loss(), "errors": Subsampled(Errors(), every=2)}, weights={"errors": 0.5})
    names = [list(loss.terms(z, x)) for _ in range(2)]
    assert names == [["pixel", "errors/squared", "errors/absolute"]] * 2


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (Errors(), {"every": 0}, "`every` should be a whole number of at least 1, found 0"),
        (Errors(), {"every": True}, "`every` should"),
        (Errors(), {"subset": 0}, "`subset` should be an integer above 0 or a share"),
        (Errors(), {"subset": 1.5}, "`subset` should"),
        (Errors(), {"subset": "0.5"}, "`subset` should"),
        (Errors, {}, "`objective` should be callable as .* found the class Errors"),
        (0.5, {}, "`objective` should be callable as .* found 0.5"),
    ],
)
def test_what_cannot_be_is_refused(objective: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subsampled(objective, **options)


@pytest.mark.parametrize("shares", [{}, {"other": 0.5}])
def test_a_call_of_the_same_image_before_its_backward_pass_is_told(shares: dict[str, float]) -> None:
    loss = WeightedSum({"pixel": nn.L1Loss(), "other": Subsampled(nn.MSELoss(), every=2)}, shares=shares)
    clean, weight = uniform(2, 3, 4, 4), torch.ones((), requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):  # one call a step, also with several images before a backward pass
            sum(loss(weight * uniform(2, 3, 4, 4, seed=seed + n), clean) for n in range(2)).backward()
        restored = weight * uniform(2, 3, 4, 4)
        for _ in range(3):  # or with a backward pass after each
            loss(restored, clean).backward(retain_graph=True)
    loss(restored, clean)
    with pytest.warns(UserWarning, match=r"this one is of the image of the last.*`sum\(terms\.values\(\)\)`"):
        loss.terms(restored, clean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(restored, clean)
        loss(restored, clean)
    assert pickle.loads(pickle.dumps(loss)).current_weights() == loss.current_weights()
