"""Every exported objective, ready to be put through the contract: how it is built, and what fixes its chance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restoreloss import (
    DiffLoss,
    FeatureExtractor,
    FlowLevels,
    HLFLoss,
    LatentPrior,
    NoiseSchedule,
    Objective,
    Subsampled,
    TDPLoss,
    WeightedSum,
)
from tests.helpers.networks import (
    guided_unet,
    live_detector,
    live_recogniser,
    tiny_autoencoder,
    tiny_conditional_unet,
    tiny_transformer,
    tiny_unet,
)

SHAPE = (4, 3, 8, 8)
ELSEWHERE = {
    "FeatureMatchingLoss",  # trains a network and not an image: its contract is in test_hlf_fm.py
    "Masked", "MultiOutput", "NoReference",  # called otherwise: tests/unit/objectives/test_outputs_and_masks.py
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], Objective]
    channels: int = 3
    part: float = 1.0  # of the image, that it looks at

    def __str__(self) -> str:
        return self.name


def smallest_unet(**options: Any) -> nn.Module:
    """Of one resolution, which is traced in half of the time; images of every size fit it."""
    return tiny_unet((8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **options)


def conditional_unet() -> nn.Module:
    """Likewise of one resolution."""
    return tiny_conditional_unet(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )


def unet_with_dropout() -> nn.Module:
    return smallest_unet(dropout=0.3).train()


def pointwise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return 0.7 * x_t, x_t.tanh()


def l1_like(restored: Tensor, target: Tensor) -> Tensor:
    return (restored.float() - target.float()).abs().mean()


def all_terms() -> WeightedSum:
    objectives: dict[str, Any] = {"pixel": nn.L1Loss(), "diff": DiffLoss(unet_with_dropout()), "function": l1_like}
    return WeightedSum(objectives, weights={"diff": 0.1})


def shares() -> WeightedSum:
    return WeightedSum({"pixel": nn.L1Loss(), "diff": DiffLoss(unet_with_dropout())}, shares={"diff": 0.5})


def two_looks_through_one_network() -> WeightedSum:
    shared = FeatureExtractor(live_recogniser(), ["stem.1", "stage"])
    looks = {"near": TDPLoss(shared, ["stem.1"], distance="rms"), "far": TDPLoss(shared, ["stage"])}
    return WeightedSum({"pixel": nn.L1Loss(), **looks}, weights={"near": 0.5})


# look through a network that somebody else is training
LIVE = [
    Case("TDPLoss-l1", lambda: TDPLoss(live_recogniser(), ["stage"])),
    Case("TDPLoss-mse", lambda: TDPLoss(live_recogniser(), ["stage"], distance="mse")),
    Case("TDPLoss-rms", lambda: TDPLoss(live_recogniser(), ["stage"], distance="rms")),
    Case("TDPLoss-l2", lambda: TDPLoss(live_recogniser(), ["stage"], distance="l2")),
    # the in-place ReLU overwrites what "stem.1" returns
    Case(
        "TDPLoss-layers",
        lambda: TDPLoss(
            live_recogniser(), ["stage", "stem.1", "head"], layer_weights={"stem.1": 0.1, "stage": 2, "head": 1}
        ),
    ),
    Case("TDPLoss-detector", lambda: TDPLoss(live_detector())),
    Case("WeightedSum-shared", two_looks_through_one_network),
    Case("HLFLoss-l1", lambda: HLFLoss(live_recogniser(), live_recogniser(), ["stage"])),
    Case("HLFLoss-rms", lambda: HLFLoss(live_recogniser(), live_recogniser(), ["stage"], distance="rms")),
]
CASES = [
    Case("DiffLoss-mse", lambda: DiffLoss(tiny_unet(dropout=0.3).train())),
    Case("DiffLoss-rms", lambda: DiffLoss(unet_with_dropout(), distance="rms")),
    Case("DiffLoss-l2", lambda: DiffLoss(unet_with_dropout(), distance="l2")),
    Case("DiffLoss-l1", lambda: DiffLoss(unet_with_dropout(), distance="l1")),
    Case("DiffLoss-noise", lambda: DiffLoss(unet_with_dropout(), h_space_weight=0)),
    Case("DiffLoss-h_space", lambda: DiffLoss(unet_with_dropout(), noise_weight=0, h_space_weight=1)),
    Case("DiffLoss-guided", lambda: DiffLoss(guided_unet(use_checkpoint=True))),
    Case("DiffLoss-callable", lambda: DiffLoss(pointwise, distance="rms")),
    Case(
        "DiffLoss-conditional",
        lambda: DiffLoss(conditional_unet(), NoiseSchedule.scaled_linear(), conditioning=torch.ones(1, 4, 8)),
    ),
    Case(
        "DiffLoss-latent",
        lambda: DiffLoss(tiny_unet((8, 8), in_channels=4, out_channels=4), encoder=tiny_autoencoder(), distance="rms"),
    ),
    Case(
        "DiffLoss-latent_prior",
        lambda: DiffLoss(LatentPrior(tiny_autoencoder(), smallest_unet(in_channels=4, out_channels=4)), snr_power=0.5),
    ),
    Case(
        "DiffLoss-transformer",
        lambda: DiffLoss(tiny_transformer("DiT"), conditioning=torch.tensor([1]), compare="native"),
    ),
    Case("DiffLoss-flow", lambda: DiffLoss(smallest_unet(), FlowLevels.uniform(shift=3.0))),
    Case("DiffLoss-crop", lambda: DiffLoss(tiny_unet((8, 8), dropout=0.3).train(), crop=0.5), part=0.25),
    Case("Subsampled-subset", lambda: Subsampled(DiffLoss(unet_with_dropout()), subset=0.5), part=0.5),
    Case("DiffLoss-checkpointing", lambda: DiffLoss(smallest_unet(), checkpointing=True)),
    Case("WeightedSum", all_terms),
    Case("WeightedSum-shares", shares),
    *LIVE,
]


def images(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    z, x = (torch.rand(shape, generator=generator).to(dtype) for _ in range(2))
    return z.requires_grad_(), x


def networks(module: nn.Module) -> list[nn.Module]:
    """The networks that an objective holds but hides."""
    return [network for part in module.modules() for network in getattr(part, "_held", ())]


def live_networks(module: nn.Module) -> list[nn.Module]:
    """The networks that an objective looks through and does not own, each once."""
    extractors = [getattr(part, "features", None) for part in module.modules()]
    found = dict.fromkeys(one.network for one in extractors if isinstance(one, FeatureExtractor))
    return [network for network in found if network not in networks(module)]
