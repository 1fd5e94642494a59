"""CPU time of every corruption on an 8-bit image, and as a multiple of the package imagecorruptions where it is there.

    pip install imagecorruptions && python -m examples.benchmarks.corruptions_cost

The package is patched so that it runs on today's numpy, scikit-image and setuptools; its formulas stay as they are.
"""

import argparse
import functools
import importlib.resources
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import skimage.data
import skimage.filters
import torch
from PIL import Image

from restoreloss.integrations.imagecorruptions import corrupt, get_corruption_names


def package() -> Callable[..., Any] | None:
    """``imagecorruptions.corrupt``, or None where it is not installed."""
    resources = types.ModuleType("pkg_resources")
    resources.resource_filename = lambda name, file: str(  # type: ignore[attr-defined]
        importlib.resources.files(name.split(".")[0]) / file
    )
    sys.modules.setdefault("pkg_resources", resources)
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore[attr-defined]
    gaussian = skimage.filters.gaussian

    @functools.wraps(gaussian)
    def with_channels(image: Any, sigma: Any, *, multichannel: bool = False, **options: Any) -> Any:
        return gaussian(image, sigma, channel_axis=-1 if multichannel else None, **options)

    skimage.filters.gaussian = with_channels
    try:
        from imagecorruptions import corrupt as theirs
    except ImportError:
        return None
    finally:
        skimage.filters.gaussian = gaussian
    import cv2  # the package's own

    cv2.setNumThreads(1)
    found: Callable[..., Any] = theirs
    return found


def seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser("corruptions_cost", description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the image (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    image = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((args.size, args.size)))
    theirs = package()
    print(f"{'':<20}{'ms':>8}{'' if theirs is None else '  ours / imagecorruptions'}")
    ratios = []
    for name in get_corruption_names("common"):
        corrupt(image, 1, name)  # makes what is made once
        ours_seconds, their_seconds = 0.0, 0.0
        for severity in (1, 3, 5):
            ours, other = [], []
            for _ in range(args.repeats):  # in turns, as the machine is never quite at rest
                ours.append(seconds(functools.partial(corrupt, image, severity, name)))
                if theirs is not None:
                    other.append(seconds(functools.partial(theirs, image, severity, name)))
            ours_seconds += statistics.median(ours)
            their_seconds += statistics.median(other) if other else 0
        line = f"{name:<20}{1000 * ours_seconds / 3:>8.1f}"
        if theirs is not None:
            ratios.append(ours_seconds / their_seconds)
            line += f"{ratios[-1]:>10.2f}"
        print(line, flush=True)
    if ratios:
        print(f"geometric mean      {math.exp(statistics.fmean(map(math.log, ratios))):>18.2f}")


if __name__ == "__main__":
    main()
