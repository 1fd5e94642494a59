"""How do the paper's data sets lie on disk? Pairs of degraded and clean files, by the layouts they are published in.

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
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")


class Layout(NamedTuple):
    """Patterns below the root, and what turns a degraded folder's name into that of the clean one."""

    train: str
    test: str
    degraded: str = ""
    clean: str = ""


LAYOUTS: Mapping[str, Layout] = {
    "gopro": Layout("train/*/blur/*", "test/*/blur/*", "blur", "sharp"),
    "reside6k": Layout("train/hazy/*", "test/hazy/*", "hazy", "GT"),
    "lol": Layout("our485/low/*", "eval15/low/*", "low", "high"),
    "raindrop": Layout("train/data/*", "test_a/data/*", "data", "gt"),
    "rain100h": Layout("train/rain/*", "test/rain/*", "rain", "norain"),
    "srd": Layout("train/shadow/*", "test/shadow/*", "shadow", "shadow_free"),
    "snow100k": Layout("train/synthetic/*", "test/Snow100K-L/synthetic/*", "synthetic", "gt"),
    "cbsd68": Layout("train/*", "original_png/*"),
    "celebahq": Layout("train/*", "test/*"),
    "clean": Layout("train/*", "test/*"),
    "universal": Layout("train/{name}/LQ/*", "val/{name}/LQ/*", "LQ", "GT"),
}


def pairs(layout: str, root: Path, split: str, name: str) -> list[tuple[Path | None, Path]]:
    """(degraded, clean) files; degraded is None where it is to be made of the clean one.

    A degraded picture without a clean one is named in a warning and left out.

    Args:
        layout: a key of ``LAYOUTS``.
        root: of the data set.
        split: "train" or "test".
        name: of the degradation.

    Raises:
        ValueError: For an unknown layout, or if there is no pair.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` should be one of {', '.join(LAYOUTS)}, found {layout!r}.")
    described = LAYOUTS[layout]
    pattern = (described.train if split == "train" else described.test).format(name=name)
    files = [path for path in sorted(root.glob(pattern)) if path.suffix.lower() in PICTURES]
    if not described.degraded:
        found: list[tuple[Path | None, Path]] = [(None, path) for path in files]
    else:
        found, known = [], {}
        for path in files:
            folder = path.parent.parent / described.clean
            if folder not in known:
                known[folder] = _by_key(folder)
            clean = known[folder].get(_key(path))
            if clean is None:
                logger.warning("%s skipped: no clean picture of it in %s", path, folder)
            else:
                found.append((path, clean))
    if not found:
        raise ValueError(f"{root} should hold pictures as {layout} lays them out, found none at {pattern}.")
    return found


def _by_key(folder: Path) -> dict[str, Path]:
    return {_key(path): path for path in sorted(folder.glob("*")) if path.suffix.lower() in PICTURES}


def _key(path: Path) -> str:
    """What a picture and its pair have in common: the name without what says which of the two it is."""
    return re.sub(r"(^(no)?rain-|_(rain|clean|no_shadow|free)$|(?<=\d)x2$)", "", path.stem.removesuffix("x2"))
