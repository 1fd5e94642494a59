"""The cost of a training step with TDPLoss and CQMix, next to the same step written plainly.

    python -m examples.benchmarks.tdp_cost

Phase 1 of SR4IR: the restorer (EDSR-baseline, x4) learns from L1 and TDP. Written plainly, the task network runs to its
end for both images, the HR image's features carry a graph, and the task network's own gradients are computed and
thrown away. As published, its parameters are frozen, so that only the head is too much. All steps, and CQMix alone, are
measured in turn, round after round; ratios are medians over the rounds. The gradients of the restorer must be equal, or
the benchmark fails.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
from torchvision.transforms.v2.functional import normalize
from tqdm import tqdm

from examples.benchmarks.measure import seconds
from examples.common.data.degrade import low_resolution
from examples.common.networks.edsr import EDSR
from restoreloss import CQMix, TDPLoss
from restoreloss.normalization import IMAGENET


def task_networks(size: int) -> dict[str, nn.Module]:
    """The classifier and the detector of the paper, without weights."""
    torch.manual_seed(0)
    detector = fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=21, min_size=size, max_size=size
    )
    for module in detector.modules():  # untrained, its features would be a thousandth of their inputs
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.9, 1.1)
    return {"ResNet18": resnet18(num_classes=200), "MobileNetV3-FPN": detector}


def plain_features(network: nn.Module, name: str) -> Callable[[Tensor], list[Tensor]]:
    """The features of a network that runs to its end, with a graph."""
    seen: list[Any] = []
    layer: nn.Module = network.get_submodule("layer4" if name == "ResNet18" else "backbone")
    layer.register_forward_hook(lambda *call: seen.append(call[-1]))

    def features(images: Tensor) -> list[Tensor]:
        seen.clear()
        if name == "ResNet18":
            network(normalize(images, list(IMAGENET[0]), list(IMAGENET[1])))
            return [seen[0]]
        network(list(images))
        return [seen[0]["0"], seen[0]["1"]]

    return features


def plain_step(
    name: str, network: nn.Module, restorer: nn.Module, hr: Tensor, lr: Tensor, *, frozen: bool
) -> Callable[[], None]:
    network = copy.deepcopy(network).eval().requires_grad_(not frozen)
    features = plain_features(network, name)

    def step() -> None:
        restorer.zero_grad()
        network.zero_grad()
        restored = restorer(lr)
        pairs = list(zip(features(restored), features(hr), strict=True))
        tdp = torch.stack([F.l1_loss(z, x) for z, x in pairs]).mean()
        (F.l1_loss(restored, hr) + tdp).backward()

    return step


def our_step(network: nn.Module, restorer: nn.Module, hr: Tensor, lr: Tensor) -> Callable[[], None]:
    tdp = TDPLoss(copy.deepcopy(network).train())

    def step() -> None:
        restorer.zero_grad()
        restored = restorer(lr)
        (F.l1_loss(restored, hr) + tdp(restored, hr)).backward()

    return step


def gradient(restorer: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in restorer.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="of the HR images (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(1)
    hr = torch.rand(args.batch, 3, args.size, args.size, generator=generator).to(args.device)
    lr = low_resolution(hr, 4)
    print(f"{args.batch} images of {args.size}x{args.size}, {args.device}; medians over {args.rounds} rounds\n")
    print(f"{'':<34}{'ours / plain':>14}{'ours / published':>18}{'CQMix / ours':>14}{'gradients differ by':>22}")
    for name, network in task_networks(args.size).items():
        network = network.to(args.device)
        for title, restorer in {"EDSR-baseline": EDSR(4), "a restorer that costs nothing": _Enlarge()}.items():
            restorer = restorer.to(args.device)
            restored = restorer(lr).detach()
            mix = CQMix((8, 8))
            steps = {
                "plain": plain_step(name, network, restorer, hr, lr, frozen=False),
                "published": plain_step(name, network, restorer, hr, lr, frozen=True),
                "ours": our_step(network, restorer, hr, lr),
            }
            gradients = {}
            for key, step in steps.items():
                step()
                gradients[key] = gradient(restorer).clone()
            size = gradients["plain"].norm()
            gap = max(float((gradients[key] - gradients["plain"]).norm() / size) for key in ("ours", "published"))
            ratios: dict[str, list[float]] = {"plain": [], "published": [], "mix": []}
            for _ in tqdm(range(args.rounds), desc=f"{name}, {title}", leave=False):
                times = {key: seconds(step, args.device) for key, step in steps.items()}
                ratios["plain"].append(times["ours"] / times["plain"])
                ratios["published"].append(times["ours"] / times["published"])
                ratios["mix"].append(seconds(lambda: mix(restored, hr), args.device) / times["ours"])  # noqa: B023 - called at once
            row = f"{name}, {title}" if title == "EDSR-baseline" else f"{name}, TDP alone"
            plain, published, share = (statistics.median(values) for values in ratios.values())
            print(f"{row:<34}{plain:>14.2f}{published:>18.2f}{share:>14.2%}{gap:>22.1e}")
            if gap > 1e-4:
                raise SystemExit("The steps should give the restorer the same gradient.")
            if plain > 0.85 or share > 0.02:
                raise SystemExit("A step should take at most 0.85 of the plain one, and CQMix 2 % of it.")


class _Enlarge(nn.Module):
    """Bilinear enlargement and one weight for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, lr: Tensor) -> Tensor:
        return self.weight * F.interpolate(lr, scale_factor=4.0, mode="bilinear")


if __name__ == "__main__":
    main()
