"""Wrong uses of schedules, diffusion models and what samples with them."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.schedulers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from restoreloss import (
    Denoiser,
    FlowLevels,
    LatentPrior,
    NoiseLevels,
    NoiseSchedule,
    TimestepMatch,
    as_denoiser,
    denoise,
    load_prior,
    match_timestep,
    null_text,
    order_by_timestep,
    partial_diffusion,
    short_steps,
    small_prior,
)
from tests.contract.wrong_uses.table import wrong
from tests.contract.wrong_uses.things import (
    ABAR,
    ARRAY,
    BETAS,
    NOT_GENERATORS,
    NOT_IMAGES,
    NOT_RANGES,
    NOT_TENSORS,
    clean,
    conditional_unet,
    diff,
    fill,
    latent_unet,
    levels,
    linear,
    reference,
    restorer,
    seeded,
    unet,
    vae,
)

FACTORIES = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
}
NOT_COUNTS: dict[str, Any] = {"0": 0, "-1": -1, "text": "1000", "1.5": 1.5, "None": None, "True": True}
NOT_MODELS: dict[str, Any] = {
    "None": None, "a class": UNet2DModel, "text": "google/ddpm-cat-256", "a path": Path("unet.pth"), "an image": clean(),
    "small_prior": small_prior, "a list": [1], "a scheduler": DDPMScheduler(), "a loss": nn.L1Loss(), "a number": 1000,
}  # fmt: skip
NOT_LEVELS: dict[str, Any] = {
    "None": None, "text": "linear", "a number": 50, "words": ["a"], "nothing": [], "a matrix": [[0.1, 0.2]], "NaN": [0.1, float("nan")],
    "infinite": [0.1, float("inf")], "negative": [-0.1, 0.1], "falling": [0.5, 0.1], "a class": Tensor, "numbers as text": ["0.1", "0.2"],
}  # fmt: skip


def _folder(*names: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    for name in names:
        (folder / name).write_text("{}" if name.endswith(".json") else "no weights")
    return folder


def _match() -> TimestepMatch:
    return TimestepMatch(torch.tensor([0, 1]), torch.rand(2, 2), torch.rand(2))


def _matched(**options: Any) -> TimestepMatch:
    return match_timestep(fill, levels(), **{"degraded": clean(), "clean": clean(), **options})


WRONG = [
    # --- tables
    wrong("NoiseSchedule", "nothing", lambda: NoiseSchedule(), "alphas_cumprod", by=TypeError),
    *(wrong("NoiseSchedule", k, partial(NoiseSchedule, v), "`alphas_cumprod`") for k, v in NOT_TENSORS.items() if k != "a number"),
    *(
        wrong("NoiseSchedule", k, partial(lambda v: NoiseSchedule(v()), v), "alphas_cumprod")
        for k, v in {
            "betas": lambda: BETAS, "alphas that are not cumulated": lambda: 1 - BETAS, "a rising table": lambda: ABAR.flip(0),
            "a number of timesteps": lambda: 1000, "whole numbers": lambda: torch.arange(10), "negative": lambda: ABAR - 0.5,
            "above 1": lambda: ABAR + 0.5, "NaN": lambda: torch.full((5,), float("nan")), "a matrix": lambda: ABAR[None],
            "an empty one": lambda: ABAR[:0], "sigmas": lambda: torch.linspace(0.1, 80, 20), "logarithms": lambda: ABAR.log(),
        }.items()
    ),
    wrong("NoiseSchedule", "an unknown prediction type", lambda: NoiseSchedule(ABAR, prediction_type="noise"), "`prediction_type`"),
    wrong("NoiseSchedule", "None for a prediction type", lambda: NoiseSchedule(ABAR, prediction_type=None), "`prediction_type`"),
    wrong("NoiseSchedule", "a prediction type by place", lambda: NoiseSchedule(ABAR, "epsilon"), "positional", by=TypeError),
    wrong("NoiseSchedule", "an unknown option", lambda: NoiseSchedule.linear(steps=10), "steps", by=TypeError),
    *(wrong("NoiseSchedule", f".{n}({k})", partial(f, v), "`num_timesteps`") for n, f in FACTORIES.items() for k, v in NOT_COUNTS.items()),
    *(
        wrong("NoiseSchedule", f".{n}({o}={v!r})", partial(FACTORIES[n], **{o: v}), o)
        for n in ("linear", "scaled_linear")
        for o in ("beta_start", "beta_end")
        for v in ("1e-4", -0.1, float("nan"), None, 2.0, True)
    ),
    *(wrong("NoiseSchedule", f".cosine({o}={v!r})", partial(NoiseSchedule.cosine, **{o: v}), o) for o in ("offset", "max_beta") for v in ("0.008", float("nan"), None, -1.0)),
    *(
        wrong("NoiseSchedule", f".from_diffusers({k})", partial(NoiseSchedule.from_diffusers, v), "schedule")
        for k, v in {"None": None, "a class": DDPMScheduler, "text": "ddpm", "a U-Net": unet(), "EDM": EDMEulerScheduler(), "flow": FlowMatchEulerDiscreteScheduler(), "a table": ABAR}.items()
    ),
    *(
        wrong("NoiseSchedule", f".add_noise at {v!r}", partial(lambda v: linear().add_noise(clean(), clean(), v), v), "`timestep`")
        for v in (1000, -1, 0.5, "5", None, [1, 2], True)
    ),
    wrong("NoiseSchedule", ".add_noise at floats", lambda: linear().add_noise(clean(), clean(), torch.rand(2)), "`timestep`"),
    wrong("NoiseSchedule", ".add_noise at a bool tensor", lambda: linear().add_noise(clean(), clean(), torch.tensor([True, False])), "`timestep`"),
    wrong("NoiseSchedule", ".add_noise for another batch", lambda: linear().add_noise(clean(), clean(), torch.tensor([1, 2, 3])), "`timestep`"),
    wrong("NoiseSchedule", ".add_noise of another shape", lambda: linear().add_noise(clean(), clean(size=4), 5), "`noise`"),
    wrong("NoiseSchedule", ".add_noise to whole numbers", lambda: linear().add_noise(clean().long(), clean().long(), 5), "`x`"),
    wrong("NoiseSchedule", ".add_noise to an array", lambda: linear().add_noise(ARRAY, clean(), 5), "`x`"),
    wrong("NoiseSchedule", ".add_noise of an array", lambda: linear().add_noise(clean(), ARRAY, 5), "`noise`"),
    wrong("NoiseSchedule", ".add_noise of a level", lambda: linear().add_noise(clean(), 0.1, 5), "`noise`"),
    wrong("NoiseSchedule", ".add_noise without noise", lambda: linear().add_noise(clean(), t=5), "noise", by=TypeError),
    wrong("NoiseSchedule", ".predict_x0 of another shape", lambda: linear().predict_x0(clean(), clean(size=4), 5), "`noise`"),
    wrong("NoiseSchedule", ".predict_x0 of None", lambda: linear().predict_x0(clean(), None, 5), "`noise`"),
    wrong("NoiseSchedule", ".predict_x0 beyond the table", lambda: linear().predict_x0(clean(), clean(), 1000), "`timestep`"),
    wrong("NoiseSchedule", ".posterior upwards", lambda: linear().posterior(clean(), clean(), 5, 10), "`previous`"),
    wrong("NoiseSchedule", ".posterior of another shape", lambda: linear().posterior(clean(), clean(size=4), 5, 4), "`x0`"),
    wrong("NoiseSchedule", ".posterior below the table", lambda: linear().posterior(clean(), clean(), 0, -1), "timestep"),
    wrong("NoiseSchedule", ".to_noise of an unknown type", lambda: linear().to_noise(clean(), clean(), 5, prediction_type="noise"), "`prediction_type`"),
    wrong("NoiseSchedule", ".to_noise of another shape", lambda: linear().to_noise(clean(size=4), clean(), 5, prediction_type="v_prediction"), "`output`"),
    wrong("NoiseSchedule", ".to_noise of an object", lambda: linear().to_noise("x", clean(), 5), "`output`"),
    wrong("NoiseSchedule", ".training_target of another shape", lambda: linear().training_target(clean(), clean(size=4), 5), "`noise`"),
    *(wrong("NoiseLevels", k, partial(NoiseLevels, v), "`sigmas`") for k, v in NOT_LEVELS.items()),
    wrong("NoiseLevels", "an unknown prediction type", lambda: NoiseLevels([0.0, 0.1], prediction_type="noise"), "`prediction_type`"),
    *(wrong("NoiseLevels", f".ir_sde({k})", partial(NoiseLevels.ir_sde, v), "`num_timesteps`") for k, v in NOT_COUNTS.items()),
    *(wrong("NoiseLevels", f".ir_sde(sigma_max={v!r})", partial(NoiseLevels.ir_sde, sigma_max=v), "sigma_max") for v in ("0.04", -1.0, 0.0, float("nan"), None, True)),
    *(wrong("FlowLevels", k, partial(FlowLevels, v), "`levels`") for k, v in NOT_LEVELS.items()),
    wrong("FlowLevels", "above 1", lambda: FlowLevels([0.5, 1.5]), "`levels`"),
    wrong("FlowLevels", "an unknown prediction type", lambda: FlowLevels([0.1, 0.2], prediction_type="flow"), "`prediction_type`"),
    *(wrong("FlowLevels", f"time_scale={v!r}", partial(FlowLevels, [0.1, 0.2], time_scale=v), "`time_scale`") for v in ("1000", 0, -1, float("nan"), None, True)),
    *(wrong("FlowLevels", f".uniform({k})", partial(FlowLevels.uniform, v), "`num_timesteps`") for k, v in NOT_COUNTS.items()),
    *(wrong("FlowLevels", f".uniform(shift={v!r})", partial(FlowLevels.uniform, shift=v), "`shift`") for v in ("3", 0, -1, float("nan"), None, True)),
    *(wrong("FlowLevels", f".from_diffusers({k})", partial(FlowLevels.from_diffusers, v), "scheduler") for k, v in {"None": None, "a class": FlowMatchEulerDiscreteScheduler, "DDPM": DDPMScheduler(), "text": "flow"}.items()),
    # --- models
    *(wrong("as_denoiser", k, partial(as_denoiser, v), "`model`") for k, v in NOT_MODELS.items()),
    wrong("as_denoiser", "exchanged", lambda: as_denoiser(linear(), unet()), "`model`"),
    wrong("as_denoiser", "an autoencoder", lambda: as_denoiser(vae()), "`model`"),
    wrong("as_denoiser", "a classifier", lambda: as_denoiser(reference()), "`model`"),
    wrong("as_denoiser", "the restorer", lambda: as_denoiser(restorer()), "`model`"),
    wrong("as_denoiser", "a DiffLoss", lambda: as_denoiser(diff()), "`model`"),
    wrong("as_denoiser", "a function of images alone", lambda: as_denoiser(lambda x: x), "`model`"),
    wrong("as_denoiser", "a schedule by name", lambda: as_denoiser(unet(), "linear"), "schedule"),
    wrong("as_denoiser", "a schedule's class", lambda: as_denoiser(unet(), NoiseSchedule), "schedule"),
    wrong("as_denoiser", "no bottleneck of this name", lambda: as_denoiser(unet(), bottleneck="middle"), "`bottleneck`"),
    wrong("as_denoiser", "a bottleneck of a function", lambda: as_denoiser(fill, bottleneck="middle"), "`bottleneck`"),
    wrong("as_denoiser", "a module for the bottleneck", lambda: as_denoiser(unet(), bottleneck=nn.ReLU()), "`bottleneck`"),
    wrong("as_denoiser", "conditioning of an unconditional model", lambda: as_denoiser(unet(), conditioning=clean()), "`conditioning`"),
    wrong("as_denoiser", "a prompt", lambda: as_denoiser(conditional_unet(), conditioning="a photo"), "`conditioning`"),
    wrong("as_denoiser", "no conditioning", lambda: as_denoiser(conditional_unet()), "`conditioning`"),
    wrong("as_denoiser", "an unknown option", lambda: as_denoiser(unet(), h_space=True), "h_space", by=TypeError),
    wrong("Denoiser", "no schedule", lambda: Denoiser(fill), "schedule", by=TypeError),
    *(wrong("Denoiser", k, partial(Denoiser, v, linear()), "`model`") for k, v in NOT_MODELS.items()),
    *(wrong("Denoiser", f"{k} for the schedule", partial(Denoiser, fill, v), "`schedule`") for k, v in {"None": None, "text": "linear", "a class": NoiseSchedule, "betas": BETAS, "a scheduler": DDPMScheduler()}.items()),
    *(wrong("Denoiser", f"multiple={v!r}", partial(Denoiser, fill, linear(), multiple=v), "`multiple`") for v in (0, -1, "8", 1.5)),
    *(wrong("Denoiser", f"called with {k}", partial(lambda v: Denoiser(fill, linear())(v, 5), v), "`noisy`") for k, v in NOT_TENSORS.items()),
    *(wrong("Denoiser", f"called with {k}", partial(lambda v: Denoiser(fill, linear())(v(), 5), v), "`noisy`") for k, v in NOT_IMAGES.items() if k != "no image"),
    *(wrong("Denoiser", f"called at {v!r}", partial(lambda v: Denoiser(fill, linear())(clean(), v), v), "timestep") for v in (1000, -1, 0.5, "5", None, True)),
    wrong("Denoiser", "called without t", lambda: Denoiser(fill, linear())(clean()), "t", by=TypeError),
    wrong("Denoiser", "asked for a bottleneck that it has not", lambda: Denoiser(fill, linear()).with_bottleneck(clean(), 5), "bottleneck"),
    wrong("Denoiser", "images of other channels", lambda: as_denoiser(unet())(clean(channels=4), 5), "noisy"),
    wrong("LatentPrior", "exchanged", lambda: LatentPrior(unet(), vae()), "`vae`"),
    *(wrong("LatentPrior", f"{k} for vae", partial(lambda v: LatentPrior(v, latent_unet()), v), "`vae`") for k, v in {"None": None, "text": "vae", "a class": type(vae()), "a list": [1]}.items()),
    *(wrong("LatentPrior", f"{k} for unet", partial(lambda v: LatentPrior(vae(), v), v), "`unet`") for k, v in NOT_MODELS.items()),
    wrong("LatentPrior", "no U-Net", lambda: LatentPrior(vae()), "unet", by=TypeError),
    wrong("LatentPrior", "a schedule by name", lambda: LatentPrior(vae(), latent_unet(), schedule="linear"), "schedule"),
    wrong("LatentPrior", "a prompt", lambda: LatentPrior(vae(), conditional_unet(), "a photo"), "`conditioning`"),
    wrong("LatentPrior", "a U-Net of pixels", lambda: LatentPrior(vae(), unet()), "unet"),
    # --- files
    *(wrong("load_prior", k, partial(load_prior, v), "`source`") for k, v in {"None": None, "a number": 1, "a U-Net": unet(), "nothing": "", "a class": UNet2DModel, "a list": ["a"]}.items()),
    wrong("load_prior", "a missing file", lambda: load_prior("/nowhere/unet.safetensors"), "/nowhere/unet.safetensors", by=FileNotFoundError),
    wrong("load_prior", "an empty folder", lambda: load_prior(_folder()), "source"),
    wrong("load_prior", "a file that holds no weights", lambda: load_prior(_folder("unet.pth") / "unet.pth"), "unet.pth"),
    wrong("load_prior", "a truncated safetensors file", lambda: load_prior(_folder("unet.safetensors") / "unet.safetensors"), "unet.safetensors"),
    wrong("load_prior", "an unknown prediction type", lambda: load_prior(_folder(), prediction_type="noise"), "`prediction_type`"),
    wrong("load_prior", "an unknown option", lambda: load_prior(_folder(), device="cuda"), "device", by=TypeError),
    *(wrong("null_text", k, partial(null_text, v), "`source`") for k, v in {"None": None, "a number": 1, "a U-Net": unet(), "an empty folder": _folder(), "nothing": ""}.items()),
    wrong("small_prior", "an argument", lambda: small_prior("64"), "argument", by=TypeError),
    # --- sampling
    *(wrong("short_steps", f"{a!r}", partial(short_steps, *a), n) for n, a in (("t_p", (-1, 1)), ("t_p", ("200", 1)), ("t_p", (1.5, 1)), ("t_p", (None, 1)), ("n", (200, 0)), ("n", (200, -1)), ("n", (200, "4")), ("n", (200, 1.5)), ("n", (200, None)), ("n", (4, 200)), ("n", (200, True)), ("t_p", (True, 1)))),
    *(
        wrong(n, f"{k} for the denoiser", partial(f, v, clean(), 5, linear()), "`denoiser`")
        for n, f in (("denoise", denoise), ("partial_diffusion", partial_diffusion))
        for k, v in {"None": None, "a class": UNet2DModel, "text": "unet", "an image": clean(), "small_prior": small_prior, "a loss": nn.L1Loss(), "a restorer": restorer()}.items()
    ),
    *(
        wrong(n, f"steps={v!r}", partial(f, fill, clean(), v, linear()), "steps")
        for n, f in (("denoise", denoise), ("partial_diffusion", partial_diffusion))
        for v in ([1, 5], [], 1000, -1, 0.5, "5", None, [5, 5], ["5"], [5, -1], True, [2.5, 1.5])
    ),
    *(
        wrong(n, f"{k} for the image", partial(f, fill, v, 5, linear()), a)
        for n, f, a in (("denoise", denoise, "`x_t`"), ("partial_diffusion", partial_diffusion, "`x`"))
        for k, v in NOT_TENSORS.items()
    ),
    *(
        wrong(n, f"schedule={k}", partial(f, fill, clean(), 5, v), "`schedule`")
        for n, f in (("denoise", denoise), ("partial_diffusion", partial_diffusion))
        for k, v in {"text": "linear", "a class": NoiseSchedule, "a scheduler": DDPMScheduler(), "betas": BETAS, "None": None}.items()
    ),
    *(
        wrong(n, f"generator={k}", partial(f, fill, clean(), [5, 1], linear(), generator=v), "`generator`")
        for n, f in (("denoise", denoise), ("partial_diffusion", partial_diffusion))
        for k, v in NOT_GENERATORS.items()
    ),
    wrong("denoise", "generators for another batch", lambda: denoise(fill, clean(), [5, 1], linear(), generator=[seeded()] * 3), "`generator`"),
    wrong("partial_diffusion", "noise of another shape", lambda: partial_diffusion(fill, clean(), 5, linear(), noise=clean(size=4)), "`noise`"),
    wrong("partial_diffusion", "noise as a level", lambda: partial_diffusion(fill, clean(), 5, linear(), noise=0.1), "`noise`"),
    wrong("denoise", "exchanged image and denoiser", lambda: denoise(clean(), fill, 5, linear()), "`denoiser`"),
    wrong("denoise", "a model that returns a float", lambda: denoise(lambda x, t: 0.5, clean(), 5, linear()), "denoiser"),
    wrong("denoise", "a model that returns another shape", lambda: denoise(lambda x, t: x[..., :4], clean(), 5, linear()), "denoiser"),
    # --- matching
    *(wrong("match_timestep", f"{k} for the denoiser", partial(match_timestep, v, levels(), clean(), clean()), "`denoiser`") for k, v in NOT_MODELS.items()),
    *(wrong("match_timestep", f"{k} for the schedule", partial(match_timestep, fill, v, clean(), clean()), "schedule") for k, v in {"text": "linear", "a class": NoiseSchedule}.items()),
    wrong("match_timestep", "betas for the schedule", lambda: match_timestep(fill, BETAS, clean(), clean()), "alphas_cumprod"),
    *(wrong("match_timestep", f"{k} for degraded", partial(lambda v: _matched(degraded=v), v), "`degraded`") for k, v in NOT_TENSORS.items()),
    *(wrong("match_timestep", f"{k} for clean", partial(lambda v: _matched(clean=v), v), "`clean`") for k, v in NOT_TENSORS.items()),
    *(wrong("match_timestep", f"{k} for both", partial(lambda v: _matched(degraded=v(), clean=v()), v), "`degraded`") for k, v in NOT_IMAGES.items()),
    wrong("match_timestep", "exchanged with the schedule", lambda: match_timestep(levels(), fill, clean(), clean()), "`denoiser`"),
    wrong("match_timestep", "images of two sizes", lambda: _matched(clean=clean(size=9)), "`clean`"),
    wrong("match_timestep", "0..255", lambda: _matched(degraded=255 * clean()), "`degraded`", "input_range", by=Warning),
    wrong("match_timestep", "clean in 0..255", lambda: _matched(clean=255 * clean()), "`clean`", "input_range", by=Warning),
    *(wrong("match_timestep", f"timesteps={v!r}", partial(lambda v: _matched(timesteps=v), v), "timestep") for v in ([], [60], [-5], [0.5], 5, "5", ["1"], [None])),
    wrong("match_timestep", "an unknown mode", lambda: _matched(mode="x0"), "`mode`"),
    wrong("match_timestep", "an unknown distance", lambda: _matched(distance="L1"), "`distance`"),
    *(wrong("match_timestep", f"ddim_steps={v!r}", partial(lambda v: _matched(mode="ddim", ddim_steps=v), v), "`ddim_steps`") for v in (0, -1, "5", 1.5, None, True)),
    *(wrong("match_timestep", f"input_range={k}", partial(lambda v: _matched(input_range=v), v), "`input_range`") for k, v in NOT_RANGES.items()),
    *(wrong("match_timestep", f"generator={k}", partial(lambda v: _matched(mode="diffuse", generator=v), v), "`generator`") for k, v in NOT_GENERATORS.items()),
    *(wrong("match_timestep", f"a model that returns {k}", partial(lambda v: match_timestep(v, levels(), clean(), clean()), v), "denoiser") for k, v in {"a float": lambda x, t: 0.5, "half the size": lambda x, t: x[..., :4], "None": lambda x, t: None}.items()),
    *(wrong("order_by_timestep", k, partial(order_by_timestep, v), "`matches") for k, v in {"a list": [1, 2], "None": None, "text within": {"a": "1"}, "None within": {"a": None}, "a curve": {"a": torch.rand(5)}, "NaN": {"a": float("nan")}, "True": {"a": True}, "one match": _match(), "text": "a"}.items()),
    *(wrong("TimestepMatch", f".pool({k})", partial(TimestepMatch.pool, v), "`matches`") for k, v in {"nothing": [], "one match": _match(), "None": None, "floats": [0.5], "a mapping": {"a": _match()}}.items()),
    wrong("TimestepMatch", ".pool of other timesteps", lambda: TimestepMatch.pool([_match(), TimestepMatch(torch.tensor([0, 2]), torch.rand(2, 2), torch.rand(2))]), "timesteps"),
    wrong("TimestepMatch", "made of nothing", lambda: TimestepMatch(), "timesteps", by=TypeError),
]  # fmt: skip

# wrong uses that are not told yet
