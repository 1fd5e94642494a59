"""How a fine-tuned network is tested: its experts as they were trained, the mean over flips, the figures of a pair."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def experts(settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the experts of a finished run: of "paper" each t* of the run has a router."""
    return {
        "moe": settings["moe"], "experts": settings["experts"], "form": settings["experts_form"],
        "timesteps": sorted({int(t) for key, t in results.items() if key.startswith("t_")}) or 50,
    }  # fmt: skip


def over_flips(restore: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """The mean of what is restored of an image and of its three flips."""
    turned = [(), (2,), (3,), (2, 3)]
    return torch.stack([restore(image.flip(dims)).flip(dims) for dims in turned]).mean(dim=0)


def figures(restored: Tensor, clean: Tensor) -> tuple[float, float]:
    """PSNR and SSIM."""
    ssim: Any = structural_similarity_index_measure(restored, clean, data_range=1.0)
    return float(peak_signal_noise_ratio(restored, clean, data_range=1.0)), float(ssim)
