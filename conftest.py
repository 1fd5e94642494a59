"""What the examples in docstrings may use without importing it, and how many threads a test may."""

import os
from typing import Any

import pytest
import torch

import restoreloss

if "PYTEST_XDIST_WORKER" in os.environ:  # each has a core
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace: dict[str, Any]) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, nn=torch.nn)
    doctest_namespace.update({name: getattr(restoreloss, name) for name in restoreloss.__all__})
    doctest_namespace.update(restored=torch.rand(1, 3, 16, 16), clean=torch.rand(1, 3, 16, 16))
