"""Corruptions and mixtures among the transforms of torchvision v2: images change, labels, boxes and masks stay."""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from restoreloss.integrations.transforms import RandomCorruption, RandomMixture

transform = v2.Compose([v2.RandomHorizontalFlip(), RandomCorruption(p=0.5, names=["fog", "snow"], severities=[1, 2])])
image = tv_tensors.Image(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
box = tv_tensors.BoundingBoxes([[4, 4, 20, 20]], format="XYXY", canvas_size=(64, 64))
changed, boxes, label = transform(image, box, 7)
assert isinstance(changed, tv_tensors.Image)
assert isinstance(boxes, tv_tensors.BoundingBoxes)
assert label == 7

pair = {"lq": torch.rand(3, 64, 64), "gt": torch.rand(3, 64, 64)}
degraded = RandomMixture(p=0.9, keys=("lq",))(pair)  # a pair of BasicSR: "gt" stays as it is
assert torch.equal(degraded["gt"], pair["gt"])
