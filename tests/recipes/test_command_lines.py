"""Wrong use of every command: one clear line that names the option, exit code 2, and no folder left behind."""

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.common.engine.options import HIGHEST, LOWEST, RunOptions, check_numbers
from examples.diffloss.config import Adversarial
from examples.diffloss.config import Config as DiffLossConfig
from examples.dtp.config import Config as DTPConfig
from examples.edtr.config import Config as EDTRConfig
from examples.edtr.prepare import Config as EDTRPreparing
from examples.sr4ir.config import Config as SR4IRConfig
from examples.unirestore.config import Config as UniRestoreConfig
from examples.unirestore.prepare import Config as UniRestorePreparing

TRAINERS = {
    "examples.diffloss.train": [], "examples.dtp.train": ["--method=scratch"], "examples.sr4ir.train": [],
    "examples.edtr.train": [], "examples.unirestore.train": ["stage1"], "examples.edtr.prepare": [],
    "examples.unirestore.prepare": [],
}  # fmt: skip
EVERYWHERE = {
    "--stepz=1": "stepz", "--step=1": "--step=1",
    "--steps=many": "steps", "--steps=-1": "`steps` should be at least 1, found -1",
    "--batch=0": "`batch`", "--seed=-1": "`seed`", "--workers=-1": "`workers`", "--eval_every=-1": "`eval_every`",
    "--max_norm=-1": "`max_norm`", "--precision=fp8": "precision", "--config=nowhere.yaml": "nowhere.yaml",
    "--config=unknown.yaml": "stepz", "--config=broken.yaml": "config", "--test_count=0": "`test_count`",
    "--train_count=-5": "`train_count`",
}  # fmt: skip
OWN = [
    ("examples.diffloss.train", ["--patch=5000"], "`patch`"),
    ("examples.diffloss.train", ["--test_size=5000"], "`test_size` should be at most 150"),
    ("examples.diffloss.train", ["--test_size=5"], "`test_size` should be at least 6"),
    ("examples.diffloss.train", ["--batch=100", "--train_count=20"], "`batch` should be between 1 and the 20"),
    ("examples.diffloss.train", ["--diff.weight=1", "--diff.crop=0"], "`diff`: `crop`"),
    ("examples.diffloss.train", ["--diff.weight=1", "--diff.prior=./empty"], "`diff.prior` should be small, untrained"),
    ("examples.diffloss.train", ["--diff.timesteps=[600,100]"], "`diff.share` should be given with `diff.timesteps`"),
    ("examples.diffloss.train", ["--filter.kind=fourier"], "`filter.share` should be given with `filter.kind`"),
    ("examples.diffloss.train", ["--adversarial.weight=1", "--adversarial.width=0"], "`adversarial.width`"),
    ("examples.diffloss.train", ["--degradations=[]"], "`degradations`"),
    ("examples.diffloss.train", ["--data=folders", "--pairs={rainy: 'lol:empty'}"], "should hold images as lol"),
    ("examples.dtp.train", ["--method=gef", "--pretrained=empty"], "`pretrained`"),
    ("examples.dtp.train", ["--method=scratch", "--shallow=2"], "`shallow` should be at most 1"),
    ("examples.sr4ir.train", ["--size=0"], "`size` should be at least 1"),
    ("examples.sr4ir.train", ["--grid=0"], "`grid`"),
    ("examples.sr4ir.train", ["--mix=2"], "`mix` should be at most 1"),
    ("examples.sr4ir.train", ["--severities=[]"], "`severities`"),
    ("examples.edtr.train", ["--n=0"], "`n` should be at least 1"),
    ("examples.edtr.train", ["--prepared=empty"], "`prepared`"),
    ("examples.unirestore.train", ["stage1", "--steps_of_diffusion=-1"], "`steps_of_diffusion` should be at least 0"),
    ("examples.unirestore.train", ["stage3"], "stage3"),
    ("examples.edtr.prepare", ["--tasks=[]"], "`tasks`"),
    ("examples.edtr.prepare", ["--pre_lr=-1"], "`pre_lr`"),
    ("examples.unirestore.prepare", ["--judge=x", "--train_count=20"], "`judge`"),
    ("examples.unirestore.prepare", ["--images=empty"], "`images`"),
]


def refused(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module.rpartition(".")[2], *arguments])
    with pytest.raises(SystemExit, match="^2$"):
        importlib.import_module(module).main()


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "unknown.yaml").write_text("stepz: 1\n")
    (tmp_path / "broken.yaml").write_text("steps: [1\n")
    return tmp_path


@pytest.mark.parametrize("module", TRAINERS)
def test_wrong_options_of_every_trainer(
    module: str, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, message in EVERYWHERE.items():
        refused(module, [*TRAINERS[module], "--cpu=true", "--out=run", option], monkeypatch)
        assert message in capsys.readouterr().err.splitlines()[-1], option
        assert not (there / "run").exists(), option
    for out in ("file", "file/below"):
        refused(module, [*TRAINERS[module], "--cpu=true", f"--out={out}"], monkeypatch)
        assert "`out` should be a folder, found the file" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("module", "arguments", "message"), OWN, ids=[f"{m} {' '.join(a)}" for m, a, _ in OWN])
def test_wrong_options_of_one_trainer(
    module: str, arguments: list[str], message: str, there: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    refused(module, [*arguments, "--cpu=true", "--out=run"], monkeypatch)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (there / "run").exists()


CONFIGS: list[Any] = [
    DiffLossConfig(out=Path()), DTPConfig(out=Path()), SR4IRConfig(out=Path()), EDTRConfig(out=Path()),
    UniRestoreConfig(out=Path()), EDTRPreparing(out=Path()), UniRestorePreparing(out=Path()),
]  # fmt: skip


def test_defaults_are_in_range_and_every_range_is_that_of_an_option() -> None:
    known = {name for config in CONFIGS for name in vars(config)} | {"width", "levels"}
    known |= {f"{group}.{name}" for group in ("adversarial", "diff") for name in vars(getattr(CONFIGS[0], group))}
    for config in CONFIGS:
        check_numbers(config)
    assert {*LOWEST, *HIGHEST} <= known


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match=f"`lr` should be finite, found {value}"):
        check_numbers(replace(CONFIGS[0], lr=value))
    with pytest.raises(ValueError, match="`adversarial.lr` should be finite"):
        check_numbers(replace(CONFIGS[0], adversarial=Adversarial(lr=value)))
    with pytest.raises(ValueError, match="`max_norm` should be finite"):
        check_numbers(RunOptions(out=Path(), max_norm=value))


def test_packages_that_are_missing_are_named_all_at_once() -> None:
    program = (
        "import importlib.util as util; found = util.find_spec;"
        "util.find_spec = lambda name: None if name in ('yaml', 'tqdm') else found(name);"
        "import examples"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert 'The recipes need tqdm, yaml: pip install -e ".[examples]"' in done.stderr and done.returncode == 1
