"""SR4IR in one file: a super-resolution network and the classifier that reads its images train in turn.

    python -m examples.minimal.sr4ir

A classifier has to name textures that a reduction by four has nearly erased. The restorer S learns from the pixels and
from the task-driven perceptual (TDP) loss, the distance of two images in the features of the task network H; H learns
from restored images, clean images and CQMix of both. The whole training runs twice from the same start, without and
with the TDP loss. It prints what H reads in restored test images, and what a judge reads in them: a classifier that
was trained on clean images and takes no part in SR4IR.

Kim et al., "Beyond Image Super-Resolution for Image Recognition with Task-Driven Perceptual Loss", CVPR 2024.
"""

import argparse
import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss import CQMix, TDPLoss, frozen

CLASSES, SIZE, SCALE, BATCH = 8, 32, 4, 16


def textures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stripes on a smooth background, (N, 3, H, W) in [0, 1]; the label (N,) is their direction."""
    label = torch.randint(CLASSES, (count,), generator=generator)
    period, phase, contrast = torch.rand(3, count, 1, 1, generator=generator)
    angle = math.pi / CLASSES * label[:, None, None]
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    wave = torch.cos(2 * math.pi * ((angle.cos() * x + angle.sin() * y) / (5 + 3 * period) + phase))
    background = 0.2 + 0.6 * torch.rand(count, 3, 3, 3, generator=generator)
    image = F.interpolate(background, size=SIZE, mode="bilinear") + ((0.05 + 0.1 * contrast) * wave)[:, None]
    return (image + 0.03 * torch.randn(image.shape, generator=generator)).clamp(0, 1), label


def downsample(clean: Tensor) -> Tensor:
    """The low-resolution image: bicubic, 8 bits."""
    small = F.interpolate(clean, scale_factor=1 / SCALE, mode="bicubic")
    return (small.clamp(0, 1) * 255).round() / 255


class Restorer(nn.Module):
    """S: convolutions at the low resolution and a pixel shuffle, on top of bilinear enlargement."""

    def __init__(self, width: int = 48, depth: int = 5) -> None:
        super().__init__()
        hidden = [layer for _ in range(depth) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        last = nn.Conv2d(width, 3 * SCALE**2, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *hidden, last, nn.PixelShuffle(SCALE))

    def forward(self, low: Tensor) -> Tensor:
        return F.interpolate(low, scale_factor=SCALE, mode="bilinear") + self.body(low)


def classifier() -> nn.Sequential:
    """H: four convolutions, the output of whose last one ("3") is H_f, and a linear head."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 24, 2), (24, 24, 2), (24, 48, 1), (48, 48, 1)):
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        layers.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, CLASSES))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    test_images, test_labels = textures(1000, torch.Generator().manual_seed(options.seed + 1))
    start, judge, cqmix = (Restorer(), classifier()), classifier(), CQMix(grid=(4, 4))

    generator, optimizer = torch.Generator().manual_seed(options.seed + 2), torch.optim.AdamW(judge.parameters())
    for _ in range(options.steps):  # the judge learns the task on clean images alone
        clean, label = textures(BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(judge(clean), label).backward()
        optimizer.step()

    for name, w_tdp in (("without TDP", 0.0), ("with TDP", 0.1)):  # 1 in the paper, for other features
        generator = torch.Generator().manual_seed(options.seed)  # the same batches for both
        s, h = copy.deepcopy(start)
        tdp = TDPLoss(h, "3", normalize=None)  # these classifiers read images in [0, 1] as they are
        s_optimizer = torch.optim.AdamW(s.parameters(), lr=1e-3, weight_decay=0)
        h_optimizer = torch.optim.SGD(h.parameters(), lr=3e-2, momentum=0.9, weight_decay=1e-4)
        for step in range(options.steps):
            clean, label = textures(BATCH, generator)
            low = downsample(clean)

            # Phase 1 (Eqs. 2, 3): S learns from L_pix + w L_TDP, for which H is frozen and in eval mode.
            restored = s(low)
            loss = F.l1_loss(restored, clean)
            if w_tdp and step >= options.steps // 10:  # the features of an untrained H mean nothing yet
                loss = loss + w_tdp * tdp(restored, clean)
            s_optimizer.zero_grad()
            loss.backward()
            s_optimizer.step()

            # Phase 2: H learns the task from what the updated S restores, from clean images and from a mixture.
            with torch.no_grad():
                restored = s(low).clamp(0, 1)
            mixed = cqmix(restored, clean, generator=generator)
            loss = F.cross_entropy(h(torch.cat([restored, clean, mixed])), label.repeat(3))
            h_optimizer.zero_grad()
            loss.backward()
            h_optimizer.step()

        with torch.no_grad(), frozen(s, h, judge):
            restored = s(downsample(test_images)).clamp(0, 1)
            accuracy = [(reader(restored).argmax(1) == test_labels).float().mean().item() for reader in (h, judge)]
        psnr = -10 * F.mse_loss(restored, test_images).log10().item()
        print(f"{name:12} accuracy of H {accuracy[0]:.1%}, of the judge {accuracy[1]:.1%}, PSNR {psnr:.2f} dB")


if __name__ == "__main__":
    main()
