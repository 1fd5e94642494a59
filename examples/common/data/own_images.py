"""Labeled images of one's own: a folder for each class, or a file of labels."""

from pathlib import Path

from examples.common.data.datasets import FolderData, Split, classification_transform, existing_files, label_of
from examples.common.data.folder import image_files

ENDINGS = (".txt", ".csv", ".tsv")


def class_folders(root: Path, split: Split, *, size: int = 224) -> FolderData:
    """A folder of images for each class: ``root/train/CLASS/...`` and ``root/test/CLASS/...`` (or ``val``).

    Without these every tenth image of ``root/CLASS/...`` is for the test. Images are prepared as those of CUB.

    Raises:
        ValueError: If there is no folder, fewer than two classes, or a class of the test that was not trained.
    """
    if not root.is_dir():
        raise ValueError(f"`root` should be a folder with a folder of images for each class, found {root}.")
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    apart = (root / "train").is_dir() and bool(tests)
    base = root / "train" if apart else root
    names = sorted(path.name for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"`root` should hold folders of at least two classes, found {names} in {base}.")
    of = tests[0] if apart and split == "test" else base
    if unknown := sorted(path.name for path in of.iterdir() if path.is_dir() and path.name not in names):
        raise ValueError(f"{of} should hold classes of {base}, found {unknown[0]!r}.")
    samples: list[tuple[Path, int | Path]] = []
    for label, name in enumerate(names):
        files = image_files(of / name) if (of / name).is_dir() else []
        if not apart:
            files = [file for n, file in enumerate(files) if (n % 10 == 0) == (split == "test")]
        samples += [(file, label) for file in files]
    return _classified(samples, names, split, size, of)


def label_file(root: Path, split: Split, *, size: int = 224) -> FolderData:
    """A file with an image and its class in each line: ``train.txt`` and ``test.txt`` (or ``.csv``), or ``labels.txt``.

    The two are separated by a tab, else by the last comma, else by the last space, so that names of images may have
    spaces. Paths are relative to ``root``; ``labels.txt`` alone gives every tenth line to the test. A first line that
    names no file is a heading. Images that are not there are named and left out.

    Raises:
        ValueError: If there is no such file, a line has no class, a class of the test was not trained, or nothing that
            the file lists is there.
    """
    names = ("train", "labels") if split == "train" else ("test", "labels")
    tries = [root / f"{name}{ending}" for name in names for ending in ENDINGS]
    file = next((path for path in tries if path.is_file()), None)
    if file is None:
        raise ValueError(f"`root` should hold train.txt and test.txt, or labels.txt, found none in {root}.")
    rows = known = _rows(file, root)
    if file.stem == "labels":
        rows = [row for n, row in enumerate(rows) if (n % 10 == 0) == (split == "test")]
    elif split == "test":  # the classes are those of the training, where that is there
        known = next((_rows(path, root) for e in ENDINGS if (path := root / f"train{e}").is_file()), rows)
    classes = sorted({name for _, name in known}, key=lambda name: (not name.isdigit(), name.zfill(9)))
    if unknown := sorted({name for _, name in rows} - set(classes)):
        raise ValueError(f"{file} should hold classes of the training, found {unknown[0]!r}.")
    samples = existing_files([(path, classes.index(name)) for path, name in rows], split, file)
    return _classified(samples, classes, split, size, file)


def _rows(file: Path, root: Path) -> list[tuple[Path, str]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        separator = next((sign for sign in "\t," if sign in line), None)
        parts = line.strip().rsplit(separator, 1)
        if len(parts) != 2 or not parts[1].strip():
            raise ValueError(f"{file}, line {number}: expected an image and its class, found {line!r}.")
        path = root / parts[0].strip()
        if number == 1 and not path.suffix:
            continue
        rows.append((path, parts[1].strip()))
    return rows


def _classified(
    samples: list[tuple[Path, int | Path]], names: list[str], split: Split, size: int, place: Path
) -> FolderData:
    if not samples:
        raise ValueError(f"{place} should have images to {split} with, found none.")
    return FolderData("classification", names, samples, label_of, classification_transform(split == "train", size))
