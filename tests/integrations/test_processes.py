"""What tells how many samples a process holds, as seen from one of two."""

import pytest
import torch

from restoreloss.integrations.processes import check_equal_batches


@pytest.fixture
def other(monkeypatch):
    """A second process, which holds 4 samples."""

    def gather(found, mine):
        found[:] = [mine, 4]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


class Features(dict):
    """As transformers' BatchFeature: a mapping of its own."""


@pytest.mark.parametrize(
    "batch",
    [
        torch.rand(3, 3, 8, 8),
        (torch.rand(3, 3, 8, 8), torch.rand(3)),
        {"name": ["a", "b", "c"], "scale": torch.tensor(2.0), "image": torch.rand(3, 3, 8, 8)},
        Features(pixel_values=torch.rand(3, 3, 8, 8)),
        ([torch.rand(3, 8, 8), torch.rand(3, 6, 9), torch.rand(3, 5, 5)], [{"boxes": torch.rand(7, 4)}] * 3),
    ],
)
def test_batches_of_3_are_not_of_4(batch, other):
    with pytest.raises(ValueError, match=r"`batch` should hold equally many samples on all processes, found \[3, 4\]"):
        check_equal_batches(batch)


def test_batches_of_4_are(other):
    check_equal_batches([torch.rand(4, 3, 8, 8), torch.rand(9)])


def test_a_batch_without_tensors_is_refused_where_it_is_compared(other):
    with pytest.raises(ValueError, match="`batch` should hold tensors of several samples, found dict"):
        check_equal_batches({"name": "a", "scale": torch.tensor(2.0)})


def test_one_process_has_nothing_to_compare():
    check_equal_batches({"name": "a"})
