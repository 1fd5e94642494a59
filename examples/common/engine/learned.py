"""The folders that a run has learned from, itself and by the runs that it began with."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.common.engine.run_directory import settings_of

logger = logging.getLogger(__name__)

_RUNS = (
    "after", "prepared", "pretrained", "prior", "autoencoder", "pre", "s_weights", "h_weights", "foreign", "fixed_hr",
    "judge", "references", "judges",
)  # fmt: skip
"""Options that may name a run; ``prepared`` is a folder of several:"""
_PREPARED = ("prior", "pre", "*_hq", "*_judge")
_FOLDERS = ("root", "images", "lq", "gt", "of", "clean", "pairs", "data_sets")
"""Options that name folders of images, some as NAME:FOLDER."""


def has_learned_from(folder: Path, *runs: Mapping[str, Any] | None) -> bool:
    """Whether runs of these settings, or those that they began with, learned from images in, above or below a folder.

    A run whose settings are no longer found (None) may have. Where one folder contains the other, they may share
    images: a warning says so.
    """
    folder, met = folder.resolve(), set[Path]()
    waiting = [*runs]
    while waiting:
        settings = waiting.pop()
        if settings is None:
            return True
        for name in _FOLDERS:
            for value in _listed(settings.get(name)):
                seen = Path(value.rpartition(":")[2])
                if seen.is_absolute() and (folder.is_relative_to(seen) or seen.is_relative_to(folder)):
                    if seen != folder:
                        logger.warning("%s may hold images that were trained on: %s was learned from", folder, seen)
                    return True
        waiting += began_with(settings, met)
    return False


def began_with(settings: Mapping[str, Any], met: set[Path] | None = None) -> list[dict[str, Any] | None]:
    """The settings of the runs that a run began with; None of one that is no longer there.

    Weights from a file or a package have none.

    Args:
        settings: of the run.
        met: runs that are left out; those that are found are added.
    """
    found: list[dict[str, Any] | None] = []
    met = set() if met is None else met
    for name in _RUNS:
        for value in _listed(settings.get(name)):
            folder = Path(value)
            if name in ("after", "prepared", "pretrained") and not folder.is_dir():
                found.append(None)
            patterns = _PREPARED if name == "prepared" else ()
            for run in [part for pattern in patterns for part in sorted(folder.glob(pattern))] or [folder]:
                if (run / "config.yaml").is_file() and run.resolve() not in met:
                    met.add(run.resolve())
                    found.append(settings_of(run))
    return found


def _listed(value: Any) -> list[str]:
    """One value, or those of a list or a mapping; none of None."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return [str(one) for one in values if one is not None]
