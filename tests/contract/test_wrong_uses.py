"""Nothing is silent: whatever is used wrongly says so, names the argument and says what was found."""

import importlib

import pytest

import restoreloss
from tests.contract.wrong_uses.table import Right, Wrong, attempt, fault

AREAS = ("objectives", "priors", "augmentations", "blocks", "regularizers", "training", "integrations", "commands")
MODULES = [importlib.import_module(f"tests.contract.wrong_uses.{area}") for area in AREAS]
WRONG: list[Wrong] = [entry for module in MODULES for entry in module.WRONG]
RIGHT: list[Right] = importlib.import_module("tests.contract.wrong_uses.right").RIGHT


@pytest.mark.parametrize("entry", WRONG, ids=str)
def test_wrong_use_is_told(entry: Wrong) -> None:
    assert fault(entry) is None


@pytest.mark.parametrize("entry", RIGHT, ids=str)
def test_right_use_near_a_wrong_one_is_neither_refused_nor_warned_of(entry: Right) -> None:
    raised, warned, _ = attempt(entry.use)
    assert raised is None, raised
    assert not warned


def test_the_tables_are_whole() -> None:
    names = [str(entry) for entry in WRONG]
    assert len(set(names)) == len(names)
    assert len(WRONG) >= 300 and len(RIGHT) >= 40
    assert sum(entry.obscure is not None for entry in WRONG) <= 10


def test_every_exported_name_is_in_a_table() -> None:
    assert set(restoreloss.__all__) <= {entry.what for entry in WRONG}


def test_a_fault_is_found() -> None:
    def of(use: object, by: type[BaseException] = ValueError) -> str:
        return fault(Wrong("", "", use, ("`a`",), by, None)) or ""  # type: ignore[arg-type]

    def refuse(error: BaseException) -> object:
        def use() -> None:
            raise error

        return use

    assert of(lambda: 1) == "silent"
    assert of(refuse(KeyError("`a` found"))).startswith("gave KeyError")
    assert of(refuse(ValueError("`b` should be, found"))).startswith("does not tell ['`a`']")
    assert of(refuse(ValueError("`a` is wrong"))).startswith("does not say what was found")
    assert of(refuse(ValueError("`a` should be 1, found 2"))) == ""
    assert of(refuse(SystemExit(0)), SystemExit) == "ended as if all was well"
