"""The clean images that generation trains and is tested on."""

from typing import Any

from torch import Tensor

from examples.common.data.clean_images import CleanImages, training_photographs
from examples.common.data.pair_folders import own_pairs, pairs
from examples.common.data.pairs import FolderPairs, TestPairs, layout_and_root, pairs_to_test


def clean_images(config: Any) -> CleanImages:
    """The pool of pre-training, replay and importance: photographs, ``clean``, or the clean sides of the pairs."""
    if config.data == "photos" and config.lq is None:
        return CleanImages(training_photographs(config.patch), config.train_count, config.patch)
    if config.clean is not None:
        layout, root = layout_and_root(config, "clean", {"clean": config.clean})
        files = [clean for _, clean in pairs(layout, root, "train", "clean")]
    elif config.lq is not None:
        files = [clean for _, clean in own_pairs(config.lq, config.gt or config.lq)]
    else:
        roots = [(name, *layout_and_root(config, name)) for name in config.degradations]
        files = [clean for name, layout, root in roots for _, clean in pairs(layout, root, "train", name)]
    return CleanImages(files, len(files), config.patch)


def held_out_images(config: Any) -> list[Tensor]:
    """Clean test images (1, 3, H, W), for the generative loss."""
    if config.clean is None or (config.data == "photos" and config.lq is None):
        return [clean for _, clean in pairs_to_test(config, config.degradations[0], shifted=False)]
    data = FolderPairs({"noisy": layout_and_root(config, "clean", {"clean": config.clean})}, "test", config.patch)
    return [clean for _, clean in TestPairs(data, config.test_count)]
