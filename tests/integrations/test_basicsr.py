"""BasicSR trains with our losses and our model: runs of its `train_pipeline` on image files, and single iterations."""

import copy
import logging
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

import restoreloss
from restoreloss import CQMix, ParameterImportance
from restoreloss.integrations import basicsr as integration
from restoreloss.integrations import options
from restoreloss.integrations.basicsr import import_basicsr, load_resume_state, read_labels, register
from tests.helpers.processes import ROOT
from tests.integrations.basicsr_worker import train_alone

WORKER = ROOT / "tests" / "integrations" / "basicsr_worker.py"
PAGE = (ROOT / "docs" / "basicsr.md").read_text(encoding="utf-8")
SHIM = "torchvision.transforms.functional_tensor"
SIZE, SEED = 48, 3

needs_basicsr = pytest.mark.skipif(
    find_spec("basicsr") is None,
    reason="BasicSR is not installed, and needs torch to be: pip install --no-build-isolation basicsr==1.4.2",
)


def snippets(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


LOSSES, MODEL = snippets("yaml")
TRAIN, OWN_MODEL = snippets("py")
SMALL = ["network_g:num_feat=8", "network_g:num_conv=2"]
ON_THIS_MACHINE = [
    "num_gpu=0", "datasets:train:num_worker_per_gpu=0", "datasets:train:batch_size_per_gpu=2",
    "logger:print_freq=1", *SMALL,
]  # fmt: skip
# one image, seen whole and the right way round: the order of the data does not matter
ALWAYS_THE_SAME = [
    "datasets:train:dataset_enlarge_ratio=8",
    "datasets:train:use_hflip=false",
    f"datasets:train:gt_size={SIZE}",
]
READER = ["network_t:name=torchvision/shufflenet_v2_x0_5", "network_t:weights=random", "network_t:num_classes=5"]


def restorer(seed=0):
    register()
    from basicsr.archs.srvgg_arch import SRVGGNetCompact

    torch.manual_seed(seed)
    return SRVGGNetCompact(num_feat=8, num_conv=2, upscale=1)


def write_importance(network, path):
    importance = ParameterImportance(network)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, 8, 8, generator=generator)
    importance.accumulate(lambda net, batch: (net(batch) - 0.5 * batch).abs().mean(), [images])
    torch.save(importance.state_dict(), path)


def write_data(folder):
    rng = np.random.default_rng(0)
    for name in ("clean", "noisy"):
        (folder / "data" / name).mkdir(parents=True)
    clean = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
    noisy = np.clip(np.asarray(clean) + rng.normal(0, 25, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    clean.save(folder / "data/clean/0001.png")
    Image.fromarray(noisy).save(folder / "data/noisy/0001.png")
    (folder / "data/labels.txt").write_text("0001.png 3\n")
    first = restorer()
    torch.save({"params": first.state_dict()}, folder / "first.pth")
    write_importance(first, folder / "importance.pth")
    (folder / "train.yml").write_text(MODEL)


def run(folder, program, *arguments):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *program, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def train(folder, *force, options=(), program=("-m", "restoreloss.integrations.basicsr")):
    code, output = run(folder, program, "-opt", "train.yml", *options, "--force_yml", *ON_THIS_MACHINE, *force)
    assert code == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The options of the docs, trained for six iterations; and stopped after the third, and resumed."""
    folder = tmp_path_factory.mktemp("basicsr")
    write_data(folder)
    short = ["train:total_iter=6", "logger:save_checkpoint_freq=3", "val:val_freq=6", *ALWAYS_THE_SAME, *READER]
    (folder / "whole.log").write_text(train(folder, *short))
    experiments = folder / "experiments"
    # what a run that is killed after its third iteration leaves
    shutil.copytree(experiments / "denoise", experiments / "stopped")
    for file in experiments.glob("stopped/*/*"):
        if "_3" not in file.stem and file.stem != "3":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    shutil.copytree(experiments / "stopped", experiments / "resumed")
    (folder / "resumed.log").write_text(train(folder, "name=resumed", *short, options=["--auto_resume"]))
    return folder


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
    names = "l_importance l_pix l_percep l_percep/noise l_percep/h_space l_tdp l_tdp/conv5 l_task"
    assert set(logs[1]) == set(names.split())
    assert [logs[n]["l_percep/noise"] > 0 for n in logs] == [True, False, True, False, True, False]
    for terms in logs.values():
        assert terms["l_percep"] == pytest.approx(terms["l_percep/noise"] + terms["l_percep/h_space"], rel=1e-3)
    assert logs[1]["l_importance"] == 0 < logs[2]["l_importance"]  # begins at its anchor
    assert logs[6]["l_pix"] < logs[1]["l_pix"] and logs[6]["l_task"] < logs[1]["l_task"]
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
            assert whole["restoreloss"]["calls"] == {"perceptual.objective": 6}
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
    losses["perceptual_opt"] |= {"weights": "random", "task": "torchvision/shufflenet_v2_x0_5"}
    given["train"] |= losses
    given["logger"] |= {"use_tb_logger": False}
    (tmp_path / "train.yml").write_text(yaml.safe_dump(given))
    (tmp_path / "train.py").write_text(TRAIN)
    output = train(tmp_path, "train:total_iter=3", *ALWAYS_THE_SAME, program=["train.py"])
    logs = logged(output)
    assert [set(terms) for terms in logs.values()] == [{"l_pix", "l_percep"}] * 3
    assert logs[3]["l_percep"] != logs[1]["l_percep"] > 0
    assert "Model [SRModel] is created." in output


# --- the model, one iteration at a time


@pytest.fixture
def opt(tmp_path, monkeypatch):
    """Options of a RestorelossModel with a pixel loss, as BasicSR hands them to its models."""
    if find_spec("basicsr") is None:
        pytest.skip(needs_basicsr.kwargs["reason"])
    register()
    monkeypatch.setattr(logging.getLogger("basicsr"), "disabled", True)  # it prints every network
    (tmp_path / "labels.txt").write_text("a.png 3\nb c.png 1\n")
    return {
        "model_type": "RestorelossModel", "name": "test", "num_gpu": 0, "is_train": True, "dist": False, "rank": 0,
        "manual_seed": SEED, "datasets": {"train": {"dataroot_gt": "/data/gt"}},
        "network_g": {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 2, "upscale": 1},
        "path": {"training_states": str(tmp_path), "models": str(tmp_path)},
        "train": {
            "ema_decay": 0.9, "optim_g": {"type": "Adam", "lr": 1e-2},
            "scheduler": {"type": "MultiStepLR", "milestones": [2], "gamma": 0.1},
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0},
        },
    }  # fmt: skip


def with_reader(opt, **task):
    opt["network_t"] = {"name": "timm/test_resnet", "weights": "random", "num_classes": 5}
    opt["train"]["optim_t"] = {"type": "SGD", "lr": 0.1, "momentum": 0.9}
    opt["train"]["task_opt"] = {"labels": str(Path(opt["path"]["models"]) / "labels.txt")} | task
    return opt


def build(opt):
    from basicsr.models import build_model

    torch.manual_seed(0)
    return build_model(opt)


def batch(seed=0):
    torch.manual_seed(seed)
    gt = torch.rand(2, 3, 32, 32)
    return {"lq": gt + 0.1 * torch.randn_like(gt), "gt": gt, "gt_path": ["/data/gt/a.png", "/data/gt/b c.png"]}


def iterate(model, numbers):
    logs = []
    for number in numbers:
        model.update_learning_rate(number, warmup_iter=-1)
        model.feed_data(batch(number))
        model.optimize_parameters(number)
        logs.append(model.get_current_log())
    return logs


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


# --- options that are wrong


def changed(**values):
    """A change to the options: train's keys by name, those of the rest as `top_`, a nested one as "a__b"."""

    def change(opt):
        for name, value in values.items():
            place = opt if name.startswith("top_") else opt["train"]
            *path, last = name.removeprefix("top_").split("__")
            for key in path:
                place = place[key]
            if value is None:
                del place[last]
            else:
                place[last] = value

    return change


WRONG = {
    "slot of pixel_opt": (
        changed(pixel_opt={"type": "PerceptualDiffLoss"}), "`type` of `pixel_opt` should be 'DiffLoss', found 'Percep"
    ),
    "slot of perceptual_opt": (
        changed(perceptual_opt={"type": "DiffLoss"}),
        "`type` of `perceptual_opt` should be 'PerceptualDiffLoss', found 'DiffLoss'",
    ),
    "opt": (
        changed(percetual_opt={"type": "DiffLoss"}), "no option 'percetual_opt'; did you mean 'perceptual_opt'"
    ),
    "task": (changed(task_opt__tpd_weight=1.0), "`task_opt` has no option 'tpd_weight'; did you mean 'tdp_weight'"),
    "text": (changed(task_opt__tdp_weight="1e-3"), "`tdp_weight` of `task_opt` .* a number, found the text '1e-3'"),
    "text of an optimizer": (changed(optim_t__lr="1e-2"), "`lr` of `optim_t` .* a number, found the text '1e-2'"),
    "option of an optimizer": (changed(optim_t__momentun=0.9), "`optim_t` .* 'momentun'; did you mean 'momentum'"),
    "no labels": (changed(task_opt={"p": 0.5}), r"`task_opt` should be given \['labels'\]"),
    "labels": (changed(task_opt={"labels": "absent.txt"}), "`labels` should be a text file, found none at absent.txt"),
    "no mapping": (changed(task_opt="labels.txt"), "`task_opt` should be a mapping of options, found 'labels.txt'"),
    "grid": (changed(task_opt__grid=[4]), "`grid` should be"),
    "one number for a grid": (changed(task_opt__grid=4), "`grid` should be"),
    "layer": (changed(task_opt__layers=["layer5"]), "layer5"),
    "network": (
        changed(top_network_t__weight="random"), "`network_t` has no option 'weight'; did you mean 'weights'"
    ),
    "no weights": (changed(top_network_t__weights=None), r"`network_t` should be given \['weights'\]"),
    "no optimizer": (changed(optim_t=None), r"`network_t`, `task_opt`, `optim_t` should be given .* no \['optim_t'\]"),
    "no network": (changed(top_network_t=None), r"should be given together, found no \['network_t'\]"),
    "optimizer": (changed(optim_t__type="Lion3"), "`type` of `optim_t` should be .*, found 'Lion3'"),
    "no importance": (changed(importance_opt={"path": "absent.pth"}), "`path` of `importance_opt` should be a file, "),
    "importance": (
        changed(importance_opt={"path": "absent.pth", "strenght": 1.0}), "no option 'strenght'; did you mean 'strength'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_named_when_the_model_is_built(name, opt):
    change, message = WRONG[name]
    opt = with_reader(opt)
    build(copy.deepcopy(opt))  # as it is, it is right
    change(opt)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(opt)


def test_unknown_option_of_a_loss_is_named(opt):
    opt["train"]["pixel_opt"] = {"type": "DiffLoss", "timestep": [100, 600]}
    with pytest.raises(TypeError, match="'timestep'"):
        build(opt)


def test_plain_model_fails_at_the_wrong_slot_as_the_docs_say(opt):
    for key, name in (("pixel_opt", "PerceptualDiffLoss"), ("perceptual_opt", "DiffLoss")):
        plain = build(opt | {"model_type": "SRModel", "train": opt["train"] | {key: {"type": name}}})
        with pytest.raises(TypeError) as error:
            iterate(plain, [1])
        assert str(error.value) in PAGE.replace("\n", " ")


def test_importance_of_another_network_is_refused(opt, tmp_path):
    write_importance(torch.nn.Conv2d(3, 3, 1), tmp_path / "importance.pth")
    opt["train"]["importance_opt"] = {"path": str(tmp_path / "importance.pth")}
    with pytest.raises(ValueError, match="was it another network"):
        build(opt)


def test_batches_without_a_label_are_named(opt):
    model = build(with_reader(opt))
    model.feed_data(batch() | {"gt_path": ["/data/gt/a.png", "/data/gt/z.png"]})
    with pytest.raises(ValueError, match=r"`labels` should have a line for each clean image, found none for 'z\.png'"):
        model.optimize_parameters(1)
    model.feed_data({name: batch()[name] for name in ("lq", "gt")})
    with pytest.raises(ValueError, match="`gt_path`"):
        model.optimize_parameters(1)


def test_label_beyond_the_classes_is_named(opt):
    opt = with_reader(opt)
    opt["network_t"]["num_classes"] = 3
    model = build(opt)
    model.feed_data(batch())
    with pytest.raises(ValueError, match=r"`network_t` should give .* \(N, 4 or more\), found of shape \(6, 3\)"):
        model.optimize_parameters(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png\n", r"found 'a\.png' in line 1"), ("a.png 1\n\nb.png x\n", "in line 3"), ("a.png -1", "in line 1"),
        ("a.png 1\na.png 2\n", "in line 2"), ("\n", "at least one line"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_read_are_named(text, message, tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(path)


def test_labels_are_read_by_names_that_may_have_folders_and_spaces(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("birds/0 1.png 7\n\n 0002.png\t0 \n")
    assert read_labels(path) == {"birds/0 1.png": 7, "0002.png": 0}


# --- import and registration


@needs_basicsr
def test_registration_twice_is_once_and_a_taken_name_is_told(monkeypatch):
    register()
    from basicsr.utils.registry import LOSS_REGISTRY, MODEL_REGISTRY

    before = [*LOSS_REGISTRY], [*MODEL_REGISTRY]
    register()
    assert ([*LOSS_REGISTRY], [*MODEL_REGISTRY]) == before
    assert {"DiffLoss", "PerceptualDiffLoss", "WeightedSum", "PerceptualTDPLoss"} <= set(LOSS_REGISTRY.keys())
    for registry, name in ((LOSS_REGISTRY, "DiffLoss"), (MODEL_REGISTRY, "RestorelossModel")):
        with monkeypatch.context() as patch:
            patch.setitem(registry._obj_map, name, torch.nn.MSELoss)
            with pytest.raises(ValueError, match=f"The name '{name}' should be free, found .*MSELoss"):
                register()


@needs_basicsr
def test_losses_return_what_their_slots_take():
    register()
    from basicsr.losses import build_loss

    restored, target = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    given = {"task": "timm/test_resnet", "weights": "random", "loss_weight": 0.5}
    pixel, perceptual = build_loss({"type": "TDPLoss"} | given), build_loss({"type": "PerceptualTDPLoss"} | given)
    assert pixel(restored, target).shape == ()
    value, style = perceptual(restored, target)
    assert value.shape == () and style is None
    assert isinstance(perceptual, options.Criterion)
    unweighted = restoreloss.TDPLoss(pixel.network.network, normalize="model")(restored, target)
    torch.testing.assert_close(pixel(restored, target), 0.5 * unweighted)


@needs_basicsr
def test_removed_module_is_replaced_only_when_asked_and_only_if_missing(tmp_path):
    code = f"""
import sys, torch
import restoreloss.integrations.basicsr as integration
print({SHIM!r} in sys.modules, "basicsr" in sys.modules)
integration.import_basicsr()
image = torch.rand(1, 3, 4, 4)
import torchvision.transforms.functional as F
from tests.helpers.processes import ROOT
print(torch.equal(sys.modules[{SHIM!r}].rgb_to_grayscale(image), F.rgb_to_grayscale(image)))
kept = sys.modules[{SHIM!r}]
print(integration.import_basicsr().__version__[:4], sys.modules[{SHIM!r}] is kept)
"""
    code, output = run(tmp_path, ["-c", code])
    assert (code, output.splitlines()[-3:]) == (0, ["False False", "True", "1.4. True"]), output


def test_absent_basicsr_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, SHIM, ModuleType(SHIM))
    monkeypatch.delitem(sys.modules, "basicsr", raising=False)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "basicsr":
                raise ModuleNotFoundError("No module named 'basicsr'", name="basicsr")

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(ImportError, match="not installed: pip install --no-build-isolation basicsr==1.4.2"):
        register()


@pytest.mark.parametrize(
    ("version", "message"), [("1.3.5", "should be BasicSR 1.4, found 1.3.5: pip install"), (None, "/fork.*forks")]
)
def test_other_versions_and_forks_are_told(version, message, monkeypatch):
    monkeypatch.setitem(sys.modules, SHIM, ModuleType(SHIM))
    found = ModuleType("basicsr")
    found.__path__ = ["/fork/basicsr"]
    if version is not None:
        found.__version__ = version
    monkeypatch.setitem(sys.modules, "basicsr", found)
    with pytest.raises(ImportError, match=message):
        import_basicsr()


@needs_basicsr
def test_latest_state_is_resumed_by_number(tmp_path):
    register()
    for number in (5, 999, 1000):
        torch.save({"iter": number}, tmp_path / f"{number}.state")
    (tmp_path / "1001.tmp").write_bytes(b"a save that was interrupted")
    opt = {"path": {"training_states": str(tmp_path), "models": "models"}, "auto_resume": True, "network_g": {}}
    assert load_resume_state(opt) == {"iter": 1000}
    assert opt["path"]["pretrain_network_g"] == "models/net_g_1000.pth"
    opt |= {"auto_resume": False}
    opt["path"]["resume_state"] = str(tmp_path / "5.state")
    assert load_resume_state(opt) == {"iter": 5}
    opt["path"]["resume_state"] = None
    assert load_resume_state(opt) is None
    opt = {"path": {"training_states": str(tmp_path / "none")}, "auto_resume": True}
    assert load_resume_state(opt) is None


def test_page_names_every_option():
    for given in (integration.TaskOptions, integration.ImportanceOptions):
        for name in given.__dataclass_fields__:
            assert f"`{name}`" in PAGE or f"_opt: {name}`" in PAGE, name
