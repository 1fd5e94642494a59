"""A real BasicSR: whole runs, and the model one iteration at a time."""

import copy
import logging
import re

import pytest
import torch
import torch.nn.functional as F
import yaml

import restoreloss
from restoreloss import CQMix
from restoreloss.integrations.basicsr import load_resume_state
from tests.helpers.basicsr import (
    ALWAYS_THE_SAME,
    LOSSES,
    MODEL,
    SEED,
    batch,
    build,
    iterate,
    needs_basicsr,
    restorer,
    run,
    snippets,
    train,
    with_reader,
    write_data,
    write_importance,
)
from tests.helpers.processes import ROOT
from tests.integrations.basicsr_worker import train_alone

WORKER = ROOT / "tests" / "integrations" / "basicsr_worker.py"
TRAIN, OWN_MODEL = snippets("py")


def load(folder, path):
    return torch.load(folder / "experiments" / path, weights_only=True)


def assert_equal(one, other, path=""):
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}/{number}")
    else:
        assert one == other, path


def logged(text):
    """By iteration, the terms that the log has."""
    lines = re.findall(r"iter: +(\d+),.*\] (l_.*)$", text, flags=re.MULTILINE)
    return {int(n): {k: float(v) for k, v in re.findall(r"(l_\S+): (\S+)", terms)} for n, terms in lines}


@needs_basicsr
def test_options_of_the_docs_train_and_each_term_is_logged(folder):
    logs = logged((folder / "whole.log").read_text())
    assert list(logs) == [1, 2, 3, 4, 5, 6]
    parts = ("l_pix/pixel/loss", "l_pix/diff/noise", "l_pix/diff/h_space")
    assert set(logs[1]) == {"l_importance", "l_pix", *parts, "l_tdp", "l_tdp/conv5", "l_task"}
    assert [logs[n]["l_pix/diff/noise"] > 0 for n in logs] == [True, False] * 3
    for terms in logs.values():
        assert terms["l_pix"] == pytest.approx(sum(terms[part] for part in parts), rel=1e-3)
    assert logs[1]["l_importance"] == 0 < logs[2]["l_importance"]  # begins at its anchor
    first, last = logs[1], logs[6]
    assert last["l_pix/pixel/loss"] < first["l_pix/pixel/loss"] and last["l_task"] < first["l_task"]
    assert "# psnr:" in (folder / "whole.log").read_text()
    assert any((folder / "tb_logger" / "denoise").iterdir())


@needs_basicsr
def test_resumed_run_ends_where_the_whole_one_does(folder):
    log = (folder / "resumed.log").read_text()
    assert "Resuming training from epoch: 0, iter: 3." in log
    assert list(logged(log)) == [4, 5, 6]
    for name in ("models/net_g_6.pth", "models/net_t_6.pth", "training_states/6.state"):
        found = load(folder, f"resumed/{name}")
        if "state" in name:
            assert found.pop("epoch") == 0  # BasicSR begins the epoch anew: six iterations are within its first eight
            whole = load(folder, f"denoise/{name}")
            assert whole.pop("epoch") == 1
            losses = whole["restoreloss"]["losses"]
            assert losses["pixel.objective.objective_diff.objective._extra_state"] == 6
            # eight in the first call, and the other five; the sixth was left out
            assert losses["pixel.objective.norms.calls_diff"] == 13
            assert losses["pixel.objective.norms.idle_diff"] == 1
        else:
            whole = load(folder, f"denoise/{name}")
        assert_equal(found, whole, name)
    stopped, whole = (load(folder, f"denoise/models/net_g_{n}.pth") for n in (3, 6))
    assert set(whole) == {"params", "params_ema"}
    for kind in whole:
        assert any(not torch.equal(stopped[kind][key], whole[kind][key]) for key in whole[kind])


@needs_basicsr
def test_own_train_py_with_two_lines_takes_our_losses_into_a_plain_model(tmp_path):
    write_data(tmp_path)
    given = yaml.safe_load(MODEL) | {"model_type": "SRModel"}
    del given["network_t"], given["val"], given["datasets"]["val"]
    given["train"] = {key: given["train"][key] for key in ("total_iter", "optim_g", "scheduler")}
    given["train"]["optim_g"]["lr"] = 1e-3
    losses = yaml.safe_load(LOSSES)["train"]
    task = {"type": "TDPLoss", "weights": "random", "task": "torchvision/shufflenet_v2_x0_5"}
    losses["pixel_opt"]["objectives"]["task"], losses["pixel_opt"]["shares"]["task"] = task, 0.3
    given["train"] |= losses
    given["logger"] |= {"use_tb_logger": False}
    (tmp_path / "train.yml").write_text(yaml.safe_dump(given))
    (tmp_path / "train.py").write_text(TRAIN)
    output = train(tmp_path, "train:total_iter=3", *ALWAYS_THE_SAME, program=["train.py"])
    logs = logged(output)
    assert [set(terms) for terms in logs.values()] == [{"l_pix"}] * 3
    assert logs[3]["l_pix"] != logs[1]["l_pix"] > 0
    assert "Model [SRModel] is created." in output


def test_without_additions_it_trains_as_an_sr_model(opt):
    opt["train"]["perceptual_opt"] = {"type": "PerceptualTDPLoss", "task": "timm/test_resnet", "weights": "random"}
    ours, theirs = build(opt), build(opt | {"model_type": "SRModel"})
    found, expected = iterate(ours, range(1, 5)), iterate(theirs, range(1, 5))
    for one, other in zip(found, expected, strict=True):
        assert {name: one[name] for name in other} == other
    assert_equal(ours.net_g.state_dict(), theirs.net_g.state_dict())
    assert_equal(ours.net_g_ema.state_dict(), theirs.net_g_ema.state_dict())
    assert ours.get_current_learning_rate() == theirs.get_current_learning_rate() == [pytest.approx(1e-3)]
    assert torch.equal(ours.output, theirs.output)


def test_iteration_is_that_of_a_loop_in_plain_torch(opt, tmp_path):
    anchor = restorer(5)
    write_importance(anchor, tmp_path / "importance.pth")
    opt["train"]["importance_opt"] = {"path": str(tmp_path / "importance.pth"), "strength": 0.5}
    model = build(with_reader(opt, tdp_weight=2.0, grid=[2, 3], p=0.3))
    net, reader = copy.deepcopy(model.net_g), copy.deepcopy(model.net_t)
    slow, fast = torch.optim.Adam(net.parameters(), 1e-2), torch.optim.SGD(reader.parameters(), 0.1, momentum=0.9)
    importance = torch.load(tmp_path / "importance.pth", weights_only=True)
    mean, std = (torch.tensor(reader.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    mix = CQMix((2, 3), p=0.3)
    statistics = reader.bn1.running_mean.clone()
    for number in (1, 2):
        data = batch(number)
        torch.manual_seed(1_000_003 * SEED + number)
        reader.eval()
        restored = net(data["lq"])
        pixel = (restored - data["gt"]).abs().mean()
        seen, wanted = (reader.forward_features((image - mean) / std) for image in (restored, data["gt"]))
        tdp = 2 * (seen - wanted.detach()).abs().mean()
        penalty = 0
        for name, parameter in net.named_parameters():
            omega, start = (importance[f"0/{kind}/{name.replace('.', '/')}"] for kind in ("importance", "anchor"))
            moved = omega * (parameter - start)
            penalty = penalty + 0.5 * (moved.abs() + moved.square() / 2).sum()
        slow.zero_grad()
        (pixel + tdp + penalty).backward()
        slow.step()
        reader.train()
        with torch.no_grad():
            again = net(data["lq"])
        images = torch.cat([again, data["gt"], mix(again, data["gt"])])
        task = F.cross_entropy(reader((images - mean) / std), torch.tensor([3, 1] * 3))
        fast.zero_grad()
        task.backward()
        fast.step()
        (logs,) = iterate(model, [number])
        expected = {"l_pix": pixel, "l_tdp": tdp, "l_importance": penalty, "l_task": task}
        assert {name: logs[name] for name in expected} == pytest.approx(
            {name: float(value.detach()) for name, value in expected.items()}, rel=1e-4
        )
    for mine, theirs in ((net, model.net_g), (reader, model.net_t)):
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(reader.bn1.running_mean, statistics)
    assert model.net_g.training and model.net_t.training
    assert len(model.optimizers) == len(model.schedulers) == 2


def test_a_reference_is_looked_through_by_the_restorer_and_teaches_the_task_network(opt, tmp_path):
    clean = build(with_reader(copy.deepcopy(opt))).net_t
    torch.save(clean.state_dict(), tmp_path / "clean.pth")
    given = {"tdp_weight": 0.0, "hlf_weight": 2.0, "fm_weight": 0.5, "reference": str(tmp_path / "clean.pth")}
    model = build(with_reader(copy.deepcopy(opt), **given))
    with torch.no_grad():
        for parameter in model.net_t.parameters():
            parameter.add_(0.01)
    net, reader, data = copy.deepcopy(model.net_g), copy.deepcopy(model.net_t), batch(1)
    looks = {"normalize": model.normalize}
    hlf = restoreloss.HLFLoss(reader, copy.deepcopy(clean).requires_grad_(False), **looks)
    torch.manual_seed(1_000_003 * SEED + 1)
    expected = 2 * hlf(net(data["lq"]), data["gt"])
    (logs,) = iterate(model, [1])
    assert logs["l_hlf"] == pytest.approx(expected.item(), rel=1e-4)
    assert {"l_hlf/task/layer4", "l_hlf/reference/layer4", "l_fm/layer4", "l_task"} <= set(logs) and logs["l_fm"] > 0
    with pytest.raises(ValueError, match="`reference` of `task_opt` should be given with `hlf_weight` or `fm_weight`"):
        build(with_reader(copy.deepcopy(opt), fm_weight=0.5))


def test_log_says_which_term_is_nan(opt):
    opt["train"]["pixel_opt"] = {
        "type": "WeightedSum",
        "objectives": {"pixel": {"type": "L1Loss"}, "diff": {"type": "DiffLoss", "loss_weight": 0.1}},
    }
    model = build(with_reader(opt))
    with torch.no_grad():
        next(model.net_t.parameters()).fill_(float("nan"))
    (logs,) = iterate(model, [1])
    wrong = {name for name, value in logs.items() if value != value}
    assert wrong == {"l_tdp", "l_tdp/layer4", "l_task"}
    assert set(logs) - wrong == {"l_pix", "l_pix/pixel/loss", "l_pix/diff/noise", "l_pix/diff/h_space"}


def test_what_an_iteration_draws_follows_from_its_number_and_leaves_torch_alone(opt):
    opt["train"]["pixel_opt"] = {"type": "DiffLoss"}
    opt["train"]["optim_g"]["lr"] = 0.0
    first, second, other = (build(opt | {"manual_seed": seed}) for seed in (SEED, SEED, SEED + 1))
    data = batch()
    draws = {}
    for name, model, numbers in (("first", first, [1, 2, 3]), ("second", second, [3]), ("other", other, [3])):
        for number in numbers:
            state = torch.get_rng_state()
            model.feed_data(data)
            model.optimize_parameters(number)
            assert torch.equal(torch.get_rng_state(), state)
            draws[name, number] = model.get_current_log()["l_pix"]
    assert draws["first", 3] == draws["second", 3]
    assert len({draws["first", 1], draws["first", 2], draws["first", 3], draws["other", 3]}) == 4


def test_state_of_losses_and_of_the_task_network_is_saved_and_comes_back(opt, tmp_path):
    write_importance(restorer(5), tmp_path / "importance.pth")
    opt["train"]["importance_opt"] = {"path": str(tmp_path / "importance.pth")}
    opt["train"]["perceptual_opt"] = {"type": "PerceptualDiffLoss", "every": 3}
    opt = with_reader(opt)
    model = build(opt)
    iterate(model, [1, 2])
    model.save(0, 2)
    model.save(-1, -1)
    names = {path.name for path in tmp_path.iterdir() if path.suffix in (".pth", ".state", ".tmp")}
    assert names == {"net_g_2.pth", "net_t_2.pth", "2.state", "net_g_latest.pth", "net_t_latest.pth", "importance.pth"}
    (tmp_path / "importance.pth").unlink()  # not needed to resume
    opt["auto_resume"] = True
    state = load_resume_state(opt)
    assert opt["path"]["pretrain_network_t"] == str(tmp_path / "net_t_2.pth")
    resumed = build(opt)
    resumed.resume_training(state)
    assert resumed.cri_perceptual.objective.calls == 2
    expected, found = iterate(model, [3, 4]), iterate(resumed, [3, 4])
    assert found == expected
    assert (expected[0]["l_percep"], expected[1]["l_percep"] > 0) == (0, True)  # the fourth call is due
    assert_equal(resumed.importance.state_dict(), model.importance.state_dict())
    assert_equal(resumed.net_t.state_dict(), model.net_t.state_dict())
    assert_equal(resumed.net_g_ema.state_dict(), model.net_g_ema.state_dict())


class Perceptual(torch.nn.Module):
    """As BasicSR's own: a frozen network that is a part of the loss."""

    def __init__(self):
        super().__init__()
        self.vgg = torch.nn.Conv2d(3, 64, 3).requires_grad_(False)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, output, gt):
        return self.scale * F.l1_loss(self.vgg(output), self.vgg(gt)), None


def test_a_frozen_network_of_a_loss_is_in_no_training_state(opt, tmp_path, caplog):
    model, resumed = build(opt), build(opt)
    for one in (model, resumed):
        one.cri_perceptual = Perceptual()
    with torch.no_grad():
        model.cri_perceptual.scale.fill_(3)
    model.save_training_state(0, 2)
    state = torch.load(tmp_path / "2.state", weights_only=True)
    assert [name for name in state["restoreloss"]["losses"] if "perceptual" in name] == ["perceptual.scale"]
    resumed.resume_training(state)
    assert resumed.cri_perceptual.scale == 3 and "begin anew" not in caplog.text
    resumed.cri_perceptual.other = torch.nn.Parameter(torch.ones(()))
    resumed.resume_training(state)
    assert "begin anew where they are: ['perceptual.other']" in caplog.text


def test_state_of_an_sr_model_is_resumed_but_not_with_a_task_network(opt, tmp_path, caplog):
    plain = build(opt | {"model_type": "SRModel"})
    iterate(plain, [1, 2])
    plain.save(0, 2)
    state = torch.load(tmp_path / "2.state", weights_only=True)
    opt["path"]["pretrain_network_g"] = str(tmp_path / "net_g_2.pth")
    model = build(opt)
    with caplog.at_level(logging.WARNING, "restoreloss"):
        model.resume_training(state)
    assert "begins at 0" in caplog.text
    iterate(plain, [3])
    iterate(model, [3])
    assert_equal(model.net_g.state_dict(), plain.net_g.state_dict())
    with pytest.raises(ValueError, match=r"should have 2 optimizers, found 1: .*`network_t`.*pretrain_network_g"):
        build(with_reader(opt)).resume_training(state)


def test_model_of_ones_own_takes_the_additions(opt, monkeypatch):
    from basicsr.utils.registry import MODEL_REGISTRY

    monkeypatch.setattr(MODEL_REGISTRY, "_obj_map", dict(MODEL_REGISTRY._obj_map))
    exec(OWN_MODEL, {"__name__": "own"})
    model = build(with_reader(opt) | {"model_type": "MyModel"})
    (logs,) = iterate(model, [1])
    assert "l_task" in logs
    assert model.lq.max() <= 1 < batch(1)["lq"].max()


@needs_basicsr
def test_two_processes_are_one_on_the_whole_batch(tmp_path):
    write_importance(restorer(5), tmp_path / "importance.pth")
    (tmp_path / "labels.txt").write_text("".join(f"{number}.png {number % 3}\n" for number in range(4)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    code, output = run(tmp_path, [*launcher, str(WORKER)])
    assert code == 0, output[-3000:]
    two, one = torch.load(tmp_path / "two.pth", weights_only=True), train_alone(tmp_path)
    assert two["log"] == pytest.approx(one["log"], rel=1e-3)
    assert set(one["log"]) == {"l_importance", "l_pix", "l_tdp", "l_tdp/stages.3", "l_task"}
    for network in ("net_g", "net_t"):
        for name, value in one[network].items():
            torch.testing.assert_close(two[network][name], value, rtol=1e-3, atol=1e-5, msg=f"{network}.{name}")
    assert (tmp_path / "3.state").is_file()
