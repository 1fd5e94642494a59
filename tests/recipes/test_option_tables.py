"""The tables of options in the documentation say what the dataclasses do."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from examples.common.engine.option_tables import PAGES, descriptions, option_table, write_tables
from examples.common.engine.options import TrainerOptions
from tests.helpers.processes import ROOT


def test_the_pages_of_the_recipes_have_the_options_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    for page in PAGES:
        text = (ROOT / "docs" / "recipes" / f"{page}.md").read_text(encoding="utf-8")
        (tmp_path / "recipes" / f"{page}.md").write_text(text, encoding="utf-8")
    assert write_tables(tmp_path) == [], "run python -m examples.common.engine.option_tables"


@pytest.mark.parametrize("kind", [kind for kinds in PAGES.values() for kind in kinds], ids=lambda kind: kind.__module__)
def test_every_option_is_described(kind: type) -> None:
    said = descriptions(kind)
    assert all(said.get(option.name) for option in fields(kind) if option.name != "adversarial")  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group.

    Attributes:
        weight: how much.
    """

    weight: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Made(TrainerOptions):
    """A run.

    Attributes:
        lr: how fast, of :class:`torch.optim.Adam`
            or ``another``.
        names: a | b.
        maps: by name.
        inner: others.
    """

    steps: int = 7
    lr: float = 0.5
    names: tuple[str, ...] = ("a",)
    maps: dict[str, int] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_a_table_has_what_a_recipe_adds_or_sets_otherwise() -> None:
    rows = option_table(Made).splitlines()[2:]
    names = ["`--steps`", "`--lr`", "`--names`", "`--maps`", "`--inner.weight`"]
    assert [row.split("|")[1].strip() for row in rows] == names
    assert rows[0].startswith("| `--steps` | `7` | steps of every phase.")
    assert rows[1] == "| `--lr` | `0.5` | how fast, of `Adam` or `another`. |"
    assert rows[2] == "| `--names` | `['a']` | a \\| b. |"
    assert rows[4] == "| `--inner.weight` | `0.5` | how much. |"
