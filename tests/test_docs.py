"""Every Python snippet of the README and of docs/ runs, file by file, top to bottom."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torchvision.models import resnet18

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
    namespace: dict[str, object] = {}
    try:
        for snippet in snippets(page):
            exec(compile(snippet, str(page), "exec"), namespace)
    finally:  # an Accelerator is one for the process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_the_loop_of_the_readme_trains_before_and_after_the_change() -> None:
    blocks = re.findall(r"^```diff\n(.*?)^```$", PAGES[0].read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    loops = [block for block in blocks if "for degraded, clean in loader" in block]
    assert len(loops) == 1
    for block in loops:
        for added, removed in ((" ", "+"), ("+", "-")):
            lines = [line[1:] for line in block.splitlines() if not line.startswith(removed)]
            assert any(line.startswith(added) for line in block.splitlines())
            network, classifier = nn.Conv2d(3, 3, 3, padding=1), resnet18(num_classes=10)
            before = copy.deepcopy(network.state_dict())
            loader = [tuple(torch.rand(2, 1, 3, 64, 64))]
            exec(
                compile("\n".join(lines), "README.md", "exec"),
                {
                    "F": F, "nn": nn, "loader": loader, "network": network, "classifier": classifier,
                    "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
                    "device": "cpu",
                },
            )  # fmt: skip
            assert not torch.equal(network.weight, before["weight"])


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_guides_name_every_public_name() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name != "reference")
    missing = [name for name in restoreloss.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def test_the_reference_has_every_exported_name() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    entries = re.findall(r"^   (restoreloss\.\S+)$", text, flags=re.MULTILINE)
    packages = [restoreloss, *(importlib.import_module(f"restoreloss.{name}") for name in PACKAGES)]
    names = {f"{package.__name__}.{name}" for package in packages for name in getattr(package, "__all__", ())}
    assert len(names) > 45
    assert names - set(entries) == set()
    assert {f"restoreloss.{name}" for name in PACKAGES} - set(entries) == set()  # of which every module gets a page
