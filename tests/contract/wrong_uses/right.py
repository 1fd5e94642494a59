"""Right uses near the wrong ones, which must neither raise nor warn."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from restoreloss import (
    CFRM,
    TFA,
    Alternation,
    Corruptions,
    CQMix,
    DenoisingLoss,
    DiffLoss,
    FeatureExtractor,
    FeatureMatchingLoss,
    FiLM,
    GradientOrthogonality,
    HLFLoss,
    MixtureA,
    MixtureB,
    NoiseSchedule,
    ParameterImportance,
    Phase,
    Subsampled,
    TDPLoss,
    TimeConditioned,
    WaveletColorFix,
    WeightedSum,
    audit,
    calibrate,
    corrupt,
    denoise,
    frozen,
    match_timestep,
    partial_diffusion,
    short_steps,
)
from restoreloss.integrations import options
from restoreloss.regularizers.layer_decay import add_gradients, execution_order, layer_weights, shallow
from tests.contract.wrong_uses.table import Right
from tests.contract.wrong_uses.things import (
    ABAR,
    BETAS,
    clean,
    diff,
    fill,
    hlf,
    levels,
    linear,
    matching,
    noise_loss,
    reader,
    reference,
    restored,
    restorer,
    seeded,
    tdp,
    unet,
    weighted,
)
from tests.helpers.networks import live_detector, live_recogniser


@torch.no_grad()
def validated(objective: Any) -> Tensor:
    """A loss in validation, where also the target may require a gradient."""
    return objective(clean(), restored())


def overshooting(objective: Any) -> Tensor:
    """A network that leaves the range by a few percent."""
    return objective(1.1 * restored() - 0.05, clean())


def tanh(objective: Any) -> Tensor:
    """One that is untrained and around zero."""
    return objective(0.1 * restored() - 0.05, clean())


def detector_in_train_mode() -> Any:
    detector, network = live_detector(), nn.Conv2d(3, 3, 1)
    loss = TDPLoss(detector)
    phase = Phase(
        "restorer",
        [network],
        lambda batch: loss(network(batch), batch),
        _sgd(network),
        frozen=[detector],
        modes={detector: "train"},
    )
    return Alternation([phase]).step(clean(size=16))


def _sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.1)


def importance() -> Any:
    network = nn.Sequential(nn.Conv2d(3, 3, 3))
    penalty = ParameterImportance(network, strength=np.float32(0.5), layer_weights={"0": 0})
    penalty.accumulate(lambda model, batch: model(batch).square().mean(), (batch for batch in [clean()]))
    return penalty(), penalty.apply_()


def decayed() -> Any:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))
    order = tuple(execution_order(network, clean()))
    weights = layer_weights(order, np.float64(5), share=np.float64(0.5))
    add_gradients(network(clean()).mean(), network, weights)
    return shallow(network, order, 1)


def projected() -> Any:
    network = restorer()
    gradients = GradientOrthogonality(list(network.parameters()), gamma=0)
    generation, reconstruction = network(clean()).mean(), network(clean()).square().mean()
    return gradients.project(generation, reconstruction, others=())


def accumulated() -> Any:
    network = restorer()
    phase = Phase("fit", (network,), lambda batch: network(batch).mean(), [_sgd(network)], None, max_norm=float("inf"))
    return Alternation((phase,), precision=torch.bfloat16).step(clean(), clean(), accumulate=True)


def conditioned() -> Any:
    timed = TimeConditioned(nn.Sequential(restorer()), {"0": FiLM(3)})
    timed.attach({"0": FiLM(3)})
    return timed(clean(), 2.5), timed(clean(), torch.tensor([0, 50])), timed.at(3)


LOSSES = {"DiffLoss": diff, "TDPLoss": tdp, "HLFLoss": hlf, "WeightedSum": weighted}

RIGHT = [
    *(Right(n, "validation under no_grad, whichever requires a gradient", lambda b=b: validated(b())) for n, b in LOSSES.items()),
    *(Right(n, "overshoot of a few percent", lambda b=b: overshooting(b())) for n, b in LOSSES.items()),
    *(Right(n, "an untrained output around zero", lambda b=b: tanh(b())) for n, b in LOSSES.items()),
    *(Right(n, "both require a gradient", lambda b=b: b()(restored(), restored())) for n, b in LOSSES.items()),
    *(Right(n, "neither requires a gradient", lambda b=b: b()(clean(), clean())) for n, b in LOSSES.items()),
    *(Right(n, "restored in half beside a target in float32", lambda b=b: b()(restored().half(), clean())) for n, b in LOSSES.items()),
    *(Right(n, "both in float64", lambda b=b: b()(restored().double(), clean().double())) for n, b in LOSSES.items() if n in ("DiffLoss",)),
    *(Right(n, "a batch of one", lambda b=b: b()(restored(1, 3, 8, 8), clean(1, 3, 8, 8))) for n, b in LOSSES.items()),
    *(Right(n, "an odd size", lambda b=b: b()(restored(2, 3, 9, 13), clean(2, 3, 9, 13))) for n, b in LOSSES.items()),
    *(Right(n, "black images", lambda b=b: b()(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))) for n, b in LOSSES.items()),
    *(Right(n, "channels_last memory", lambda b=b: b()(restored().to(memory_format=torch.channels_last), clean())) for n, b in LOSSES.items()),
    Right("DiffLoss", "a U-Net at a size that it does not divide", lambda: DiffLoss(unet())(restored(2, 3, 13, 9), clean(2, 3, 13, 9))),
    Right("DiffLoss", "one generator per sample", lambda: noise_loss()(restored(), clean(), generator=[seeded(0), seeded(1)])),
    Right("DiffLoss", "generators in a tuple", lambda: noise_loss()(restored(), clean(), generator=(seeded(0), seeded(1)))),
    Right("DiffLoss", "numpy scalars as numbers", lambda: DiffLoss(unet(), noise_weight=np.float32(0.5), h_space_weight=np.float64(0.1), snr_power=np.float32(0.5), crop=np.float32(0.5))),
    Right("Subsampled", "numpy numbers", lambda: Subsampled(nn.L1Loss(), every=np.int64(2), subset=np.float64(0.5))(restored(), clean())),
    Right("Subsampled", "validation under no_grad", lambda: validated(Subsampled(diff(), every=2))),
    Right("DiffLoss", "a list for timesteps", lambda: DiffLoss(unet(), timesteps=[100, 600])),
    Right("DiffLoss", "numpy integers for timesteps", lambda: DiffLoss(unet(), timesteps=(np.int64(100), np.int64(600)))),
    Right("DiffLoss", "a list for input_range", lambda: DiffLoss(unet(), input_range=[-1, 1])(2 * restored() - 1, 2 * clean() - 1)),
    Right("DiffLoss", "a table of alphas", lambda: DiffLoss(unet(), ABAR)),
    Right("DiffLoss", "a noise weight of 0", lambda: DiffLoss(unet(), noise_weight=0)(restored(), clean())),
    Right("DiffLoss", "a timestep for each sample", lambda: noise_loss()(restored(), clean(), timestep=torch.tensor([0, 999]))),
    Right("DiffLoss", "a numpy integer for the timestep", lambda: noise_loss()(restored(), clean(), timestep=np.int64(5))),
    Right("DiffLoss", "a prior at rest that keeps gradients of old", lambda: DiffLoss(copy.deepcopy(unet()))),
    Right("DiffLoss", "grey images for a function", lambda: noise_loss()(restored(channels=1), clean(channels=1))),
    Right("DiffLoss", "bfloat16 under autocast", lambda: _autocast()),
    Right("DiffLoss", "a lambda with more arguments that have defaults", lambda: DiffLoss(lambda x, t, scale=0.5: scale * x, h_space_weight=0)(restored(), clean())),
    Right("TDPLoss", "a detector that is frozen in train mode", detector_in_train_mode),
    Right("TDPLoss", "the network itself for a layer", lambda: TDPLoss(reader(), "", normalize=None)(restored(), clean())),
    Right("TDPLoss", "a list of images for a detector", lambda: TDPLoss(live_detector())([restored(3, 16, 16), restored(3, 9, 12)], [clean(3, 16, 16), clean(3, 9, 12)])),
    Right("TDPLoss", "a callable for normalize", lambda: tdp(normalize=lambda images: 2 * images - 1)(restored(), clean())),
    Right("TDPLoss", "a module for normalize", lambda: tdp(normalize=nn.Identity())(restored(), clean())),
    Right("TDPLoss", "lists for mean and std", lambda: tdp(normalize=[[0.5] * 3, [0.5] * 3])(restored(), clean())),
    Right("TDPLoss", "grey images with a normalize of their own", lambda: tdp(normalize=lambda images: images.expand(-1, 3, -1, -1))(restored(channels=1), clean(channels=1))),
    Right("HLFLoss", "a copy for the reference", lambda: HLFLoss(net := live_recogniser(), copy.deepcopy(net), "stage", normalize=None)(restored(), clean())),
    Right("FeatureMatchingLoss", "images that need no gradient", lambda: matching()(clean(), clean())),
    Right("FeatureMatchingLoss", "validation", lambda: torch.no_grad()(lambda: FeatureMatchingLoss(live_recogniser().requires_grad_(False), reference(), "stage", normalize=None)(clean(), clean()))()),
    Right("FeatureExtractor", "one layer as text", lambda: FeatureExtractor(reader(), "stage", normalize=None)(clean())),
    Right("DenoisingLoss", "one generator per sample", lambda: DenoisingLoss(fill, levels())(clean(), generator=[seeded(0), seeded(1)])),
    Right("DenoisingLoss", "weights as a list", lambda: DenoisingLoss(fill, levels(), weights=[1.0] * 51, timesteps=[1, 50])(clean())),
    Right("DenoisingLoss", "clean images that require a gradient", lambda: DenoisingLoss(fill, levels())(restored())),
    Right("WeightedSum", "an objective that gives one value a sample", lambda: WeightedSum({"mine": lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))})(restored(), clean())),
    Right("WeightedSum", "a weight of 0 and a negative one", lambda: WeightedSum({"a": nn.L1Loss(), "b": nn.MSELoss(), "c": nn.L1Loss()}, {"b": 0, "c": -0.1})(restored(), clean())),
    Right("NoiseSchedule", "one timestep for all", lambda: linear().add_noise(clean(), clean(), 5)),
    Right("NoiseSchedule", "alphas in float16", lambda: NoiseSchedule(ABAR[:500].half())),
    Right("NoiseSchedule", "betas that were cumulated", lambda: NoiseSchedule(torch.cumprod(1 - BETAS, 0))),
    Right("denoise", "a tuple of steps", lambda: denoise(fill, clean(), (5, 3, 1), linear())),
    Right("partial_diffusion", "short steps and one generator per sample", lambda: partial_diffusion(fill, clean(), short_steps(200, 4), linear(), generator=[seeded(0), seeded(1)])),
    Right("match_timestep", "a range for timesteps", lambda: match_timestep(fill, levels(), clean(), clean(), timesteps=range(1, 5))),
    Right("CQMix", "uint8 images", lambda: CQMix()((255 * clean()).byte(), (255 * clean()).byte())),
    Right("CQMix", "restored in half", lambda: CQMix()(restored().half(), clean())),
    Right("CQMix", "lists of any sizes", lambda: CQMix()([restored(3, 8, 9), restored(3, 5, 5)], [clean(3, 8, 9), clean(3, 5, 5)])),
    Right("CQMix", "a gradient that reaches the target alone", lambda: CQMix()(clean(), restored()).sum().backward()),
    Right("MixtureA", "overshoot", lambda: MixtureA()(1.1 * clean() - 0.05)),
    Right("MixtureB", "grey images and lists for spans", lambda: MixtureB(sigma=[0.1, 1], quality=[50, 100])(clean(channels=1), generator=seeded())),
    Right("MixtureB", "no draw", lambda: MixtureB().draw(0)),
    Right("Corruptions", "tuples, and images in half", lambda: Corruptions(("fog",), (1, 2))(clean().half(), generator=[seeded(0), seeded(1)])),
    Right("corrupt", "one name and severity for each", lambda: corrupt(clean(), ["fog", "snow"], [1, 5])),
    Right("WaveletColorFix", "one pixel", lambda: WaveletColorFix()(clean(1, 3, 1, 1), clean(1, 3, 1, 1))),
    Right("CFRM", "a network of one's own for the blocks", lambda: CFRM(4, blocks=nn.Identity(), groups=2)(clean(2, 4, 5, 3))),
    Right("TFA", "one task for all", lambda: TFA((4,), 4, tasks=iter(["a", "b"])).prompt("a", 3)),
    Right("TimeConditioned", "fractions of timesteps, and two blocks on a layer", conditioned),
    Right("ParameterImportance", "batches from a generator, a layer that weighs nothing", importance),
    Right("layer_weights", "numpy scalars and a tuple of names", decayed),
    Right("GradientOrthogonality", "no other parameters", projected),
    Right("Alternation", "micro-batches, tuples and no scheduler", accumulated),
    Right("frozen", "no network, and two", lambda: [frozen().__enter__(), frozen(restorer(), restorer()).__enter__()]),
    Right("audit", "one objective, and numpy integers", lambda: audit(nn.L1Loss(), restored(), clean(), draws=np.int64(1), seed=np.int64(0))),
    Right("audit", "images that need no gradient", lambda: audit({"a": nn.L1Loss()}, clean(), clean())),
    Right("calibrate", "numpy shares", lambda: calibrate({"a": nn.L1Loss(), "b": nn.MSELoss()}, restored(), clean(), shares={"b": np.float64(0.5)})),
    Right("options.criterion", "whole numbers where floats are meant", lambda: options.criterion({"type": "DiffLoss", "noise_weight": 1, "timesteps": [100, 600]})(restored(), clean())),
]  # fmt: skip


def _autocast() -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return diff()(restorer()(clean()), clean())
