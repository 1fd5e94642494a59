"""The losses called as neosr calls them: fixed slots, one tensor each, weighted by themselves, within autocast."""

import sys

import pytest
import torch

from restoreloss import DiffLoss
from restoreloss.integrations import neosr, options
from tests.helpers.networks import tiny_unet
from tests.helpers.processes import launch
from tests.integrations.frameworks import checkout, copied, import_losses

SLOTS = ("pixel_opt", "perceptual_opt", "dists_opt")


def closure(build_loss, train, output, gt, *, autocast=False, clamp=False):
    """What the model of neosr does with the losses of `train`."""
    losses = {
        slot: build_loss(train[slot]).to("cpu", memory_format=torch.channels_last, non_blocking=True)
        for slot in SLOTS
        if train.get(slot)
    }
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if clamp:
            output = torch.clamp(output, 1 / 255, 1)
        total, log = torch.zeros(1), {}
        for slot, loss in losses.items():
            value = loss(output, gt)
            total += value
            log[slot] = value
    total.backward()
    with torch.inference_mode():  # its logger, over several processes
        torch.stack(list(log.values()), 0)
    return total, log


@pytest.fixture
def repository(tmp_path):
    return checkout(tmp_path / "repository", "neosr", lower=False, weighs_itself=True)


@pytest.fixture
def build_loss(repository, monkeypatch):
    neosr.FRAMEWORK.write(repository)
    return import_losses(repository, "neosr", monkeypatch).build_loss


def images():
    generator = torch.Generator().manual_seed(0)
    output, gt = (torch.rand(2, 3, 24, 24, generator=generator) for _ in range(2))
    return output.requires_grad_(), gt


def test_each_loss_weighs_itself_once(build_loss, tmp_path):
    network = tiny_unet()
    network.save_pretrained(tmp_path / "prior")
    train = {
        "pixel_opt": {"type": "L1Loss", "loss_weight": 2.0},
        "perceptual_opt": {"type": "DiffLoss", "prior": str(tmp_path / "prior"), "loss_weight": 0.1},
    }
    output, gt = images()
    torch.manual_seed(3)
    total, log = closure(build_loss, train, output, gt)
    other = output.detach().clone().requires_grad_()
    torch.manual_seed(3)
    expected = 2 * (other - gt).abs().mean() + 0.1 * DiffLoss(network)(other, gt)
    expected.backward()
    torch.testing.assert_close(total, expected.reshape(1))
    torch.testing.assert_close(output.grad, other.grad)
    assert [value.ndim for value in log.values()] == [0, 0]


def test_the_toml_of_the_page_trains(build_loss):
    tomllib = pytest.importorskip("tomllib")
    train = tomllib.loads(copied("neosr/losses.toml"))["train"]
    output, gt = images()
    _, log = closure(build_loss, train, output, gt, autocast=True, clamp=True)
    assert list(log) == ["pixel_opt"]
    assert log["pixel_opt"].dtype == torch.float32 and log["pixel_opt"] > 0
    assert output.grad.isfinite().all() and output.grad.abs().max() > 0


def test_where_the_output_is_cut_no_loss_has_a_gradient(build_loss):
    """As the page says."""
    output = torch.full((2, 3, 24, 24), 0.5)
    output[..., :8] = 1.2
    output.requires_grad_()
    train = {"pixel_opt": {"type": "DiffLoss", "loss_weight": 1.0}}
    closure(build_loss, train, output, torch.full((2, 3, 24, 24), 0.3), clamp=True)
    assert output.grad[..., :8].abs().max() == 0 and output.grad[..., 8:].abs().max() > 0


def test_names_are_case_sensitive_and_stand_beside_theirs(build_loss, repository):
    registry = sys.modules["neosr.utils.registry"].LOSS_REGISTRY
    assert sorted(registry.found) == ["DiffLoss", "HLFLoss", "L1Loss", "TDPLoss", "WeightedSum"]
    assert issubclass(registry.get("DiffLoss"), options.Criterion)
    neosr.register(registry)
    registry.found["WeightedSum"] = dict
    with pytest.raises(ValueError, match="'WeightedSum' should be free"):
        neosr.register(registry)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"type": "DiffLoss", "gamma": 1.0}, ValueError, "`DiffLoss` has no option 'gamma'"),
        ({"type": "DiffLoss", "loss_weight": "0.1"}, ValueError, "`loss_weight` should be a number"),
        ({"type": "DiffLoss", "prior": "nowhere/nothing", "local_files_only": True}, OSError, "nowhere"),
    ],
)
def test_bad_options_are_named(build_loss, given, error, message):
    with pytest.raises(error, match=message):
        build_loss(given)


def test_the_command_neither_imports_the_framework_nor_takes_another(repository, tmp_path):
    """Importing neosr reads the command line."""
    (repository / "neosr" / "__init__.py").write_text("raise SystemExit('imported')")
    done = launch("-m", "restoreloss.integrations.neosr", str(repository), processes=1, cwd=repository)
    path = repository / "neosr" / "losses" / "restoreloss_loss.py"
    assert done.returncode == 0 and path.read_text() == neosr.FRAMEWORK.source

    trainner = checkout(tmp_path / "other", "traiNNer", lower=True, weighs_itself=False)
    with pytest.raises(ValueError, match=r"`repository` should be a checkout of neosr"):
        neosr.FRAMEWORK.write(trainner)
