"""Our corruptions and mixtures as a transform of albumentations: uint8 or float32 arrays (H, W, 3), on its seed."""

import albumentations
import numpy as np
import torch

from restoreloss.integrations.transforms import RandomCorruption, RandomMixture


class Degrade(albumentations.ImageOnlyTransform):
    """One of our transforms of an image; masks, boxes and keypoints stay."""

    def __init__(self, transform, p=0.5):
        super().__init__(p=p)
        self.transform = transform

    def apply(self, img, **parameters):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.py_random.randrange(2**31))  # the seed of Compose(seed=...) is that of this too
            return self.transform(img)


pipeline = albumentations.Compose(
    [albumentations.HorizontalFlip(p=0.5), Degrade(RandomCorruption(names=["fog", "jpeg_compression"]), p=1.0)], seed=3
)
image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
found = pipeline(image=image, mask=image[..., 0])
assert found["image"].shape == image.shape
assert found["image"].dtype == np.uint8

floats = albumentations.Compose([Degrade(RandomMixture(), p=1.0)], seed=3)
degraded = floats(image=image.astype(np.float32) / 255)["image"]
assert degraded.dtype == np.float32
assert degraded.min() >= 0
assert degraded.max() <= 1
