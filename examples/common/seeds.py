"""Seeds of several numbers."""

import numpy as np


def derive_seed(*numbers: int) -> int:
    """One seed of several numbers, which shares nothing with that of neighboring numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
