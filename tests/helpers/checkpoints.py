"""Files of weights for the tests of load_prior."""

from typing import Any

import torch

from restoreloss import Denoiser
from tests.helpers.adm import ADM

NOISY, T = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 900])


def adm(**options: Any) -> ADM:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return ADM(**options).eval()


def denoiser(prior: Any) -> Denoiser:
    assert isinstance(prior, Denoiser)
    return prior
