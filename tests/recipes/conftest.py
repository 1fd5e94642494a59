"""Runs that several test files begin with, trained once in a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from examples.common.data.datasets import FolderData
from tests.helpers.datasets import MAKE
from tests.recipes import cases


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> cases.Prepared:
    """The networks that runs begin with; each is trained when it is first asked for."""
    return cases.Prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of several sizes and kinds, with one that cannot be read."""
    return cases.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(params=MAKE)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Callable[..., FolderData]]:
    """(root, its folder, the loader) of each data set."""
    make, load, options = MAKE[request.param]
    return tmp_path, make(tmp_path), lambda root, split="train": load(root, split, **options)


@pytest.fixture(scope="session")
def folder(prepared: cases.Prepared) -> Path:
    """Networks prepared for UniRestore, and a run of each stage: "prepared", "stage1", "stage2", "add-task"."""
    return prepared.unirestore
