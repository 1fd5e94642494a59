"""Pairs of degraded and clean files, by the layouts in which the paper's data sets are published.

========== ==================================================== =====================================================
layout     degraded                                             clean
========== ==================================================== =====================================================
gopro      ``train/*/blur/*``, ``test/*/blur/*``                ``sharp`` for ``blur``
reside6k   ``train/hazy/*``, ``test/hazy/*``                    ``GT`` for ``hazy``
lol        ``our485/low/*``, ``eval15/low/*``                   ``high`` for ``low``
raindrop   ``train/data/0_rain.png``, ``test_a/data/*``         ``train/gt/0_clean.png``
rain100h   ``train/rain/norain-1x2.png``, ``test/rain/*``       ``train/norain/norain-1.png``
srd        ``train/shadow/A.jpg``, ``test/shadow/*``            ``train/shadow_free/A_no_shadow.jpg``
snow100k   ``train/synthetic/*``, ``test/Snow100K-L/synthetic`` ``gt`` for ``synthetic``
cbsd68     made of the clean ones                               ``original_png/*`` (for train: ``train/*``)
celebahq   made of the clean ones                               ``train/*``, ``test/*``
clean      made of the clean ones                               ``train/*``, ``test/*``: DIV2K, LIVE1, your own
universal  ``train/NAME/LQ/*``, ``val/NAME/LQ/*``               ``GT`` for ``LQ``: all ten in one tree, as in DA-CLIP
========== ==================================================== =====================================================

The clean file of a degraded one is that of the very same name; else the one that differs in the suffix alone; else the
one that the layout calls differently (raindrop, rain100h, srd and, for the degradations of these, universal).
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from examples.common.data.folder import image_files

logger = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Patterns below the root, and how the clean files are found.

    Attributes:
        train: pattern of the degraded files, or of the clean ones where these are degraded here.
        test: likewise.
        degraded: name of the folder of degraded files.
        clean: name of the folder of clean files beside it.
        renamed: what the layout makes of the stem of a degraded file: patterns and the stems of its clean file.
    """

    train: str
    test: str
    degraded: str = ""
    clean: str = ""
    renamed: tuple[tuple[str, str], ...] = ()


_RAINDROP = ((r"(.+)_rain", r"\1_clean"),)
_RAIN100H = ((r"(?:no)?rain-(\d+)(?:x2)?", r"norain-\1"),)
_SRD = ((r"(.+)", r"\1_no_shadow"), (r"(.+)", r"\1_free"))
LAYOUTS: Mapping[str, Layout] = {
    "gopro": Layout("train/*/blur/*", "test/*/blur/*", "blur", "sharp"),
    "reside6k": Layout("train/hazy/*", "test/hazy/*", "hazy", "GT"),
    "lol": Layout("our485/low/*", "eval15/low/*", "low", "high"),
    "raindrop": Layout("train/data/*", "test_a/data/*", "data", "gt", _RAINDROP),
    "rain100h": Layout("train/rain/*", "test/rain/*", "rain", "norain", _RAIN100H),
    "srd": Layout("train/shadow/*", "test/shadow/*", "shadow", "shadow_free", _SRD),
    "snow100k": Layout("train/synthetic/*", "test/Snow100K-L/synthetic/*", "synthetic", "gt"),
    "cbsd68": Layout("train/*", "original_png/*"),
    "celebahq": Layout("train/*", "test/*"),
    "clean": Layout("train/*", "test/*"),
    "universal": Layout("train/{name}/LQ/*", "val/{name}/LQ/*", "LQ", "GT"),
}
_UNIVERSAL = {"raindrop": _RAINDROP, "rainy": _RAIN100H, "shadowed": _SRD}
"""The names of clean files in the data sets that went into "universal", by the name of the degradation."""


def pairs(layout: str, root: Path, split: str, name: str) -> list[tuple[Path | None, Path]]:
    """(degraded, clean) files; degraded is None where it is to be made of the clean one.

    A degraded image without a clean one is named in a warning and left out.

    Args:
        layout: a key of ``LAYOUTS``.
        root: of the data set.
        split: "train" or "test".
        name: of the degradation.

    Raises:
        ValueError: For an unknown layout, if there is no pair, and if one degraded file has two clean ones.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` should be one of {', '.join(LAYOUTS)}, found {layout!r}.")
    described = LAYOUTS[layout]
    pattern = (described.train if split == "train" else described.test).format(name=name)
    files = image_files(root, pattern)
    if not files:
        raise ValueError(f"{root} should hold images as {layout} lays them out, found none at {pattern}.")
    if not described.degraded:
        return [(None, path) for path in files]
    renamed = _UNIVERSAL.get(name, ()) if layout == "universal" else described.renamed
    folders = {path.parent: path.parent.parent / described.clean for path in files}
    sides = {folder: _Side(image_files(folder, "*")) for folder in dict.fromkeys(folders.values())}
    found: list[tuple[Path | None, Path]] = []
    for path in files:
        folder = folders[path.parent]
        clean = sides[folder].of(path, renamed)
        if clean is None:
            logger.warning("%s skipped: no clean image of it in %s", path, folder)
        else:
            found.append((path, clean))
    if not found:
        clean_files = [path for side in sides.values() for path in side.names.values()]
        example = f", such as {clean_files[0].relative_to(root)}" if clean_files else ""
        raise ValueError(
            f"{root} should hold pairs as {layout} names them, found {len(files)} degraded images at {pattern}, such "
            f"as {files[0].relative_to(root)}, and {len(clean_files)} clean ones in {described.clean}/{example}: no "
            "two of one name."
        )
    return found


class _Side:
    """The clean files of a folder."""

    def __init__(self, files: list[Path]) -> None:
        self.names = {path.name: path for path in files}
        self.stems: dict[str, list[Path]] = {}
        for path in files:
            self.stems.setdefault(path.stem, []).append(path)

    def of(self, degraded: Path, renamed: tuple[tuple[str, str], ...]) -> Path | None:
        """The file of the same name, of the same stem, or of a stem that the layout gives."""
        if degraded.name in self.names:
            return self.names[degraded.name]
        matches = [(re.fullmatch(pattern, degraded.stem), stem) for pattern, stem in renamed]
        for stem in (degraded.stem, *(match.expand(stem) for match, stem in matches if match)):
            found = self.stems.get(stem, [])
            if len(found) > 1:
                raise ValueError(f"{degraded} should have one clean image, found {found[0]} and {found[1]}.")
            if found:
                return found[0]
        return None
