"""WeightedSum(shares=...) whose weights, shares or objectives change, in a training or between two."""

from fractions import Fraction

import pytest
from torch import nn

from restoreloss import WeightedSum
from tests.helpers.shares import images, run, scaled, shares_of


def test_shares_are_given_at_construction():
    loss = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()})
    loss.shares["other"] = 0.5
    with pytest.raises(ValueError, match="`shares` should be given at construction"):
        loss(*images())
    loss = WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.5})
    loss.weights["other"] = 2.0
    with pytest.raises(ValueError, match=r"should not name what has a share, found \['other'\]"):
        loss(*images())


def test_weights_that_change_are_measured_anew():
    restored, target = images()

    def reached(loss):
        terms = loss.terms(restored, target)
        found = shares_of(terms, restored)["other"]
        sum(terms.values()).backward()
        return found

    objectives = {"pixel": scaled(1.0), "later": scaled(30.0), "other": scaled(100.0)}
    loss = WeightedSum(objectives, weights={"later": 0.0}, shares={"other": 0.5})
    assert [reached(loss) for _ in range(20)] == pytest.approx([0.5] * 20, rel=1e-4)
    loss.weights.update(pixel=0.0, later=1.0)  # another in its place
    assert [reached(loss) for _ in range(20)] == pytest.approx([0.5] * 20, rel=1e-4)
    loss.weights.update(pixel=1.0)  # both, which were measured
    assert [reached(loss) for _ in range(20)] == pytest.approx([0.5] * 20, rel=1e-4)


@pytest.mark.parametrize("strength", [0.0, float("nan"), 1000.0])
def test_measuring_another_objective_leaves_those_alone_that_are_known(strength):
    now = [1.0]
    objectives = {"pixel": scaled(1.0), "later": scaled(3.0), "other": lambda z, x: now[0] * scaled(1.0)(z, x)}
    loss = run(WeightedSum(objectives, weights={"later": 0.0}, shares={"other": 0.5}), range(20))
    loss.norms.take_in()
    now[0] = strength
    loss.weights["later"] = 1.0
    loss(*images())
    if strength != strength:  # a broken call measures nothing
        assert loss.norms.calls_later == 0
        now[0] = 1.0
        loss(*images())
    assert loss.current_weights()["other"] == pytest.approx(4.0) and loss.norms.calls_other == 20


def test_a_state_with_shares_may_go_on_with_fixed_weights():
    objectives = {"pixel": scaled(1.0), "other": scaled(5.0)}
    state = run(WeightedSum(objectives, shares={"other": 0.5}), range(3)).state_dict()
    fixed = nn.ModuleDict({"loss": WeightedSum(objectives, weights={"other": 0.2})})
    fixed.load_state_dict({f"loss.{name}": value for name, value in state.items()})
    assert fixed["loss"].current_weights() == {"pixel": 1.0, "other": 0.2}


def test_a_state_of_other_objectives_gives_none_the_norm_of_another():
    objectives = {"pixel": scaled(1.0), "big": scaled(100.0)}
    state = run(WeightedSum(objectives, shares={"big": 0.5}), range(3)).state_dict()
    turned = WeightedSum(dict(reversed(objectives.items())), shares={"big": 0.5})
    turned.load_state_dict(state)
    assert turned.current_weights() == pytest.approx({"big": 0.01, "pixel": 1.0})
    for more in ({**objectives, "more": scaled(1.0)}, {"pixel": scaled(1.0), "more": scaled(0.1)}):
        name = list(more)[-1]
        others = WeightedSum(more, shares={name: 0.5})
        others.load_state_dict(state)
        assert others.norms.calls_pixel == 3 and others.norms.get_buffer(f"calls_{name}") == 0
        run(others, range(1))
        assert others.current_weights()[name] == pytest.approx(101.0 if "big" in more else 10.0)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("rest", [5, 700])
def test_an_objective_of_fixed_weight_that_rested_is_measured_anew_for_a_share(resumed, rest):
    active = [1.0]
    hinge = lambda restored, target: active[0] * scaled(2.0)(restored, target)  # noqa: E731
    objectives = {"pixel": scaled(1.0), "other": scaled(5.0), "hinge": hinge}
    loss = run(WeightedSum(objectives, weights={"hinge": 0.1}, shares={"other": 0.3}), range(3))
    active[0] = 0.0
    run(loss, range(rest))
    shares = {"other": 0.3, "hinge": 0.2}
    if resumed:
        state = loss.state_dict()
        loss = WeightedSum(objectives, shares=shares)
        loss.load_state_dict(state)
    else:
        del loss.weights["hinge"]
        loss.shares = shares
    with pytest.raises(ValueError, match="should have a finite gradient above 0"):
        loss(*images())
    active[0] = 1.0
    run(loss, range(3))
    assert loss.current_weights() == pytest.approx({"pixel": 1.0, "other": 0.3 / 0.5 / 5, "hinge": 0.2 / 0.5 / 2})


def test_what_is_known_keeps_its_weight_until_what_is_new_has_been_measured():
    objectives = {"pixel": scaled(1.0), "later": scaled(3.0), "other": scaled(4.0)}
    loss = run(WeightedSum(objectives, weights={"later": 0.0}, shares={"other": 0.5}), range(3))
    loss.weights["later"] = 1.0
    assert loss.current_weights()["other"] == pytest.approx(0.25)
    assert run(loss, range(1)).current_weights()["other"] == pytest.approx(1.0)


def test_a_state_is_exact_where_weights_change_too():
    def trained(saved):
        objectives = {"pixel": nn.L1Loss(), "later": nn.MSELoss(), "other": nn.MSELoss()}
        loss = run(WeightedSum(objectives, weights={"later": 0.0}, shares={"other": 0.3}), range(5))
        if saved:
            state = loss.state_dict()
            loss = WeightedSum(objectives, weights={"later": 0.0}, shares={"other": 0.3})
            loss.load_state_dict(state)
        loss.weights["later"] = 1.0
        return [float(loss(*images(seed))) for seed in range(3)]

    assert trained(saved=True) == trained(saved=False)


@pytest.mark.parametrize("looked", [False, True])
def test_looking_at_the_weights_changes_none(looked):
    loss = WeightedSum(
        {"pixel": scaled(1.0), "other": scaled(4.0), "c": scaled(2.0)}, weights={"c": 0.1}, shares={"other": 0.3}
    )
    for shares in ({"other": 0.3, "c": 0.2}, {"other": 0.3}, {"other": 0.3, "c": 0.2}):
        loss.weights = {"pixel": 1.0} if "c" in shares else {"pixel": 1.0, "c": 0.1}
        loss.shares = shares
        if looked:
            loss.current_weights()
        run(loss, range(1 if "c" not in shares else 3))
    assert int(loss.norms.idle_c) == 0
    assert loss.current_weights() == pytest.approx({"pixel": 1.0, "other": 0.3 / 0.5 / 4, "c": 0.2 / 0.5 / 2})


def test_weights_are_floats_whatever_numbers_they_were_given_as():
    loss = WeightedSum({"a": scaled(1.0), "b": scaled(1.0), "c": scaled(1.0)}, {"a": 1, "b": Fraction(1, 2)})
    assert loss.current_weights() == {"a": 1.0, "b": 0.5, "c": 1.0}
    assert all(type(weight) is float for weight in [*loss.weights.values(), *loss.current_weights().values()])
    float(loss(*images()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: loss.weights.update(typo=2.0), r"`weights` should be named after .* found \['typo'\]"),
        (lambda loss: loss.shares.update(typo=0.1), r"`shares` should be named after .* found \['typo'\]"),
        (lambda loss: loss.weights.update(pixel=float("nan")), r"`weights\['pixel'\]` should be a finite number"),
        (lambda loss: loss.weights.update(pixel="0.5"), r"`weights\['pixel'\]` should be a finite number"),
        (lambda loss: loss.shares.update(other=1.5), r"`shares\['other'\]` should be .* at most 1"),
        (lambda loss: loss.shares.clear(), r"should name each objective, found no \['other'\]"),
        (lambda loss: setattr(loss, "weights", {}), r"should name each objective, found no \['pixel'\]"),
    ],
)
def test_wrong_changes_are_told_at_the_next_call(change, message):
    loss = run(WeightedSum({"pixel": nn.L1Loss(), "other": nn.MSELoss()}, shares={"other": 0.3}), range(2))
    change(loss)
    with pytest.raises(ValueError, match=message):
        loss(*images())
