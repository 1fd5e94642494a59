"""Runs that several test files begin with, trained once in a session."""

from pathlib import Path

import pytest

from tests.recipes import cases


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> cases.Prepared:
    """The networks that runs begin with; each is trained when it is first asked for."""
    return cases.Prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of several sizes and kinds, with one that cannot be read."""
    return cases.write_images(tmp_path_factory.mktemp("images"))
