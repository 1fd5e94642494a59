"""A detector of YOLO's kind reads the images: it wants [0, 1] as they are, sides of 32, and is a list of layers.

ultralytics' own networks are of this form: `YOLO("yolo11n.pt").model`, whose layers are `model.0` ... `model.23`. Their
license is AGPL-3.0, and ours does not depend on them.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from restoreloss import TDPLoss


class Layers(nn.Module):
    """Layers in a row under the name `model`, of which the last one reads several of those before it."""

    def __init__(self):
        super().__init__()
        widths = [3, 8, 16, 32, 32, 32]
        rows = [
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.SiLU(inplace=True))
            for i, o in itertools.pairwise(widths)
        ]
        self.model = nn.ModuleList([*rows, nn.ModuleList([nn.Conv2d(32, 64, 1) for _ in range(3)])])

    def forward(self, images):
        seen, found = images, []
        for number, row in enumerate(list(self.model)[:-1]):
            seen = row(seen)
            found += [seen] if number >= 2 else []
        return [head(one) for head, one in zip(self.model[-1], found, strict=True)]


def to_detector(images):
    """No normalization; sides that 32 divides, filled with the gray of its own letterbox."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % 32, 0, -height % 32), value=114 / 255)


detector = Layers().eval()  # yours
loss = TDPLoss(detector, ["model.2", "model.4"], normalize=to_detector)
restored, clean = torch.rand(2, 3, 100, 120, requires_grad=True), torch.rand(2, 3, 100, 120)
loss(restored, clean).backward()
