"""Objectives of several outputs, of the output alone, and of a part of the image, against closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from restoreloss import DiffLoss, Masked, MultiOutput, NoReference, TDPLoss, WeightedSum, audit
from tests.contract.objectives import images, pointwise


def test_outputs_of_several_sizes_meet_the_reduced_target():
    target = images(torch.float64, (2, 3, 16, 24))[1].detach()
    outputs = [torch.rand(2, 3, 16 // n, 24 // n, dtype=torch.float64, requires_grad=True) for n in (1, 2, 4)]
    loss = MultiOutput(nn.L1Loss(), [1.0, 0.5, 0.25])
    expected = sum(
        w * (z - F.avg_pool2d(target, n)).abs().mean()
        for w, z, n in zip([1, 0.5, 0.25], outputs, (1, 2, 4), strict=True)
    )
    torch.testing.assert_close(loss(outputs, target), expected)
    torch.testing.assert_close(loss(outputs, [F.avg_pool2d(target, n) for n in (1, 2, 4)]), expected)
    loss(outputs, target).backward()
    assert all(output.grad.abs().sum() > 0 for output in outputs)


def test_an_output_of_weight_0_is_not_looked_at_and_terms_keep_their_names():
    restored, target = images()
    loss = MultiOutput(DiffLoss(pointwise, h_space_weight=0), [0.0, 2.0])
    assert list(loss.terms([restored * float("nan"), restored], target)) == ["1/noise"]
    torch.manual_seed(0)
    found = loss([restored * float("nan"), restored], target)
    torch.manual_seed(0)
    torch.testing.assert_close(found, 2 * DiffLoss(pointwise, h_space_weight=0)(restored, target))


@pytest.mark.parametrize("objective", [nn.L1Loss(), nn.MSELoss()])
def test_a_mask_leaves_the_mean_over_what_it_shows(objective):
    restored, target = images(torch.float64)
    mask = (torch.rand(len(target), 1, *target.shape[2:]) < 0.3).double()
    chosen = mask.bool().expand_as(target)
    found = Masked(objective)(restored, target, mask=mask)
    torch.testing.assert_close(found, objective(restored[chosen], target[chosen]))
    found.backward()
    assert (restored.grad != 0).equal(chosen & (restored != target))


def test_a_mask_of_ones_is_the_objective_and_one_of_zeros_is_0():
    restored, target = images()
    loss = DiffLoss(pointwise, h_space_weight=0)
    whole = torch.ones_like(target)
    torch.manual_seed(0)
    found = Masked(loss)(restored, target, mask=whole)
    torch.manual_seed(0)
    torch.testing.assert_close(found, loss(restored, target))
    empty = Masked(loss)(restored, target, mask=0 * whole)
    empty.backward()
    assert empty == 0 and not restored.grad.any()


def test_what_a_network_sees_outside_of_the_mask_is_no_difference():
    restored, target = images(shape=(1, 3, 32, 32))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))
    loss = Masked(TDPLoss(network, "0", normalize=None))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :8, :8] = 1
    loss(restored, target, mask=mask).backward()
    assert restored.grad[..., :8, :8].abs().min() > 0
    assert not restored.grad[..., 8:, :].any() and not restored.grad[..., 8:].any()


class Elsewhere:
    """A mask on an accelerator: it counts how often its values are read."""

    is_meta, device = False, torch.device("cuda")

    def __init__(self, highest):
        self.highest, self.reads = highest, 0

    def detach(self):
        return self

    def aminmax(self):
        self.reads += 1
        return torch.tensor(0.0), torch.tensor(self.highest)


def test_on_an_accelerator_the_range_of_the_first_mask_alone_is_read():
    with pytest.raises(ValueError, match=r"`mask` should have values in \[0, 1\], found 0 to 255"):
        Masked(nn.L1Loss())._check_range(Elsewhere(255.0))
    loss, masks = Masked(nn.L1Loss()), [Elsewhere(1.0) for _ in range(3)]
    for mask in masks:
        loss._check_range(mask)
    assert [mask.reads for mask in masks] == [1, 0, 0]
    restored, target = images()
    with pytest.raises(ValueError, match="found 0 to 255"):  # On the CPU every mask is read.
        loss(restored, target, mask=255 * (torch.rand_like(target) > 0.5))


def variation(image):
    return image.diff(dim=2).abs().mean() + image.diff(dim=3).abs().mean()


def test_a_loss_of_the_output_alone_is_a_term_of_a_sum():
    restored, target = images()
    parts = {"pixel": nn.L1Loss(), "smooth": NoReference(variation), "quality": NoReference(variation, sign=-1)}
    loss = WeightedSum(parts, weights={"smooth": 0.1})
    terms = loss.terms(restored, target)
    torch.testing.assert_close(terms["smooth/loss"], 0.1 * variation(restored))
    torch.testing.assert_close(terms["quality/loss"], -variation(restored))
    assert audit(WeightedSum({"pixel": nn.L1Loss(), "s": NoReference(variation)}, shares={"s": 0.2}), restored, target)


@pytest.mark.parametrize(("lower_better", "sign"), [(False, 1), (True, -1)])
def test_a_quality_with_the_wrong_sign_is_refused(lower_better, sign):
    quality = nn.Module()
    quality.forward, quality.lower_better = variation, lower_better
    NoReference(quality, sign=-sign)
    with pytest.raises(ValueError, match=f"of which {'less' if lower_better else 'more'} is better"):
        NoReference(quality, sign=sign)


def test_a_weight_below_zero_does_not_turn_a_sign_that_was_turned():
    known = nn.Module()
    known.forward, known.lower_better = variation, True
    for quality in (NoReference(variation, sign=-1), NoReference(known)):
        with pytest.raises(ValueError, match="should be more where images are better, to be weighed by -0.1"):
            WeightedSum({"pixel": nn.L1Loss(), "quality": quality}, weights={"quality": -0.1})
    WeightedSum({"pixel": nn.L1Loss(), "quality": NoReference(variation)}, weights={"quality": -0.1})


def test_outputs_of_a_metric_of_which_more_is_better_weigh_less_than_nothing():
    quality = nn.MSELoss()
    quality.lower_better = False
    MultiOutput(quality, [-1.0, -0.5])
    for weights in (None, [-1.0, 0.5]):
        with pytest.raises(ValueError, match="`objective` should be less where images are better"):
            MultiOutput(quality, weights)


@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_of_the_output_alone_may_be_one_for_each_sample(count):
    restored, target = images(shape=(count, 3, 8, 8))
    smooth = NoReference(lambda image: image.diff(dim=2).abs().mean(dim=(1, 2, 3)))
    distance = TDPLoss(nn.Sequential(nn.Conv2d(3, 4, 1)), "0", normalize=None, reduction="none")
    assert WeightedSum({"seen": distance, "smooth": smooth})(restored, target).shape == (count,)


def test_losses_of_piq_are_terms_of_a_sum():
    piq = pytest.importorskip("piq")
    restored, target = images(shape=(2, 3, 24, 24))
    loss = WeightedSum({"ssim": piq.SSIMLoss(), "tv": NoReference(piq.TVLoss())}, weights={"tv": 1e-3})
    restored = restored.clamp(0, 1)
    torch.testing.assert_close(loss.terms(restored, target)["tv/loss"], 1e-3 * piq.total_variation(restored))


def test_a_loss_whose_second_argument_is_no_target_is_refused():
    def total_variation(image, weight=None):
        return variation(image if weight is None else weight * image)

    def with_option(image, strength=0.1):
        return strength * variation(image)

    for function in (total_variation, with_option):
        for build in (Masked, MultiOutput, lambda f: WeightedSum({"tv": f})):
            with pytest.raises(ValueError, match="should take the target in second place, .* `NoReference` makes"):
                build(function)
        assert NoReference(function)(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)) > 0

    def perhaps(image, target=None):
        return image.sum() if target is None else (image - target).abs().sum()

    assert WeightedSum({"l1": perhaps})(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)) == 12


def test_what_is_masked_may_hold_anything():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    restored, target = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    restored[..., 2:] = torch.nan
    restored.requires_grad_()
    loss = Masked(nn.L1Loss())(restored, target, mask=mask)
    loss.backward()
    assert loss == 1
    torch.testing.assert_close(restored.grad, mask.expand(1, 3, 4, 4) / 24)


def test_each_image_has_the_mean_over_its_own_mask():
    restored, target = images(torch.float64)
    mask = torch.zeros(len(target), 1, *target.shape[2:], dtype=torch.float64)
    mask[0, :, :2, :2] = 1
    mask[1:] = 1
    mask[-1] = 0
    found = Masked(lambda z, x: (z - x).abs().mean(dim=(1, 2, 3)))(restored, target, mask=mask)
    for n in range(len(target)):
        chosen = mask[n].bool().expand_as(target[n])
        expected = (restored - target)[n][chosen].abs().mean() if chosen.any() else torch.zeros(()).double()
        torch.testing.assert_close(found[n], expected)


@pytest.mark.parametrize(
    ("objective", "found"),
    [
        (nn.L1Loss(reduction="sum"), "reduction='sum'"),
        (DiffLoss(pointwise, h_space_weight=0, distance="rms"), "distance='rms'"),
        (
            WeightedSum({"pixel": nn.L1Loss(), "other": DiffLoss(pointwise, h_space_weight=0, distance="l2")}),
            "distance='l2'",
        ),
    ],
)
def test_what_says_that_it_is_no_mean_is_not_masked(objective, found):
    with pytest.raises(ValueError, match=f"`objective` should be a mean over pixels, found {found}"):
        Masked(objective)


def test_means_that_hold_a_sum_within_are_masked_and_maps_are_not():
    class Own(nn.Module):
        distance = "l2"

        def __init__(self):
            super().__init__()
            self.l1 = nn.L1Loss(reduction="sum")

        def forward(self, restored, target):
            return self.l1(restored, target).view(1) / restored.numel()

    restored, target = images()
    mask = torch.ones(len(target), 1, *target.shape[2:])
    mask[..., :4] = 0
    found = Masked(Own())(restored, target, mask=mask)
    assert found.shape == (1,)
    torch.testing.assert_close(found[0], Masked(nn.L1Loss())(restored, target, mask=mask))
    with pytest.raises(ValueError, match="`objective` should return a mean over pixels, found"):
        Masked(nn.L1Loss(reduction="none")).terms(restored, target, mask=mask)
