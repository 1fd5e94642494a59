"""Tiles fade into each other, and images of many sizes go through as one batch."""

import itertools

import pytest
import torch
from torch import Tensor

from restoreloss.restorers.tiling import crop_to, pad_to_batch, tiled


def test_tiles_of_a_pointwise_function_are_its_whole() -> None:
    image = torch.rand(2, 3, 37, 50, dtype=torch.float64)
    for tile, overlap in ((16, 0), (16, 4), (16, 8), (40, 10), (64, 16)):
        torch.testing.assert_close(tiled(torch.square, image, tile=tile, overlap=overlap), image.square())

        def twice(part: Tensor) -> Tensor:
            return part.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

        torch.testing.assert_close(tiled(twice, image, tile=tile, overlap=overlap, scale=2), twice(image))


def test_tiles_fade_into_each_other() -> None:
    count = [0.0]

    def constant(part: Tensor) -> Tensor:
        count[0] += 1
        return torch.full_like(part, count[0])

    row = tiled(constant, torch.zeros(1, 1, 8, 24, dtype=torch.float64), tile=16, overlap=8)[0, 0, 0]
    assert torch.equal(row[:8], torch.ones(8).double()) and torch.equal(row[16:], torch.full((8,), 2.0).double())
    steps = row.diff()[7:16]
    assert (steps > 0).all() and steps.max() < 0.2
    with pytest.raises(ValueError, match="half a tile"):
        tiled(constant, torch.zeros(1, 1, 8, 24), tile=16, overlap=9)


@pytest.mark.parametrize(("side", "count"), [(513, 2), (896, 2), (897, 3), (1280, 3)])
def test_there_are_no_more_tiles_than_overlap_and_steps_ask_for(side: int, count: int) -> None:
    image, seen = torch.zeros(1, 1, 512, -(-side // 8) * 8), []
    tiled(lambda part: seen.append(part) or part, image, tile=512, step=8)  # type: ignore[func-returns-value]
    assert len(seen) == count


def test_together_and_apart() -> None:
    images = [torch.rand(3, 5, 9), torch.rand(3, 8, 4)]
    batch = pad_to_batch(images, 4)
    assert batch.shape == (2, 3, 8, 12)
    assert torch.equal(batch[0, :, 7, 11], images[0][:, 4, 8])
    assert all(torch.equal(one, other) for one, other in zip(crop_to(batch, images), images, strict=True))
    assert pad_to_batch(torch.rand(2, 3, 8, 8), 4, 16).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("size", [(64, 96), (40, 88), (32, 200)])
def test_fields_are_cut_with_the_image_and_neighbors_share_enough(size: tuple[int, int]) -> None:
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image, field = torch.stack([rows, columns])[None].float(), torch.stack([rows, columns])[None, :, ::8, ::8].float()
    starts = []

    def check(part: Tensor, coarse: Tensor) -> Tensor:
        assert torch.equal(part[..., ::8, ::8], coarse)
        starts.append(int(part[0, 1, 0, 0]))
        return part

    assert torch.allclose(tiled(check, image, tile=32, overlap=10, fields=[field], step=8), image)
    firsts = sorted(set(starts))
    assert all(start % 8 == 0 for start in firsts) and firsts[-1] + 32 == width
    assert all(after - before <= 32 - 10 for before, after in itertools.pairwise(firsts))
    with pytest.raises(ValueError, match="`overlap` should be a whole number"):
        tiled(check, image, tile=32, overlap=2.5)  # type: ignore[arg-type]
    for wrong in ({"tile": 30}, {"step": 5}):
        with pytest.raises(ValueError, match="multiples of"):
            tiled(check, image, **{"tile": 32, "overlap": 8, "fields": [field], "step": 8, **wrong})
