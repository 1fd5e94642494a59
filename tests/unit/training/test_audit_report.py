"""The report of audit, and calibrate."""

import json
import math
import struct
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from restoreloss import Objective, WeightedSum, audit, calibrate
from tests.helpers.audit import (
    Edges,
    detached,
    linear_diffloss,
    nan_value,
    pair,
    root_of_zero,
    saturated,
    stochastic,
    under_no_grad,
)


@pytest.fixture
def flawed():
    objectives = {
        "pixel": F.l1_loss,
        "against": lambda z, x: -100 * F.l1_loss(z, x),
        "prior": under_no_grad,
        "root": root_of_zero,
    }
    return audit(objectives, *pair())


def test_table_holds_every_name_and_flag(flawed):
    assert {flag for term in flawed.terms for flag in term.flags} == {"DEAD", "NON-FINITE", "DOMINATES", "OPPOSES"}
    header, _, *rows, last = str(flawed).splitlines()
    assert header.split() == ["term", "value", "|gradient|", "share", "cosine", "time", "flags"]
    for row, term in zip(rows, flawed.terms, strict=True):
        name, value, norm, share, *_ = row.split()
        assert name == term.name
        assert float(value) == pytest.approx(term.value, rel=1e-3)
        assert float(norm) == pytest.approx(term.gradient_norm, rel=1e-2, nan_ok=True)
        assert float(share.rstrip("%")) == pytest.approx(100 * term.share, abs=0.051, nan_ok=True)
        assert row.partition("%")[2].partition("%")[2].split() == list(term.flags)
    assert last == "first to be NaN or infinite: root"


def test_table_ends_with_the_notes():
    restored, target = pair()
    restored[1] = math.nan
    assert str(audit({"l1": F.l1_loss}, restored, target)).splitlines()[-1].endswith("in samples [1].")


def test_dictionary_survives_json(flawed):
    found = json.loads(json.dumps(flawed.to_dict()))
    assert list(found["terms"]) == ["pixel", "against", "prior", "root"]
    assert found["terms"]["against"]["flags"] == ["DOMINATES", "OPPOSES"]
    assert found["terms"]["pixel"]["gradient_norm"] == flawed["pixel"].gradient_norm
    assert found["terms"]["prior"]["share"] == 0.0
    assert math.isnan(found["terms"]["root"]["share"])
    assert (found["first_non_finite"], found["notes"]) == ("root", [])


def test_unknown_name_is_a_key_error(flawed):
    with pytest.raises(KeyError, match="absent"):
        flawed["absent"]


def test_plot_writes_a_png_of_a_readable_size(flawed, tmp_path):
    path = flawed.plot(tmp_path / "report.png")
    assert path == tmp_path / "report.png"
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 600
    assert height >= 50 * len(flawed.terms)
    assert len(data) > 5000


def test_plot_without_matplotlib_names_the_extra(flawed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"AuditReport.plot needs `matplotlib`.*pip install matplotlib"):
        flawed.plot(tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("others", [{}, {"l1": F.l1_loss}])
def test_two_terms_of_one_name_are_refused_by_name(others):
    with pytest.raises(ValueError, match="edges/x"):
        audit({**others, "edges/x": F.mse_loss, "edges": Edges()}, *pair())


@pytest.mark.parametrize(
    ("objectives", "images", "options", "message"),
    [
        ({}, pair(), {}, "`objectives` should name at least one objective, found none"),
        ({"l1": nn.L1Loss(reduction="none")}, pair(), {}, r"Term 'l1' should be a scalar.*found \(2, 3, 6, 5\)"),
        ({"l1": lambda z, x: 0.5}, pair(), {}, "Term 'l1' should be a scalar tensor.*found 0.5"),
        ({"l1": lambda z, x: None}, pair(), {}, "Term 'l1' should be a scalar tensor.*found None"),
        (
            {"l1": lambda z, x: z.detach().numpy()},
            pair(),
            {},
            r"Term 'l1' should be a scalar tensor.*found a numpy array of shape \(2, 3, 6, 5\)",
        ),
        ({"l1": lambda z, x: {"a": z.mean()}}, pair(), {}, "Term 'l1' should be a scalar tensor.*found dict"),
        ({"l1": nn.L1Loss}, pair(), {}, "should be callable as .*, found the class L1Loss"),
        (nn.L1Loss, pair(), {}, "`objectives` should be .* found the class L1Loss"),
        (pair()[0], (pair()[1], {"l1": F.l1_loss}), {}, "`objectives` should be .* found a tensor of shape"),
        ({"l1": F.l1_loss}, pair(), {"draws": 0}, "`draws` should be a whole number of at least 1, found 0"),
        ({"l1": F.l1_loss}, pair(), {"draws": "4"}, "`draws` should be a whole number of at least 1, found '4'"),
        ({"l1": F.l1_loss}, pair(), {"draws": True}, "`draws` should be a whole number of at least 1, found True"),
        ({"l1": F.l1_loss}, pair(), {"seed": None}, "`seed` should be a whole number .* found None"),
        ({"l1": F.l1_loss}, pair(), {"dominates": "9e-1"}, "`dominates` should be a finite number, found '9e-1'"),
        ({"l1": F.l1_loss}, pair(), {"opposes": None}, "`opposes` should be a finite number, found None"),
        ({"l1": F.l1_loss}, (pair()[0], pair()[1][:1]), {}, r"`target` should have the shape .* found \(1, 3, 6, 5\)"),
        ({"l1": F.l1_loss}, (pair()[0].int(), pair()[1]), {}, "`restored` should be floating point, found torch.int32"),
    ],
)
def test_bad_input_is_refused_with_what_was_found(objectives, images, options, message):
    with pytest.raises(ValueError, match=message):
        audit(objectives, *images, **options)


@pytest.mark.parametrize(
    "shares", [{"l2": 0.25, "noisy": 0.1, "edges": 0.05}, {"edges": 1e-4, "noisy": 0.9, "l2": 0.01}]
)
def test_calibrated_weights_give_the_shares_that_were_asked_for(shares):
    restored, target = pair()
    edges = Edges().forward  # one term, so that the share of the objective is the share of the term
    objectives = {"l1": F.l1_loss, "l2": nn.MSELoss(), "noisy": stochastic, "edges": edges}
    weights = calibrate(objectives, restored, target, shares=shares)
    assert list(weights) == list(objectives)
    assert weights["l1"] == 1.0
    report = audit(WeightedSum(objectives, weights), restored, target)
    found = {term.name: term.share for term in report.terms}
    assert found == pytest.approx({"l1": 1 - sum(shares.values()), **shares}, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(share=st.floats(1e-6, 0.999), scale=st.floats(1e-6, 1e6))
def test_calibrated_weight_has_its_closed_form(share, scale):
    restored, target = pair((1, 1, 3, 3), dtype=torch.float64)
    objectives = {"l2": F.mse_loss, "scaled": lambda z, x: scale * F.mse_loss(z, x)}
    weights = calibrate(objectives, restored, target, shares={"scaled": share}, draws=1)
    assert weights == {"l2": 1.0, "scaled": pytest.approx(share / (1 - share) / scale, rel=1e-9)}


def test_diffloss_is_calibrated_as_a_whole():
    restored, target = pair()
    objectives = {"pixel": nn.L1Loss(), "diff": linear_diffloss()}
    weights = calibrate(objectives, restored, target, shares={"diff": 0.3}, draws=2)
    assert list(weights) == ["pixel", "diff"]
    report = audit(WeightedSum(objectives, weights), restored, target, draws=2)
    # the gradients of a linear denoiser's two terms are collinear: their norms add up
    assert report["diff/noise"].share + report["diff/h_space"].share == pytest.approx(0.3, rel=1e-4)


def test_first_objective_alone_weighs_one():
    assert calibrate({"l1": F.l1_loss}, *pair(), shares={}) == {"l1": 1.0}


@pytest.mark.parametrize(
    ("broken", "flag"),
    [(detached, "DEAD"), (saturated, "DEAD"), (nan_value, "NON-FINITE"), (root_of_zero, "NON-FINITE")],
)
@pytest.mark.parametrize("order", [("good", "bad"), ("bad", "good")])
def test_objective_that_cannot_have_a_share_is_named(broken, flag, order):
    functions = {"good": F.l1_loss, "bad": broken}
    with pytest.raises(ValueError, match=rf"finite gradient at `restored`, found bad \({flag}\)\.$"):
        calibrate({name: functions[name] for name in order}, *pair(), shares={order[1]: 0.5})


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"l2": 0.5},
        {"l2": 0.1, "l3": 0.1, "l4": 0.1},
        {"l1": 0.5, "l2": 0.2, "l3": 0.3},
        {"l2": 0.0, "l3": 0.1},
        {"l2": -0.1, "l3": 0.1},
        {"l2": 0.5, "l3": 0.5},
        {"l2": math.nan, "l3": 0.1},
        {"l2": math.inf, "l3": 0.1},
    ],
)
def test_bad_shares_are_refused_with_what_was_found(shares):
    objectives = {"l1": F.l1_loss, "l2": F.mse_loss, "l3": F.huber_loss}
    with pytest.raises(ValueError, match=r"`shares` should give each of \['l2', 'l3'\] more than 0 .* found \{"):
        calibrate(objectives, *pair(), shares=shares)


def test_nothing_to_calibrate_is_refused_by_name():
    with pytest.raises(ValueError, match="`objectives` should name at least one objective"):
        calibrate({}, *pair(), shares={})


def test_an_objective_may_change_its_images_in_place():
    z, x = pair()
    before = z.clone(), x.clone()
    report = audit({"clamped": lambda r, t: (r.clamp_(0.2, 0.8) - t.zero_()).abs().mean()}, z, x)
    assert report["clamped"].gradient_norm > 0
    assert torch.equal(z, before[0])
    assert torch.equal(x, before[1])


def test_half_precision_does_not_call_dead_what_a_grad_scaler_saves():
    z, x = pair((4, 3, 128, 128), dtype=torch.float16)
    loss = WeightedSum({"l1": torch.nn.L1Loss(), "l2": torch.nn.MSELoss()}, {"l2": 1e-3})
    report = audit(loss, z, x)
    expected = 1e-3 * 2 * (z.double() - x.double()).norm().item() / z.numel()
    assert report["l2"].flags == ()
    assert report["l2"].gradient_norm == pytest.approx(expected, rel=0.05)


def test_terms_that_come_and_go_are_refused_by_name():
    class Fickle(Objective):
        calls = 0

        def terms(self, restored, target):
            self.calls += 1
            always = {"always": (restored - target).abs().mean()}
            return always | ({"sometimes": restored.mean()} if self.calls % 2 else {})

    with pytest.raises(ValueError, match="'fickle/sometimes' in some only"):
        audit({"fickle": Fickle()}, *pair())


@pytest.mark.parametrize("objectives", [{"a": 3}, [torch.nn.L1Loss()]])
def test_objectives_that_cannot_be_called_are_refused(objectives):
    with pytest.raises(ValueError, match="`objectives.* should be"):
        audit(objectives, *pair())


@pytest.mark.parametrize(("objectives", "shares"), [(torch.nn.L1Loss(), {}), ({"l1": torch.nn.L1Loss()}, 0.1)])
def test_calibrate_wants_mappings(objectives, shares):
    with pytest.raises(ValueError, match="mappings by name"):
        calibrate(objectives, *pair(), shares=shares)


@pytest.mark.parametrize("flag", ["dead", "NON_FINITE", "", None, ["DEAD"]])
def test_an_unknown_flag_is_refused_with_the_four_that_there_are(flag):
    report = audit({"l1": F.l1_loss, "bad": detached}, *pair())
    with pytest.raises(
        ValueError, match="`flag` should be one of .'DEAD', 'NON-FINITE', 'DOMINATES', 'OPPOSES'., found"
    ):
        report.flagged(flag)
    assert report.flagged("DEAD") == ["bad"] and report.flagged("OPPOSES") == []


def test_an_unknown_term_is_refused_with_those_that_there_are():
    with pytest.raises(KeyError, match=r"one of \['l1', 'bad'\], found 'l2'"):
        audit({"l1": F.l1_loss, "bad": detached}, *pair())["l2"]


@pytest.mark.parametrize(
    ("objectives", "shares", "message"),
    [
        (
            {"l1": F.l1_loss, "l2": F.mse_loss},
            {"l2": "0.5"},
            r"`shares\['l2'\]` should be a finite number, found '0.5'",
        ),
        ({"l1": F.l1_loss, "l2": F.mse_loss}, {"l2": True}, r"`shares\['l2'\]` should be .* found True"),
        ({"l1": F.l1_loss, "l2": F.mse_loss}, {"l2": None}, r"`shares\['l2'\]` should be .* found None"),
        ({"l1": F.l1_loss, "l2": 3}, {"l2": 0.5}, "should be callable as .*, found 3"),
        (
            {"l1": F.l1_loss, "l2": nn.MSELoss},
            {"l2": 0.5},
            "should be callable as .*, found the class MSE",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_named(objectives, shares, message):
    with pytest.raises(ValueError, match=message):
        calibrate(objectives, *pair(), shares=shares)


def test_weights_that_were_all_set_to_zero_later_are_named():
    loss = WeightedSum({"l1": F.l1_loss})
    loss.weights["l1"] = 0.0
    with pytest.raises(ValueError, match="`objectives` should weigh something, found the weights .*'l1': 0.0"):
        audit(loss, *pair())
