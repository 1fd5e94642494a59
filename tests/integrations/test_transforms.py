"""RandomCorruption and RandomMixture on what data pipelines hand them, and the successor of imagecorruptions."""

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photos
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from restoreloss import CORRUPTIONS, Corruptions, MixtureA, MixtureB, corrupt
from restoreloss.augmentations.corruptions import Corruption
from restoreloss.integrations.imagecorruptions import corrupt as package_corrupt
from restoreloss.integrations.imagecorruptions import get_corruption_names
from restoreloss.integrations.transforms import RandomCorruption, RandomMixture, corrupted

BYTES = torch.from_numpy(photos.astronaut()[100:148, 180:244].copy()).permute(2, 0, 1)  # (3, 48, 64)
KINDS: dict[str, Any] = {
    "PIL": Image.fromarray(BYTES.permute(1, 2, 0).contiguous().numpy()),
    "uint8": BYTES,
    "float": BYTES / 255,
    "half": (BYTES / 255).half(),
    "batch": BYTES.repeat(4, 1, 1, 1),
    "clip": BYTES.repeat(2, 3, 1, 1, 1),
    "tv_tensor": tv_tensors.Image(BYTES),
    "numpy": BYTES.permute(1, 2, 0).numpy(),
    "numpy float": (BYTES / 255).permute(1, 2, 0).numpy(),
}
TRANSFORMS = {
    "corruption": lambda **o: RandomCorruption(names=["fog", "contrast", "jpeg_compression"], **o),
    "mixture": RandomMixture,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


def array(image: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image.numpy() if isinstance(image, Tensor) else image)


@every_kind
@both
def test_an_image_comes_back_in_its_own_kind(make: Any, kind: str) -> None:
    image = KINDS[kind]
    before = array(image).copy()
    changed = make()(image)
    assert type(changed) is type(image)
    assert array(changed).shape == before.shape and array(changed).dtype == before.dtype
    assert not np.array_equal(array(changed), before)
    assert np.array_equal(array(image), before)  # not written into
    unchanged = make(p=0)(image)
    assert type(unchanged) is type(image) and np.array_equal(array(unchanged), before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("severity", [1, 5])
def test_bytes_are_the_floats_rounded(name: str, severity: int) -> None:
    torch.manual_seed(0)
    expected = corrupt(BYTES[None] / 255, name, severity)
    torch.manual_seed(0)
    found = corrupted(BYTES[None], Corruption(name, severity))
    difference = (found.float() - 255 * expected).abs().max()
    assert found.dtype == torch.uint8 and difference <= (2 if name == "pixelate" else 0.5 + 1e-3)


@pytest.mark.parametrize("level", range(5))
def test_cells_and_jpeg_of_bytes_are_those_of_pillow(level: int) -> None:
    image, (height, width) = KINDS["PIL"], BYTES.shape[1:]
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    cells = image.resize((int(width * share), int(height * share)), Image.Resampling.BOX).resize(image.size, 0)
    assert np.array_equal(package_corrupt(array(image), level + 1, "pixelate"), array(cells))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    assert np.array_equal(package_corrupt(array(image), level + 1, "jpeg_compression"), array(Image.open(file)))
    transform = RandomCorruption(names=["pixelate"], severities=[level + 1])
    assert np.array_equal(array(transform(image)), array(cells))


@both
def test_labels_boxes_and_masks_beside_an_image_stay(make: Any) -> None:
    sample = {
        "image": tv_tensors.Image(BYTES),
        "mask": tv_tensors.Mask(BYTES[0].clone()),
        "boxes": tv_tensors.BoundingBoxes([[1, 2, 10, 12]], format="XYXY", canvas_size=(48, 64)),
        "features": torch.rand(3, 48, 64),
        "label": 3,
        "name": "astronaut",
    }
    changed = make()(sample)
    assert not torch.equal(changed["image"], sample["image"])
    for key in ("mask", "boxes", "features"):
        assert type(changed[key]) is type(sample[key]) and torch.equal(changed[key], sample[key])
    assert (changed["label"], changed["name"]) == (3, "astronaut")
    image, label = make()(BYTES, torch.tensor(2))
    assert not torch.equal(image, BYTES) and label == 2


@both
@every_kind
def test_keys_choose_the_entries_of_a_dict(make: Any, kind: str) -> None:
    pair = {"lq": KINDS[kind], "gt": KINDS[kind]}
    changed = make(keys=("lq",))(pair)
    assert list(changed) == ["lq", "gt"] and changed["gt"] is pair["gt"]
    assert not np.array_equal(array(changed["lq"]), array(pair["lq"]))
    for wrong in (pair["lq"], {"gt": pair["gt"]}):
        with pytest.raises(TypeError, match="`keys` should be entries of the sample"):
            make(keys=("lq",))(wrong)


def test_each_image_of_a_batch_has_its_own_draw_and_a_share_stays() -> None:
    torch.manual_seed(0)
    batch = BYTES.repeat(400, 1, 1, 1)[..., :16, :16]
    changed, drawn = RandomCorruption(p=0.3, names=["contrast", "brightness"], return_drawn=True)(batch)
    assert len(drawn) == 400 and 90 < sum(what is not None for what in drawn) < 150
    assert {what.name for what in drawn if what} == {"contrast", "brightness"}
    assert {what.severity for what in drawn if what} == {1, 2, 3, 4, 5}
    for before, after, what in zip(batch, changed, drawn, strict=True):
        expected = before if what is None else corrupted(before[None], what)[0]
        assert torch.equal(after, expected)


def test_images_of_one_sample_share_what_is_drawn() -> None:
    changed = RandomCorruption(names=["contrast", "pixelate"])({"a": tv_tensors.Image(BYTES), "b": KINDS["PIL"]})
    assert np.array_equal(array(changed["b"]), changed["a"].permute(1, 2, 0).numpy())


def test_a_mixture_is_the_library_s() -> None:
    image = BYTES[None] / 255
    torch.manual_seed(3)
    changed, (what,) = RandomMixture(return_drawn=True)(image)
    torch.manual_seed(3)
    again = RandomMixture(return_drawn=True)(image)
    assert torch.equal(changed, again[0]) and again[1] == [what]
    assert torch.equal(RandomMixture(mixture=MixtureA(4, 60))(image), MixtureA(4, 60)(image))


@both
def test_a_chain_of_transforms(make: Any) -> None:
    chain = v2.Compose([v2.RandomCrop(32), make(), v2.ToDtype(torch.float32, scale=True)])
    image, label = chain(tv_tensors.Image(BYTES), 5)
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.float32 and image.shape == (3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(make(p=0.0)))(BYTES), BYTES) and label == 5


class Photos(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        changed: Tensor = RandomCorruption(names=["gaussian_noise", "fog"])(BYTES[:, :16, :16])
        return changed


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_draw_independently_and_again_the_same(start: str) -> None:
    def epoch() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(
            Photos(), batch_size=1, num_workers=2, multiprocessing_context=start, generator=generator,
            collate_fn=default_collate,
        )  # fmt: skip
        return torch.cat(list(loader))

    first = epoch()
    assert torch.equal(first, epoch())
    assert len({image.numpy().tobytes() for image in first}) == 8


def test_weights_clean_images_and_a_reduced_side() -> None:
    generator = torch.Generator().manual_seed(0)
    corruptions = Corruptions({"fog": 3.0, "snow": 1.0, "clean": 1.0}, {1: 0.25, 4: 0.75}, side=(8, 16))
    drawn = corruptions.draw(4000, generator=generator, side=32)
    counts = [sum(what.name == name for what in drawn) / 4000 for name in ("fog", "snow", "clean")]
    assert counts == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    assert sum(what.severity == 4 for what in drawn) / 4000 == pytest.approx(0.75, abs=0.03)
    sides = {round(32 / what.scale) for what in drawn}
    assert sides == set(range(8, 17))
    assert all(what.scale == 1 for what in corruptions.draw(50, side=8))
    image = BYTES[None, :, :32, :32] / 255
    assert torch.equal(Corruptions(["clean"])(image), image)
    # at half the size a cell of `pixelate` is twice as wide: of 32 pixels, 16 are left and 4 cells of them
    cells = Corruptions(["pixelate"], [5], side=(16, 16))(image)
    small = torch.nn.functional.interpolate(image, size=(16, 16), mode="bilinear", antialias=True)
    expected = torch.nn.functional.interpolate(corrupt(small, "pixelate", 5), size=(32, 32), mode="bilinear")
    torch.testing.assert_close(cells, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Corruptions({}), "`names`"),
        (lambda: Corruptions({"fog": -1.0}), "names"),
        (lambda: Corruptions({"fog": 0.0}), "`names` should have a weight above 0"),
        (lambda: Corruptions(severities={6: 1.0}), "`severities`"),
        (lambda: Corruptions(side=(16, 8)), "`side` should rise"),
        (lambda: Corruptions(side=(2, 8)), "side"),
        (lambda: Corruptions(side=16), "`side` should be pixels"),
        (lambda: RandomCorruption(1.5), "`p`"),
        (lambda: RandomCorruption(names=["rain"]), "`names` should be one of"),
        (lambda: RandomCorruption(keys="lq"), "`keys` should be names"),
        (lambda: RandomCorruption(return_drawn=1), "`return_drawn`"),
        (lambda: RandomMixture(mixture="B"), "`mixture`"),
        (lambda: RandomMixture(mixture=MixtureB(input_range=(-1, 1))), "`mixture`"),
    ],
)
def test_wrong_options_are_told(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (3, "should hold an image, found"),
        ({"label": 3}, "should hold an image, found"),
        (torch.zeros(8, 8), "should be"),
        (torch.zeros(3, 16, 16, dtype=torch.int64), "should be"),
        (torch.zeros(1, 16, 16), "three channels"),
        (KINDS["PIL"].convert("RGBA"), "RGB, found mode 'RGBA'"),
        (KINDS["PIL"].convert("L"), "three channels"),
        (torch.zeros(3, 4, 4), "sides of at least 8"),
    ],
)
def test_what_is_no_image_is_told(sample: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RandomCorruption()(sample)


@both
def test_floats_of_another_range_warn_once(make: Any) -> None:
    transform = make(p=0)
    with pytest.warns(UserWarning, match="image"):
        transform(BYTES.float())
    transform(BYTES.float())


def test_the_successor_of_imagecorruptions() -> None:
    image = np.array(KINDS["PIL"])
    for number, name in enumerate(get_corruption_names("all")):
        torch.manual_seed(number)
        found = package_corrupt(image, corruption_name=name, severity=3)
        torch.manual_seed(number)
        assert np.array_equal(found, package_corrupt(image, 3, corruption_number=number))
        assert found.dtype == np.uint8 and found.shape == image.shape and not np.array_equal(found, image)
    assert package_corrupt(KINDS["PIL"].convert("L"), 2, "fog").shape == image.shape
    assert [len(get_corruption_names(s)) for s in ("common", "validation", "all", "weather")] == [15, 4, 19, 4]
    for wrong, message in (
        ({"corruption_name": "rain"}, "`corruption_name` should be one of"),
        ({}, "`corruption_number`"),
        ({"corruption_name": "fog", "severity": 6}, "`severity`"),
    ):
        with pytest.raises(ValueError, match=message):
            package_corrupt(image, **wrong)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        package_corrupt(image[:16], corruption_name="fog")
    with pytest.raises(ValueError, match="`image` should be uint8"):
        package_corrupt(image / 255, corruption_name="fog")
    with pytest.raises(ValueError, match="`subset`"):
        get_corruption_names("rain")


def test_masks_and_keypoints_of_numpy_are_no_images() -> None:
    image = np.full((32, 32, 3), 128, np.uint8)
    mask = np.arange(1024, dtype=np.uint8).reshape(32, 32, 1) % 3
    found = RandomMixture(p=1.0)({"image": image, "mask": mask})
    assert not np.array_equal(found["image"], image) and np.array_equal(found["mask"], mask)
    points = np.zeros((12, 17, 3), np.float32)
    with pytest.raises(ValueError, match=r"sizes \[\(12, 17\), \(32, 32\)\] are images should be said, by `keys`"):
        RandomCorruption(names=["fog"])({"image": image, "keypoints": points})
    kept = RandomCorruption(names=["fog"], keys=["image"])({"image": image, "keypoints": points})
    assert np.array_equal(kept["keypoints"], points) and not np.array_equal(kept["image"], image)
    pil = RandomCorruption(names=["fog"])({"image": Image.fromarray(image), "keypoints": points})
    assert np.array_equal(pil["keypoints"], points)


@both
def test_every_image_below_the_keys_is_changed(make: Any) -> None:
    image = KINDS["float"]
    found = make(keys=("lq", "gt"))({"lq": image, "gt": image.clone(), "label": torch.tensor(3)})
    assert not torch.equal(found["lq"], image) and not torch.equal(found["gt"], image)
    frames = make(keys=("frames",))({"frames": [image, image, (image, torch.tensor([1, 2]))]})["frames"]
    assert all(not torch.equal(one, image) for one in (frames[0], frames[1], frames[2][0]))
    assert torch.equal(frames[2][1], torch.tensor([1, 2]))
    mixed = make(keys=("lq", "gt"))({"lq": image, "gt": KINDS["numpy"]})
    assert not torch.equal(mixed["lq"], image) and not np.array_equal(mixed["gt"], KINDS["numpy"])
    masks = [tv_tensors.Mask(torch.ones(1, 48, 64)), torch.ones(4, 48, 64, dtype=torch.bool), torch.ones(7, 48, 64)]
    assert all(bool((mask == 1).all()) for mask in make(keys=("lq",))({"lq": [image, *masks]})["lq"][1:])
    normals = torch.ones(3, 48, 64)  # beside what says that it is an image no tensor is one
    kept = make(keys=("s",))({"s": {"image": KINDS["tv_tensor"], "normals": normals}})["s"]
    assert torch.equal(kept["normals"], normals) and not torch.equal(kept["image"], KINDS["tv_tensor"])
    with pytest.raises(TypeError, match="`label` should hold an image, found"):
        make(keys=("lq", "label"))({"lq": image, "label": torch.tensor(3)})


def test_what_was_drawn_is_one_list_for_images_of_several_numbers() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        sample = (tv_tensors.Image(BYTES), tv_tensors.Video(BYTES.repeat(4, 1, 1, 1)))
        (image, video), drawn = RandomCorruption(p=0.5, names=["fog"], return_drawn=True)(sample)
        changed = [not torch.equal(frame, BYTES) for frame in video]
        assert len(drawn) == 4 and changed == [what is not None for what in drawn]
        assert (not torch.equal(image, BYTES)) == changed[0]


def test_a_palette_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"should be RGB, found mode 'P': `image.convert\('RGB'\)` makes one"):
        package_corrupt(KINDS["PIL"].convert("P"), 1, "brightness")
