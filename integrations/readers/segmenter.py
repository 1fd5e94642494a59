"""A segmenter of segmentation_models_pytorch reads the images: its deepest map, and its decoder."""

import segmentation_models_pytorch as smp
import torch

from restoreloss import TDPLoss

segmenter = smp.Unet("resnet18", encoder_weights=None, classes=2)  # yours: encoder_weights="imagenet", and trained
restored, clean = torch.rand(2, 3, 64, 64, requires_grad=True), torch.rand(2, 3, 64, 64)

loss = TDPLoss(segmenter, ["encoder/5", "decoder"], layer_weights={"encoder/5": 1.0, "decoder": 0.5})
loss(restored, clean).backward()
assert set(loss.terms(restored, clean)) == {"encoder/5", "decoder"}
