"""The clean images that generation trains and is tested on."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torchvision.transforms.v2.functional import center_crop

from examples.common.data.clean_images import CleanImages, training_photographs
from examples.common.data.pair_folders import pairs
from examples.common.data.pairs import FolderPairs, TestPairs, layout_and_root, own_pairs_of, pairs_to_test


def clean_images(config: Any) -> CleanImages:
    """The pool of pre-training, replay and importance: photographs, ``clean``, or the clean sides of the pairs."""
    if config.data == "photos" and config.lq is None:
        return CleanImages(training_photographs(config.patch), config.train_count, config.patch)
    if config.clean is not None:
        layout, root = layout_and_root({"clean": config.clean}, "clean", option="clean")
        files = [clean for _, clean in pairs(layout, root, "train", "clean")]
    elif config.lq is not None:
        files = [clean for _, clean in own_pairs_of(config, "train")]
    else:
        roots = [(name, *layout_and_root(config.pairs, name)) for name in config.degradations]
        files = [clean for name, layout, root in roots for _, clean in pairs(layout, root, "train", name)]
    return CleanImages(files, len(files), config.patch)


def held_out_images(config: Any) -> Iterator[Tensor]:
    """Clean test images (1, 3, H, W), for the generative loss; of those larger than a tile the middle."""
    if config.clean is None:
        found = pairs_to_test(config, config.degradations[0], shifted=False)
    else:
        root = layout_and_root({"clean": config.clean}, "clean", option="clean")
        found = TestPairs(FolderPairs({"noisy": root}, "test", config.patch), config.test_count)
    for _, clean in found:
        height, width = (min(side, config.tile or side) for side in clean.shape[2:])
        yield center_crop(clean, [height, width])
