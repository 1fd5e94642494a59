"""Seeds of several numbers."""

import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """A seed from several numbers; neighboring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seeded(*numbers: int) -> torch.Generator:
    """A generator with that seed."""
    return torch.Generator().manual_seed(derive_seed(*numbers))
