"""The site builds without a warning, and its search finds what people look for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import restoreloss

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    pytest.importorskip("furo")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", out / "doctrees", "docs", out / "html"]
    subprocess.run(command, cwd=ROOT, check=True)
    return out / "html"


def test_every_module_is_described(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").rglob("*.html"))
    files = [path.relative_to(ROOT / "restoreloss").with_suffix("") for path in (ROOT / "restoreloss").rglob("*.py")]
    modules = {".".join(("restoreloss", *path.parts)) for path in files if not path.name.startswith("_")}
    modules.remove("restoreloss.frozen")  # has the name of a function: its page describes the members one by one
    assert len(modules) > 55
    assert {name for name in modules if f'id="module-{name}"' not in text} == set()


@pytest.mark.parametrize("name", restoreloss.__all__)
def test_an_exported_name_has_a_page(site: Path, name: str) -> None:
    page = (site / "reference" / "generated" / f"restoreloss.{name}.html").read_text(encoding="utf-8")
    assert f'id="restoreloss.{name}"' in page


@pytest.mark.parametrize(
    ("word", "page"), [("prompt", "guides/task-prompts"), ("ddp", "guides/distributed"), ("ocr", "guides/task-driven")]
)
def test_the_search_finds_what_people_look_for(site: Path, word: str, page: str) -> None:
    index = json.loads((site / "searchindex.js").read_text(encoding="utf-8")[len("Search.setIndex(") : -1])
    found = [where for terms in (index["terms"], index["titleterms"]) for where in [terms.get(word, [])]]
    pages = {index["docnames"][n] for where in found for n in (where if isinstance(where, list) else [where])}
    assert page in pages


def test_formulas_are_formulas(site: Path) -> None:
    page = (site / "reference" / "generated" / "restoreloss.DiffLoss.html").read_text(encoding="utf-8")
    assert page.count('class="math ') > 3 and "mathjax" in page
