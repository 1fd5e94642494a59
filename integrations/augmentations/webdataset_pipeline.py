"""Corruptions in a pipeline of webdataset, for each way in which it decodes images."""

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from restoreloss.integrations.transforms import RandomCorruption

shard = Path(tempfile.mkdtemp()) / "images-000000.tar"
with webdataset.TarWriter(str(shard)) as sink:  # your shards
    for number in range(4):
        buffer = io.BytesIO()
        Image.fromarray(np.full((64, 64, 3), 60 * number, dtype=np.uint8)).save(buffer, "png")
        sink.write({"__key__": f"{number:04d}", "png": buffer.getvalue(), "cls": number})

degrade = RandomCorruption(names=["fog", "jpeg_compression"], severities=[1, 2])
for decoding in ("pil", "torchrgb", "torchrgb8", "rgb", "rgb8"):
    data = webdataset.WebDataset(str(shard), shardshuffle=False).decode(decoding).to_tuple("png", "cls")
    for image, label in data.map_tuple(degrade, lambda label: label):
        assert isinstance(image, Image.Image | torch.Tensor | np.ndarray)
        assert label in range(4)
