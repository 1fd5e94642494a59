"""Our corruptions as an augmentation of kornia: in its containers, for images on their own device."""

import torch
from kornia.augmentation import AugmentationSequential, IntensityAugmentationBase2D, RandomHorizontalFlip

from restoreloss.integrations.transforms import RandomCorruption


class Degrade(IntensityAugmentationBase2D):
    """One of our transforms of a batch of images, which kornia applies to a share ``p`` of them."""

    def __init__(self, transform, p=0.5):
        super().__init__(p=p)
        self.transform = transform

    def apply_transform(self, input, params, flags, transform=None):  # noqa: A002, the name that kornia gives it
        return self.transform(input)


pipeline = AugmentationSequential(
    RandomHorizontalFlip(p=0.5), Degrade(RandomCorruption(names=["fog", "contrast"])), data_keys=["input", "mask"]
)
images, masks = torch.rand(4, 3, 64, 64), torch.ones(4, 1, 64, 64)
changed, same = pipeline(images, masks)
assert changed.shape == images.shape
assert torch.equal(same, masks)
