"""What pyproject.toml, CITATION.cff, CHANGELOG.md and the pages say of the package is so."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml

import restoreloss

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = {
    "PIL": "Pillow", "pywt": "PyWavelets", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml",
}  # fmt: skip
ELSEWHERE = {
    "basicsr",  # cannot be built beside an installed torch: see docs/integrations/basicsr.md
    "cv2", "imagecorruptions",  # what the corruptions are measured against, of another time
}  # fmt: skip


def imported(folder: Path) -> set[str]:
    """The packages that the files of a folder import, whether at their top, in a function or by ``require``."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("require", "import_module"):
                found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    tops = {str(name).partition(".")[0] for name in found}
    return tops - set(sys.stdlib_module_names) - {"restoreloss", "examples", "tests", ""}


def declared(*extras: str) -> set[str]:
    """The distributions that the package and these extras ask for, as names are compared."""
    asked = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in asked}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("restoreloss", ("blocks", "examples", "integrations")), ("examples", ("examples", "reading", "integrations"))],
)
def test_what_is_imported_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    names = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in imported(ROOT / folder) - ELSEWHERE}
    assert names - declared(*extras) == set()
    assert len(names) > 10


def test_every_bound_has_a_lower_end_and_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in PROJECT["dependencies"] + EXTRAS["examples"] + EXTRAS["integrations"]:
        assert ">=" in line
        if text.count(f'"{line}"') == 1:
            assert re.search(rf'"{re.escape(line)}"[],]+ # \w', text), line


def test_citation_and_changelog_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    dated = f"## [{restoreloss.__version__}] - {citation['date-released']}"
    assert citation["version"] == restoreloss.__version__
    assert dated in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()


def test_the_classifiers_name_the_pythons_that_are_tested() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    tested = {str(entry["python"]) for entry in workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]}
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert named == tested


def test_no_page_installs_from_an_index_what_is_not_published() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"pip install ['\"]?restoreloss\b", page.read_text(encoding="utf-8")), page.name


def test_the_literature_has_the_five_papers() -> None:
    text = (ROOT / "docs" / "literature.bib").read_text(encoding="utf-8")
    papers = {"2406.19030", "2404.01692", "2507.22459", "2501.13134", "2506.21722"}
    assert set(re.findall(r"eprint\s*= \{(\S+)\}", text)) == papers
    for field in ("title", "author", "year"):
        assert len(re.findall(rf"^  {field}\s*= ", text, flags=re.MULTILINE)) == len(papers)
