"""An image of every corruption at every severity.

    python -m examples.experiments.contact_sheet --out docs/images/corruptions.png

A photograph of 192 pixels, shown at half of its size, with each of them at severities 1, 3 and 5.
"""

import argparse
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from examples.common.data.photos import HELD_OUT, TRAIN, load_photo
from restoreloss import CORRUPTIONS, corrupt

SEVERITIES = (1, 3, 5)
SIZE, TILE, LABEL, COLUMNS = 192, 96, 16, 10


def square(photo: Tensor, size: int) -> Tensor:
    """The middle of a photograph (3, H, W), as large as it goes, at ``size``: (1, 3, size, size)."""
    side = min(photo.shape[1:])
    top, left = (photo.shape[1] - side) // 2, (photo.shape[2] - side) // 2
    middle = photo[None, :, top : top + side, left : left + side]
    return F.interpolate(middle, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def contact_sheet(clean: Tensor, seed: int = 0) -> Figure:
    """A column for every corruption, a row for every severity, in bands; pixels are not scaled."""
    columns = {"clean": [clean]}
    for name in CORRUPTIONS:
        again = [torch.Generator().manual_seed(seed) for _ in SEVERITIES]
        columns[name] = [
            corrupt(clean, name, severity, generator=g) for severity, g in zip(SEVERITIES, again, strict=True)
        ]
    bands = -(-len(columns) // COLUMNS)
    width, height = COLUMNS * TILE, bands * (len(SEVERITIES) * TILE + LABEL)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    for number, (name, images) in enumerate(columns.items()):
        band, column = divmod(number, COLUMNS)
        top = height - band * (len(SEVERITIES) * TILE + LABEL) - LABEL
        for row, image in enumerate(images, 1):
            tile = F.interpolate(image, size=(TILE, TILE), mode="area")[0].permute(1, 2, 0)
            figure.figimage(tile.numpy(), column * TILE, top - row * TILE, origin="upper")
        x, y = (column + 0.5) * TILE / width, (top + LABEL / 2) / height
        figure.text(x, y, name, ha="center", va="center", fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", default="chelsea", choices=(*TRAIN, *HELD_OUT), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/corruptions.png"), help="(default: %(default)s)")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    contact_sheet(square(load_photo(args.photo), SIZE), args.seed).savefig(file, dpi=100)
    image = Image.open(file).convert("RGB")
    ImageOps.posterize(image, 6).save(args.out, optimize=True)  # noise of all 8 bits makes a large file


if __name__ == "__main__":
    main()
