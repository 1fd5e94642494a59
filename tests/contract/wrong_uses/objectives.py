"""Wrong uses of the objectives."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.schedulers import EDMEulerScheduler
from torch import Tensor, nn

from restoreloss import (
    DenoisingLoss,
    DiffLoss,
    FeatureExtractor,
    FeatureMatchingLoss,
    HLFLoss,
    LatentPrior,
    Masked,
    MultiOutput,
    NoiseSchedule,
    NoReference,
    Objective,
    Subsampled,
    TDPLoss,
    WeightedSum,
    small_prior,
)
from tests.contract.wrong_uses.table import wrong
from tests.contract.wrong_uses.things import (
    ARRAY,
    BETAS,
    NOT_GENERATORS,
    NOT_IMAGES,
    NOT_NUMBERS,
    NOT_RANGES,
    NOT_TENSORS,
    NOT_WHOLE,
    clean,
    conditional_unet,
    diff,
    fill,
    hlf,
    latent_unet,
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
    transformer,
    unet,
    vae,
    weighted,
)
from tests.helpers.networks import as_if_trained, live_detector, live_recogniser, tiny_unet


def flat(x: Tensor, t: Tensor) -> Tensor:
    return x.mean()


def floats(x: Tensor, t: Tensor) -> Any:
    return 0.5


class Returns(Objective):
    """An objective whose terms are what it is given."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def terms(self, restored: Tensor, target: Tensor) -> Any:
        return self.result(restored - target) if callable(self.result) else self.result


class NotWritten(Objective):
    pass


def zeroed() -> DiffLoss:
    loss = diff()
    loss.noise_weight = 0
    return loss


def trained(network: nn.Module) -> nn.Module:
    network.zeros = torch.optim.SGD(network.parameters(), lr=0.1)  # type: ignore[assignment]
    return network


def with_gradients(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return network


PAIRED = {
    "Subsampled": lambda: Subsampled(diff()),
    "DiffLoss": diff,
    "TDPLoss": tdp,
    "HLFLoss": hlf,
    "WeightedSum": weighted,
}
LOOKING = {
    "TDPLoss": lambda **o: TDPLoss(reader(), "stage", **{"normalize": "imagenet", **o}),
    "HLFLoss": lambda **o: HLFLoss(reader(), reference(), "stage", **{"normalize": "imagenet", **o}),
    "FeatureMatchingLoss": lambda **o: FeatureMatchingLoss(
        reader(), reference(), "stage", **{"normalize": "imagenet", **o}
    ),
}
NOT_NETWORKS: dict[str, Any] = {
    "None": None, "a class": nn.Conv2d, "text": "resnet50", "a path": Path("resnet50.pth"), "a function": fill,
    "a list": [1], "parameters": list(restorer().parameters()), "a state dict": restorer().state_dict(),
    "a numpy array": ARRAY, "an image": clean(),
}  # fmt: skip

WRONG = [
    # --- what is to denoise
    wrong("DiffLoss", "nothing", lambda: DiffLoss(), "denoiser", by=TypeError),
    wrong("DiffLoss", "a hub name", lambda: DiffLoss("google/ddpm-cat-256"), "`denoiser`", "load_prior"),
    wrong("DiffLoss", "a path", lambda: DiffLoss(Path("unet.safetensors")), "`denoiser`", "load_prior"),
    wrong("DiffLoss", "a function not called", lambda: DiffLoss(small_prior), "`denoiser`"),
    wrong("DiffLoss", "a class", lambda: DiffLoss(UNet2DModel), "`denoiser`", "UNet2DModel"),
    wrong("DiffLoss", "None", lambda: DiffLoss(None), "`denoiser`"),
    wrong("DiffLoss", "an image", lambda: DiffLoss(clean()), "`denoiser`"),
    wrong("DiffLoss", "a numpy array", lambda: DiffLoss(ARRAY), "`denoiser`"),
    wrong("DiffLoss", "a list", lambda: DiffLoss([unet()]), "`denoiser`"),
    wrong("DiffLoss", "a state dict", lambda: DiffLoss(unet().state_dict()), "`denoiser`"),
    wrong("DiffLoss", "parameters", lambda: DiffLoss(unet().parameters()), "`denoiser`"),
    wrong("DiffLoss", "a scheduler", lambda: DiffLoss(DDPMScheduler()), "`denoiser`"),
    wrong("DiffLoss", "exchanged with the schedule", lambda: DiffLoss(linear(), unet()), "`denoiser`"),
    wrong("DiffLoss", "another loss", lambda: DiffLoss(nn.L1Loss()), "`denoiser`"),
    wrong("DiffLoss", "a DiffLoss", lambda: DiffLoss(diff()), "`denoiser`"),
    wrong("DiffLoss", "a TDPLoss", lambda: DiffLoss(tdp()), "`denoiser`"),
    wrong("DiffLoss", "an autoencoder", lambda: DiffLoss(vae()), "`denoiser`"),
    wrong("DiffLoss", "a classifier", lambda: DiffLoss(reference()), "`denoiser`"),
    wrong("DiffLoss", "the restorer", lambda: DiffLoss(restorer()), "`denoiser`"),
    wrong("DiffLoss", "a generator of randomness", lambda: DiffLoss(seeded()), "`denoiser`"),
    wrong("DiffLoss", "a function of images alone", lambda: DiffLoss(lambda x: x, h_space_weight=0), "denoiser"),
    wrong(
        "DiffLoss",
        "a network in an optimizer",
        lambda: (lambda net, o: DiffLoss(net))(*(lambda n: (n, torch.optim.SGD(n.parameters(), lr=0.1)))(_live_unet())),
        "`denoiser`",
        by=Warning,
    ),
    wrong("DiffLoss", "a network with gradients", lambda: DiffLoss(with_gradients(_live_unet())), "`denoiser`", by=Warning),
    wrong("DiffLoss", "an untrained network", lambda: DiffLoss(tiny_unet()), "`denoiser` (UNet2DModel) seems to be untrained", by=Warning),
    wrong("DiffLoss", "what returns a float", lambda: DiffLoss(floats, h_space_weight=0)(restored(), clean()), "denoiser"),
    wrong("DiffLoss", "what returns a scalar", lambda: DiffLoss(flat, h_space_weight=0)(restored(), clean()), "denoiser"),
    wrong("DiffLoss", "what returns None", lambda: DiffLoss(lambda x, t: None, h_space_weight=0)(restored(), clean()), "denoiser"),
    wrong("DiffLoss", "what returns another size", lambda: DiffLoss(lambda x, t: x[..., :4], h_space_weight=0)(restored(), clean()), "denoiser"),
    wrong("DiffLoss", "a function without a bottleneck", lambda: DiffLoss(fill)(restored(), clean()), "h_space_weight"),
    # --- its schedule
    wrong("DiffLoss", "a schedule by name", lambda: DiffLoss(unet(), "linear"), "schedule"),
    wrong("DiffLoss", "a number of timesteps for a schedule", lambda: DiffLoss(unet(), 1000), "schedule"),
    wrong("DiffLoss", "a schedule's class", lambda: DiffLoss(unet(), NoiseSchedule), "schedule"),
    wrong("DiffLoss", "a schedule not made", lambda: DiffLoss(unet(), NoiseSchedule.linear), "schedule"),
    wrong("DiffLoss", "a scheduler's class", lambda: DiffLoss(unet(), DDPMScheduler), "schedule"),
    wrong("DiffLoss", "betas for a schedule", lambda: DiffLoss(unet(), BETAS), "alphas_cumprod"),
    wrong("DiffLoss", "alphas that are not cumulated", lambda: DiffLoss(unet(), 1 - BETAS), "alphas_cumprod"),
    wrong("DiffLoss", "a scheduler of sigmas", lambda: DiffLoss(unet(), EDMEulerScheduler()), "schedule"),
    wrong("DiffLoss", "a list of words for a schedule", lambda: DiffLoss(unet(), ["a"]), "schedule"),
    # --- options
    *(wrong("DiffLoss", f"noise_weight={n}", partial(DiffLoss, unet(), noise_weight=v), "`noise_weight`") for n, v in NOT_NUMBERS.items()),
    *(wrong("DiffLoss", f"h_space_weight={n}", partial(DiffLoss, unet(), h_space_weight=v), "`h_space_weight`") for n, v in NOT_NUMBERS.items()),
    *(wrong("Subsampled", f"every={n}", partial(Subsampled, nn.L1Loss(), every=v), "`every`") for n, v in NOT_WHOLE.items()),
    *(wrong("Subsampled", f"subset={v!r}", partial(Subsampled, nn.L1Loss(), subset=v), "`subset`") for v in (0, -1, 1.5, 0.0, "0.5", True, float("nan"), (4, 4))),
    *(wrong("Subsampled", k, partial(Subsampled, v), "`objective`") for k, v in {"None": None, "a class": nn.L1Loss, "text": "l1", "a mapping": {"pixel": nn.L1Loss()}, "a list": [nn.L1Loss()], "of one image": lambda a: a.mean(), "small_prior": small_prior, "an image": clean()}.items()),
    *(wrong("Subsampled", f"generator={k}", partial(lambda v: Subsampled(nn.L1Loss())(restored(), clean(), generator=v), v), "`generator`") for k, v in NOT_GENERATORS.items()),
    wrong("Subsampled", "an unknown option", lambda: Subsampled(nn.L1Loss(), crop=4), "crop", by=TypeError),
    wrong("DiffLoss", "an option of Subsampled", lambda: DiffLoss(unet(), every=2), "every", by=TypeError),
    wrong("WeightedSum", "weights 0 later", lambda: _weightless()(restored(), clean()), "`weights`"),
    *(wrong("DiffLoss", f"input_range={n}", partial(DiffLoss, unet(), input_range=v), "`input_range`") for n, v in NOT_RANGES.items()),
    wrong("DiffLoss", "both weights 0", lambda: DiffLoss(unet(), noise_weight=0, h_space_weight=0), "noise_weight", "h_space_weight"),
    wrong("DiffLoss", "both weights 0 later", lambda: zeroed()(restored(), clean()), "noise_weight"),
    wrong("DiffLoss", "timesteps reversed", lambda: DiffLoss(unet(), timesteps=(600, 100)), "`timesteps`"),
    wrong("DiffLoss", "timesteps beyond the table", lambda: DiffLoss(unet(), timesteps=(0, 2000)), "`timesteps`"),
    wrong("DiffLoss", "timesteps of one", lambda: DiffLoss(unet(), timesteps=(100,)), "`timesteps`"),
    wrong("DiffLoss", "timesteps a number", lambda: DiffLoss(unet(), timesteps=100), "`timesteps`"),
    wrong("DiffLoss", "timesteps as text", lambda: DiffLoss(unet(), timesteps="100,600"), "`timesteps`"),
    wrong("DiffLoss", "timesteps as fractions", lambda: DiffLoss(unet(), timesteps=(0.1, 0.6)), "`timesteps`"),
    wrong("DiffLoss", "timesteps negative", lambda: DiffLoss(unet(), timesteps=(-1, 5)), "`timesteps`"),
    wrong("DiffLoss", "timesteps empty", lambda: DiffLoss(unet(), timesteps=(100, 100)), "`timesteps`"),
    wrong("DiffLoss", "timesteps text within", lambda: DiffLoss(unet(), timesteps=("1", "9")), "`timesteps`"),
    wrong("DiffLoss", "timesteps a class", lambda: DiffLoss(unet(), timesteps=range), "`timesteps`"),
    wrong("DiffLoss", "timesteps drawn as floats", lambda: DiffLoss(fill, h_space_weight=0, timesteps=lambda n, g: torch.rand(n))(restored(), clean()), "timestep"),
    wrong("DiffLoss", "timesteps drawn beyond the table", lambda: DiffLoss(fill, h_space_weight=0, timesteps=lambda n, g: torch.full((n,), 1000))(restored(), clean()), "timestep"),
    wrong("DiffLoss", "timesteps drawn for another batch", lambda: DiffLoss(fill, h_space_weight=0, timesteps=lambda n, g: torch.ones(n + 1).long())(restored(), clean()), "timestep"),
    wrong("DiffLoss", "timesteps by a function of one", lambda: DiffLoss(fill, h_space_weight=0, timesteps=lambda n: torch.ones(n))(restored(), clean()), "timesteps"),
    wrong("DiffLoss", "timesteps drawn as a list", lambda: DiffLoss(fill, h_space_weight=0, timesteps=lambda n, g: [1] * n)(restored(), clean()), "timestep"),
    wrong("DiffLoss", "an unknown distance", lambda: DiffLoss(unet(), distance="huber"), "`distance`"),
    wrong("DiffLoss", "a distance in capitals", lambda: DiffLoss(unet(), distance="L1"), "`distance`"),
    wrong("DiffLoss", "a module for a distance", lambda: DiffLoss(unet(), distance=nn.L1Loss()), "`distance`"),
    wrong("DiffLoss", "a list for a distance", lambda: DiffLoss(unet(), distance=["l1"]), "`distance`"),
    wrong("DiffLoss", "an unknown reduction", lambda: DiffLoss(unet(), reduction="avg"), "`reduction`"),
    wrong("DiffLoss", "None for a reduction", lambda: DiffLoss(unet(), reduction=None), "`reduction`"),
    wrong("DiffLoss", "an unknown size policy", lambda: DiffLoss(unet(), size="crop"), "`size`"),
    wrong("DiffLoss", "a number for the size policy", lambda: DiffLoss(unet(), size=64), "`size`"),
    wrong("DiffLoss", "an unknown compare", lambda: DiffLoss(unet(), compare="x0"), "`compare`"),
    wrong("DiffLoss", "snr_power as text", lambda: DiffLoss(unet(), snr_power="0.5"), "`snr_power`"),
    wrong("DiffLoss", "snr_power NaN", lambda: DiffLoss(unet(), snr_power=float("nan")), "`snr_power`"),
    *(
        wrong("DiffLoss", f"{o}={v!r}", partial(DiffLoss, unet(), **{o: v}), f"`{o}`")
        for o in ("crop",)
        for v in (0, -1, 1.5, 0.0, "0.5", True, float("nan"), (4, 4))
    ),
    wrong("DiffLoss", "checkpointing as text", lambda: DiffLoss(unet(), checkpointing="false"), "`checkpointing`"),
    wrong("DiffLoss", "conditioning of an unconditional model", lambda: DiffLoss(unet(), conditioning=torch.ones(1, 4, 8)), "`conditioning`"),
    wrong("DiffLoss", "no conditioning of a conditional model", lambda: DiffLoss(conditional_unet()), "`conditioning`"),
    wrong("DiffLoss", "a prompt for the conditioning", lambda: DiffLoss(conditional_unet(), conditioning="a photo"), "`conditioning`"),
    wrong("DiffLoss", "conditioning of another width", lambda: DiffLoss(conditional_unet(), conditioning=torch.ones(1, 4, 9))(restored(), clean()), "conditioning"),
    wrong("DiffLoss", "conditioning of another batch", lambda: DiffLoss(conditional_unet(), conditioning=torch.ones(3, 4, 8))(restored(), clean()), "conditioning"),
    wrong("DiffLoss", "a class beyond the table", lambda: DiffLoss(transformer(), conditioning=torch.tensor([7]))(restored(), clean()), "conditioning"),
    wrong("DiffLoss", "an encoder's class", lambda: DiffLoss(latent_unet(), encoder=type(vae())), "`encoder`"),
    wrong("DiffLoss", "an encoder by name", lambda: DiffLoss(latent_unet(), encoder="vae"), "`encoder`"),
    wrong("DiffLoss", "an encoder beside a model of pixels", lambda: DiffLoss(unet(), encoder=vae())(restored(), clean()), "encoder"),
    wrong("DiffLoss", "no encoder beside a model of latents", lambda: DiffLoss(latent_unet())(restored(), clean()), "encoder"),
    wrong("DiffLoss", "an encoder beside a LatentPrior", lambda: DiffLoss(LatentPrior(vae(), latent_unet()), encoder=vae()), "encoder"),
    wrong("DiffLoss", "a schedule beside a LatentPrior", lambda: DiffLoss(LatentPrior(vae(), latent_unet()), linear()), "schedule"),
    wrong("DiffLoss", "an encoder that returns a distribution", lambda: DiffLoss(latent_unet(), encoder=vae().encode)(restored(), clean()), "encoder"),
    wrong("DiffLoss", "an unknown option", lambda: DiffLoss(unet(), gamma=0.1), "gamma", by=TypeError),
    wrong("DiffLoss", "a misspelled option", lambda: DiffLoss(unet(), timestep=(1, 2)), "timestep", by=TypeError),
    wrong("DiffLoss", "options by place", lambda: DiffLoss(unet(), None, 1.0), "positional", by=TypeError),
    # --- pairs of images
    *(wrong(n, "exchanged images", partial(lambda b: b()(clean(), restored()), b), "`restored`", "exchanged") for n, b in PAIRED.items()),
    *(wrong(n, "one image", partial(lambda b: b()(restored()), b), "target", by=TypeError) for n, b in PAIRED.items()),
    *(wrong(n, f"{k} for restored", partial(lambda b, v: b()(v, clean()), b, v), "`restored`") for n, b in PAIRED.items() for k, v in NOT_TENSORS.items() if (n, k) != ("TDPLoss", "x")),
    *(wrong(n, f"{k} for target", partial(lambda b, v: b()(restored(), v), b, v), "`target`") for n, b in PAIRED.items() for k, v in NOT_TENSORS.items()),
    *(wrong(n, f"{k} for both", partial(lambda b, v: b()(v(), v()), b, v), "`restored`") for n, b in PAIRED.items() for k, v in NOT_IMAGES.items()),
    *(wrong(n, "images of two sizes", partial(lambda b: b()(restored(), clean(size=9)), b), "`target`") for n, b in PAIRED.items()),
    *(wrong(n, "grey beside color", partial(lambda b: b()(restored(), clean(channels=1)), b), "`target`") for n, b in PAIRED.items()),
    *(wrong(n, "one target for two", partial(lambda b: b()(restored(), clean(1, 3, 8, 8)), b), "`target`") for n, b in PAIRED.items()),
    *(wrong(n, "a target on another device", partial(lambda b: b()(restored(), clean().to("meta")), b), "`target`") for n, b in PAIRED.items()),
    *(wrong(n, "a target in float64", partial(lambda b: b()(restored(), clean().double()), b), "`target`") for n, b in PAIRED.items()),
    *(wrong(n, "0..255 without saying so", partial(lambda b: b()(restored(), 255 * clean()), b), "`target`", "input_range", by=Warning) for n, b in PAIRED.items()),
    *(wrong(n, "a restored image in 0..255", partial(lambda b: b()(255 * restored(), clean()), b), "`restored`", "input_range", by=Warning) for n, b in PAIRED.items()),
    *(wrong(n, "both in -1..1", partial(lambda b: b()(2 * restored() - 1, 2 * clean() - 1), b), "`target`", "input_range", by=Warning) for n, b in PAIRED.items()),
    wrong("DiffLoss", "[0, 1] where -1..1 is said", lambda: DiffLoss(fill, h_space_weight=0, input_range=(-1, 1))(restored(), clean()), "input_range", by=Warning),
    wrong("DiffLoss", "[0, 1] where 0..255 is said", lambda: DiffLoss(fill, h_space_weight=0, input_range=(0, 255))(restored(), clean()), "input_range", by=Warning),
    wrong("DiffLoss", "channels last", lambda: DiffLoss(unet())(restored(2, 8, 8, 3), clean(2, 8, 8, 3)), "`restored`", "(N, 3, H, W)"),
    wrong("DiffLoss", "grey images", lambda: DiffLoss(unet())(restored(channels=1), clean(channels=1)), "`restored`", "(N, 3, H, W)"),
    wrong("DiffLoss", "images with alpha", lambda: DiffLoss(unet())(restored(channels=4), clean(channels=4)), "`restored`", "(N, 3, H, W)"),
    wrong("DiffLoss", "images of half size where none is padded", lambda: DiffLoss(unet(), size="error")(restored(size=7), clean(size=7)), "size"),
    # --- what is drawn
    *(wrong("DiffLoss", f"generator={k}", partial(lambda v: noise_loss()(restored(), clean(), generator=v), v), "`generator`") for k, v in NOT_GENERATORS.items()),
    wrong("DiffLoss", "generators for another batch", lambda: noise_loss()(restored(), clean(), generator=[seeded()] * 3), "`generator`"),
    wrong("DiffLoss", "a list of seeds", lambda: noise_loss()(restored(), clean(), generator=[0, 1]), "`generator`"),
    wrong("DiffLoss", "timestep=1000", lambda: noise_loss()(restored(), clean(), timestep=1000), "`timestep`"),
    wrong("DiffLoss", "timestep=-1", lambda: noise_loss()(restored(), clean(), timestep=-1), "`timestep`"),
    wrong("DiffLoss", "timestep=.5", lambda: noise_loss()(restored(), clean(), timestep=0.5), "`timestep`"),
    wrong("DiffLoss", "timestep as text", lambda: noise_loss()(restored(), clean(), timestep="5"), "`timestep`"),
    wrong("DiffLoss", "timestep of floats", lambda: noise_loss()(restored(), clean(), timestep=torch.rand(2)), "`timestep`"),
    wrong("DiffLoss", "timesteps for another batch", lambda: noise_loss()(restored(), clean(), timestep=torch.ones(3).long()), "`timestep`"),
    wrong("DiffLoss", "timestep a list", lambda: noise_loss()(restored(), clean(), timestep=[1, 2]), "`timestep`"),
    wrong("DiffLoss", "timestep a bool", lambda: noise_loss()(restored(), clean(), timestep=True), "`timestep`"),
    wrong("DiffLoss", "noise of another shape", lambda: noise_loss()(restored(), clean(), noise=clean(2, 3, 4, 4)), "`noise`"),
    wrong("DiffLoss", "noise as a numpy array", lambda: noise_loss()(restored(), clean(), noise=ARRAY), "`noise`"),
    wrong("DiffLoss", "noise as a level", lambda: noise_loss()(restored(), clean(), noise=0.1), "`noise`"),
    wrong("DiffLoss", "noise of whole numbers", lambda: noise_loss()(restored(), clean(), noise=clean().long()), "`noise`"),
    wrong("DiffLoss", "an unknown argument of the call", lambda: noise_loss()(restored(), clean(), t=5), "t", by=TypeError),
    # --- task networks
    *(wrong("TDPLoss", f"{k} for task", partial(lambda v: TDPLoss(v, "stage"), v), "`task`") for k, v in NOT_NETWORKS.items()),
    *(wrong("HLFLoss", f"{k} for task", partial(lambda v: HLFLoss(v, reference(), "stage"), v), "`task`") for k, v in NOT_NETWORKS.items()),
    *(wrong("HLFLoss", f"{k} for reference", partial(lambda v: HLFLoss(reader(), v, "stage"), v), "`reference`") for k, v in NOT_NETWORKS.items()),
    *(wrong("FeatureMatchingLoss", f"{k} for student", partial(lambda v: FeatureMatchingLoss(v, reference(), "stage"), v), "`student`") for k, v in NOT_NETWORKS.items()),
    *(wrong("FeatureMatchingLoss", f"{k} for teacher", partial(lambda v: FeatureMatchingLoss(reader(), v, "stage"), v), "`teacher`") for k, v in NOT_NETWORKS.items()),
    *(wrong("FeatureExtractor", f"{k} for network", partial(lambda v: FeatureExtractor(v, "stage"), v), "`network`") for k, v in NOT_NETWORKS.items()),
    wrong("TDPLoss", "a network that states no normalization", lambda: TDPLoss(reader(), "stage"), "`normalize`", by=Warning),
    wrong("TDPLoss", "an untrained network", lambda: TDPLoss(_untrained(), "1", normalize=None)(restored(), clean()), "`task` (Sequential) seems", by=Warning),
    wrong("FeatureMatchingLoss", "an untrained teacher", lambda: FeatureMatchingLoss(_untrained(), _untrained(), "1", normalize=None), "`teacher` (Sequential) seems", by=Warning),
    wrong("HLFLoss", "exchanged networks", lambda: HLFLoss(reference(), with_gradients(live_recogniser()), "stage", normalize=None), "`reference`", by=Warning),
    wrong("FeatureMatchingLoss", "exchanged networks", lambda: FeatureMatchingLoss(reference(), with_gradients(live_recogniser()), "stage"), "`student`"),
    wrong("FeatureMatchingLoss", "a student at rest", lambda: FeatureMatchingLoss(reference(), reference(), "stage")(clean(), clean()), "student"),
    wrong("HLFLoss", "one network for both", lambda: HLFLoss(reader(), reader(), "stage"), "reference"),
    wrong("HLFLoss", "a list of layers for the reference", lambda: HLFLoss(reader(), ["stage"]), "`reference`"),
    wrong("TDPLoss", "another loss for the task", lambda: TDPLoss(nn.CrossEntropyLoss()), "layers"),
    wrong("TDPLoss", "a network without a default", lambda: TDPLoss(live_recogniser()), "`layers`"),
    *(
        wrong(n, f"layers={v!r}", partial(lambda b, v: _looking(b, v), n, v), "`layers`")
        for n in ("TDPLoss", "HLFLoss", "FeatureMatchingLoss", "FeatureExtractor")
        for v in ("stge", ["stage", "nothing"], [], 3, ["stage", "stage"], [3], {"stage": 1.0}, nn.ReLU())
    ),
    wrong("TDPLoss", "layers that do not run", lambda: TDPLoss(_idle(), "idle")(restored(), clean()), "`layers`", "idle"),
    wrong("TDPLoss", "a container with the input", lambda: TDPLoss(_pyramid(), "encoder")(restored(), clean()), "`layers`"),
    wrong("TDPLoss", "a part that is not returned", lambda: TDPLoss(live_recogniser(), "stage/3")(restored(), clean()), "`layers`"),
    *(wrong(n, f"input_range={k}", partial(b, input_range=v), "`input_range`") for n, b in LOOKING.items() for k, v in NOT_RANGES.items() if k in ("255", "reversed", "text", "None")),
    *(wrong(n, "an unknown distance", partial(b, distance="L1"), "`distance`") for n, b in LOOKING.items()),
    *(wrong(n, "an unknown reduction", partial(b, reduction="avg"), "`reduction`") for n, b in LOOKING.items()),
    *(wrong(n, "an unknown option", partial(b, weight=1.0), "weight", by=TypeError) for n, b in LOOKING.items()),
    *(wrong(n, f"layer_weights={v!r}", partial(b, layer_weights=v), "layer_weights") for n, b in LOOKING.items() for v in ({"stage": "1"}, {"stge": 1.0}, {"stage": -1}, {"stage": 0}, [1.0], 2.0, {"stage": float("nan")}, {"stage": None}, {"stage": True})),
    *(
        wrong("TDPLoss", f"normalize={k}", partial(tdp, normalize=v), "`normalize`")
        for k, v in {
            "unknown": "imagenet1k", "a number": 0.5, "one tuple": (0.5, 0.5, 0.5), "a std of 0": ((0.5,) * 3, (0.0,) * 3),
            "two and three": ((0.5,) * 3, (0.5,) * 2), "a class": nn.BatchNorm2d, "True": True, "text within": (("a",) * 3, ("b",) * 3),
            "model": "model", "NaN": ((float("nan"),) * 3, (1.0,) * 3),
        }.items()
    ),
    wrong("TDPLoss", "normalize returns None", lambda: tdp(normalize=lambda x: None)(restored(), clean()), "normalize"),
    wrong("TDPLoss", "normalize of two arguments", lambda: tdp(normalize=lambda x, y: x)(restored(), clean()), "normalize"),
    wrong("TDPLoss", "grey images", lambda: tdp()(restored(channels=1), clean(channels=1)), "expand(-1, 3, -1, -1)", "normalize"),
    wrong("TDPLoss", "channels last", lambda: tdp()(restored(2, 8, 8, 3), clean(2, 8, 8, 3)), "channels"),
    wrong("HLFLoss", "grey images", lambda: hlf()(restored(channels=1), clean(channels=1)), "expand(-1, 3, -1, -1)"),
    wrong("FeatureMatchingLoss", "grey images", lambda: matching()(clean(channels=1), clean(channels=1)), "expand(-1, 3, -1, -1)"),
    *(wrong("FeatureMatchingLoss", f"{k} for the student's images", partial(lambda v: matching()(v, clean()), v), "`student_images`") for k, v in NOT_TENSORS.items()),
    *(wrong("FeatureMatchingLoss", f"{k} for the teacher's images", partial(lambda v: matching()(clean(), v), v), "`teacher_images`") for k, v in NOT_TENSORS.items()),
    *(wrong("FeatureMatchingLoss", f"{k} for the images", partial(lambda v: matching()(v(), v()), v), "_images`") for k, v in NOT_IMAGES.items()),
    wrong("FeatureMatchingLoss", "images of two sizes", lambda: matching()(clean(), clean(size=9)), "teacher_images"),
    wrong("FeatureMatchingLoss", "0..255", lambda: matching()(clean(), 255 * clean()), "input_range", by=Warning),
    wrong("FeatureMatchingLoss", "features of another layer", lambda: matching()({"stem": clean()}, clean()), "student_images"),
    wrong("FeatureMatchingLoss", "features of another shape", lambda: matching()({"stage": restored()}, clean()), "student_images"),
    wrong("FeatureMatchingLoss", "no features", lambda: matching()({}, clean()), "student_images"),
    *(wrong("FeatureExtractor", f"{k} for images", partial(lambda v: FeatureExtractor(reader(), "stage")(v), v), "images") for k, v in NOT_TENSORS.items()),
    *(wrong("FeatureExtractor", f"{k} for images", partial(lambda v: FeatureExtractor(reader(), "stage")(v()), v), "images") for k, v in NOT_IMAGES.items()),
    wrong("FeatureExtractor", "images on another device", lambda: FeatureExtractor(reader(), "stage")(clean().to("meta")), "images", "device"),
    wrong("FeatureExtractor", "an empty list", lambda: FeatureExtractor(live_detector())([]), "images"),
    wrong("FeatureExtractor", "another extractor", lambda: FeatureExtractor(FeatureExtractor(reader(), "stage"), "stage"), "`network`"),
    wrong("TDPLoss", "lists for a classifier", lambda: tdp()([clean(3, 8, 8)], [clean(3, 8, 8)]), "list", by=TypeError, obscure="only the network knows whether it takes lists; its own error passes"),
    wrong("TDPLoss", "layers that the extractor has not", lambda: TDPLoss(FeatureExtractor(reader(), "stem"), "stage"), "`layers`"),
    wrong("TDPLoss", "a range beside an extractor of another", lambda: TDPLoss(FeatureExtractor(reader(), "stage"), input_range=(0, 255)), "input_range"),
    # --- denoising
    wrong("DenoisingLoss", "no schedule", lambda: DenoisingLoss(fill), "schedule", by=TypeError),
    wrong("DenoisingLoss", "exchanged", lambda: DenoisingLoss(linear(), fill), "`denoiser`"),
    wrong("DenoisingLoss", "a class", lambda: DenoisingLoss(UNet2DModel, linear()), "`denoiser`"),
    wrong("DenoisingLoss", "None", lambda: DenoisingLoss(None, linear()), "`denoiser`"),
    wrong("DenoisingLoss", "a path", lambda: DenoisingLoss("unet.pth", linear()), "`denoiser`"),
    wrong("DenoisingLoss", "a loss", lambda: DenoisingLoss(nn.L1Loss(), linear()), "`denoiser`"),
    wrong("DenoisingLoss", "another loss", lambda: DenoisingLoss(diff(), linear()), "`denoiser`"),
    wrong("DenoisingLoss", "small_prior", lambda: DenoisingLoss(small_prior, linear()), "`denoiser`"),
    wrong("DenoisingLoss", "a restorer", lambda: DenoisingLoss(restorer(), linear())(clean()), "`denoiser`"),
    wrong("DenoisingLoss", "a schedule by name", lambda: DenoisingLoss(fill, "linear"), "`schedule`"),
    wrong("DenoisingLoss", "a schedule's class", lambda: DenoisingLoss(fill, NoiseSchedule), "`schedule`"),
    wrong("DenoisingLoss", "a schedule not made", lambda: DenoisingLoss(fill, NoiseSchedule.linear), "`schedule`"),
    wrong("DenoisingLoss", "a scheduler", lambda: DenoisingLoss(fill, DDPMScheduler()), "`schedule`"),
    wrong("DenoisingLoss", "betas", lambda: DenoisingLoss(fill, BETAS), "`schedule`"),
    wrong("DenoisingLoss", "an unknown distance", lambda: DenoisingLoss(fill, linear(), distance="L1"), "`distance`"),
    wrong("DenoisingLoss", "an unknown reduction", lambda: DenoisingLoss(fill, linear(), reduction="avg"), "`reduction`"),
    *(wrong("DenoisingLoss", f"input_range={k}", partial(DenoisingLoss, fill, linear(), input_range=v), "`input_range`") for k, v in NOT_RANGES.items() if v is not None),
    *(wrong("DenoisingLoss", f"timesteps={v!r}", partial(DenoisingLoss, fill, levels(), timesteps=v), "`timesteps`") for v in ((0, 1000), (5, 5), (9, 1), (0.1, 0.5), 10, "1,9", (1, 2, 3), (True, 5), ("1", "9"))),
    *(wrong("DenoisingLoss", f"weights={k}", partial(DenoisingLoss, fill, levels(), weights=v), "`weights`") for k, v in {"a number": 1.0, "too few": [1.0], "text": ["a"] * 51, "NaN": [float("nan")] * 51, "negative": [-1.0] * 51, "None within": [None] * 51, "all 0": [0.0] * 51}.items()),
    *(wrong("DenoisingLoss", f"{k} for clean", partial(lambda v: DenoisingLoss(fill, linear())(v), v), "`clean`") for k, v in NOT_TENSORS.items()),
    *(wrong("DenoisingLoss", f"{k} for clean", partial(lambda v: DenoisingLoss(fill, linear())(v()), v), "`clean`") for k, v in NOT_IMAGES.items()),
    *(wrong("DenoisingLoss", f"generator={k}", partial(lambda v: DenoisingLoss(fill, linear())(clean(), generator=v), v), "`generator`") for k, v in NOT_GENERATORS.items()),
    wrong("DenoisingLoss", "two images", lambda: DenoisingLoss(fill, linear())(clean(), clean()), "positional", by=TypeError),
    wrong("DenoisingLoss", "0..255", lambda: DenoisingLoss(fill, linear())(255 * clean()), "`clean`", "input_range", by=Warning),
    wrong("DenoisingLoss", "-1..1", lambda: DenoisingLoss(fill, linear())(2 * clean() - 1), "`clean`", "input_range", by=Warning),
    wrong("DenoisingLoss", "t = 60 of 50", lambda: DenoisingLoss(fill, levels())(clean(), timestep=60), "`timestep`"),
    wrong("DenoisingLoss", "t = -5", lambda: DenoisingLoss(fill, levels())(clean(), timestep=-5), "`timestep`"),
    wrong("DenoisingLoss", "t = .5", lambda: DenoisingLoss(fill, levels())(clean(), timestep=0.5), "`timestep`"),
    wrong("DenoisingLoss", "t = True", lambda: DenoisingLoss(fill, levels())(clean(), timestep=True), "`timestep`"),
    wrong("DenoisingLoss", "noise of another shape", lambda: DenoisingLoss(fill, levels())(clean(), noise=clean(2, 3, 4, 4)), "noise"),
    wrong("DenoisingLoss", "noise as a numpy array", lambda: DenoisingLoss(fill, levels())(clean(), noise=ARRAY), "noise"),
    wrong("DenoisingLoss", "noise as a level", lambda: DenoisingLoss(fill, levels())(clean(), noise=0.1), "noise"),
    *(wrong("DenoisingLoss", f"a network that returns {k}", partial(lambda v: DenoisingLoss(v, linear())(clean()), v), "denoiser") for k, v in {"a float": floats, "a scalar": flat, "None": lambda x, t: None, "text": lambda x, t: "x", "an empty tuple": lambda x, t: (), "half the size": lambda x, t: x[..., :4], "one channel": lambda x, t: x[:, :1], "whole numbers": lambda x, t: x.long(), "a mapping": lambda x, t: {"sample": x}}.items()),
    wrong("DenoisingLoss", "a function of images alone", lambda: DenoisingLoss(lambda x: x, linear())(clean()), "denoiser"),
    # --- several outputs, none but the output, and parts of the image
    *(wrong("MultiOutput", f"objective={k}", partial(MultiOutput, v), "`objective`") for k, v in {"None": None, "a class": nn.L1Loss, "text": "l1"}.items()),
    *(wrong("MultiOutput", f"weights={v!r}", partial(MultiOutput, nn.L1Loss(), v), "`weights") for v in (1.0, "12", ["1"], [0, 0], [float("nan")])),
    *(wrong("MultiOutput", f"restored={k}", partial(MultiOutput(nn.L1Loss()), v, clean()), "`restored`") for k, v in {"an image": restored(), "nothing": [], "None": None}.items()),
    wrong("MultiOutput", "weights of another number", lambda: MultiOutput(nn.L1Loss(), [1.0])([restored()] * 2, clean()), "`weights`"),
    wrong("MultiOutput", "targets of another number", lambda: MultiOutput(nn.L1Loss())([restored()] * 2, [clean()]), "`target`"),
    wrong("MultiOutput", "a target that is smaller", lambda: MultiOutput(nn.L1Loss())([restored()], clean()[..., ::2, ::2]), "`target`"),
    *(wrong("NoReference", k, partial(NoReference, v), "`function`") for k, v in {"None": None, "a class": nn.L1Loss, "a loss of two": nn.L1Loss()}.items()),
    *(wrong("NoReference", f"sign={v!r}", partial(NoReference, torch.mean, sign=v), "`sign`") for v in (0, -0.5, "-1", None)),
    wrong("NoReference", "a function that returns a number", lambda: NoReference(lambda image: 1.0)(restored(), clean()), "`function`"),
    *(wrong("Masked", k, partial(Masked, v), "`objective`") for k, v in {"None": None, "a class": nn.L1Loss, "a mask": clean()}.items()),
    *(wrong("Masked", f"mask={k}", partial(lambda v: Masked(nn.L1Loss())(restored(), clean(), mask=v), v), "`mask`") for k, v in {"None": None, "a number": 1.0, "two channels": clean()[:, :2], "of pixels": clean()[0, 0], "of 255": clean() * 255, "negative": clean() - 2}.items()),
    # --- sums
    *(wrong("WeightedSum", f"objectives={k}", partial(WeightedSum, v), "`objectives") for k, v in {"None": None, "a list": [nn.L1Loss()], "one loss": nn.L1Loss(), "nothing": {}, "a class": {"pixel": nn.L1Loss}, "a name": {"pixel": "l1"}, "None within": {"pixel": None}, "pairs": [("pixel", nn.L1Loss())], "a number": {"pixel": 1.0}, "a constructor": {"diff": small_prior}}.items()),
    *(wrong("WeightedSum", f"weights={k}", partial(WeightedSum, {"pixel": nn.L1Loss(), "other": nn.MSELoss()}, v), "weights") for k, v in {"a list": [1.0, 2.0], "a number": 0.1, "text": {"other": "1e-3"}, "an unknown name": {"pixl": 1.0}, "NaN": {"other": float("nan")}, "infinity": {"other": float("inf")}, "None": {"other": None}, "True": {"other": True}, "all 0": {"pixel": 0, "other": 0}}.items()),
    wrong("WeightedSum", "a prior for an objective", lambda: WeightedSum({"diff": unet()})(restored(), clean()), "size of tensor", by=RuntimeError, obscure="a U-Net takes two arguments as well, and fails on the second"),
    wrong("WeightedSum", "a name with a slash", lambda: WeightedSum({"a/b": nn.L1Loss()}), "`objectives`"),
    wrong("WeightedSum", "a name that is no text", lambda: WeightedSum({1: nn.L1Loss()}), "`objectives`"),
    wrong("WeightedSum", "an unknown option", lambda: WeightedSum({"pixel": nn.L1Loss()}, weight=1.0), "weight", by=TypeError),
    *(wrong("WeightedSum", f"an objective that returns {k}", partial(lambda v: WeightedSum({"mine": v})(restored(), clean()), v), "mine") for k, v in {"a float": lambda a, b: 0.5, "None": lambda a, b: None, "an image": lambda a, b: a - b, "a mapping": lambda a, b: {"x": a.mean()}, "a tuple": lambda a, b: (a.mean(), b.mean()), "text": lambda a, b: "0.5"}.items()),
    wrong("WeightedSum", "scalars beside (N,)", lambda: WeightedSum({"mine": nn.L1Loss(), "other": lambda a, b: (a - b).mean(dim=(1, 2, 3))})(restored(), clean()), "mine"),
    wrong("WeightedSum", "an objective that is not reduced", lambda: WeightedSum({"mine": nn.L1Loss(reduction="none")})(restored(), clean()), "mine"),
    wrong("WeightedSum", "an objective of one image", lambda: WeightedSum({"mine": lambda a: a.mean()})(restored(), clean()), "mine"),
    *(wrong("WeightedSum", f"generator={k}", partial(lambda v: weighted()(restored(), clean(), generator=v), v), "`generator`") for k, v in NOT_GENERATORS.items()),
    *(wrong("Objective", f"terms that are {k}", partial(lambda v: Returns(v)(restored(), clean()), v), "terms") for k, v in {"a tensor": lambda d: d.mean(), "None": None, "floats": {"a": 0.5}, "nothing": {}, "a list": [1.0], "None within": {"a": None}, "text": "0.5", "images beside scalars": lambda d: {"a": d, "b": d.mean()}}.items()),
    *(wrong("Objective", f"terms in a sum that are {k}", partial(lambda v: WeightedSum({"mine": Returns(v)})(restored(), clean()), v), "terms", "mine") for k, v in {"a tensor": lambda d: d.mean(), "None": None, "floats": {"a": 0.5}, "nothing": {}, "images": lambda d: {"a": d}}.items()),
    wrong("Objective", "without terms", lambda: NotWritten(), "terms", by=TypeError),
]  # fmt: skip


def _untrained() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def _live_unet() -> nn.Module:
    return as_if_trained(tiny_unet())


def _weightless() -> WeightedSum:
    total = weighted()
    total.weights = dict.fromkeys(total.weights, 0.0)
    return total


def _looking(name: str, layers: Any) -> Any:
    builders: dict[str, Any] = {
        "TDPLoss": lambda: TDPLoss(reader(), layers),
        "HLFLoss": lambda: HLFLoss(reader(), reference(), layers),
        "FeatureMatchingLoss": lambda: FeatureMatchingLoss(reader(), reference(), layers),
        "FeatureExtractor": lambda: FeatureExtractor(reader(), layers),
    }
    return builders[name]()


class _Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def _idle() -> nn.Module:
    return _Idle()


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, self.conv(x)]


class _Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Encoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)[1]


def _pyramid() -> nn.Module:
    return _Pyramid()


# wrong uses that are not told yet
