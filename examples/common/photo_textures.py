"""Which real pictures test recognition, without a download?

Patches of the photographs that come with scikit-image and scikit-learn, grey and of equal mean and contrast, so that
only texture tells them apart. The class is the photograph. One side of each photograph is for training, the other for
testing, and the strip between them is left out. Only photographs that ``photos.HELD_OUT`` does not name are used.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from examples.common.photos import load_photo, pyramid
from examples.common.tasks import InMemory, Task

Split = Literal["train", "test"]
Floats = NDArray[np.floating[Any]]

WINDOWS = {
    # name: (scale, top, bottom, left, right, "x" | "y" the axis that is cut)
    "brick": (1.0, 0, 512, 0, 512, "x"),
    "grass": (1.0, 0, 512, 0, 512, "x"),
    "gravel": (1.0, 0, 512, 0, 512, "x"),
    "immunohistochemistry": (1.0, 0, 512, 0, 512, "x"),
    "hubble_deep_field": (0.5, 0, 872, 0, 1000, "x"),
    "coins": (1.0, 0, 303, 0, 384, "x"),
    "motorcycle_left": (1.0, 100, 400, 0, 741, "x"),
    "china": (1.0, 80, 427, 150, 480, "x"),
    "retina": (0.5, 200, 1200, 200, 1200, "x"),
    "flower": (0.75, 100, 350, 190, 450, "x"),
    "astronaut": (1.0, 0, 512, 0, 512, "x"),
    "moon": (1.0, 0, 512, 0, 512, "x"),
}
