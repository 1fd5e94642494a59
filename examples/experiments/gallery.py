"""The images of the gallery: what each augmentation makes of one photograph, and the terms of a short training.

    python -m examples.experiments.gallery --out docs/images/gallery

Written are corruptions.jpg, degradations.jpg, mixtures.jpg and losses.png; some minutes on two cores.
"""

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from examples.common.data.degradations import DEGRADATIONS, degrade
from examples.common.data.photos import HELD_OUT, TRAIN, load_photo, random_crops
from examples.common.networks.restorers import restorer
from restoreloss import CORRUPTIONS, CQMix, DiffLoss, MixtureA, MixtureB, WeightedSum, corrupt, small_prior

SIZE, TILE, LABEL = 192, 96, 16


def square(photo: Tensor, size: int) -> Tensor:
    """The middle of a photograph (3, H, W), as large as it goes, at ``size``: (1, 3, size, size)."""
    side = min(photo.shape[1:])
    top, left = (photo.shape[1] - side) // 2, (photo.shape[2] - side) // 2
    middle = photo[None, :, top : top + side, left : left + side]
    return F.interpolate(middle, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def contact_sheet(
    columns: Mapping[str, Sequence[Tensor]], *, width: int, tile: int = TILE, rows: Sequence[str] = ("",)
) -> Figure:
    """Named columns of images (1, 3, H, W), ``width`` of them in a band, their names above and those of rows beside."""
    bands = -(-len(columns) // width)
    band_height = len(rows) * tile + LABEL
    height, left = bands * band_height, LABEL if any(rows) else 0
    across = left + width * tile
    figure = Figure(figsize=(across / 100, height / 100), dpi=100)
    for number, (name, images) in enumerate(columns.items()):
        band, column = divmod(number, width)
        top = height - band * band_height - LABEL
        for row, image in enumerate(images, 1):
            shown = F.interpolate(image, size=(tile, tile), mode="area")[0].permute(1, 2, 0)
            figure.figimage(shown.numpy(), left + column * tile, top - row * tile, origin="upper")
        middle = (left + (column + 0.5) * tile) / across
        figure.text(middle, (top + LABEL / 2) / height, name, ha="center", va="center", fontsize=7)
        for row, said in enumerate(rows if column == 0 else ()):
            place = (top - (row + 0.5) * tile) / height
            figure.text(LABEL / 2 / across, place, said, ha="center", va="center", fontsize=7, rotation=90)
    return figure


def corruptions(clean: Tensor, seed: int) -> Figure:
    """Each corruption at severities 1, 3 and 5, from the same seed."""
    columns = {"clean": [clean]} | {
        name: [corrupt(clean, name, severity, generator=torch.Generator().manual_seed(seed)) for severity in (1, 3, 5)]
        for name in CORRUPTIONS
    }
    return contact_sheet(columns, width=10, rows=("severity 1", "severity 3", "severity 5"))


def degradations(clean: Tensor, seed: int) -> Figure:
    """Each degradation of DTP as it is in training, and shifted."""
    columns = {"clean": [clean]} | {
        name: [
            degrade(name, clean[0], torch.Generator().manual_seed(seed), shifted=shifted)[None]
            for shifted in (False, True)
        ]
        for name in DEGRADATIONS
    }
    return contact_sheet(columns, width=6, tile=160, rows=("as in training", "shifted"))


def mixtures(clean: Tensor, seed: int) -> Figure:
    """Mixture-A at two scales, four draws of Mixture-B, and CQMix of the first with the clean image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = MixtureA(8)(clean)
    columns = {"clean": clean, "Mixture-A, scale 4": MixtureA(4)(clean), "Mixture-A, scale 8": coarse}
    columns |= {f"Mixture-B, draw {draw}": MixtureB()(clean, generator=generator) for draw in (1, 2)}
    columns["CQMix of Mixture-A and clean"] = CQMix()(coarse, clean, generator=generator)
    return contact_sheet({name: [image] for name, image in columns.items()}, width=6, tile=160)


def losses(steps: int, seed: int) -> Figure:
    """The weighted terms of L1 + DiffLoss with half of the gradient, while a small NAFNet learns to denoise."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    photos = [load_photo(name) for name in TRAIN]
    network = restorer("nafnet-small", scale=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    diff = DiffLoss(small_prior(), timesteps=(100, 600))
    objective = WeightedSum({"pixel": nn.L1Loss(), "diff": diff}, shares={"diff": 0.5})
    seen: dict[str, list[float]] = {}
    for _ in range(steps):
        clean = random_crops(photos, 8, 48, generator)
        restored = network(clean + 0.1 * torch.randn(clean.shape, generator=generator))
        terms = objective.terms(restored, clean)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        for name, value in terms.items():
            seen.setdefault(name, []).append(value.item())
    figure = Figure(figsize=(7, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    window = max(1, steps // 20)
    for name, values in seen.items():
        (line,) = axes.plot(values, alpha=0.25, linewidth=0.8)
        smooth = torch.tensor(values).unfold(0, window, 1).mean(1)
        axes.plot(range(window - 1, steps), smooth, color=line.get_color(), label=name)
    axes.set(xlabel="step", ylabel="weighted term", yscale="log")
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", default="chelsea", choices=(*TRAIN, *HELD_OUT), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all randomness (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of the training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gallery"), help="(default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"argument --steps: should be at least 1, found {args.steps}")
    args.out.mkdir(parents=True, exist_ok=True)
    clean = square(load_photo(args.photo), SIZE)
    for sheet in (corruptions, degradations, mixtures):
        file = io.BytesIO()
        sheet(clean, args.seed).savefig(file, dpi=100)
        image = Image.open(file).convert("RGB")
        image.save(args.out / f"{sheet.__name__}.jpg", quality=88, subsampling=0, optimize=True)
    losses(args.steps, args.seed).savefig(args.out / "losses.png", dpi=100)


if __name__ == "__main__":
    main()
