"""Every Python snippet of the README and of docs/ runs, file by file, top to bottom."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


def test_every_page_is_in_the_navigation() -> None:
    pages = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(pages) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])


def test_pages_name_every_public_name() -> None:
    import restoreloss

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in restoreloss.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []
