"""Every Python snippet of the README and of docs/ runs, file by file, top to bottom."""

import importlib
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState

import restoreloss

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = sorted(path.parent.name for path in (ROOT / "restoreloss").glob("*/__init__.py"))


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda p: "/".join(p.parts[-2:]))
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # the README's first three lines show only the change to a loop that has these already
    namespace = {"F": F, "restored": torch.rand(1, 3, 16, 16, requires_grad=True), "clean": torch.rand(1, 3, 16, 16)}
    try:
        for snippet in snippets(page):
            exec(compile(snippet, str(page), "exec"), namespace)
    finally:  # an Accelerator is one for the process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_guides_name_every_public_name() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name != "reference")
    missing = [name for name in restoreloss.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_the_reference_has_every_exported_name_and_every_module() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    entries = set(re.findall(r"^   (restoreloss\.\S+)$", text, flags=re.MULTILINE))
    packages = [restoreloss, *(importlib.import_module(f"restoreloss.{name}") for name in PACKAGES)]
    names = {f"{package.__name__}.{name}" for package in packages for name in getattr(package, "__all__", ())}
    modules = {
        f"restoreloss.{path.relative_to(ROOT / 'restoreloss').with_suffix('')}".replace(os.sep, ".")
        for path in (ROOT / "restoreloss").rglob("*.py")
        if not path.name.startswith("_")
    }
    assert len(names) > 45 and len(modules) > 55
    assert entries == names | modules
