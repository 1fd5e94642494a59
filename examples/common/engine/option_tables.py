"""The tables of options on the pages of the recipes, made of the dataclasses that hold them.

python -m examples.common.engine.option_tables     # writes them into docs/recipes/
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from examples.common.data.options import DataOptions, PairOptions
from examples.common.engine.options import RunOptions, TrainerOptions
from examples.diffloss.config import Config as DiffLossConfig
from examples.dtp.config import Config as DTPConfig
from examples.edtr.config import Config as EDTRConfig
from examples.sr4ir.config import Config as SR4IRConfig
from examples.unirestore.config import Config as UniRestoreConfig

SHARED = (RunOptions, TrainerOptions, DataOptions, PairOptions)
PAGES: dict[str, tuple[type, ...]] = {
    "diffloss": (DiffLossConfig,), "dtp": (DTPConfig,), "edtr": (EDTRConfig,), "sr4ir": (SR4IRConfig,),
    "unirestore": (UniRestoreConfig,), "index": SHARED,
}  # fmt: skip
"""The page of each recipe has what its config adds or sets otherwise, and the index what they share."""
BEGIN, END = "<!-- options of {}: made by examples.common.engine.option_tables -->", "<!-- end of the options -->"


def option_table(config: type) -> str:
    """A table of the options that a dataclass adds to those that recipes share, with their defaults."""
    said = descriptions(config)
    rows = ["| option | default | what it is |", "|---|---|---|"]
    for name, field in _own(config):
        default = f"`{_default(field)}`" if (default := _default(field)) != "" else "required"
        shown = name if field.metadata.get("positional") else f"--{name}"
        rows.append(f"| `{shown}` | {default} | {said.get(name, '')} |")
    return "\n".join(rows)


def descriptions(config: type) -> dict[str, str]:
    """What the docstring of a dataclass, or of the one that it extends, says of each attribute, as Markdown.

    Those of an attribute that is a dataclass itself have its name before theirs: "diff.share".
    """
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        text = inspect.getdoc(kind) or ""
        _, _, attributes = text.partition("Attributes:\n")
        for block in re.split(r"\n(?=    \w)", "\n" + attributes):
            name, colon, rest = block.strip().partition(":")
            if colon and name.isidentifier():
                found[name] = _markdown(rest)
    for field in fields(config):
        if (group := _group(field)) is not None:
            found |= {f"{field.name}.{name}": text for name, text in descriptions(group).items()}
    return found


def write_tables(docs: Path) -> list[Path]:
    """Bring the tables of all pages up to date; returns the pages that have changed."""
    changed = []
    for page, kinds in PAGES.items():
        path = docs / "recipes" / f"{page}.md"
        before = text = path.read_text(encoding="utf-8")
        for kind in kinds:
            text = _with_table(text, kind)
        if text != before:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def _with_table(text: str, kind: type) -> str:
    begin = BEGIN.format(_name(kind))
    if begin not in text:
        text = text.rstrip() + f"\n\n## {_heading(kind)}\n\n{begin}\n{END}\n"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(END)
    return f"{head}{begin}\n\n{option_table(kind)}\n\n{END}{tail}"


def _name(kind: type) -> str:
    return kind.__module__.split(".")[1] if kind.__name__ == "Config" else kind.__name__


def _heading(kind: type) -> str:
    said = {
        RunOptions: "Options of every run", TrainerOptions: "Options of an evaluation",
        DataOptions: "Options of labeled images", PairOptions: "Options of pairs",
    }  # fmt: skip
    return said.get(kind, "Options")


def _own(config: type, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    bases = [kind for kind in config.__mro__[1:] if is_dataclass(kind)]
    inherited = {field.name: _default(field) for kind in bases for field in fields(kind)}
    for field in fields(config):
        if field.name in inherited and inherited[field.name] == _default(field):
            continue
        if (group := _group(field)) is not None:
            yield from _own(group, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def _group(field: Field[Any]) -> type | None:
    """The dataclass of options that a field holds, if it does."""
    made = _made(field)
    return type(made) if is_dataclass(made) and not isinstance(made, type) else None


def _made(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _default(field: Field[Any]) -> str:
    value = _made(field)
    if value is MISSING:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)


def _markdown(text: str) -> str:
    plain = re.sub(r":\w+:`~?([^`]+)`", lambda match: f"`{match.group(1).rpartition('.')[2]}`", " ".join(text.split()))
    return plain.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    for page in write_tables(Path("docs")):
        print(page)
