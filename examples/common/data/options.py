"""Which images a recipe reads: DataOptions for labeled ones, PairOptions for degraded and clean ones."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.common.data.tasks import Task

Degradation = Literal["bicubic", "mixture_a", "mixture_b", "corruptions", "unseen_corruptions", "none"]
DataName = Literal[
    "generated", "photos", "words", "cub200", "cars", "voc2012", "cityscapes", "foggy_cityscapes", "acdc", "coco",
    "rtts", "class_folders", "label_file",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images, and their degradation.

    Attributes:
        task: what is read in the images.
        data: "generated", "photos" and, for reading, "words" are made on the spot; the others are read from ``root``:
            data sets as they are handed out, and your own images, a folder for each class ("class_folders") or lines of
            an image and its class ("label_file").
        root: folder of the data set on disk.
        data_sets: data of a task of its own, where a run has several tasks: NAME:ROOT by the task, or a NAME of those
            that are made on the spot; of the other tasks ``data`` and ``root``.
        lq: folder of degraded images of your own: each at the place below it, and of the size, that its clean image has
            below ``root``, under the same name, or a_LR.png for a_HR.png. They take the place of ``degradation``.
        size: side of the training images in pixels; the default is the data set's own.
        voc_scales: lowest and highest factor of the random scale of VOC's training images for segmentation; without it
            they are resized to one size, as in SR4IR.
        train_count: number of training images that are made on the spot.
        test_count: number of test images that are made on the spot.
        data_seed: seed of the images that are made on the spot; the default is ``seed``.
        contrast: lowest and highest amplitude of the textures of "generated".
        degradation: "bicubic" reduction by ``scale``, or what keeps the size: "mixture_a" and "mixture_b" of EDTR,
            "corruptions", which are one of the 15 of ImageNet-C at random for each image, or "unseen_corruptions", one
            of the four that it keeps for validation; "none" for images that are foggy or hazy as they are.
        scale: scale of the super-resolution.
        blur: standard deviation of a Gaussian blur before a bicubic reduction (SR4IR, Table S5).
        noise: standard deviation of Gaussian noise after a bicubic reduction, in 1/255.
        jpeg: quality of a JPEG compression at last, of a bicubic reduction; the default is none.
        mixture_extent: extent of the mixtures' blur and reduction, as a fraction of what the paper does to 512 pixels.
        severities: severities of the corruptions, any of 1 to 5.
        severity_weights: weight of each of ``severities``; the default is the same for all. UniRestore's code has 5,
            25, 40, 25, 5.
        clean_too: "clean" is one more corruption, which leaves an image as it is; UniRestore's code has it, and its
            recipe in training alone.
        corruption_side: (lowest, highest) of a reduced shorter side at which an image is corrupted; (128, 512) in
            UniRestore's code.
        corruption_extent: lengths of the corruptions, as a fraction of those for images of 224 pixels.
    """

    task: Task = "classification"
    data: DataName = "generated"
    root: Path | None = None
    data_sets: dict[str, str] = field(default_factory=dict)
    lq: Path | None = None
    size: int | None = None
    voc_scales: tuple[float, float] | None = None
    train_count: int = 1500
    test_count: int = 1000
    data_seed: int | None = None
    contrast: tuple[float, float] = (0.035, 0.1)
    degradation: Degradation = "bicubic"
    scale: int = 4
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int | None = None
    mixture_extent: float = 1.0
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    severity_weights: list[float] | None = None
    clean_too: bool = False
    corruption_side: tuple[int, int] | None = None
    corruption_extent: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """The pairs of degraded and clean images.

    Attributes:
        degradations: degradations to restore, of examples/common/data/degradations.py; a name of your own for ``lq``.
        data: "photos" are available without a download; "folders" are read from disk.
        pairs: for "folders", where the pairs of each degradation are, as LAYOUT:ROOT by its name; layouts are in
            examples/common/data/pair_folders.py.
        shifted_pairs: likewise, other data to test on: REVIDE, Rain100H, ...
        patch: side of the training crops.
        train_count: crops in an epoch of "photos".
        test_size: side of the test images of "photos".
        test_count: number of test images of each degradation; the default is 24 photographs, and all files of folders.
        lq: folder of degraded images of your own, for the first of ``degradations``; ``data`` is then "folders".
        gt: folder of their clean images.
        test_lq: likewise for the test; the default is a tenth of the pairs of ``lq``.
        test_gt: folder of their clean images.
        tile: side of the tiles that larger test images are restored in; 0 restores them whole.
    """

    degradations: list[str] = field(default_factory=lambda: ["rainy"])
    data: Literal["photos", "folders"] = "photos"
    pairs: dict[str, str] = field(default_factory=dict)
    shifted_pairs: dict[str, str] = field(default_factory=dict)
    patch: int = 48
    train_count: int = 4096
    test_size: int = 96
    test_count: int | None = None
    lq: Path | None = None
    gt: Path | None = None
    test_lq: Path | None = None
    test_gt: Path | None = None
    tile: int = 512
