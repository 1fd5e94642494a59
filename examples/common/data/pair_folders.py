"""Pairs of degraded and clean files, by the layouts in which the papers' data sets are published.

=============== ================================================ ===================================================
layout          degraded                                         clean
=============== ================================================ ===================================================
gopro           ``train/*/blur/*``, ``test/*/blur/*``            ``sharp`` for ``blur``
reside          ``ITS/hazy/1_1_0.9.png``, ``SOTS/*/hazy/*``      ``ITS/clear/1.png``, ``gt`` for ``hazy``
reside6k        ``train/hazy/*``, ``test/hazy/*``                ``GT`` for ``hazy``
dense_haze      ``hazy/01_hazy.png``; 51 to 55 are the test      ``GT/01_GT.png``
revide          ``Train/hazy/VIDEO/*``, ``Test/hazy/VIDEO/*``    ``gt`` for ``hazy``
lol             ``our485/low/*``, ``eval15/low/*``               ``high`` for ``low``
lol_v2          ``Real_captured/Train/Low/low1.png``, ``Test``   ``Normal/normal1.png``
lol_v2_made     ``Synthetic/Train/Low/*``, ``Synthetic/Test/..`` ``Normal`` for ``Low``
raindrop        ``train/data/0_rain.png``, ``test_a/data/*``     ``train/gt/0_clean.png``
rain100h        ``train/rain/norain-1x2.png``, ``test/rain/*``   ``train/norain/norain-1.png``
rain13k         ``train/Rain13K/input/*``, ``test/*/input/*``    ``target`` for ``input``
srd             ``train/shadow/A.jpg``, ``test/shadow/*``        ``train/shadow_free/A_no_shadow.jpg``
snow100k        ``train/synthetic/*``, ``test/Snow100K-L/..``    ``gt`` for ``synthetic``
realsnow        ``train*/input/*``, ``test*/input/*``            ``gt``, ``GT`` or ``target`` for ``input``
uhdsnow         the same                                         the same
cbsd68          made of the clean ones                           ``original_png/*`` (for train: ``train/*``)
celebahq        made of the clean ones                           ``train/*``, ``test/*``
div2k           made of the clean ones                           ``DIV2K_train_HR/*``, ``DIV2K_valid_HR/*``
clean           made of the clean ones                           ``train/*``, ``test/*``: LIVE1, your own
universal       ``train/NAME/LQ/*``, ``val/NAME/LQ/*``           ``GT`` for ``LQ``: all in one tree; NAME as in DA-CLIP
=============== ================================================ ===================================================

The clean file of a degraded one is that of the very same name; else the one that differs in the suffix alone; else the
one that the layout calls differently. :func:`own_pairs` reads two folders of one's own.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.common.data.folder import image_files

logger = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Patterns below the root, and how the clean files are found.

    Attributes:
        train: patterns of the degraded files, or of the clean ones where these are degraded here.
        test: likewise.
        degraded: name of the folder of degraded files.
        clean: names that the folder of clean files may have in its place.
        renamed: what the layout makes of the stem of a degraded file: patterns and the stems of its clean file.
        kept: patterns of the stems of the training and of the test files, where they lie in one folder.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    degraded: str = ""
    clean: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, str] = (".*", ".*")


_RAINDROP = ((r"(.+)_rain", r"\1_clean"),)
_RAIN100H = ((r"(?:no)?rain-(\d+)(?:x2)?", r"norain-\1"),)
_SRD = ((r"(.+)", r"\1_no_shadow"), (r"(.+)", r"\1_free"))
_SNOW = Layout(("train*/input/*",), ("test*/input/*",), "input", ("gt", "GT", "target"))
LAYOUTS: Mapping[str, Layout] = {
    "gopro": Layout(("train/*/blur/*",), ("test/*/blur/*",), "blur", ("sharp",)),
    "reside": Layout(
        ("ITS/hazy/*", "OTS/hazy/*"), ("SOTS/hazy/*", "SOTS/*/hazy/*"), "hazy", ("clear", "gt"),
        ((r"(\d+)_.+", r"\1"),),
    ),
    "reside6k": Layout(("train/hazy/*",), ("test/hazy/*",), "hazy", ("GT",)),
    "dense_haze": Layout(
        ("hazy/*",), ("hazy/*",), "hazy", ("GT",), ((r"(\d+)_hazy", r"\1_GT"),), ("(?!5[1-5]_).*", "5[1-5]_.*")
    ),
    "revide": Layout(("Train/hazy/*/*",), ("Test/hazy/*/*",), "hazy", ("gt",)),
    "lol": Layout(("our485/low/*",), ("eval15/low/*",), "low", ("high",)),
    "lol_v2": Layout(
        ("Real_captured/Train/Low/*",), ("Real_captured/Test/Low/*",), "Low", ("Normal",), ((r"low(.+)", r"normal\1"),)
    ),
    "lol_v2_made": Layout(("Synthetic/Train/Low/*",), ("Synthetic/Test/Low/*",), "Low", ("Normal",)),
    "raindrop": Layout(("train/data/*",), ("test_a/data/*",), "data", ("gt",), _RAINDROP),
    "rain100h": Layout(("train/rain/*",), ("test/rain/*",), "rain", ("norain",), _RAIN100H),
    "rain13k": Layout(("train/Rain13K/input/*", "train/input/*"), ("test/*/input/*",), "input", ("target",)),
    "srd": Layout(("train/shadow/*",), ("test/shadow/*",), "shadow", ("shadow_free",), _SRD),
    "snow100k": Layout(("train/synthetic/*",), ("test/Snow100K-L/synthetic/*",), "synthetic", ("gt",)),
    "realsnow": _SNOW,
    "uhdsnow": _SNOW,
    "cbsd68": Layout(("train/*",), ("original_png/*",)),
    "celebahq": Layout(("train/*",), ("test/*",)),
    "div2k": Layout(
        ("DIV2K_train_HR/*", "DIV2K_train_HR/DIV2K_train_HR/*"),
        ("DIV2K_valid_HR/*", "DIV2K_valid_HR/DIV2K_valid_HR/*"),
    ),
    "clean": Layout(("train/*",), ("test/*",)),
    "universal": Layout(("train/{name}/LQ/*",), ("val/{name}/LQ/*",), "LQ", ("GT",)),
}  # fmt: skip
_UNIVERSAL = {"raindrop": _RAINDROP, "rainy": _RAIN100H, "shadowed": _SRD}
"""The names of clean files in the data sets that went into "universal", by the name of the degradation."""
_FOLDERS = {"blurry": "motion-blurry", "inpainting": "uncompleted", "jpeg": "jpeg-compressed", "low_light": "low-light"}
"""What DA-CLIP calls the degradations, where that is another name."""
_SUFFIXES = r"(?:[-_]?(?:lq|lr|gt|hq|hr|input|target|degraded|clean|low|high|x[2348]))+"
"""What the names of one's own pairs may end in."""
_DEGRADED, _CLEAN = "lq|lr|input|degraded|low", "gt|hq|hr|target|clean|high"


def pairs(layout: str, root: Path, split: str, name: str) -> list[tuple[Path | None, Path]]:
    """(degraded, clean) files; degraded is None where it is to be made of the clean one.

    Degraded images without a clean one are left out, with a warning.

    Args:
        layout: a key of ``LAYOUTS``.
        root: of the data set; of DIV2K also the folder of its training images.
        split: "train" or "test".
        name: of the degradation.

    Raises:
        ValueError: For an unknown layout, if there is no pair, and if one degraded file has two clean ones.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` should be one of {', '.join(LAYOUTS)}, found {layout!r}.")
    described = LAYOUTS[layout]
    if any(pattern.startswith(f"{root.name}/") for pattern in described.train) and layout == "div2k":
        root = root.parent
    undivided = layout == "div2k" and not (root / "DIV2K_valid_HR").is_dir()
    of_split = described.train if split == "train" or undivided else described.test
    folders_of = (name, _FOLDERS.get(name, name))
    patterns = [*dict.fromkeys(pattern.format(name=folder) for pattern in of_split for folder in folders_of)]
    kept = described.kept[split != "train"]
    files = [path for pattern in patterns for path in image_files(root, pattern) if re.fullmatch(kept, path.stem)]
    if undivided:
        logger.warning("%s has no DIV2K_valid_HR: every tenth image is for the test, the others for training", root)
        files = [file for number, file in enumerate(files) if (number % 10 == 0) == (split == "test")]
    at = " or ".join(patterns)
    if not files:
        raise ValueError(f"{root} should hold images as {layout} lays them out, found none at {at}.")
    if not described.degraded:
        return [(None, path) for path in files]
    renamed = _UNIVERSAL.get(name, ()) if layout == "universal" else described.renamed
    folders = {path.parent: _clean_folder(path.parent, root, described) for path in files}
    sides = {folder: _Side(image_files(folder, "*")) for folder in dict.fromkeys(folders.values())}
    found = _partners((path, sides[folders[path.parent]].of(path, renamed)) for path in files)
    if not found:
        clean_files = [path for side in sides.values() for path in side.names.values()]
        example = f", such as {clean_files[0].relative_to(root)}" if clean_files else ""
        raise ValueError(
            f"{root} should hold pairs as {layout} names them, found {len(files)} degraded images at {at}, such as "
            f"{files[0].relative_to(root)}, and {len(clean_files)} clean ones in {'/ or '.join(described.clean)}/"
            f"{example}: no two of one name."
        )
    return found


def own_pairs(lq: Path, gt: Path) -> list[tuple[Path | None, Path]]:
    """(degraded, clean) files of two folders of one's own, with the same folders below them.

    The clean file has the name of the degraded one, up to its suffix; or both begin alike and end in what says which
    they are: ``a_LR.png`` and ``a_HR.png``, ``0001x4.png`` and ``0001.png``. A warning counts those without.

    Raises:
        ValueError: If there is no such folder, or no pair.
    """
    for option, folder in (("lq", lq), ("gt", gt)):
        if not folder.is_dir():
            raise ValueError(f"`{option}` should be a folder of images, found {folder}.")
    if lq.resolve() == gt.resolve():
        raise ValueError(f"`lq` should hold the degraded images of those in `gt`, found {lq} for both.")
    sides: dict[Path, _Side] = {}
    for path in image_files(gt):
        sides.setdefault(path.parent.relative_to(gt), _Side([])).add(path)
    files = image_files(lq)
    if not files:
        raise ValueError(f"`lq` should hold images, found none in {lq}.")
    empty = _Side([])
    found = _partners((path, sides.get(path.parent.relative_to(lq), empty).of(path, (), own=True)) for path in files)
    if not found:
        raise ValueError(f"`gt` should hold a clean image for those in {lq}, found none of {len(files)} in {gt}.")
    _check_names(found, lq, gt)
    return found


def _partners(tried: Iterable[tuple[Path, Path | None]]) -> list[tuple[Path | None, Path]]:
    """The degraded images that have a clean one, with it; the others are counted in a warning."""
    every = [*tried]
    if missing := [path for path, clean in every if clean is None]:
        logger.warning("Degraded images without a clean one: %d of %d, %s first", len(missing), len(every), missing[0])
    return [(path, clean) for path, clean in every if clean is not None]


def _check_names(found: Sequence[tuple[Path | None, Path]], lq: Path, gt: Path) -> None:
    """Raise ``ValueError`` where all names of files, or those of the folders, say that the two are exchanged."""
    named = [(path, clean) for path, clean in found if path is not None]
    told = (_says(f"_{lq.name}", _CLEAN), _says(f"_{gt.name}", _DEGRADED))
    if all(told) or all(_says(path.stem, _CLEAN) and _says(clean.stem, _DEGRADED) for path, clean in named):
        raise ValueError(f"The degraded images should be the first of a pair, found {named[0][0]} for {named[0][1]}.")
    if any(told):
        logger.warning("%s is taken for the degraded images of %s: are the two exchanged?", lq, gt)


def _says(name: str, words: str) -> bool:
    return re.search(rf"[-_]({words})$", name, re.IGNORECASE) is not None


def degraded_files(clean: Sequence[Path], root: Path, lq: Path, *, option: str = "lq") -> dict[Path, Path]:
    """The degraded file of each clean one: at the same place below ``lq`` as that below ``root``, named as in
    :func:`own_pairs`. Of clean files that have none the number and the first are told in a warning.

    Raises:
        ValueError: If there is no such folder, no pair, a degraded file of two clean ones, or names that say that the
            folders are exchanged.
    """
    if not lq.is_dir():
        raise ValueError(f"`{option}` should be a folder of images, found {lq}.")
    sides: dict[Path, _Side] = {}
    for path in image_files(lq):
        sides.setdefault(path.parent.relative_to(lq), _Side([])).add(path)
    below = [path for path in clean if path.is_relative_to(root)]
    tried = [(path, sides.get(path.parent.relative_to(root), _Side([])).of(path, (), own=True)) for path in below]
    found = {path: degraded for path, degraded in tried if degraded is not None}
    if not found:
        raise ValueError(
            f"`{option}` should hold degraded images of those in {root}, found none of {len(clean)} in {lq}."
        )
    of: dict[Path, Path] = {}
    for path, degraded in found.items():
        if (other := of.setdefault(degraded, path)) != path:
            raise ValueError(f"{degraded} should be of one clean image, found {other} and {path}.")
    _check_names([(degraded, path) for path, degraded in found.items()], lq, root)
    outside = [path for path in clean if not path.is_relative_to(root)]
    if missing := [*outside, *(path for path, degraded in tried if degraded is None)]:
        logger.warning("%d images skipped, %s first: no degraded image in %s", len(missing), missing[0], lq)
    return found


def _clean_folder(folder: Path, root: Path, described: Layout) -> Path:
    """The folder of the clean files: that of the degraded ones under another name."""
    parts = list(folder.relative_to(root).parts)
    place = len(parts) - 1 - parts[::-1].index(described.degraded)
    candidates = [root.joinpath(*parts[:place], name, *parts[place + 1 :]) for name in described.clean]
    return next((candidate for candidate in candidates if candidate.is_dir()), candidates[0])


class _Side:
    """The clean files of a folder."""

    def __init__(self, files: list[Path]) -> None:
        self.names: dict[str, Path] = {}
        self.stems: dict[str, list[Path]] = {}
        self.roots: dict[str, list[Path]] = {}
        for path in files:
            self.add(path)

    def add(self, path: Path) -> None:
        """One more file."""
        self.names[path.name] = path
        self.stems.setdefault(path.stem, []).append(path)
        self.roots.setdefault(_without_suffix(path.stem), []).append(path)

    def of(self, degraded: Path, renamed: tuple[tuple[str, str], ...], *, own: bool = False) -> Path | None:
        """The file of the same name, of the same stem, or of a stem that the layout gives; with ``own`` also one that
        begins alike.
        """
        if degraded.name in self.names:
            return self.names[degraded.name]
        matches = [(re.fullmatch(pattern, degraded.stem), stem) for pattern, stem in renamed]
        tries = [
            self.stems.get(stem, [])
            for stem in (degraded.stem, *(match.expand(stem) for match, stem in matches if match))
        ]
        if own:
            tries.append(self.roots.get(_without_suffix(degraded.stem), []))
        for found in tries:
            if len(found) > 1:
                raise ValueError(f"{degraded} should have one partner, found {found[0]} and {found[1]}.")
            if found:
                return found[0]
        return None


def _without_suffix(stem: str) -> str:
    """A stem without what says which of a pair it is."""
    match = re.fullmatch(rf"(.+?){_SUFFIXES}", stem, re.IGNORECASE)
    return match.group(1).lower() if match else stem.lower()
