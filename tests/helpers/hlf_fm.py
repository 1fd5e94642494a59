"""Task networks and images for the tests of HLFLoss and FeatureMatchingLoss."""

from typing import Any

import torch
from torch import Tensor, nn

from restoreloss import FeatureMatchingLoss
from tests.helpers.networks import live_recogniser

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3, stride=2),
        nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip


def pair(seed: int = 1) -> tuple[Tensor, Tensor]:
    z, x = torch.rand(2, 4, 3, 9, 11, generator=torch.Generator().manual_seed(seed))
    return z.requires_grad_(), x


def everything(net: nn.Module) -> dict[str, Any]:
    """What a loss could disturb."""
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "modes": [module.training for module in net.modules()],
        "tracks": [getattr(module, "track_running_stats", None) for module in net.modules()],
        "flags": [parameter.requires_grad for parameter in net.parameters()],
        "hooks": [len(module._forward_hooks) for module in net.modules()],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def matching(distance: Any = "l1", **options: Any) -> tuple[FeatureMatchingLoss, nn.Module, nn.Module]:
    student, teacher = live_recogniser(), live_recogniser().requires_grad_()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    return FeatureMatchingLoss(student, teacher, ["stem.1", "stage"], distance=distance, **options), student, teacher
