import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common.data import photo_textures as photos_module
from examples.common.data.clean_images import training_photographs
from examples.common.data.generated import CLASSES, STRIPES, generated
from examples.common.data.photo_textures import BACKGROUNDS, CUT, GAP, PHOTOS, columns, part, photo_textures, untested
from examples.common.data.photos import HELD_OUT, TRAIN, load_photo

TASKS = ("classification", "segmentation", "detection")
MAKERS = {
    "generated": inspect.unwrap(generated),  # past the cache: every call draws anew
    "photos train": lambda task, count, seed, **size: photo_textures(task, "train", count, seed, **size),
    "photos test": lambda task, count, seed, **size: photo_textures(task, "test", count, seed, **size),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
every_task = pytest.mark.parametrize("task", TASKS)


def same(one, other) -> bool:
    if isinstance(one, dict):
        return all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys()
    return torch.equal(one, other)


def tight_box(mask: Tensor) -> list[float]:
    """Pixel by pixel: the least rectangle that holds the mask."""
    inside = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    rows, cols = [y for y, _ in inside], [x for _, x in inside]
    return [min(cols), min(rows), max(cols) + 1, max(rows) + 1]


@every_maker
@every_task
def test_the_first_images_are_the_same_for_every_count(make, task):
    few, many, other = make(task, 7, 3), make(task, 15, 3), make(task, 7, 4)
    assert torch.equal(few.images, many.images[:7])
    assert all(same(few.targets[i], many.targets[i]) for i in range(7))
    assert not any(torch.equal(few.images[i], other.images[i]) for i in range(7))
    assert len({image.numpy().tobytes() for image in many.images}) == 15


@every_maker
@every_task
def test_the_state_of_the_global_generators_is_neither_read_nor_moved(make, task):
    torch.manual_seed(0)
    np.random.seed(0)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())
    first = make(task, 4, 0)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(make(task, 4, 0).images, first.images)


@every_maker
@every_task
@pytest.mark.parametrize("size", [24, 48, 61])
def test_images_and_targets_are_as_the_tasks_module_says(make, task, size):
    data = make(task, 12, 0, size=size)
    assert data.task == task and len(data) == len(data.targets) == 12
    assert data.images.shape == (12, 3, size, size) and data.images.dtype == torch.float32
    levels = data.images * 255
    assert data.images.min() >= 0 and data.images.max() <= 1
    assert torch.allclose(levels, levels.round(), atol=1e-4, rtol=0)
    for image, target in (data[i] for i in range(12)):
        assert image.shape == (3, size, size)
        if task == "classification":
            assert target.shape == () and target.dtype == torch.int64 and 0 <= target < len(data.class_names)
        elif task == "segmentation":
            assert target.shape == (size, size) and target.dtype == torch.int64
            assert target.min() >= 0 and target.max() < len(data.class_names)
        else:
            boxes, labels = target["boxes"], target["labels"]
            assert data.class_names[0] == "background"
            assert boxes.dtype == torch.float32 and labels.dtype == torch.int64
            assert boxes.shape == (len(labels), 4) and 1 <= len(labels) <= 2
            assert (labels >= 1).all() and (labels < len(data.class_names)).all()
            assert (boxes >= 0).all() and (boxes <= size).all() and (boxes[:, 2:] - boxes[:, :2] >= size / 4).all()


@every_maker
def test_every_class_is_shown_equally_often(make):
    data = make("classification", 3 * len(make("classification", 1, 0).class_names), 5)
    assert torch.bincount(data.targets).tolist() == [3] * len(data.class_names)


# --- generated ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 48, 80])
def test_label_mask_and_box_are_of_the_same_object(size):
    labels, masks, boxes = (generated(task, 30, 1, size=size) for task in TASKS)
    assert torch.equal(labels.images, masks.images) and torch.equal(labels.images, boxes.images)
    assert labels.class_names == CLASSES and masks.class_names == boxes.class_names == ("background", *CLASSES)
    for label, mask, target in zip(labels.targets, masks.targets, boxes.targets, strict=True):
        assert set(mask.unique().tolist()) == {0, int(label) + 1}
        assert target["labels"].tolist() == [int(label) + 1]
        assert target["boxes"].tolist() == [tight_box(mask > 0)]


def test_objects_lie_within_the_image_and_are_as_large_as_said():
    masks = generated("segmentation", 400, 2).targets > 0
    area, side = masks.sum(dim=(1, 2)), masks.any(dim=1).sum(dim=1)
    assert side.min() >= 2 * 0.9 * 11 - 2 and side.max() <= 2 * 1.2 * 17 + 1
    assert area.min() >= 200 and area.max() <= 1000
    # not cut off: all three shapes are the same from all sides
    assert torch.equal(side, masks.any(dim=2).sum(dim=1)) or (side - masks.any(dim=2).sum(dim=1)).abs().max() <= 1


def features_of_objects(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, (N,), mean color, area and place of the objects, (N, 6), and their gray spectrum, (N, K)."""
    data = generated("segmentation", count, seed)
    masks = data.targets > 0
    area = masks.sum(dim=(1, 2))
    color = (data.images * masks[:, None]).sum(dim=(2, 3)) / area[:, None]
    side = torch.arange(masks.shape[1])
    place = (
        torch.stack([(masks * side).sum(dim=(1, 2)), (masks * side[:, None]).sum(dim=(1, 2))], dim=1) / area[:, None]
    )
    gray = torch.where(masks, data.images.mean(dim=1) - color.mean(dim=1)[:, None, None], 0.0)
    spectrum = torch.fft.fft2(gray).abs()[:, :13].roll(12, dims=2)[:, :, :25]
    pooled = F.avg_pool2d(spectrum[:, None], 2, ceil_mode=True).flatten(1)
    labels = data.targets.amax(dim=(1, 2)) - 1
    return labels, torch.cat([color, area[:, None], place], dim=1), F.normalize(pooled)


def nearest_class_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    scale = train.std(dim=0) + 1e-6
    centers = torch.stack([train[train_labels == label].mean(dim=0) for label in range(int(train_labels.max()) + 1)])
    guess = torch.cdist(test / scale, centers / scale).argmin(dim=1)
    return float((guess == test_labels).float().mean())


def test_the_texture_and_nothing_else_tells_the_class():
    labels, other, spectrum = features_of_objects(800, 0)
    test_labels, test_other, test_spectrum = features_of_objects(400, 1)
    chance = 1 / len(CLASSES)
    assert nearest_class_accuracy(other, labels, test_other, test_labels) < chance + 0.06  # four standard deviations
    assert nearest_class_accuracy(spectrum, labels, test_spectrum, test_labels) > 0.7


@pytest.mark.parametrize("name", STRIPES)
def test_stripes_have_the_direction_and_the_period_that_were_asked_for(name):
    label, period = CLASSES.index(name), 6.0
    data = generated("segmentation", 60, 0, size=96, period=(period, period), contrast=(0.3, 0.3))
    for image, mask in [data[i] for i in range(label, 60, 10)]:
        gray, inside = image.mean(dim=0), mask > 0
        spectrum = torch.fft.fft2(torch.where(inside, gray - gray[inside].mean(), 0.0), s=(384, 384)).abs()
        down, right = divmod(int(spectrum[:193].argmax()), 384)
        frequency = np.array([-down, right if right < 192 else right - 384]) / 384  # upwards, rightwards
        assert 1 / np.hypot(*frequency) == pytest.approx(period, rel=0.06)
        direction = np.degrees(np.arctan2(*frequency)) % 180
        assert abs((direction - STRIPES[name] + 90) % 180 - 90) < 10


def test_contrast_is_that_of_the_object():
    flat, strong = (generated("segmentation", 50, 0, contrast=(c, c)) for c in (0.0, 0.2))
    assert torch.equal(flat.targets, strong.targets)
    outside = (flat.targets == 0)[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(flat.images[outside], strong.images[outside])
    for plain, textured, mask in zip(flat.images, strong.images, flat.targets > 0, strict=True):
        assert float((textured - plain).mean(dim=0)[mask].std()) == pytest.approx(0.2 / 2**0.5, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "depth"}, r"`task`.*'classification'.*'depth'"),
        ({"count": 0}, r"`count`.*at least 1.*0"),
        ({"seed": -1}, r"`seed`.*at least 0.*-1"),
        ({"size": 23}, r"`size`.*at least 24.*23"),
        ({"period": (8.0, 5.5)}, r"`period`.*lowest, highest.*\(8\.0, 5\.5\)"),
        ({"period": (1.0, 5.5)}, r"`period`.*from 2.*\(1\.0, 5\.5\)"),
        ({"contrast": (-0.1, 0.1)}, r"`contrast`.*from 0.*\(-0\.1, 0\.1\)"),
    ],
)
def test_generated_refuses_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        generated(**{"task": "classification", "count": 2, "seed": 0, **arguments})


# --- photographs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PHOTOS, *BACKGROUNDS])
def test_training_and_test_parts_share_no_column(name):
    left, cut, start, right = *columns(name, "train"), *columns(name, "test")
    assert 0 <= left < cut and cut + GAP == start < right <= load_photo(name).shape[2]
    assert (cut - left) / (right - left) == pytest.approx(CUT, abs=0.01)


def test_a_part_depends_on_its_own_columns_only(monkeypatch):
    """Also where the photograph is shrunk: other columns may be anything."""
    name = "grass"
    expected = {split: [level.copy() for level in part(name, split)] for split in ("train", "test")}
    for split in ("train", "test"):
        start, stop = columns(name, split)
        spoiled = torch.rand(load_photo(name).shape, generator=torch.Generator().manual_seed(0))
        spoiled[:, :, start:stop] = load_photo(name)[:, :, start:stop]
        monkeypatch.setattr(photos_module, "load_photo", lambda _, spoiled=spoiled: spoiled)
        for level, wanted in zip(part.__wrapped__(name, split), expected[split], strict=True):
            assert np.array_equal(level, wanted)
        monkeypatch.undo()


def test_photographs_beside_textures_have_no_test_part():
    for name in TRAIN:
        rest = untested(name, load_photo(name))
        if name == "motorcycle_right":
            assert rest is None
        elif name in PHOTOS | BACKGROUNDS:
            assert rest is not None and columns(name, "train")[1] <= rest.shape[2] < columns(name, "test")[0]
            assert torch.equal(rest, load_photo(name)[:, :, : rest.shape[2]])
        else:
            assert rest is not None and torch.equal(rest, load_photo(name))
    alone, beside = training_photographs(24), training_photographs(24, beside_textures=True)
    assert len(beside) == len(alone) - 3 and sum(map(torch.numel, beside)) < 0.8 * sum(map(torch.numel, alone))


def test_no_held_out_photograph_and_no_background_that_is_a_class():
    assert not {*PHOTOS, *BACKGROUNDS} & set(HELD_OUT) and not set(PHOTOS) & set(BACKGROUNDS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_patches_are_grey_and_of_equal_mean_and_contrast(split):
    data = photo_textures("classification", split, 10 * len(PHOTOS), 0)
    assert torch.equal(data.images[:, :1].expand(-1, 3, -1, -1), data.images) and data.class_names == tuple(PHOTOS)
    mean, contrast = data.images[:, 0].mean(dim=(1, 2)), data.images[:, 0].std(dim=(1, 2))
    whole = (data.images.flatten(1).amin(dim=1) > 0) & (data.images.flatten(1).amax(dim=1) < 1)  # nothing was clipped
    assert whole.float().mean() > 0.25
    assert (mean[whole] - 0.5).abs().max() < 0.002 and (contrast[whole] - 0.15).abs().max() < 0.01
    assert (mean - 0.5).abs().max() < 0.03


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_mosaic_shows_two_to_four_photographs_a_tenth_each(split):
    masks = photo_textures("segmentation", split, 60, 0).targets
    numbers = set()
    for mask in masks:
        shares = torch.bincount(mask.flatten())
        shares = shares[shares > 0] / mask.numel()
        numbers.add(len(shares))
        assert shares.min() >= 0.1
    assert numbers == {2, 3, 4}
    assert len(masks.unique()) == len(PHOTOS)


def test_pasted_objects_fill_their_boxes(monkeypatch):
    """On a black background with white photographs, the box is that of the white pixels."""
    monkeypatch.setattr(
        photos_module, "_standard", lambda crop, mask, contrast=1.0: np.full(crop.shape, contrast == 1.0)
    )
    data = photo_textures("detection", "train", 40, 0)
    numbers = [len(target["labels"]) for target in data.targets]
    assert set(numbers) == {1, 2}
    for image, target in data:
        seen = image[0] == 1
        outline = torch.zeros_like(seen)
        for left, top, right, bottom in target["boxes"].int().tolist():
            assert 16 <= right - left <= 28 and 16 <= bottom - top <= 28
            window = seen[top:bottom, left:right]
            assert window[0].any() and window[-1].any() and window[:, 0].any() and window[:, -1].any()
            outline[top:bottom, left:right] = True
        assert not (seen & ~outline).any()
        if len(target["labels"]) == 1:
            assert target["boxes"].tolist() == [tight_box(seen)]
        assert len(set(target["labels"].tolist())) == len(target["labels"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "depth"}, r"`task`.*'classification'.*'depth'"),
        ({"split": "val"}, r"`split`.*'train', 'test'.*'val'"),
        ({"count": 0}, r"`count`.*at least 1.*0"),
        ({"seed": -1}, r"`seed`.*at least 0.*-1"),
        ({"size": 20}, r"`size`.*from 24 to \d+.*20"),
        ({"size": 400}, r"`size`.*from 24 to \d+.*400"),
    ],
)
def test_photo_textures_refuses_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        photo_textures(**{"task": "classification", "split": "train", "count": 2, "seed": 0, **arguments})
