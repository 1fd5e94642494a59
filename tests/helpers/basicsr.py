"""Options and images for the tests of BasicSR."""

import logging
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restoreloss import ParameterImportance
from restoreloss.integrations.basicsr import register
from tests.helpers.processes import ROOT

PAGE = (ROOT / "docs" / "integrations" / "basicsr.md").read_text(encoding="utf-8")
SIZE, SEED = 48, 3

needs_basicsr = pytest.mark.skipif(
    find_spec("basicsr") is None,
    reason="BasicSR is not installed, and needs torch to be: pip install --no-build-isolation basicsr==1.4.2",
)


def snippets(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


LOSSES, MODEL = ((ROOT / f"integrations/basicsr/{name}.yml").read_text() for name in ("losses", "train"))
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


def write_images(folder):
    rng = np.random.default_rng(0)
    clean = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
    noisy = np.clip(np.asarray(clean) + rng.normal(0, 25, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    for name, image in (("clean", clean), ("noisy", Image.fromarray(noisy))):
        for place in (folder / "data" / name, folder / "data" / f"{name}_test"):
            place.mkdir(parents=True)
            image.save(place / "0001.png")


def write_data(folder):
    write_images(folder)
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


@pytest.fixture(scope="session")
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
