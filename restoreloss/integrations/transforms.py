"""Corruptions and mixtures as torchvision v2 transforms, of PIL, uint8, float and numpy images, one or a batch."""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from restoreloss._optional import needed_by
from restoreloss.augmentations.corruptions import (
    CLEAN,
    CORRUPTIONS,
    Corruption,
    Corruptions,
    apply_corruption,
    check_corruptible,
)
from restoreloss.augmentations.imagenet_c import JPEG_QUALITY, PIXELATE_SHARE
from restoreloss.augmentations.mixtures import MixtureA, MixtureB
from restoreloss.checks import check_number, describe
from restoreloss.generators import uniform
from restoreloss.images import RangeWatch, at_least_float32

with needed_by("restoreloss.integrations.transforms", install="numpy Pillow torchvision"):
    import numpy as np
    from PIL import Image
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional


class _OnImages(v2.Transform, ABC):  # type: ignore[misc]
    """What both transforms share: which parts of a sample are images, and what an image is.

    Args:
        p: probability that an image is changed, for each image of a batch by itself; the others stay bit for bit.
        keys: entries of a dict to change, with all the images in them; all others stay as they are, so that
            ``keys=("lq",)`` leaves "gt". Default: all images of the sample.
        return_drawn: return (sample, drawn), with what was drawn for each image, None where it stays.
    """

    def __init__(self, p: float, keys: Sequence[str] | None, return_drawn: bool) -> None:
        super().__init__()
        self.p = check_number("p", p, low=0, high=1)
        if isinstance(keys, str) or not (keys is None or isinstance(keys, Sequence)):
            raise ValueError(f"`keys` should be names of entries, as in ('lq',), found {keys!r}.")
        self.keys = None if keys is None else tuple(keys)
        if not isinstance(return_drawn, bool):
            raise ValueError(f"`return_drawn` should be True or False, found {return_drawn!r}.")
        self.return_drawn = return_drawn
        self._range = RangeWatch((0.0, 1.0), fixed=True)

    @abstractmethod
    def draw(self, count: int, side: int) -> list[Any]:
        """What to do to ``count`` images whose shorter side has ``side`` pixels."""

    @abstractmethod
    def change(self, image: Tensor, drawn: Any) -> Tensor:
        """One image (1, C, H, W), float in [0, 1] or uint8, after what was drawn."""

    def forward(self, *inputs: Any) -> Any:
        """The sample with its images changed: an image, a tuple, a list or a dict, of any depth.

        Raises:
            TypeError: For a sample without an image, one without the ``keys``, and a key that holds none.
        """
        sample = inputs if len(inputs) > 1 else inputs[0]
        if self.keys is None:
            changed, drawn = self._changed({"": sample}, _images_among)
            changed = changed[""]
        else:
            if not isinstance(sample, Mapping) or not all(key in sample for key in self.keys):
                found = list(sample) if isinstance(sample, Mapping) else describe(sample)
                raise TypeError(f"`keys` should be entries of the sample, found {list(self.keys)} and {found}.")
            part, drawn = self._changed({key: sample[key] for key in self.keys}, _all_images_among)
            changed = {**sample, **part}
        return (changed, drawn) if self.return_drawn else changed

    def _changed(
        self, parts: Mapping[str, Any], find: Callable[[Sequence[Any]], list[int]]
    ) -> tuple[dict[str, Any], list[Any]]:
        """The parts with their images changed, the n-th of each by the same parameters, and what was drawn."""
        trees = {key: tree_flatten(part) for key, part in parts.items()}
        batches: dict[tuple[str, int], tuple[Tensor, Callable[[Tensor], Any]]] = {}
        for key, (leaves, _) in trees.items():
            if not (places := find(leaves)):
                where = f"`{key}`" if key else "The sample"
                raise TypeError(f"{where} should hold an image, found {[describe(leaf) for leaf in leaves]}.")
            batches |= {(key, place): _as_batch(leaves[place]) for place in places}
        for batch, _ in batches.values():
            if batch.is_floating_point():
                self._range.look({"image": batch})
        sizes = [tuple(batch.shape) for batch, _ in batches.values()]
        count = max(size[0] for size in sizes)
        chosen = uniform(torch.empty(count, dtype=torch.float64)) < self.p
        new = self.draw(count, min(sizes[0][2:]))
        drawn = [what if take else None for what, take in zip(new, chosen.tolist(), strict=True)]
        for (key, place), (batch, back) in batches.items():
            pairs = zip(batch.split(1), drawn[: len(batch)], strict=True)
            changed = torch.cat([one if what is None else self.change(one, what) for one, what in pairs])
            trees[key][0][place] = back(changed)
        return {key: tree_unflatten(leaves, structure) for key, (leaves, structure) in trees.items()}, drawn


class RandomCorruption(_OnImages):
    """:class:`Corruptions` as a transform: a corruption of ImageNet-C, drawn for each image.

    Args:
        p: probability that an image is corrupted, for each image of a batch by itself.
        names: as :class:`Corruptions` takes them: a sequence, or weights in a mapping; "clean" is one of them.
        severities: from 1 to 5, a sequence, or weights in a mapping.
        side: (lowest, highest) of a reduced shorter side at which an image is corrupted (:class:`Corruptions`).
        extent: factor of the corruptions' lengths (:class:`Corruptions`).
        keys: entries of a dict to change; all others stay as they are. Default: all images of the sample.
        return_drawn: return (sample, drawn), a :class:`Corruption` for each image, None where it stays.

    An image is a PIL image in RGB, a ``tv_tensors.Image``, a numpy array (H, W, 3) or, where the sample has none of
    these, its first tensor (..., 3, H, W), and below a key every such tensor: uint8, or float in [0, 1]. It comes back
    in its own kind and dtype, uint8 rounded. Randomness is torch's global one, which a ``DataLoader`` seeds in each
    worker.

    Raises:
        ValueError: At construction for options that :class:`Corruptions` refuses, at a call for images of another kind.
        TypeError: At a call for a sample without an image.

    Example:
        >>> transform = RandomCorruption(p=0.5, names=["fog", "snow"], severities=[1, 2])
        >>> image, label = transform(torch.zeros(3, 16, 16, dtype=torch.uint8), 7)
        >>> image.shape, image.dtype, label
        (torch.Size([3, 16, 16]), torch.uint8, 7)
        >>> pair = RandomCorruption(keys=("lq",))({"lq": torch.zeros(3, 16, 16), "gt": torch.zeros(3, 16, 16)})
        >>> bool(pair["gt"].any())
        False
    """

    def __init__(
        self,
        p: float = 1.0,
        *,
        names: Sequence[str] | Mapping[str, float] = CORRUPTIONS[:15],
        severities: Sequence[int] | Mapping[int, float] = (1, 2, 3, 4, 5),
        side: tuple[int, int] | None = None,
        extent: float = 1.0,
        keys: Sequence[str] | None = None,
        return_drawn: bool = False,
    ) -> None:
        super().__init__(p, keys, return_drawn)
        self.corruptions = Corruptions(names, severities, side=side, extent=extent)

    def draw(self, count: int, side: int) -> list[Corruption]:
        """What to do to ``count`` images."""
        return self.corruptions.draw(count, side=side)

    def change(self, image: Tensor, drawn: Corruption) -> Tensor:
        """One corrupted image."""
        return corrupted(image, drawn)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"p={self.p:g}, keys={self.keys}"


class RandomMixture(_OnImages):
    """:class:`MixtureB`, or another mixture, as a transform.

    Args:
        p: probability that an image is degraded, for each image of a batch by itself.
        mixture: a :class:`MixtureA` or :class:`MixtureB` of images in [0, 1]. Default: ``MixtureB()``.
        keys: entries of a dict to change; all others stay as they are. Default: all images of the sample.
        return_drawn: return (sample, drawn), a ``Degradation`` for each image (of a :class:`MixtureA` the mixture
            itself, which draws nothing), None where it stays.

    Images, kinds and randomness are those of :class:`RandomCorruption`; gray ones may have one channel.

    Raises:
        ValueError: At construction for what is no mixture of [0, 1], at a call for images of another kind.
        TypeError: At a call for a sample without an image.

    Example:
        >>> pair = {"lq": torch.rand(3, 32, 32), "gt": torch.rand(3, 32, 32)}
        >>> RandomMixture(p=0.8, keys=("lq",))(pair)["lq"].shape
        torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        p: float = 1.0,
        *,
        mixture: MixtureA | MixtureB | None = None,
        keys: Sequence[str] | None = None,
        return_drawn: bool = False,
    ) -> None:
        super().__init__(p, keys, return_drawn)
        mixture = MixtureB() if mixture is None else mixture
        if not isinstance(mixture, MixtureA | MixtureB) or mixture.input_range != (0.0, 1.0):
            raise ValueError(
                f"`mixture` should be a MixtureA or MixtureB of images in [0, 1], found {describe(mixture)}."
            )
        self.mixture = mixture

    def draw(self, count: int, side: int) -> list[Any]:
        """What to do to ``count`` images."""
        return [self.mixture] * count if isinstance(self.mixture, MixtureA) else self.mixture.draw(count)

    def change(self, image: Tensor, drawn: Any) -> Tensor:
        """One degraded image."""
        unit = _to_unit(image)
        if isinstance(self.mixture, MixtureA):
            return _like(self.mixture(unit), image)
        return _like(self.mixture.degrade(unit, drawn).clamp(0, 1), image)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"p={self.p:g}, keys={self.keys}"


def corrupted(image: Tensor, what: Corruption) -> Tensor:
    """One corruption of images (N, 3, H, W), uint8 or float in [0, 1], in their own dtype.

    JPEG and cells of uint8 images stay in 8 bits, by Pillow, as all that they do is to change 8-bit values.
    """
    check_corruptible(image)
    if what.name == CLEAN:
        return image
    if image.dtype == torch.uint8 and what.scale == 1 and what.name in ON_BYTES:
        pixels = [np.asarray(ON_BYTES[what.name](_to_pil(one), what.severity - 1)) for one in image]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(image.device)
    return _like(apply_corruption(_to_unit(image), what, clip=image.dtype != torch.uint8), image)


def _jpeg(image: Image.Image, level: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY[level])
    return Image.open(file)


def _pixelate(image: Image.Image, level: int) -> Image.Image:
    cells = [int(side * PIXELATE_SHARE[level]) for side in image.size]
    return image.resize((cells[0], cells[1]), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


ON_BYTES: dict[str, Callable[[Image.Image, int], Image.Image]] = {"jpeg_compression": _jpeg, "pixelate": _pixelate}


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _to_unit(image: Tensor) -> Tensor:
    if image.dtype == torch.uint8:
        return image.float().div_(255)
    return at_least_float32(image)


def _like(unit: Tensor, image: Tensor) -> Tensor:
    """The image in [0, 1], which may be written into where it came from 8 bits, in the dtype of another."""
    if image.dtype == torch.uint8:  # By way of int16 it is twice as fast.
        return unit.mul_(255).round_().to(torch.int16).to(torch.uint8)
    return unit.to(image.dtype)


STATED = (Image.Image, tv_tensors.Image, tv_tensors.Video)
"""What says that it is an image."""


def _all_images_among(leaves: Sequence[Any]) -> list[int]:
    """Places below a key: of the images that say that they are, else of all arrays and tensors that can be one."""

    def can_be(leaf: Any) -> bool:
        if isinstance(leaf, np.ndarray):
            return leaf.ndim == 3
        plain = isinstance(leaf, Tensor) and not isinstance(leaf, tv_tensors.TVTensor) and leaf.ndim >= 3
        return plain and leaf.shape[-3] in (1, 3) and (leaf.dtype == torch.uint8 or leaf.is_floating_point())

    stated = [n for n, leaf in enumerate(leaves) if isinstance(leaf, STATED)]
    return stated or [n for n, leaf in enumerate(leaves) if can_be(leaf)]


def _images_among(leaves: Sequence[Any]) -> list[int]:
    """Places of the images: those that say that they are, arrays of three channels, of one, or the first tensor.

    Raises:
        ValueError: For arrays of several sizes: one may hold keypoints.
    """
    stated = [n for n, leaf in enumerate(leaves) if isinstance(leaf, STATED)]
    arrays = [n for n, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray) and leaf.ndim == 3]
    colored, gray = ([n for n in arrays if leaves[n].shape[-1] == channels] for channels in (3, 1))
    pure = [n for n, x in enumerate(leaves) if isinstance(x, Tensor) and not isinstance(x, tv_tensors.TVTensor)]
    found = stated or colored or gray
    sizes = {leaves[n].shape[:2] for n in found if n in arrays}
    if len(sizes) > 1:
        raise ValueError(
            f"Which of the arrays of sizes {sorted(sizes)} are images should be said, by `keys` of a dictionary."
        )
    return found or pure[:1]


def _as_batch(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The images as (N, C, H, W), uint8 or float in [0, 1], and the way back to what they were."""
    if isinstance(image, Image.Image):
        if image.mode not in ("RGB", "L"):
            raise ValueError(f"A PIL image should be RGB, found mode {image.mode!r}: `image.convert('RGB')` makes one.")
        return functional.pil_to_tensor(image)[None], lambda batch: functional.to_pil_image(batch[0])
    if isinstance(image, np.ndarray):
        array = torch.from_numpy(np.ascontiguousarray(image).copy()).permute(2, 0, 1).contiguous()
        _check(array)
        return array[None], lambda batch: batch[0].permute(1, 2, 0).contiguous().numpy()
    _check(image)
    plain = image.as_subclass(Tensor)
    return plain.reshape(-1, *plain.shape[-3:]), lambda batch: tv_tensors.wrap(batch.reshape(image.shape), like=image)


def _check(image: Tensor) -> None:
    if image.ndim < 3 or not image.numel() or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise ValueError(
            f"An image should be (..., C, H, W), uint8 or float in [0, 1], found {image.dtype} of shape "
            f"{tuple(image.shape)}."
        )
