"""The folder integrations/: every file runs, every options file builds its losses, and a README tells of each."""

import json
import re
import runpy
from importlib.util import find_spec

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

from restoreloss import audit
from restoreloss.integrations import neosr, trainner
from restoreloss.integrations.options import OPTIONS, criterion
from tests.helpers.processes import ROOT, launch

FOLDER = ROOT / "integrations"
FOLDERS = sorted(path for path in FOLDER.iterdir() if path.is_dir() and not path.name.startswith("__"))
DROP_INS = {"trainner_redux/restoreloss_loss.py": trainner.FRAMEWORK, "neosr/restoreloss_loss.py": neosr.FRAMEWORK}
NEEDS = {
    "augmentations/albumentations_transform.py": "albumentations",
    "augmentations/kornia_transform.py": "kornia",
    "augmentations/webdataset_pipeline.py": "webdataset",
    "readers/segmenter.py": "segmentation_models_pytorch",
    "readers/clip_tower.py": "open_clip",
    "readers/text_recognizer.py": "easyocr_en_models",
    "readers/text_detector.py": "easyocr_en_models",
}
pytestmark = pytest.mark.filterwarnings("ignore:`restored` spans")  # what an untrained network returns
SCRIPTS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py"))
SCRIPTS = [name for name in SCRIPTS if name not in DROP_INS]


def run(name, tmp_path, monkeypatch, **replaced):
    monkeypatch.chdir(tmp_path)
    path = FOLDER / name
    for old, new in replaced.items():
        text = path.read_text(encoding="utf-8")
        assert text.count(f"import {old}") == 1
        path = tmp_path / path.name
        path.write_text(text.replace(f"import {old}", f"import {new} as {old}"), encoding="utf-8")
    torch.manual_seed(0)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:  # an Accelerator is one for the process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in NEEDS])
def test_a_script_runs(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_a_script_of_another_package_runs(name, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[name])
    run(name, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning/train.py", "lightning/task_driven.py"])
def test_a_script_runs_with_pytorch_lightning(name, tmp_path, monkeypatch):
    pytest.importorskip("pytorch_lightning")
    run(name, tmp_path, monkeypatch, lightning="pytorch_lightning")


@pytest.mark.parametrize("name", DROP_INS)
def test_the_file_that_a_command_writes_is_the_one_of_the_folder(name):
    assert (FOLDER / name).read_text(encoding="utf-8") == DROP_INS[name].source


def described(value):
    """The losses in an options file, each a mapping with a type."""
    if isinstance(value, dict):
        if "type" in value and str(value["type"]).removeprefix("Perceptual") in OPTIONS:
            yield value
            return
        value = list(value.values())
    for part in value if isinstance(value, list) else []:
        yield from described(part)


class Own(torch.nn.L1Loss):
    """What a framework has under a name of its own."""

    def __init__(self, loss_weight=1.0, reduction="mean"):
        super().__init__()


class Decibels(Own):
    """PSNRLoss of NAFNet."""

    def forward(self, pred, target):
        return 10 * torch.log10((pred - target).square().mean(dim=(1, 2, 3)) + 1e-8).mean()


OPTION_FILES = sorted(
    str(path.relative_to(FOLDER)) for kind in ("yml", "toml", "json") for path in FOLDER.rglob(f"*.{kind}")
)


@pytest.mark.parametrize("name", OPTION_FILES)
def test_an_options_file_builds_losses_that_pass_a_gradient(name):
    text = (FOLDER / name).read_text(encoding="utf-8").replace("pretrained", "random")
    if name.endswith(".toml"):
        loads = pytest.importorskip("tomllib").loads  # of Python 3.11
    else:
        loads = json.loads if name.endswith(".json") else yaml.safe_load
    found = list(described(loads(text)["train"]))
    assert found
    for options in found:
        given = options | {"type": options["type"].removeprefix("Perceptual")}
        assert given["type"] == "WeightedSum"
        restored, clean = torch.rand(2, 8, 3, 16, 16)  # a timestep from each eighth of their range
        loss = criterion(given, own={"CharbonnierLoss": Own, "PSNRLoss": Decibels})
        torch.manual_seed(0)
        loss(restored.requires_grad_(), clean).backward()
        assert restored.grad.abs().sum() > 0
        report = audit(loss.objective, restored.detach(), clean, draws=4)
        for name, share in given["shares"].items():
            found = sum(term.share for term in report if term.name.startswith(f"{name}/"))
            assert found == pytest.approx(share, abs=0.1), name


def test_the_patch_of_kair_builds_the_loss_of_its_options():
    lines = [line[1:] for line in (FOLDER / "kair/restoreloss.patch").read_text().splitlines() if line.startswith("+ ")]
    assert len(lines) == 3
    options = json.loads((FOLDER / "kair/train.json").read_text())["train"]
    code = "\n".join(["if False: pass", *(line[8:] for line in lines)])
    this = type("Model", (), {"opt_train": options, "device": torch.device("cpu")})()
    exec(code, {"G_lossfn_type": options["G_lossfn_type"], "self": this})
    assert this.G_lossfn(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)) > 0


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_readme_names_each_file_what_is_run_and_when(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 20
    assert re.search(r"20\d\d-\d\d-\d\d", text)
    for path in folder.iterdir():
        assert path.name == "README.md" or path.name == "__pycache__" or f"{path.name}" in text, path
    assert f"| [{folder.name}]({folder.name}/README.md) |" in (FOLDER / "README.md").read_text(encoding="utf-8")


# --- the launcher


TRAIN = """
import sys
import torch
from basicsr.models import losses

options = {"objectives": {"own": {"type": "PSNRLoss"}, "diff": {"type": "DiffLoss", "h_space_weight": 0}}}
loss = losses.WeightedSum(**options)(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16))
print(sys.argv, __name__, float(loss) > 0, sys.modules["own_networks"].__file__ is not None)
"""


def launcher(checkout, *arguments):
    done = launch("-m", "restoreloss.integrations.launch", *arguments, processes=1, cwd=checkout)
    return done.returncode, done.stdout + done.stderr


def test_the_launcher_runs_an_unchanged_script_of_an_old_fork(tmp_path):
    losses = tmp_path / "basicsr/models/losses"
    losses.mkdir(parents=True)
    (tmp_path / "basicsr/models/__init__.py").touch()
    own = "class PSNRLoss(L1Loss):\n    def __init__(self):\n        super().__init__()\n"
    (losses / "__init__.py").write_text(f"from torch.nn import L1Loss\n\n\n{own}")
    (tmp_path / "basicsr/train.py").write_text(TRAIN)
    (tmp_path / "own_networks.py").touch()
    code, output = launcher(
        tmp_path, "--import", "own_networks", "basicsr/train.py", "-opt", "train.yml", "--import", "x"
    )
    assert code == 0, output
    assert output.splitlines()[-1] == "['basicsr/train.py', '-opt', 'train.yml', '--import', 'x'] __main__ True True"


def test_the_launcher_tells_of_a_script_that_is_not_there(tmp_path):
    code, output = launcher(tmp_path, "hat/train.py")
    assert code == 2 and "`script` should be a file, found none at hat/train.py" in output


# --- the real ones


@pytest.mark.slow
@pytest.mark.skipif(find_spec("basicsr") is None, reason="BasicSR is not installed")
def test_real_basicsr_of_any_version_trains_two_iterations_with_own_networks_and_its_own_losses(tmp_path):
    from tests.helpers.basicsr import MODEL, write_images
    from tests.helpers.basicsr import run as run_it

    write_images(tmp_path)
    (tmp_path / "own_networks.py").write_text(
        "import torch\nfrom basicsr.utils.registry import ARCH_REGISTRY\n\n@ARCH_REGISTRY.register()\n"
        "class Mine(torch.nn.Conv2d):\n    def __init__(self):\n        super().__init__(3, 3, 3, padding=1)\n"
    )
    options = yaml.safe_load(MODEL)
    for key in ("network_t",):
        del options[key]
    for key in ("optim_t", "task_opt", "importance_opt"):
        del options["train"][key]
    options |= {"num_gpu": 0, "network_g": {"type": "Mine"}, "path": {"pretrain_network_g": None}}
    options["path"] |= {"strict_load_g": True, "resume_state": None}
    options["datasets"]["train"] |= {"num_worker_per_gpu": 0, "batch_size_per_gpu": 1, "gt_size": 48}
    options["train"] |= {"total_iter": 2, "optim_g": {"type": "Adam", "lr": 1e-4}}
    parts = {"own": {"type": "CharbonnierLoss"}, "diff": {"type": "DiffLoss", "loss_weight": 0.1}}
    options["train"]["pixel_opt"] = {"type": "WeightedSum", "reduction": "mean", "objectives": parts}
    options["logger"] |= {"print_freq": 1, "use_tb_logger": False}
    (tmp_path / "train.yml").write_text(yaml.safe_dump(options))
    code, output = run_it(
        tmp_path, ["-m", "restoreloss.integrations.basicsr", "--import", "own_networks"], "-opt", "train.yml"
    )
    assert code == 0, output[-3000:]
    assert "l_pix/own/loss" in output and "l_pix/diff/noise" in output


@pytest.mark.slow
def test_the_losses_are_there_for_real_esrgan():
    pytest.importorskip("basicsr")
    from restoreloss.integrations.basicsr import register

    register()
    pytest.importorskip("realesrgan")
    from basicsr.losses import build_loss
    from basicsr.utils.registry import MODEL_REGISTRY

    assert "RealESRGANModel" in MODEL_REGISTRY and "RestorelossModel" in MODEL_REGISTRY
    options = yaml.safe_load((FOLDER / "registry_forks/losses.yml").read_text())["train"]["pixel_opt"]
    restored = torch.rand(1, 3, 32, 32, requires_grad=True)
    for _ in range(2):
        build_loss(options)(restored, torch.rand(1, 3, 32, 32)).backward()
    assert restored.grad.abs().sum() > 0
