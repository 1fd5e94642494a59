"""The five minimal examples run, print finite numbers, stay short and use public names of restoreloss only."""

import ast
import importlib
import math
import re
from pathlib import Path

import pytest

import restoreloss

FOLDER = Path(__file__).parents[2] / "examples" / "minimal"
DOCS = Path(__file__).parents[2] / "docs"
LINES = 120
PRINTED = {
    "diffloss": ("degraded", "pixel loss", "pixel + DiffLoss", "pixel + image gradients", "extra/noise"),
    "sr4ir": ("without TDP", "with TDP"),
    "edtr": ("degraded", "pre-restored", "EDTR", "clean"),
    "unirestore": ("degraded", "people", "digit", "parity", "clean", "the same to the bit: True"),
    "dtp": ("rain: t* = ", "pre-trained", "plain", "GEF"),
}


def test_there_is_one_file_for_each_paper() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {"__init__", *PRINTED}


@pytest.mark.parametrize("name", PRINTED)
def test_runs_and_prints_finite_numbers(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = importlib.import_module(f"examples.minimal.{name}")
    monkeypatch.setattr(example, "BATCH", 2, raising=False)
    example.main(["--steps", "2"])
    printed = capsys.readouterr().out
    for key in PRINTED[name]:
        assert any(line.startswith(key) or line.endswith(key) for line in printed.splitlines()), key
    assert not re.search(r"\b(nan|inf)\b", printed)
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", printed)]
    assert len(numbers) >= 6
    assert all(map(math.isfinite, numbers))


@pytest.mark.parametrize("name", PRINTED)
def test_is_short(name: str) -> None:
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= LINES


@pytest.mark.parametrize("name", PRINTED)
def test_imports_public_names_only(name: str) -> None:
    documented = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md") if page.stem != "minimal")
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(module.split(".")[0] == "examples" for module in modules)
        if isinstance(node, ast.ImportFrom) and node.module == "restoreloss":
            assert {alias.name for alias in node.names} <= set(restoreloss.__all__)
        for module in modules:
            if module.startswith("restoreloss."):
                assert f"from {module} import" in documented, module
