"""audit: norms, shares, cosines and flags have their closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from restoreloss import DiffLoss, WeightedSum, audit
from tests.helpers.audit import (
    SCHEDULE,
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


def of_the_target_alone(restored, target):
    return target.mean()


def of_another_leaf(restored, target):
    return F.mse_loss(torch.zeros_like(target, requires_grad=True), target)


def without_slope(restored, target):
    return (restored * 255).round().mean()


def infinite_value(restored, target):
    return F.mse_loss(restored, target) + target.mul(0).sum().log().detach()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_value_norm_share_and_cosine_have_their_closed_forms(shape, dtype, seed):
    restored, target = pair(shape, seed, dtype)
    report = audit({"l2": nn.MSELoss(), "l1": F.l1_loss}, restored, target, draws=1)
    d = [float(e) for e in (restored.double() - target.double()).flatten()]
    n = len(d)
    length = math.sqrt(math.fsum(e * e for e in d))
    l2, l1 = report.terms
    rel = 1e-9 if dtype == torch.float64 else 1e-4
    assert (l2.name, l1.name) == ("l2", "l1")
    assert l2.value == pytest.approx(length**2 / n, rel=rel)
    assert l1.value == pytest.approx(math.fsum(map(abs, d)) / n, rel=rel)
    assert l2.gradient_norm == pytest.approx(2 * length / n, rel=rel)
    assert l1.gradient_norm == pytest.approx(1 / math.sqrt(n), rel=rel)
    assert l2.share == pytest.approx(2 * length / (2 * length + math.sqrt(n)), rel=rel)
    assert l1.share == pytest.approx(math.sqrt(n) / (2 * length + math.sqrt(n)), rel=rel)
    assert l2.cosine == pytest.approx(1, rel=rel)
    assert l1.cosine == pytest.approx(math.fsum(map(abs, d)) / (length * math.sqrt(n)), rel=rel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_measured_in_float32(dtype):
    restored, target = pair((2, 3, 32, 32), dtype=dtype)
    (term,) = audit(lambda z, x: (z - x).float().square().sum(), restored, target).terms
    expected = 2 * float((restored - target).double().square().sum().sqrt())
    assert term.gradient_norm == pytest.approx(expected, rel=5e-3)
    assert term.flags == ()


def test_shares_of_time_and_of_the_gradient_add_up_to_one():
    report = audit({"l1": F.l1_loss, "edges": Edges(), "l2": F.mse_loss}, *pair())
    assert math.fsum(term.share for term in report.terms) == pytest.approx(1)
    assert math.fsum(term.time_share for term in report.terms) == pytest.approx(1)


def test_values_and_norms_are_means_over_the_draws():
    restored, target = pair(dtype=torch.float64)
    factors = []

    def scaled(z, x):
        factors.append(float(torch.rand(())))
        return factors[-1] * F.mse_loss(z, x)

    report = audit({"l2": F.mse_loss, "scaled": scaled}, restored, target, draws=3)
    mean = math.fsum(factors) / 3
    assert len(set(factors)) == 3
    for quantity in ("value", "gradient_norm"):
        plain, found = (getattr(report[name], quantity) for name in ("l2", "scaled"))
        assert found == pytest.approx(mean * plain, rel=1e-9)
    assert report["scaled"].share == pytest.approx(mean / (1 + mean), rel=1e-9)
    assert report["scaled"].cosine == pytest.approx(1)


@pytest.mark.parametrize(
    "term", [under_no_grad, saturated, detached, of_the_target_alone, of_another_leaf, without_slope]
)
def test_term_that_does_not_move_the_image_is_dead_and_leaves_the_share_to_the_others(term):
    report = audit({"l1": F.l1_loss, "term": term}, *pair())
    dead = report["term"]
    assert dead.flags == ("DEAD",)
    assert (dead.gradient_norm, dead.share) == (0.0, 0.0)
    assert math.isnan(dead.cosine)
    assert report["l1"].share == 1.0
    assert report.flagged("DEAD") == ["term"]


def test_term_that_moves_a_single_pixel_is_not_dead():
    report = audit({"l1": F.l1_loss, "pixel": lambda z, x: (z[0, 0, 0, 0] - x[0, 0, 0, 0]).abs()}, *pair())
    assert report["pixel"].gradient_norm == pytest.approx(1)
    assert report.flagged("DEAD") == []


def test_all_terms_dead():
    report = audit({"a": detached, "b": under_no_grad}, *pair())
    assert report.flagged("DEAD") == ["a", "b"]
    assert [term.share for term in report.terms] == [0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norm_of_a_very_small_or_large_gradient_neither_vanishes_nor_overflows(scale):
    restored, target = pair()
    term = audit(lambda z, x: scale * (z - x).sum(), restored, target).terms[0]
    assert term.gradient_norm == pytest.approx(scale * math.sqrt(restored.numel()), rel=1e-4, abs=0)
    assert (term.share, term.flags) == (1.0, ())


@pytest.mark.parametrize("broken", [nan_value, infinite_value, root_of_zero])
def test_broken_term_is_named_and_does_not_spoil_the_others(broken):
    restored, target = pair()
    alone = audit({"l1": F.l1_loss, "l2": F.mse_loss}, restored, target)
    report = audit({"l1": F.l1_loss, "broken": broken, "l2": F.mse_loss, "later": nan_value}, restored, target)
    assert report.flagged("NON-FINITE") == ["broken", "later"]
    assert report["broken"].flags == ("NON-FINITE",)
    assert math.isnan(report["broken"].share)
    assert report.first_non_finite == "broken"
    for name in ("l1", "l2"):
        assert report[name].share == pytest.approx(alone[name].share)
        assert report[name].cosine == pytest.approx(alone[name].cosine)
        assert report[name].flags == ()


def test_finite_value_with_a_gradient_that_is_not_is_non_finite():
    report = audit({"root": root_of_zero}, *pair())
    assert report["root"].value == 0.0
    assert math.isnan(report["root"].gradient_norm)
    assert report["root"].flags == ("NON-FINITE",)


def test_term_that_breaks_in_one_draw_only_is_non_finite():
    calls = []

    def sometimes(z, x):
        calls.append(0)
        return F.mse_loss(z, x) * (math.nan if len(calls) == 2 else 1.0)

    assert audit({"sometimes": sometimes}, *pair(), draws=3).first_non_finite == "sometimes"


def test_healthy_report_names_no_broken_term_and_has_no_notes():
    report = audit({"l1": F.l1_loss}, *pair())
    assert (report.first_non_finite, report.notes) == (None, ())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("argument", ["restored", "target"])
def test_broken_input_is_noted_by_argument_and_sample(argument, value):
    images = dict(zip(("restored", "target"), pair((4, 3, 5, 5)), strict=True))
    images[argument][[1, 3], 0, 2, 2] = value
    report = audit({"l2": F.mse_loss}, **images)
    assert report.notes == (f"`{argument}` itself holds NaN or infinity in samples [1, 3].",)
    assert report.first_non_finite == "l2"


def test_solved_batch_is_noted():
    restored, _ = pair()
    (note,) = audit({"l2": F.mse_loss}, restored, restored.clone()).notes
    assert "`restored` equals `target`" in note


@pytest.mark.parametrize(
    ("factor", "options", "flags"),
    [(100, {}, ("DOMINATES",)), (8, {}, ()), (8, {"dominates": 0.8}, ("DOMINATES",)), (100, {"dominates": 0.995}, ())],
)
def test_term_above_the_share_dominates(factor, options, flags):
    # collinear gradients: the share is factor / (factor + 1)
    report = audit({"l2": F.mse_loss, "heavy": lambda z, x: factor * F.mse_loss(z, x)}, *pair(), **options)
    assert report["heavy"].share == pytest.approx(factor / (factor + 1))
    assert report["heavy"].flags == flags
    assert report["l2"].flags == ()


def test_term_alone_does_not_dominate():
    report = audit({"l2": F.mse_loss}, *pair())
    assert (report["l2"].share, report["l2"].flags) == (1.0, ())


@pytest.mark.parametrize(
    ("cosine", "threshold", "flags"),
    [(-1.0, -0.1, ("OPPOSES",)), (-0.2, -0.1, ("OPPOSES",)), (-0.05, -0.1, ()), (-0.2, -0.3, ()), (0.5, -0.1, ())],
)
def test_term_that_pulls_against_the_first_opposes(cosine, threshold, flags):
    restored, target = pair(dtype=torch.float64)
    up, across = torch.zeros_like(restored), torch.zeros_like(restored)
    up[0], across[1] = 1, 1  # orthogonal
    mixed = cosine * up + math.sqrt(1 - cosine**2) * across
    report = audit(
        {"up": lambda z, x: (z * up).sum(), "mixed": lambda z, x: (z * mixed).sum()},
        restored,
        target,
        opposes=threshold,
    )
    assert report["mixed"].cosine == pytest.approx(cosine)
    assert report["mixed"].flags == flags
    assert report["up"].flags == ()


def test_weights_of_a_weighted_sum_count_and_weight_zero_is_left_out():
    def never(z, x):
        raise AssertionError("this objective has weight 0")

    restored, target = pair(dtype=torch.float64)
    plain = audit({"l1": F.l1_loss, "l2": F.mse_loss}, restored, target)
    loss = WeightedSum({"l1": F.l1_loss, "never": never, "l2": nn.MSELoss()}, {"l1": 2, "l2": -0.5, "never": 0})
    report = audit(loss, restored, target)
    assert [term.name for term in report.terms] == ["l1", "l2"]
    for name, weight in (("l1", 2), ("l2", -0.5)):
        assert report[name].value == pytest.approx(weight * plain[name].value)
        assert report[name].gradient_norm == pytest.approx(abs(weight) * plain[name].gradient_norm)
    assert report["l2"].cosine == pytest.approx(-plain["l2"].cosine)
    assert report["l2"].flags == ("OPPOSES",)


def test_nested_sum_is_taken_apart_with_all_its_weights():
    restored, target = pair()
    inner = WeightedSum({"l1": nn.L1Loss(), "edges": Edges()}, {"l1": 3})
    report = audit(WeightedSum({"inner": inner, "l2": F.mse_loss}, {"inner": 0.5}), restored, target)
    assert [term.name for term in report.terms] == ["inner/l1", "inner/edges/x", "inner/edges/y", "l2"]
    assert report["inner/l1"].value == pytest.approx(1.5 * float(F.l1_loss(restored, target)))


def test_single_objective_is_named_after_its_class():
    assert [term.name for term in audit(nn.L1Loss(), *pair()).terms] == ["L1Loss"]
    assert [term.name for term in audit(Edges(), *pair()).terms] == ["Edges/x", "Edges/y"]


def test_custom_objective_is_measured_term_by_term():
    restored, target = pair(dtype=torch.float64)
    report = audit({"edges": Edges()}, restored, target)
    for name, dim in (("edges/x", 3), ("edges/y", 2)):
        differences = (restored - target).diff(dim=dim)
        gradient = torch.zeros_like(restored)
        size = differences.shape[dim]
        # each difference pulls its two ends apart
        gradient.narrow(dim, 1, size).add_(differences.sign() / differences.numel())
        gradient.narrow(dim, 0, size).sub_(differences.sign() / differences.numel())
        assert report[name].value == pytest.approx(float(differences.abs().mean()))
        assert report[name].gradient_norm == pytest.approx(float(gradient.norm()))


def test_diffloss_is_taken_apart_into_noise_and_h_space():
    restored, target = pair(dtype=torch.float64)
    loss = linear_diffloss(noise=0.5, h=3.0, timesteps=(2, 3))
    report = audit({"pixel": F.mse_loss, "diff": loss}, restored, target)
    assert [term.name for term in report.terms] == ["pixel", "diff/noise", "diff/h_space"]
    # images reach [-1, 1] by a factor 2: weight * a^2 * abar_t * 4 * mse
    for name, factor in (("diff/noise", 0.5**2), ("diff/h_space", 0.01 * 3.0**2)):
        scale = factor * float(SCHEDULE[2]) * 4
        assert report[name].value == pytest.approx(scale * report["pixel"].value, rel=1e-5)
        assert report[name].gradient_norm == pytest.approx(scale * report["pixel"].gradient_norm, rel=1e-5)
        assert report[name].cosine == pytest.approx(1)
        assert report[name].flags == ()


def test_a_denoiser_under_no_grad_is_told():
    @torch.no_grad()
    def denoiser(x_t, t):
        return 0.5 * x_t, 3 * x_t

    with pytest.raises(ValueError, match="`denoiser` should pass a gradient to `restored`, found none in 'noise'"):
        audit({"pixel": F.l1_loss, "diff": DiffLoss(denoiser)}, *pair())


def measured(report):
    return [(t.name, t.value, t.gradient_norm, t.share, t.flags) for t in report.terms]


def test_same_seed_gives_the_same_report_and_another_seed_another():
    images = pair()
    loss = {"noisy": stochastic, "diff": linear_diffloss()}
    first, same, other = (measured(audit(loss, *images, seed=seed)) for seed in (7, 7, 8))
    assert first == same
    assert all(a[1] != b[1] for a, b in zip(first, other, strict=True))


def test_report_of_a_term_does_not_depend_on_the_terms_before_it():
    images = pair()
    alone = audit({"noisy": stochastic}, *images)["noisy"]
    behind = audit({"first": stochastic, "noisy": stochastic}, *images)["noisy"]
    assert alone.value == behind.value
    assert alone.gradient_norm == behind.gradient_norm


def test_global_random_state_is_left_as_it_was():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    audit({"noisy": stochastic, "diff": linear_diffloss()}, *pair())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_metric_of_which_more_is_better_is_no_loss():
    quality = nn.MSELoss()
    quality.lower_better = False
    for objectives in (quality, {"quality": quality}):
        with pytest.raises(ValueError, match="should be less where images are better"):
            audit(objectives, torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


def test_global_random_state_is_left_as_it_was_when_an_objective_raises():
    def broken(z, x):
        torch.rand(3)
        raise RuntimeError("no")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        audit({"broken": broken}, *pair())
    assert torch.equal(torch.get_rng_state(), before)


def test_random_state_of_an_accelerator_is_not_seeded_for_images_on_the_cpu(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    audit({"noisy": stochastic}, *pair(), seed=7)
    assert seeded == []


def test_nothing_is_written_to_the_image_the_networks_or_the_graph():
    network, learned = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 1, 1)
    states = [[p.detach().clone() for p in each.parameters()] for each in (network, learned)]
    leaf, target = pair()
    image = leaf.clone()
    leaf.requires_grad_().grad = torch.ones_like(leaf)
    restored = network(leaf)
    for each in (restored, leaf):
        report = audit({"learned": lambda z, x: learned(z - x).abs().mean(), "l1": F.l1_loss}, each, target)
        assert report.flagged("DEAD") == []
    assert torch.equal(leaf, image)
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    for each, state in zip((network, learned), states, strict=True):
        assert each.training
        assert all(map(torch.equal, each.parameters(), state))
        assert all(p.requires_grad and p.grad is None for p in each.parameters())
    F.l1_loss(restored, target).backward()  # the caller's graph is still there
    assert network.weight.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_report_is_the_same_where_gradients_are_off(mode, needs_grad):
    restored, target = pair()
    loss = {"l1": F.l1_loss, "l2": F.mse_loss, "diff": linear_diffloss()}
    expected = measured(audit(loss, restored, target))
    with mode():
        found = measured(audit(loss, restored.requires_grad_(needs_grad), target))
        assert not torch.is_grad_enabled()
    assert found == expected
    assert all(flags == () for *_, flags in found)


def test_images_made_in_inference_mode_can_be_audited():
    expected = measured(audit({"l2": F.mse_loss}, *pair()))
    with torch.inference_mode():
        images = [image + 0 for image in pair()]
    assert measured(audit({"l2": F.mse_loss}, *images)) == expected
