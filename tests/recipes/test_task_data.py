"""Labeled images on their way to a network: batches, low resolution, the grid of the scale, losses of a task."""

from typing import Any

import pytest
import torch

from examples.common.data.degrade import low_resolution
from examples.common.data.task_data import crop_to_multiple
from examples.common.data.tasks import Task
from examples.common.engine.batches import Batches, loader
from examples.common.engine.recognition import Recognition
from examples.common.networks.recognizers import recognizer


def test_a_label_that_is_no_class_is_named() -> None:
    names = ("a", "b", "c")
    Recognition("segmentation", names).check(torch.tensor([[0, 2, 255]]))
    with pytest.raises(ValueError, match="Labels should be from 0 to 2, found 1 to 3"):
        Recognition("classification", names).check(torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="Labels should be from 1 to 2, found 0 to 0"):
        Recognition("detection", names).check([{"labels": torch.tensor([0])}])
    Recognition("detection", names).check([{"labels": torch.empty(0, dtype=torch.long)}])
    with pytest.raises(ValueError, match="`targets` should be as many as `images`"):
        Recognition("classification", names).loss(torch.nn.Identity(), torch.rand(2, 3, 4, 4), torch.tensor([1]))


def test_images_without_a_box_train_a_detector() -> None:
    network = recognizer("small", "detection", 3).train()
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)} for _ in range(2)]
    loss = Recognition("detection", ("background", "a", "b")).loss(network, torch.rand(2, 3, 48, 48), targets)
    loss.backward()
    assert loss.isfinite()


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = list(Batches(10, 4, seed=1, first=0, last=6))
    assert list(Batches(10, 4, seed=1, first=3, last=6)) == whole[3:]
    assert len({index for batch in whole[:2] for index, _ in batch}) == 8  # an epoch shows no image twice
    parts = [list(Batches(10, 4, seed=1, first=0, last=6, rank=rank, processes=2)) for rank in range(2)]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole
    assert list(Batches(10, 4, seed=2, first=0, last=6)) != whole


def test_samples_are_drawn_with_their_own_seed() -> None:
    class Noisy:
        task: Task = "classification"
        class_names = ("a", "b")

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return torch.rand(3, 2, 2), torch.tensor(index)

    data = Noisy()
    first, again = (list(loader(data, Batches(6, 3, seed=1, first=0, last=4), workers=n)) for n in (0, 1))
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert not torch.equal(first[0][0], first[2][0])


def test_low_resolution_is_bicubic_in_eight_bits() -> None:
    image = torch.rand(1, 3, 16, 24)
    lr = low_resolution(image, 4)
    # the bicubic kernel (a = -0.75) half-way between two pixels: -3/32, 19/32, 19/32, -3/32
    kernel = torch.tensor([-3.0, 19.0, 19.0, -3.0]) / 32
    blocks = image.unfold(2, 4, 4).unfold(3, 4, 4)
    expected = torch.einsum("nchwij,i,j->nchw", blocks, kernel, kernel).clamp(0, 1)
    torch.testing.assert_close(lr, (expected * 255).round() / 255, atol=1 / 255 + 1e-6, rtol=0)
    assert ((lr * 255).round() / 255 - lr).abs().max() < 1e-7
    assert low_resolution(image, 4, blur=2.0).var() < lr.var()
    with pytest.raises(ValueError, match="multiples of 4"):
        low_resolution(torch.rand(1, 3, 15, 24), 4)


def test_images_are_cut_to_multiples_with_their_boxes_and_masks() -> None:
    hr, mask = torch.rand(2, 3, 10, 11), torch.randint(5, (2, 10, 11))
    cut, cut_mask = crop_to_multiple(hr, mask, 4)
    assert torch.equal(cut, hr[:, :, :8, :8]) and torch.equal(cut_mask, mask[:, :8, :8])
    target = {"boxes": torch.tensor([[1.0, 2, 11, 9], [9, 0, 11, 10]]), "labels": torch.tensor([3, 4])}
    (image,), (cut_target,) = crop_to_multiple([hr[0]], [target], 4)
    assert torch.equal(image, hr[0, :, :8, :8])
    assert cut_target["boxes"].tolist() == [[1, 2, 8, 8]] and cut_target["labels"].tolist() == [3]
