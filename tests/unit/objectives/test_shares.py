"""WeightedSum(shares=...): objectives keep their share of the gradient while they change."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from restoreloss import Subsampled, WeightedSum, audit
from restoreloss.gradients import gradient_norm
from tests.helpers.processes import launch
from tests.helpers.shares import images, norm_of, run, scaled, shares_of


def test_shares_hold_from_the_first_call_on():
    loss = WeightedSum(
        {"pixel": nn.L1Loss(), "second": nn.L1Loss(), "a": scaled(300.0), "b": nn.MSELoss()},
        weights={"second": -2.0},
        shares={"a": 0.5, "b": 0.2},
    )
    restored, target = images()
    found = shares_of(loss.terms(restored, target), restored)
    assert found == pytest.approx({"pixel": 0.1, "second": 0.2, "a": 0.5, "b": 0.2}, rel=1e-5)


def test_they_follow_the_mean_norm_that_training_shows():
    strength = [1.0]
    loss = WeightedSum({"pixel": scaled(2.0), "other": lambda z, x: scaled(strength[0])(z, x)}, shares={"other": 0.25})
    restored, target = images()
    mean, expected = 1.0, []
    for call in range(1, 300):
        strength[0] = 1.0 + call % 7
        terms = loss.terms(restored, target)
        if call == 1:
            mean = strength[0]  # measured before it is used
        weight = 0.25 / 0.75 * 2.0 / mean
        assert float(terms["other"]) == pytest.approx(weight * float(scaled(strength[0])(restored, target)), rel=1e-4)
        sum(terms.values()).backward()
        if call > 1:
            mean += (strength[0] - mean) / min(call, 100)
        expected.append(weight)
    assert loss.current_weights()["pixel"] == 1.0
    assert loss.current_weights()["other"] == pytest.approx(expected[-1], rel=1e-3)


def test_the_first_call_looks_at_several_draws_of_a_random_loss():
    drawn = iter([1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0])
    seen = []

    def other(restored, target):
        seen.append(next(drawn))
        return scaled(seen[-1])(restored, target)

    loss = WeightedSum({"pixel": scaled(2.0), "other": other}, shares={"other": 0.5})
    restored, target = images()
    value = loss.terms(restored, target)["other"]
    assert len(seen) == 8 and loss.current_weights()["other"] == pytest.approx(2.0 / 5.0)
    torch.testing.assert_close(value, 2.0 / 5.0 * scaled(1.0)(restored, target))  # of the first draw


def test_what_multiplies_the_loss_does_not_count():
    def weights(factor):
        loss = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.5})
        for seed in range(5):
            restored, target = images(seed)
            (factor(seed) * loss(restored, target)).backward()
        return loss.current_weights()

    assert weights(lambda seed: 2.0 ** (16 - seed)) == pytest.approx(weights(lambda seed: 1.0), rel=1e-5)


def test_measuring_changes_no_gradient():
    restored, target = images()
    loss = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3})
    for _ in range(3):
        weights = loss.current_weights()
        (found,) = torch.autograd.grad(loss(restored, target), restored)
        weights = loss.current_weights() if weights["other"] == 1.0 else weights
        plain = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, weights=weights)
        (expected,) = torch.autograd.grad(plain(restored, target), restored)
        torch.testing.assert_close(found, expected)


def test_a_call_without_gradient_or_in_eval_measures_nothing():
    restored, target = images()
    loss = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3})
    before = float(loss.eval()(restored, target))
    assert before == pytest.approx(float(nn.L1Loss()(restored, target) + nn.MSELoss()(restored, target)))
    loss.train()(restored, target).backward()
    weights, state = loss.current_weights(), copy.deepcopy(loss.state_dict())
    with torch.no_grad():
        value = float(loss(*images(1)))
    assert value == float(loss.eval()(*images(1)))
    z, x = images(1)
    assert value == pytest.approx(float(nn.L1Loss()(z, x) + weights["other"] * nn.MSELoss()(z, x)))
    assert loss.current_weights() == weights
    torch.testing.assert_close(loss.state_dict(), state)


@pytest.mark.parametrize("carry", ["state_dict", "deepcopy", "pickle"])
def test_a_resumed_run_goes_on_with_the_same_weights(carry):
    def new():
        return WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3})

    half = run(new(), range(4))
    if carry == "state_dict":
        resumed = new()
        resumed.load_state_dict(half.state_dict())
    else:
        resumed = copy.deepcopy(half) if carry == "deepcopy" else pickle.loads(pickle.dumps(half))
    again = run(new(), range(4))
    assert run(resumed, range(4, 8)).current_weights() == run(again, range(4, 8)).current_weights()
    kept = {f"{kind}_{name}" for kind in ("mean", "calls", "idle") for name in ("pixel", "other")}
    assert set(half.state_dict()) == {f"norms.{name}" for name in kept}
    assert not list(half.parameters())


def test_a_broken_call_is_left_out():
    loss = run(WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3}), range(3))
    (float("nan") * loss(*images(3))).backward()
    same = run(WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3}), range(3))
    same(*images(3))
    assert run(loss, [4, 5]).current_weights() == run(same, [4, 5]).current_weights()


class NowAndThen(nn.Module):
    """Computes the first call and one of four by its own rule, which nobody else knows."""

    def __init__(self, is_due, at_rest=lambda restored: 0 * restored.sum()):
        super().__init__()
        self.is_due, self.at_rest, self.calls = is_due, at_rest, 0

    def forward(self, restored, target):
        self.calls += 1
        due = self.calls == 1 or self.is_due(self.calls)
        return 4 * scaled(1.0)(restored, target) if due else self.at_rest(restored)


@pytest.mark.parametrize(
    ("other", "tolerance"),
    [
        (lambda: Subsampled(scaled(1.0), every=4), 1e-3),
        (lambda: Subsampled(scaled(1.0), every=100), 1e-3),
        (lambda: Subsampled(Subsampled(scaled(1.0), every=5), every=6), 1e-3),
        (lambda: partial(Subsampled(scaled(1.0), every=4)), 1e-3),
        (lambda: NowAndThen(lambda call: call % 4 == 1), 1e-3),
        (lambda: NowAndThen(lambda call: call % 4 == 1, lambda image: torch.zeros((), requires_grad=True) * 1), 1e-3),
        (lambda: NowAndThen(lambda call: torch.rand((), generator=torch.Generator().manual_seed(call)) < 0.25), 0.05),
    ],
    ids=["every 4", "every 100", "nested", "hidden", "own rule", "own rule without an image", "by chance"],
)
def test_calls_that_are_left_out_count_whoever_leaves_them_out(other, tolerance):
    loss = WeightedSum({"pixel": scaled(1.0), "other": other()}, shares={"other": 0.5})
    restored, target = images()
    total = {"pixel": 0.0, "other": 0.0}
    for call in range(600):
        terms = {name.partition("/")[0]: value for name, value in loss.terms(restored, target).items()}
        if call >= 300:
            total = {name: total[name] + norm_of(terms[name], restored) for name in terms}
        sum(terms.values()).backward()
    assert total["other"] / sum(total.values()) == pytest.approx(0.5, abs=tolerance)


@pytest.mark.parametrize("every", [1, 4])
def test_a_hinge_that_is_satisfied_for_long_keeps_its_weight(every):
    active = [1.0]
    hinge = Subsampled(lambda z, x: active[0] * scaled(4.0)(z, x), every=every)
    loss = WeightedSum({"pixel": scaled(1.0), "hinge": hinge}, shares={"hinge": 0.5})
    run(loss, range(8))
    active[0] = 0.0
    run(loss, range(8, 1008))
    assert loss.current_weights()["hinge"] == pytest.approx(0.25, rel=1e-5)
    active[0] = 1.0
    # the first call counts for the sixteen before it, among the last hundred
    assert run(loss, range(8)).current_weights()["hinge"] == pytest.approx(0.25, rel=0.2 if every == 1 else 0.8)
    assert run(loss, range(400)).current_weights()["hinge"] == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize(("first", "rest", "highest"), [(1, 20, 0.77), (1, 700, 0.55), (50, 700, 0.55)])
def test_a_hinge_that_wakes_has_little_more_than_its_share(first, rest, highest):
    active = [1.0]
    hinge = lambda restored, target: active[0] * scaled(4.0)(restored, target)  # noqa: E731
    loss = run(WeightedSum({"pixel": scaled(1.0), "hinge": hinge}, shares={"hinge": 0.5}), range(first))
    active[0] = 0.0
    run(loss, range(rest))
    active[0] = 1.0
    restored, target = images()
    found = []
    for _ in range(20):
        terms = loss.terms(restored, target)
        found.append(shares_of(terms, restored)["hinge"])
        sum(terms.values()).backward()
    assert found[0] == pytest.approx(0.5, abs=1e-3) and max(found) < highest


def test_a_fixed_objective_at_rest_stops_nothing_and_its_part_goes_with_it():
    seen, strength, resting = [0], [1.0], [1.0]

    def other(restored, target):
        seen[0] += 1
        return strength[0] * scaled(1.0)(restored, target)

    def hinge(restored, target):
        return ((restored - target).abs() - 10).clamp(min=0).mean()

    objectives = {"pixel": scaled(1.0), "hinge": hinge, "rests": lambda z, x: resting[0] * scaled(20.0)(z, x)}
    loss = run(WeightedSum({**objectives, "other": other}, shares={"other": 0.5}), range(20))
    strength[0], resting[0] = 100.0, 0.0
    run(loss, range(20, 1500))
    assert seen[0] == 1500 + 1  # measured in the first call alone: its second draw was its first
    loss.norms.take_in()
    assert loss.current_weights()["other"] == pytest.approx(0.01, rel=1e-3)


def test_values_for_each_sample_keep_their_share_too():
    def squares(restored, target):
        return (restored - target).square().mean(dim=(1, 2, 3))

    def distances(restored, target):
        return (restored - target).abs().mean(dim=(1, 2, 3))

    restored, target = images()
    loss = WeightedSum({"pixel": distances, "other": squares}, shares={"other": 0.4})
    for _ in range(3):
        terms = {name: value.mean() for name, value in loss.terms(restored, target).items()}
        assert shares_of(terms, restored)["other"] == pytest.approx(0.4, rel=1e-4)
        sum(terms.values()).backward()


def test_audit_shows_the_share():
    restored, target = images()
    loss = run(WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3}), [0])
    assert audit(loss, restored, target)["other"].share == pytest.approx(0.3, rel=1e-4)
    assert "30% of the gradient * other: MSELoss()" in repr(loss)


def test_compiled_it_is_the_same():
    restored, target = images()
    loss, compiled = (WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3}) for _ in "ab")
    called = torch.compile(compiled, backend="aot_eager")
    for seed in range(3):
        restored, target = images(seed)
        (expected,) = torch.autograd.grad(loss(restored, target), restored)
        (found,) = torch.autograd.grad(called(restored, target), restored)
        torch.testing.assert_close(found, expected)
    assert compiled.current_weights() == pytest.approx(loss.current_weights())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": {"othr": 0.5}}, "`shares` should be named after objectives"),
        ({"shares": {"other": 1.0}}, "leave some of 1 to"),
        ({"shares": {"other": 0.0}}, "above 0"),
        ({"shares": {"other": -0.1}}, "shares"),
        ({"shares": {"other": "0.5"}}, "shares"),
        ({"shares": 0.5}, "`shares` should be a mapping"),
        ({"shares": {"pixel": 0.5, "other": 0.4}}, "should leave out at least one objective"),
        ({"shares": {"other": 0.5}, "weights": {"other": 2.0}}, "in both"),
        ({"shares": {"other": 0.5}, "weights": {"pixel": 0.0}}, "a weight other than 0"),
    ],
)
def test_wrong_shares_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, **options)


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_an_objective_without_a_gradient_cannot_have_a_share(factor):
    loss = WeightedSum({"pixel": nn.L1Loss(), "other": lambda z, x: factor * (z - x).sum()}, shares={"other": 0.3})
    with pytest.raises(ValueError, match="other"):
        loss(*images())


def test_the_norm_of_very_small_and_very_large_gradients():
    unit = torch.tensor([3.0, 4.0])
    for scale in (1e-30, 1.0, 1e30):
        assert float(gradient_norm(scale * unit)) == pytest.approx(5 * scale, rel=1e-6)
    assert float(gradient_norm(torch.zeros(3))) == 0


def test_two_processes_keep_the_shares_of_one():
    done = launch("tests/unit/objectives/shares_worker.py", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2


def test_calls_that_share_one_backward_pass_are_all_counted():
    loss, apart = (WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3}) for _ in range(2))
    loss(*images(0)).backward()
    apart(*images(0)).backward()
    (loss(*images(1)) + loss(*images(2)) + loss(*images(3))).backward()
    weights = apart.current_weights()
    for number in (1, 2, 3):
        calls = loss.norms._pending
        apart(*images(number)).backward()
    assert len(calls) == 3 and loss.state_dict()["norms.calls_other"] == apart.state_dict()["norms.calls_other"] == 4
    torch.testing.assert_close(loss.norms.by_name(), apart.norms.by_name())
    assert loss.current_weights() != weights


def test_calls_without_a_backward_pass_are_forgotten():
    loss = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3})
    loss(*images(0)).backward()
    for number in range(20):
        loss(*images(number))
    assert len(loss.norms._pending) < 10 and loss.state_dict()["norms.calls_other"] == 1
    loss(*images(1)).backward()
    assert loss.state_dict()["norms.calls_other"] == 2


def test_a_state_resumes_to_the_digit():
    def trained(calls, state=None):
        loss = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3})
        loss.load_state_dict(state or loss.state_dict())
        for call in calls:
            loss(*images(call)).backward()
        return loss

    whole, resumed = trained(range(6)), trained(range(3, 6), trained(range(3)).state_dict())
    for loss in (whole, resumed):
        loss.norms.take_in()
    before = whole.current_weights()
    nn.ModuleDict({"network": nn.Linear(2, 2), "loss": whole}).load_state_dict(
        nn.ModuleDict({"network": nn.Linear(2, 2)}).state_dict()  # of before there was this loss
    )
    assert whole.current_weights() == before
    assert whole.norms.calls_other == 6
    assert whole.current_weights() == resumed.current_weights() != trained(range(3)).current_weights()


def test_norms_stay_in_single_precision_whatever_the_network_is_cast_to():
    losses = [WeightedSum({"pixel": scaled(1.0), "tiny": scaled(1e-6)}, shares={"tiny": 0.5}) for _ in range(2)]
    restored, target = images()
    for number, loss in enumerate(losses):
        nn.Sequential(loss).to(torch.bfloat16 if number else torch.float32)
        assert loss.norms.mean_tiny.dtype == torch.float32
        for _ in range(3):
            loss(restored, target).backward()
        assert loss.current_weights()["tiny"] == pytest.approx(1e6, rel=1e-3)


class TwoTerms(nn.Module):
    """Of which the second has a hundredth of the gradient."""

    def terms(self, restored, target):
        return {"large": scaled(1.0)(restored, target), "small": scaled(0.01)(restored, target)}

    def forward(self, restored, target):
        return sum(self.terms(restored, target).values())


def test_a_backward_pass_for_each_term_measures_nothing_and_says_so():
    loss = WeightedSum({"pixel": scaled(1.0), "two": TwoTerms()}, shares={"two": 0.5})
    restored, target = images()
    loss(restored, target).backward()
    before = loss.current_weights()

    def one_by_one():
        for term in loss.terms(restored, target).values():
            term.backward(retain_graph=True)

    for _ in range(3):
        with pytest.warns(UserWarning, match="in one backward pass through the sum of all terms"):
            one_by_one()
        loss.norms.take_in()
    assert loss.current_weights() == pytest.approx(before)
    assert before["two"] == pytest.approx(1 / 1.01)


def test_a_backward_pass_through_one_objective_alone_measures_no_other():
    loss = run(WeightedSum({"pixel": scaled(1.0), "other": scaled(4.0)}, shares={"other": 0.5}), range(3))
    for name in 100 * ["other", "pixel"]:
        loss.terms(*images())[name].backward()
    loss.norms.take_in()
    assert loss.current_weights()["other"] == pytest.approx(0.25)


def test_terms_of_one_objective_that_are_multiplied_apart_measure_nothing():
    loss = WeightedSum({"pixel": scaled(1.0), "two": TwoTerms()}, shares={"two": 0.5})
    run(loss, range(2))
    for _ in range(3):
        terms = loss.terms(*images())
        (terms["pixel"] + terms["two/large"] + 100 * terms["two/small"]).backward()
    loss.norms.take_in()
    assert loss.current_weights()["two"] == pytest.approx(1 / 1.01) and loss.norms.calls_two == 2


class HalfAndSingle(nn.Module):
    """Two terms, of which one is of bfloat16, as under autocast."""

    def terms(self, restored, target):
        return {"half": scaled(1.0)(restored, target).bfloat16(), "single": scaled(1.0)(restored, target)}

    def forward(self, restored, target):
        return sum(self.terms(restored, target).values())


def test_terms_of_two_precisions_are_measured_under_any_factor():
    loss = WeightedSum({"pixel": scaled(1.0), "two": HalfAndSingle()}, shares={"two": 0.5})
    for _ in range(6):
        (loss(*images()) / 3).backward()
    loss.norms.take_in()
    assert loss.norms.calls_two == 6 and loss.current_weights()["two"] == pytest.approx(0.5, rel=1e-2)


def test_a_second_derivative_measures_nothing():
    loss = WeightedSum({"pixel": nn.MSELoss(), "other": nn.MSELoss()}, shares={"other": 0.5})
    restored, target = images()
    loss(restored, target).backward()
    (gradient,) = torch.autograd.grad(loss(restored, target), restored, create_graph=True)
    gradient.square().sum().backward()
    loss.norms.take_in()
    assert loss.current_weights()["other"] == pytest.approx(1.0)


def test_an_audit_of_what_wraps_the_sum_leaves_its_norms_alone():
    loss = WeightedSum({"pixel": scaled(1.0), "two": TwoTerms()}, shares={"two": 0.5})
    wrapped = Subsampled(loss, every=2)
    restored, target = images()
    audit(wrapped, restored, target, draws=3)
    assert loss.norms.calls_two == 0
    wrapped(restored, target).backward()
    audit({"all": loss}, restored, target, draws=3)
    loss.norms.take_in()
    assert int(loss.norms.calls_two) == 1 and loss.current_weights()["two"] == pytest.approx(1 / 1.01)


def test_what_is_computed_now_and_then_may_be_measured_at_any_call():
    for before in range(1, 9):
        other = Subsampled(scaled(4.0), every=8)
        other.calls = before  # a resumed training
        loss = WeightedSum({"pixel": scaled(1.0), "other": other}, shares={"other": 0.5})
        value = loss.terms(*images())["other/loss"].item()
        assert loss.current_weights()["other"] == pytest.approx(0.25) and other.calls == before + 1
        whole = 8 * 0.25 * float(scaled(4.0)(*images()))
        assert value == pytest.approx(whole if before == 8 else 0)


def test_shares_beside_fixed_objectives_without_a_gradient_are_refused():
    loss = WeightedSum({"pixel": scaled(0.0), "other": scaled(1.0)}, shares={"other": 0.5})
    for _ in range(2):  # nothing was taken in, after which it would pass
        with pytest.raises(ValueError, match="and one of the others"):
            loss(*images())


def test_norms_go_where_the_images_are():
    norms = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3}).norms
    norms.follow(torch.device("meta"))
    assert {buffer.device.type for buffer in norms.buffers()} == {"meta"}


def test_eval_mode_tells_of_shares_that_nothing_has_measured():
    restored, target = images()
    loss = WeightedSum({"pixel": nn.L1Loss(), "other": scaled(1000.0)}, shares={"other": 0.5}).eval()
    with torch.no_grad():
        loss(restored, target)
    with pytest.warns(UserWarning, match=r"in `\.eval\(\)` the weight of other is 1") as told:
        loss(restored, target)
    assert told[0].filename == __file__ and loss.unmeasured() == ["other"]
    loss(restored, target)  # said once
    loss.train()(restored, target).backward()
    assert loss.unmeasured() == [] and loss.current_weights()["other"] != 1


def test_audit_notes_shares_that_nothing_has_measured():
    restored, target = images()
    loss = WeightedSum({"pixel": nn.L1Loss(), "other": scaled(1000.0)}, shares={"other": 0.5})
    assert audit(loss, restored, target).notes == (
        "No call in training has measured the share of other yet: it weighs 1.",
    )
    loss(restored, target).backward()
    report = audit(loss, restored, target)
    assert not report.notes and report["other"].share == pytest.approx(0.5, rel=1e-3)


def test_audit_sets_off_no_warning_of_eval_mode(recwarn):
    restored, target = images()
    inner = WeightedSum({"one": nn.L1Loss(), "other": scaled(1000.0)}, shares={"other": 0.5})
    for given in ({"a": nn.L1Loss(), "b": inner}, WeightedSum({"a": nn.L1Loss(), "b": inner})):
        assert "the share of other yet" in audit(given, restored, target).notes[0]
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the weight of other is 1"):
        inner.eval()(restored, target)
