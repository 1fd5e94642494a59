"""The losses called as Restormer and NAFNet call them, with a module in the place of `basicsr.models.losses`."""

import sys
from types import ModuleType

import pytest
import torch
import yaml
from torch import nn

import restoreloss
from restoreloss.integrations.basicsr import register
from tests.integrations.frameworks import copied, snippet


class L1Loss(nn.Module):
    def __init__(self, loss_weight=1.0, reduction="mean"):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred, target, weight=None):
        return self.loss_weight * (pred - target).abs().mean()


class PSNRLoss(L1Loss):
    def forward(self, pred, target):
        return self.loss_weight * 10 * torch.log10(((pred - target) ** 2).mean(dim=(1, 2, 3)) + 1e-8).mean()


@pytest.fixture
def losses():
    module = ModuleType("basicsr.models.losses")
    module.L1Loss, module.PSNRLoss = L1Loss, PSNRLoss
    return module


def build(losses, options):
    options = dict(options)
    return getattr(losses, options.pop("type"))(**options).to(torch.device("cpu"))


def restormer(losses, train, preds, gt):
    """ImageCleanModel of Restormer, from its options to the gradient."""
    cri_pix = build(losses, train["pixel_opt"])
    l_pix = 0.0
    for pred in preds if isinstance(preds, list) else [preds]:
        l_pix += cri_pix(pred, gt)
    l_pix.backward()
    return {"l_pix": l_pix.mean().item()}


def nafnet(losses, train, preds, gt):
    """ImageRestorationModel of NAFNet, likewise."""
    preds = preds if isinstance(preds, list) else [preds]
    cri_pix = build(losses, train["pixel_opt"]) if train.get("pixel_opt") else None
    cri_perceptual = build(losses, train["perceptual_opt"]) if train.get("perceptual_opt") else None
    total, log = 0, {}
    if cri_pix:
        l_pix = 0.0
        for pred in preds:
            l_pix += cri_pix(pred, gt)
        total += l_pix
        log["l_pix"] = l_pix
    if cri_perceptual:
        l_percep, l_style = cri_perceptual(preds[-1], gt)
        if l_percep is not None:
            total += l_percep
            log["l_percep"] = l_percep
        if l_style is not None:
            total += l_style
            log["l_style"] = l_style
    total.backward()
    return {name: value.mean().item() for name, value in log.items()}


def images(count=1):
    generator = torch.Generator().manual_seed(0)
    gt, *preds = (torch.rand(2, 3, 24, 24, generator=generator) for _ in range(count + 1))
    return [pred.requires_grad_() for pred in preds], gt


def test_restormer_adds_the_weighted_loss_of_each_prediction(losses, prior):
    network, folder = prior
    register(losses)
    preds, gt = images(2)
    torch.manual_seed(1)
    log = restormer(losses, {"pixel_opt": {"type": "DiffLoss", "prior": folder, "loss_weight": 0.1}}, preds, gt)
    others = [pred.detach().clone().requires_grad_() for pred in preds]
    loss = restoreloss.DiffLoss(network)
    torch.manual_seed(1)
    expected = 0.1 * loss(others[0], gt) + 0.1 * loss(others[1], gt)
    expected.backward()
    assert log["l_pix"] == pytest.approx(expected.item())
    for pred, other in zip(preds, others, strict=True):
        torch.testing.assert_close(pred.grad, other.grad)


@pytest.mark.parametrize("kind", ["DiffLoss", "WeightedSum", "TDPLoss"])
def test_the_perceptual_slot_of_nafnet_gets_the_same_loss_and_no_style(losses, prior, kind):
    options = {
        "DiffLoss": {"prior": prior[1]},
        "WeightedSum": {"objectives": {"a": {"type": "L1Loss"}, "b": {"type": "DiffLoss", "prior": prior[1]}}},
        "TDPLoss": {"task": "torchvision/resnet18", "weights": "random"},
    }[kind] | {"loss_weight": 0.3}
    register(losses)
    found = []
    for train in (
        {"perceptual_opt": {"type": f"Perceptual{kind}"} | options},
        {"pixel_opt": {"type": kind} | options},
    ):
        (pred,), gt = images()
        torch.manual_seed(2)
        log = nafnet(losses, train, pred, gt)
        found.append((*log.values(), pred.grad))
        assert "l_style" not in log
    assert found[0][0] == pytest.approx(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_sum_in_the_one_slot_may_name_losses_of_the_fork(losses):
    register(losses)
    parts = {"own": {"type": "PSNRLoss", "loss_weight": 0.1}, "l2": {"type": "MSELoss"}}
    (pred,), gt = images()
    log = restormer(losses, {"pixel_opt": {"type": "WeightedSum", "objectives": parts, "reduction": "mean"}}, pred, gt)
    expected = 0.1 * PSNRLoss()(pred, gt) + nn.MSELoss()(pred, gt)
    assert log["l_pix"] == pytest.approx(expected.item(), rel=1e-5)


def test_nafnet_keeps_its_own_pixel_loss_beside_ours(losses, prior):
    register(losses)
    (first, last), gt = images(2)
    train = {
        "pixel_opt": {"type": "PSNRLoss", "loss_weight": 1, "reduction": "mean"},
        "perceptual_opt": {"type": "PerceptualDiffLoss", "prior": prior[1]},
    }
    log = nafnet(losses, train, [first, last], gt)
    assert log["l_pix"] == pytest.approx(PSNRLoss()(first, gt).item() + PSNRLoss()(last, gt).item(), rel=1e-5)
    assert log["l_percep"] > 0


def test_the_page_trains_both(losses, monkeypatch):
    losses.CharbonnierLoss = L1Loss
    packages = [ModuleType("basicsr"), ModuleType("basicsr.models"), losses]
    packages[0].models, packages[1].losses = packages[1:]
    for name in [name for name in sys.modules if name.partition(".")[0] == "basicsr"]:  # of one that is installed
        monkeypatch.delitem(sys.modules, name)
    for module in packages:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(snippet("integrations/forks.md", "py"), {})
    for number, model in enumerate((restormer, nafnet)):
        options = copied(("old_forks/restormer.yml", "old_forks/nafnet.yml")[number])
        train = yaml.safe_load(options)["train"]
        (pred,), gt = images()
        log = model(losses, train, pred, gt)
        assert all(isinstance(value, float) for value in log.values())
        assert pred.grad.abs().max() > 0
    assert list(log) == ["l_pix"]


def test_twice_is_once(losses):
    register(losses)
    before = dict(vars(losses))
    register(losses)
    assert vars(losses) == before
    assert set(vars(losses)) - set(vars(ModuleType("x"))) == {
        "L1Loss", "PSNRLoss", "DiffLoss", "TDPLoss", "HLFLoss", "WeightedSum",
        "PerceptualDiffLoss", "PerceptualTDPLoss", "PerceptualHLFLoss", "PerceptualWeightedSum",
    }  # fmt: skip


def test_a_name_that_is_taken_is_an_error_and_nothing_is_set(losses):
    losses.TDPLoss = L1Loss
    with pytest.raises(
        ValueError, match=r"The name 'TDPLoss' should be free in basicsr.models.losses, found <class .*L1Loss"
    ):
        register(losses)
    assert losses.TDPLoss is L1Loss and not hasattr(losses, "DiffLoss")


def basicsr_itself():
    module = ModuleType("basicsr.losses")
    module.L1Loss, module.build_loss = L1Loss, build
    return module


@pytest.mark.parametrize("wrong", [ModuleType("basicsr.models"), basicsr_itself(), L1Loss, {"L1Loss": L1Loss}])
def test_another_module_is_refused(wrong):
    with pytest.raises(ValueError, match=r"`where` should be the module|`registry` should be the framework"):
        register(wrong)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"type": "DiffLoss", "reduction": "none"}, ValueError, "`reduction` should be 'mean' or 'sum'"),
        ({"type": "DiffLoss", "timestep": 3}, ValueError, "no option 'timestep'; did you mean 'timesteps'"),
        ({"type": "PerceptualDiffLoss", "loss_weight": "1e-3"}, ValueError, "`loss_weight` should be a number"),
        ({"type": "PerceptualTDPLoss", "task": "resnet", "weights": "random"}, ValueError, "'library/name'"),
        ({"type": "WeightedSum", "objectives": {"a": {"type": "PSNRLos"}}}, ValueError, "did you mean 'PSNRLoss'"),
    ],
)
def test_bad_options_are_named(losses, options, error, message):
    register(losses)
    with pytest.raises(error, match=message):
        build(losses, options)
