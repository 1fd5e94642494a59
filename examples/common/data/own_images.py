"""Labeled images of one's own: a folder for each class, or a file of labels."""

from pathlib import Path

from examples.common.data.datasets import FolderData, Split, classification_transform, existing_files, label_of
from examples.common.data.folder import a_tenth, image_files

ENDINGS = (".txt", ".csv", ".tsv")
SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")
}  # fmt: skip
"""Names of the folders of a split, in any case."""


def class_folders(root: Path, split: Split, *, size: int = 224, whole: bool = False) -> FolderData:
    """A folder of images for each class: ``root/train/CLASS/...`` and ``root/test/CLASS/...`` (or ``val``).

    Of ``root/CLASS/...`` a tenth of each class is for the test. Images are prepared as those of CUB.

    Args:
        root: folder of the data set.
        split: "train" or "test".
        size: of the images.
        whole: give all images of folders that are not divided to the test, where nothing trains on them.

    Raises:
        ValueError: If there is no folder, fewer than two classes, a class without training images, or one of the test
            that was not trained.
    """
    if not root.is_dir():
        raise ValueError(f"`root` should be a folder with a folder of images for each class, found {root}.")
    folders = {path.name.lower(): path for path in _folders(root)}
    parts = {part: next((folders[name] for name in names if name in folders), None) for part, names in SPLITS.items()}
    divided = parts["train"] is not None and parts["test"] is not None
    if not divided and folders and all(name in (*SPLITS["train"], *SPLITS["test"]) for name in folders):
        if split == "train" or parts["test"] is None:
            raise ValueError(f"{root} should hold train/ and test/ (or val/), found {sorted(folders)}.")
        divided, parts["train"] = True, parts["test"]  # for an evaluation the test is enough
    base, of = (parts["train"], parts[split]) if divided else (root, root)
    assert base is not None
    assert of is not None
    names = [path.name for path in _folders(base)]
    if len(names) < 2:
        raise ValueError(f"`root` should hold folders of at least two classes, found {names} in {base}.")
    if unknown := [path.name for path in _folders(of) if path.name not in names]:
        raise ValueError(f"{of} should hold classes of {base}, found {unknown[0]!r}.")
    samples: list[tuple[Path, int | Path]] = []
    for label, name in enumerate(names):
        files = image_files(of / name) if (of / name).is_dir() else []
        if not divided and not whole:
            tested = a_tenth(files, root)
            files = [file for file in files if (file in tested) == (split == "test")]
        if split == "train" and not files:
            raise ValueError(f"{of} should hold training images of each class, found none of {name!r}.")
        samples += [(file, label) for file in files]
    return _classified(samples, names, split, size, of)


def label_file(root: Path, split: Split, *, size: int = 224, whole: bool = False) -> FolderData:
    """A file with an image and its class in each line: ``train.txt`` and ``test.txt`` (or ``.csv``), or ``labels.txt``.

    The two are separated by a tab, else by the last comma, else by the last space, so that names of images may have
    spaces. Paths are relative to ``root``; of ``labels.txt`` a tenth of each class is for the test. A first line that
    names no file is a heading. Images that are not there are named and left out.

    Args:
        root: folder of the data set.
        split: "train" or "test".
        size: of the images.
        whole: give all lines of ``labels.txt`` to the test, where nothing trains on them.

    Raises:
        ValueError: If there is no such file, or one beside ``labels.txt``, a line has no class, a class of the test was
            not trained, an image is in both files, or nothing that the file lists is there.
    """
    named = {name: [root / f"{name}{ending}" for ending in ENDINGS] for name in ("train", "test", "labels")}
    files = {name: next((path for path in paths if path.is_file()), None) for name, paths in named.items()}
    labels, file = files["labels"], files[split]
    if files["train"] is not None and files["test"] is not None:
        labels = None  # which may list the names of the classes
    elif labels is not None and (files["train"] is not None or files["test"] is not None):
        raise ValueError(
            f"`root` should hold train.txt and test.txt, or labels.txt, found one of two with it in {root}."
        )
    if labels is None and file is None:
        raise ValueError(f"`root` should hold {split}.txt, or labels.txt, found none in {root}.")
    if labels is not None:
        rows = known = _rows(labels, root)
        if not whole:
            each = {name: [path for path, other in rows if other == name] for name in {name for _, name in rows}}
            tested = {path for paths in each.values() for path in a_tenth(paths, root)}
            rows = [row for row in rows if (row[0] in tested) == (split == "test")]
        file = labels
    else:
        assert file is not None
        rows = _rows(file, root)
        known = rows if files["train"] is None else _rows(files["train"], root)
        both = {path for path, _ in rows} & {path for path, _ in known}
        if split == "test" and files["train"] is not None and both:
            raise ValueError(f"{file} should have no image of {files['train']}, found {min(both)}.")
    classes = sorted({name for _, name in known}, key=lambda name: (not name.isdigit(), name.zfill(9)))
    if unknown := sorted({name for _, name in rows} - set(classes)):
        raise ValueError(f"{file} should hold classes of the training, found {unknown[0]!r}.")
    samples = existing_files([(path, classes.index(name)) for path, name in rows], split, file)
    return _classified(samples, classes, split, size, file)


def _folders(root: Path) -> list[Path]:
    hidden = (".", "__")  # as macOS leaves them
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(hidden))


def _rows(file: Path, root: Path) -> list[tuple[Path, str]]:
    rows = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} should be text in UTF-8: {error}.") from error
    for number, line in enumerate(text.splitlines(), start=1):
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
