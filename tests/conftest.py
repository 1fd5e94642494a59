"""What several test files share."""

import gc

import pytest
import torch.distributed as dist

from tests.helpers.networks import tiny_unet


def pytest_collection_finish() -> None:
    """Leave the half a million objects of what was imported out of every garbage collection that follows."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or packages with native parts say at the exit that they leak


@pytest.fixture
def prior(tmp_path):
    """A tiny prior, and the folder that it is saved in."""
    network = tiny_unet()
    network.save_pretrained(tmp_path / "prior")
    return network, str(tmp_path / "prior")


@pytest.fixture
def process_group():
    """A group of this process alone, which DDP asks for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
