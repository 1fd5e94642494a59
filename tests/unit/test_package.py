import ast
import importlib
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

import restoreloss

ROOT = Path(restoreloss.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))


def in_fresh_interpreter(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    heavy = ["torchvision", "diffusers", "timm", "pywt", "safetensors", "matplotlib", "skimage"]
    code = f"import sys, restoreloss; print('torch' in sys.modules, [m for m in {heavy} if m in sys.modules])"
    assert in_fresh_interpreter(code) == "True []"


def test_without_diffusers_only_what_needs_it_fails_and_says_so():
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch, restoreloss
loss = restoreloss.DiffLoss(lambda x_t, t: (0.5 * x_t, x_t))
print(float(loss(torch.ones(1, 3, 5, 5), torch.zeros(1, 3, 5, 5))) > 0)
try:
    restoreloss.small_prior()
except ImportError as error:
    print(error)
"""
    assert in_fresh_interpreter(code).splitlines() == [
        "True",
        "small_prior() needs `diffusers`, which is not installed: pip install diffusers",
    ]


@pytest.mark.parametrize("name", restoreloss.__all__)
def test_public_name_exists_and_says_what_it_is(name):
    public = getattr(restoreloss, name)
    assert public.__doc__.strip()
    assert not public.__doc__.startswith(f"{name}(")  # what a dataclass without a docstring says
    assert public.__module__.startswith("restoreloss.")


def test_public_names_are_listed_once():
    assert len(set(restoreloss.__all__)) == len(restoreloss.__all__)


def test_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_prints_nothing_catches_no_keywords_and_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    prints = [n.lineno for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", None) == "print"]
    catch_alls = [n.kwarg.lineno for n in nodes if isinstance(n, ast.arguments) and n.kwarg is not None]
    # the one class that is made from the signature of another, which it shows
    made = next((n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == "registrable"), None)
    if made is not None:
        (init,) = [n for n in ast.walk(made) if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        assert "__signature__" in ast.unparse(made)
        catch_alls.remove(init.args.kwarg.lineno)
    assert (prints, catch_alls) == ([], [])
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_can_be_imported(path):
    name = ".".join(("restoreloss", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    assert Path(importlib.import_module(name).__file__) == path


def test_version_is_that_of_the_installed_distribution():
    assert {each.version for each in distributions(name="restoreloss")} <= {restoreloss.__version__}


def test_missing_dependency_of_an_installed_package_is_not_reported_as_the_package(tmp_path, monkeypatch):
    from restoreloss._optional import require

    (tmp_path / "half_installed.py").write_text("import something_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_it_needs"):
        require("half_installed", purpose="this", install="half_installed")
    with pytest.raises(ImportError, match=r"this needs `absent_package`.* pip install absent-package"):
        require("absent_package.inner", purpose="this", install="absent-package")
