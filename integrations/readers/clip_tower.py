"""The visual tower of a CLIP of open_clip reads the images, at its own size, by its own normalization."""

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from restoreloss import TDPLoss

# yours: pretrained="laion2b_s34b_b79k", or the file of your weights, and no force_image_size
tower = open_clip.create_model("ViT-B-32", pretrained=None, force_image_size=64).visual
mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))


def to_clip(images):
    """A tower reads one size: images of any other are resized here, where the gradient goes through."""
    images = F.interpolate(images, size=tower.image_size, mode="bicubic", antialias=True, align_corners=False)
    return (images - mean.to(images)) / std.to(images)


restored, clean = torch.rand(2, 3, 80, 96, requires_grad=True), torch.rand(2, 3, 80, 96)
loss = TDPLoss(tower, ["transformer.resblocks.5", "transformer"], normalize=to_clip)  # sequences of tokens
loss(restored, clean).backward()
