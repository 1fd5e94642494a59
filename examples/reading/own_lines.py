"""Your own lines of text: a folder of images and a file that says what is written in each."""

import csv
import hashlib
import itertools
import logging
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common.data.folder import UNREADABLE, read_image
from examples.common.data.words import HEIGHT, Split
from examples.common.engine.reading import as_compared

logger = logging.getLogger(__name__)

LABELS = ("labels.csv", "labels.txt")
LEAST: dict[Split, int] = {"train": 16, "test": 8}

Lines = tuple[Tensor, list[str]]
"""Images (N, 3, H, W) in [0, 1] and their texts."""


def own_lines(
    folder: Path, characters: Collection[str], *, longest: int = 640, multiple: int = 4
) -> dict[Split, Lines]:
    """The lines of a folder, gray, 64 high, for training and for test; a fifth of the texts belongs to the test.

    All have the width of the widest: others repeat their last column, as EasyOCR has it. A file that cannot be read is
    named in a warning and left out, and so is a line that is wider than ``longest`` or has more letters than the reader
    has time steps for.

    Args:
        folder: of images, with ``labels.csv`` (a first row ``filename,words``, as EasyOCR's trainer has it) or
            ``labels.txt`` (file name, tab, text).
        characters: which the reader can read.
        longest: the largest width in pixels, at a height of 64.
        multiple: by which the width can be divided.

    Raises:
        ValueError: Without such a folder or file, for a file without labels, a label without a text or with characters
            that the reader does not have, and where too few lines are left.
    """
    found: dict[Split, Lines] = {}
    images, texts = [], []
    for name, text in read_labels(folder, characters).items():
        image = _read(folder, name, text, longest)
        if image is not None:
            images.append(image)
            texts.append(text)
    width = max([multiple, *(image.shape[2] for image in images)])
    width += -width % multiple
    same = [F.pad(image, (0, width - image.shape[2], 0, 0), mode="replicate") for image in images]
    for split, least in LEAST.items():
        chosen = [i for i, text in enumerate(texts) if _split(text) == split]
        if len(chosen) < least:
            raise ValueError(
                f"{folder} should have at least {least} lines for the {split} (a text belongs to one of both, one in "
                f"five to the test), found {len(chosen)} of {len(texts)} that can be used."
            )
        found[split] = torch.stack([same[i] for i in chosen]).expand(-1, 3, -1, -1), [texts[i] for i in chosen]
    return found


def _split(text: str) -> Split:
    return "test" if hashlib.md5(as_compared(text).encode()).digest()[0] % 5 == 0 else "train"


def read_labels(folder: Path, characters: Collection[str]) -> dict[str, str]:
    """The text of each image file, as the folder's file of labels has it.

    Raises:
        ValueError: As :func:`own_lines`.
    """
    path = next((folder / name for name in LABELS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"There should be a file {' or '.join(LABELS)} in a folder of lines, found none in {folder}.")
    tabs = path.suffix == ".txt"
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [
            row
            for row in csv.reader(
                file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
            )
            if row
        ]
    if not tabs and rows[:1] == [["filename", "words"]]:
        del rows[0]
    if not rows:
        raise ValueError(f"{path} should have a line for each image, found none.")
    labels = {}
    for row in rows:
        if len(row) != 2 or not row[1].strip():
            raise ValueError(f"{path} should have a file name and a text in each line, found {row}.")
        if unknown := sorted(set(row[1]) - set(characters)):
            raise ValueError(
                f"{path} should have texts that the reader can read, found {unknown} in {row[1]!r}, {row[0]}."
            )
        labels[row[0]] = row[1]
    return labels


def _read(folder: Path, name: str, text: str, longest: int) -> Tensor | None:
    """A line, (1, 64, W), or None where it is named as skipped."""
    try:
        gray = read_image(folder / name).mean(dim=0)[None, None]
    except UNREADABLE as error:
        logger.warning("%s skipped: %s", name, error)
        return None
    width = max(1, round(gray.shape[3] * HEIGHT / gray.shape[2]))
    if width > longest:
        logger.warning("%s skipped: %d pixels wide at a height of %d, at most %d wanted", name, width, HEIGHT, longest)
        return None
    steps, wanted = width // 4 - 1, len(text) + sum(a == b for a, b in itertools.pairwise(text))
    if wanted > steps:
        logger.warning("%s skipped: %r wants %d time steps of the reader, its width has %d", name, text, wanted, steps)
        return None
    return F.interpolate(gray, size=(HEIGHT, width), mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
