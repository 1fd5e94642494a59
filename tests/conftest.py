"""What several test files share."""

import pytest

from tests.helpers.networks import tiny_unet


@pytest.fixture
def prior(tmp_path):
    """A tiny prior, and the folder that it is saved in."""
    network = tiny_unet()
    network.save_pretrained(tmp_path / "prior")
    return network, str(tmp_path / "prior")
