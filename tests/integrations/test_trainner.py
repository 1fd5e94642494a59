"""The losses called as traiNNer-redux calls them. Its trainer is written out in `Trainer`."""

import logging
import sys

import pytest
import torch
import yaml

import restoreloss
from restoreloss import NoReference
from restoreloss.integrations import trainner
from restoreloss.integrations.options import registrable
from tests.helpers.processes import launch
from tests.integrations.frameworks import checkout, copied, import_losses

CROP = (2, 3, 24, 24)


class Trainer:
    """What SRModel of traiNNer-redux does with `train: losses`."""

    def __init__(self, build_loss, losses, *, autocast=False):
        self.autocast, self.losses, self.nan_count = autocast, {}, 0
        for options in losses:
            assert "loss_weight" in options
            if float(options["loss_weight"]) != 0:
                label = "l_g_" + options["type"].lower().replace("loss", "")
                loss = build_loss(options).to(torch.device("cpu"), memory_format=torch.channels_last, non_blocking=True)
                self.losses[label] = loss

    def step(self, output, gt, lq=None):
        log = {}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            total = torch.tensor(0.0)
            for label, loss in self.losses.items():
                target = gt
                if loss.loss_weight < 0:
                    with torch.inference_mode():
                        target = torch.clamp(lq, 0, 1)
                value = loss(output, target)
                if isinstance(value, dict):
                    for sublabel, term in value.items():
                        if term > 0:
                            log[f"{label}_{sublabel}"] = term * abs(loss.loss_weight)
                            total += log[f"{label}_{sublabel}"]
                else:
                    log[label] = value * abs(loss.loss_weight)
                    total += log[label]
            if not total.isfinite():
                self.nan_count += 1
                return None, {}
            self.nan_count = 0
            total.backward()
        return total, {key: value.to(dtype=torch.float32).detach() for key, value in log.items()}


@pytest.fixture
def repository(tmp_path):
    return checkout(tmp_path / "repository", "traiNNer", lower=True, weighs_itself=False)


@pytest.fixture
def build_loss(repository, monkeypatch):
    trainner.FRAMEWORK.write(repository)
    return import_losses(repository, "traiNNer", monkeypatch).build_loss


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    output, gt, lq = (torch.rand(CROP, generator=generator) for _ in range(3))
    return output.requires_grad_(), gt, lq


TASK = {"type": "TDPLoss", "task": "torchvision/resnet18", "weights": "random"}


def test_the_trainer_applies_the_weight_once_and_names_each_term(build_loss, prior):
    network, folder = prior
    output, gt, _ = images()
    options = {"type": "DiffLoss", "prior": folder, "timesteps": [100, 600], "h_space_weight": 0.5, "loss_weight": 0.1}
    trainer = Trainer(build_loss, [{"type": "L1Loss", "loss_weight": 2.0}, options])
    torch.manual_seed(3)
    total, log = trainer.step(output, gt)

    other = output.detach().clone().requires_grad_()
    torch.manual_seed(3)
    pixel = 2 * (other - gt).abs().mean()
    terms = restoreloss.DiffLoss(network, timesteps=(100, 600), h_space_weight=0.5).terms(other, gt)
    (pixel + 0.1 * (terms["noise"] + terms["h_space"])).backward()
    torch.testing.assert_close(log["l_g_l1"], pixel.detach())
    for name, value in terms.items():
        torch.testing.assert_close(log[f"l_g_diff_{name}"], 0.1 * value.detach())
    torch.testing.assert_close(output.grad, other.grad)
    assert list(log) == ["l_g_l1", "l_g_diff_noise", "l_g_diff_h_space"] and total.ndim == 0


def test_the_yaml_of_the_page_trains(build_loss):
    options = copied("trainner_redux/losses.yml")
    losses = yaml.safe_load(options)["train"]["losses"]
    trainer = Trainer(build_loss, losses)
    output, gt, _ = images()
    _, log = trainer.step(output, gt)
    terms = ("pixel/loss", "diff/noise", "diff/h_space", "task/layer4")
    assert list(log) == [f"l_g_weightedsum_{term}" for term in terms]
    assert all(value.ndim == 0 and value > 0 for value in log.values())


def test_a_type_twice_is_one_loss_which_is_why_there_is_a_sum(build_loss):
    few = {"type": "DiffLoss", "loss_weight": 1.0, "timesteps": [0, 10]}
    trainer = Trainer(build_loss, [few, few | {"timesteps": [500, 510]}])
    assert [list(loss.objective.timesteps) for loss in trainer.losses.values()] == [[500, 510]]


def test_under_autocast_terms_are_float32_and_gradients_finite(build_loss):
    losses = [{"type": "DiffLoss", "loss_weight": 1.0}, TASK | {"loss_weight": 1.0}]
    trainer = Trainer(build_loss, losses, autocast=True)
    output, gt, _ = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(
            term.dtype == torch.float32 for loss in trainer.losses.values() for term in loss(output, gt).values()
        )
    trainer.step(output, gt)
    assert output.grad.isfinite().all() and output.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["diff", "task", "sum"])
def test_a_weight_below_0_compares_with_the_input(build_loss, prior, kind):
    options = {
        "diff": {"type": "DiffLoss", "prior": prior[1]},
        "task": TASK,
        "sum": {"type": "WeightedSum", "objectives": {"pixel": {"type": "L1Loss"}, "mse": {"type": "MSELoss"}}},
    }[kind]
    torch.manual_seed(0)
    trainer = Trainer(build_loss, [options | {"loss_weight": -0.5}])
    output, gt, lq = images()
    torch.manual_seed(1)
    total, log = trainer.step(output, gt, lq)
    assert output.grad.abs().max() > 0
    assert all(value > 0 for value in log.values())
    (loss,) = trainer.losses.values()
    torch.manual_seed(1)
    torch.testing.assert_close(total, 0.5 * sum(loss(output, lq).values()))


def test_a_call_that_is_left_out_is_dropped_and_the_others_make_up_for_it(build_loss, prior):
    options = {"type": "DiffLoss", "prior": prior[1], "timesteps": [300, 301], "loss_weight": 1.0}
    losses = [{"type": "L1Loss", "loss_weight": 1.0}, options | {"every": 2}]
    trainer = Trainer(build_loss, losses)
    torch.manual_seed(0)
    logs = [trainer.step(*images()[:2])[1] for _ in range(2)]
    torch.manual_seed(0)
    _, whole = Trainer(build_loss, [options]).step(*images()[:2])
    assert "l_g_diff_noise" not in logs[1] and logs[1]["l_g_l1"] > 0
    torch.testing.assert_close(logs[0]["l_g_diff_noise"], 2 * whole["l_g_diff_noise"])


def test_a_term_that_is_nan_is_named_and_counted_instead_of_dropped(build_loss, caplog):
    options = {"type": "DiffLoss", "h_space_weight": 0.0, "loss_weight": 1.0}
    trainer = Trainer(build_loss, [{"type": "L1Loss", "loss_weight": 1.0}, options])
    output, gt, _ = images()
    trainer.losses["l_g_diff"].objective.terms = lambda restored, target: {"noise": (restored * float("nan")).mean()}
    with caplog.at_level(logging.WARNING):
        trainer.step(output, gt)
    assert trainer.nan_count == 1 and output.grad is None
    assert "DiffLoss: the term 'noise' is NaN." in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"type": "DiffLoss", "timestep": [1, 2]}, ValueError, "no option 'timestep'; did you mean 'timesteps'"),
        ({"type": "DiffLoss", "loss_weight": "1e-3"}, ValueError, r"`loss_weight` should be a number.*'1e-3'"),
        ({"type": "DiffLoss", "timesteps": [5, 2]}, ValueError, r"`timesteps` should satisfy"),
        ({"type": "TDPLoss", "task": "torchvision/resnet18"}, ValueError, "'weights'"),
        (TASK | {"task": "resnet18"}, ValueError, "'library/name'"),
        ({"type": "WeightedSum"}, ValueError, r"`WeightedSum` should be given \['objectives'\]"),
        ({"type": "WeightedSum", "objectives": [1]}, ValueError, "`objectives` should be a mapping"),
        (
            {"type": "WeightedSum", "objectives": {"a": {"type": "DiffLoss", "timestep": 1}}},
            ValueError,
            "no option 'timestep'; did you mean 'timesteps'",
        ),
        (
            {"type": "WeightedSum", "objectives": {"a": {"type": "L1Loss", "loss_weight": -1}}},
            ValueError,
            "The weight of 'a' should be at least 0, found -1",
        ),
    ],
)
def test_bad_options_are_named(build_loss, options, error, message):
    with pytest.raises(error, match=message):
        build_loss(options)


def test_the_file_registers_beside_their_own_and_twice_is_once(build_loss):
    registry = sys.modules["traiNNer.utils.registry"].LOSS_REGISTRY
    assert sorted(registry.found) == ["diffloss", "hlfloss", "l1loss", "tdploss", "weightedsum"]
    trainner.register(registry)
    assert issubclass(registry.get("DiffLoss"), trainner.ByTerm)


def test_a_name_that_is_taken_is_an_error_and_nothing_is_registered(repository, monkeypatch):
    import_losses(repository, "traiNNer", monkeypatch)
    registry = sys.modules["traiNNer.utils.registry"].LOSS_REGISTRY
    registry.found["tdploss"] = dict
    with pytest.raises(ValueError, match=r"The name 'TDPLoss' should be free, found <class 'dict'>"):
        trainner.register(registry)
    assert sorted(registry.found) == ["l1loss", "tdploss"]


def test_the_command_writes_once_and_never_over_another_file(repository, tmp_path, capsys):
    path = repository / "traiNNer" / "losses" / "restoreloss_loss.py"
    for _ in range(2):
        with pytest.raises(SystemExit, match="0"):
            trainner.FRAMEWORK.main([str(repository)])
        assert str(path) in capsys.readouterr().err
    assert path.read_text() == trainner.FRAMEWORK.source
    assert path.name.endswith("_loss.py")

    path.write_text("theirs")
    with pytest.raises(SystemExit, match="2"):
        trainner.FRAMEWORK.main([str(repository)])
    assert "restoreloss_loss.py should be absent" in capsys.readouterr().err and path.read_text() == "theirs"

    for wrong in (tmp_path, repository / "traiNNer", tmp_path / "absent"):
        with pytest.raises(SystemExit, match="2"):
            trainner.FRAMEWORK.main([str(wrong)])
        assert "`repository` should be a checkout of traiNNer-redux" in capsys.readouterr().err


def test_a_losses_folder_that_is_not_scanned_is_refused(repository):
    (repository / "traiNNer" / "losses" / "__init__.py").write_text("# explicit imports")
    with pytest.raises(ValueError, match=r"with '_loss.py' in traiNNer/losses/__init__.py, found none"):
        trainner.FRAMEWORK.write(repository)
    assert not (repository / "traiNNer" / "losses" / "restoreloss_loss.py").exists()


def test_it_is_a_command(tmp_path):
    done = launch("-m", "restoreloss.integrations.trainner", str(tmp_path), processes=1)
    assert done.returncode == 2 and "should be a checkout of traiNNer-redux" in done.stderr


def test_terms_that_the_trainer_would_drop_are_told(caplog):
    objectives = {"pixel": {"type": "MSELoss"}, "less": {"type": "MSELoss"}}
    kind = registrable("WeightedSum", base=trainner.ByTerm)
    with pytest.raises(ValueError, match=r"The weight of 'less' should be at least 0, found -0.5: the trainer would"):
        kind(objectives=objectives, weights={"less": -0.5})
    objectives["less"]["loss_weight"] = -0.5
    with pytest.raises(ValueError, match=r"The weight of 'less' should be at least 0, found -0.5"):
        kind(objectives=objectives)
    reward = trainner.ByTerm(NoReference(lambda image: -image.mean()))
    for _ in range(2):
        reward(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
    assert [record.message for record in caplog.records if "below 0" in record.message] == [
        "ByTerm: the term 'loss' is below 0, and traiNNer-redux drops it."
    ]
