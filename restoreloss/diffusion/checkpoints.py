"""Priors from a folder, from a file, or by a name on the hub.

:func:`load_prior` reads what people have and returns what :class:`DiffLoss` takes.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restoreloss._optional import require
from restoreloss.checks import check_choice, check_integer, describe
from restoreloss.diffusion import layouts
from restoreloss.diffusion.adapt import as_denoiser, as_schedule
from restoreloss.diffusion.denoisers import Conditioning, Denoiser, check_conditioning
from restoreloss.diffusion.latents import LatentPrior
from restoreloss.diffusion.schedule import NoiseSchedule, PredictionType
from restoreloss.images import HALF
from restoreloss.weights import read_file, weights_in

MODELS = (
    "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel",
    "Transformer2DModel",
)  # fmt: skip
FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_KNOWN = (
    "a diffusers folder or hub name (its root or its unet/), an OpenAI guided-diffusion file (time_embed.*, "
    "input_blocks.*) or a latent-diffusion file (model.diffusion_model.*, first_stage_model.*)"
)


def load_prior(
    source: str | Path,
    *,
    conditioning: Conditioning | None = None,
    schedule: Any = None,
    prediction_type: PredictionType | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    head_channels: int | None = None,
    grouped_heads: bool | None = None,
) -> Denoiser | LatentPrior:
    """Load a diffusion model as a prior for :class:`DiffLoss`.

    ========================================================= ==================================================
    source                                                    gives
    ========================================================= ==================================================
    diffusers folder or hub name, at its root or in ``unet/`` :class:`Denoiser`
    the same with ``vae/``                                    :class:`LatentPrior`, for the empty prompt
    ``.pt`` or ``.safetensors`` of guided-diffusion           :class:`Denoiser`
    ``.ckpt`` or ``.safetensors`` of latent diffusion         :class:`LatentPrior`; give ``conditioning``
    ========================================================= ==================================================

    Args:
        source: a folder, a file, or a name on the hub, which diffusers downloads and keeps.
        conditioning: as :func:`as_denoiser` takes it. Default, for a pipeline with text encoders: the empty prompt,
            made once (:func:`null_text`); for a DiT the label of none.
        schedule: as :func:`as_denoiser` takes it. Default: the scheduler beside the model, the table in a file of
            latent diffusion, that of the published model of guided-diffusion that this is, or its linear one.
        prediction_type: for files of latent diffusion. Default: "v_prediction" where the file has the key ``v_pred``,
            else "epsilon"; of a file of Stable Diffusion 2 that does not say it has to be given.
        revision: of a hub repository.
        local_files_only: use what is in the cache and download nothing.
        head_channels: of guided-diffusion files, ``num_head_channels``. Default: for the published models their own;
            for others it has to be given.
        grouped_heads: of guided-diffusion files; False for ``use_new_attention_order=True``. Default: for the published
            models their own, else True.

    Returns:
        A prior in float32 on the CPU; :class:`DiffLoss` freezes it.

    Raises:
        ValueError: For a file or folder of another layout, of the wrong class, truncated, with missing or unexpected
            weights, or with code in its pickle; and where something has to be given that the file does not say.
        FileNotFoundError: If a path does not exist.
        OSError: If the hub does not answer and the cache has no copy.
        ImportError: If diffusers, safetensors or, for the empty prompt, transformers is not installed.

    Weights are read with safetensors or ``weights_only=True`` (:func:`restoreloss.weights.read_weights`). A file of
    latent diffusion with the key ``ztsnr`` has its schedule rescaled to no signal at its end
    (:meth:`NoiseSchedule.zero_terminal_snr`). What is given wins over what a file says, with a warning.

    Example:
        >>> import tempfile
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        ...                    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> folder = tempfile.mkdtemp()
        >>> unet.save_pretrained(folder)
        >>> loss = DiffLoss(load_prior(folder))
    """
    _check_source(source)
    if prediction_type is not None:
        check_choice("prediction_type", prediction_type, PredictionType)
    if head_channels is not None:
        check_integer("head_channels", head_channels)
    if grouped_heads is not None and not isinstance(grouped_heads, bool):
        raise ValueError(f"`grouped_heads` should be True, False or None, found {describe(grouped_heads)}.")
    if not _is_table(schedule):
        as_schedule(schedule)  # A wrong one is refused before anything is read.
    check_conditioning(conditioning)
    path = Path(source).expanduser()
    if path.suffix in FILES and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"`source` should be a file, found none at {path}.")
        return _from_file(path, conditioning, schedule, prediction_type, head_channels, grouped_heads)
    if not path.is_dir() and (path.is_absolute() or str(source).startswith((".", "~")) or path.exists()):
        raise FileNotFoundError(
            f"`source` should be a folder, a file that ends in {', '.join(FILES)}, or a name on the hub, found none at "
            f"{path}."
        )
    if prediction_type is not None:
        raise ValueError("`prediction_type` should be left out for a folder, whose scheduler says it; give `schedule`.")
    return _from_diffusers(_Repository(source, revision, local_files_only), conditioning, schedule)


def null_text(
    source: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Tensor | dict[str, Any]:
    """The conditioning of the empty prompt of a pipeline; its text encoders are loaded for it and let go.

    Args:
        source: a diffusers folder or hub name with text encoders: Stable Diffusion 1, 2, XL, 3.
        revision: of a hub repository.
        local_files_only: use what is in the cache and download nothing.

    Returns:
        Hidden states (1, L, D), or the keywords that the model wants beside them: what :func:`as_denoiser` takes as
        ``conditioning``. Stable Diffusion XL is conditioned on an image of 1024x1024 pixels, uncropped.

    Raises:
        ValueError: If the pipeline is none of these.
        ImportError: If diffusers or transformers is not installed.
    """
    _check_source(source)
    repository = _Repository(source, revision, local_files_only)
    if not any(name.startswith("text_encoder") for name in repository.index):
        raise ValueError(f"`source` should be a pipeline with text encoders (model_index.json), found {source}.")
    return _empty_prompt(repository)


def _check_source(source: Any) -> None:
    if not isinstance(source, str | os.PathLike) or not str(source):
        hint = ": DiffLoss takes it as it is" if isinstance(source, nn.Module) else ""
        raise ValueError(f"`source` should be a folder, a file or a name on the hub, found {describe(source)}{hint}.")


class _Repository:
    """A folder in the layout of diffusers, here or on the hub."""

    def __init__(self, source: str | Path, revision: str | None, local_files_only: bool) -> None:
        self.source = str(source)
        self.options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        self.diffusers = require("diffusers", purpose="load_prior()", install="diffusers")
        errors = require("huggingface_hub.errors", purpose="load_prior()", install="huggingface_hub")
        self.unreachable: type[Exception] = errors.LocalEntryNotFoundError
        self.index = self.config("DiffusionPipeline") or {}

    def config(self, kind: str, subfolder: str = "", source: str | None = None) -> dict[str, Any] | None:
        """What a pipeline, a model or a scheduler is, from its JSON file; None where there is none."""
        reader, source = getattr(self.diffusers, kind), source or self.source
        if Path(source).is_dir() and not (Path(source) / subfolder / reader.config_name).is_file():
            return None
        try:
            found: dict[str, Any] = reader.load_config(source, subfolder=subfolder or None, **self.options)
        except OSError as error:
            self.error = error  # In a cache a missing file and a missing hub look alike.
            if isinstance(error.__context__, self.unreachable):
                self.options["local_files_only"] = True  # One try is enough: its library tries for half a minute.
            return None
        return found

    def load(self, kind: str, subfolder: str) -> Any:
        """A model, in float32 (also of half-precision files)."""
        read = getattr(self.diffusers, kind).from_pretrained
        options = {**self.options, "subfolder": subfolder or None, "output_loading_info": True}
        place = f"{self.source}/{subfolder}".rstrip("/")
        try:
            try:
                model, info = read(self.source, **options)
            except OSError:
                model, info = read(self.source, variant="fp16", **options)  # The repository may hold nothing else.
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{place} should hold the weights of a {kind}, found: {error}") from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := [str(key) for key in info.get(problem, ())]:
                some = f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                raise ValueError(
                    f"{place} should hold every weight of a {kind} and no other, found {len(keys)} "
                    f"{problem.partition('_')[0]}: {some}."
                )
        return model.float()

    def scheduler(self) -> Any:
        """The scheduler, or None, which means the default."""
        above = str(Path(self.source).parent)  # The model may lie in its own folder in that of a pipeline.
        for source, place in ((self.source, "scheduler"), (self.source, ""), (above, "scheduler")):
            if source == above and not Path(self.source).is_dir():
                break
            config = self.config("DDPMScheduler", place, source) or {}
            if (kind := getattr(self.diffusers, config.get("_class_name", ""), None)) is not None:
                return kind.from_config(config)
        return None


def _from_diffusers(
    repository: _Repository, conditioning: Conditioning | None, schedule: Any
) -> Denoiser | LatentPrior:
    source, index = repository.source, repository.index
    folders = ("unet", "transformer", "") if index else ("", "unet", "transformer")
    found = next(((name, config) for name in folders if (config := repository.config("UNet2DModel", name))), None)
    if found is None:
        if Path(source).is_dir():
            raise ValueError(f"`source` should be {_KNOWN}, found no config.json in {source} or its unet/.")
        raise OSError(
            f"{source!r} is no folder here, and nothing of it could be read from the hub or its cache. Without a "
            "network download it elsewhere and give its folder; with one, see whether the name is right and needs an "
            "account."
        ) from repository.error
    place, config = found
    if (kind := config.get("_class_name")) not in MODELS:
        raise ValueError(f"`source` should hold one of {', '.join(MODELS)}, found {kind} in {source}/{place}.")
    schedule = repository.scheduler() if schedule is None else schedule
    if conditioning is None:
        if any(name.startswith("text_encoder") for name in index):
            conditioning = _empty_prompt(repository)
        elif kind in ("DiTTransformer2DModel", "Transformer2DModel") and config.get("num_embeds_ada_norm"):
            conditioning = torch.tensor([config["num_embeds_ada_norm"]])
    vae = repository.config("AutoencoderKL", "vae") if "vae" in index or Path(source).is_dir() else None
    if vae is not None and vae.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"`source` should hold an AutoencoderKL in vae/, found {vae.get('_class_name')}.")
    model = repository.load(str(kind), place)
    if vae is None:
        return as_denoiser(model, schedule, conditioning=conditioning)
    return LatentPrior(repository.load("AutoencoderKL", "vae"), model, conditioning, schedule=schedule)


def _empty_prompt(repository: _Repository) -> Tensor | dict[str, Any]:
    require("transformers", purpose="the empty prompt of a pipeline", install="transformers")
    name: str = repository.index["_class_name"]
    if not name.startswith("StableDiffusion"):
        raise ValueError(f"`conditioning` should be given for a {name}, whose empty prompt is not known.")
    # None stands for parts that are not loaded, and for those that the pipeline was saved without.
    others = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder")
    index = repository.index
    parts: dict[str, Any] = {part: None for part in index if part in others or index[part] == [None, None]}
    more: dict[str, str] = {}
    if name.startswith("StableDiffusion3"):  # It asks its transformer how wide the text is; one without weights does.
        more = {"prompt_2": "", "prompt_3": ""}
        with torch.device("meta"):
            parts["transformer"] = repository.diffusers.SD3Transformer2DModel.from_config(
                repository.config("SD3Transformer2DModel", "transformer")
            )
    pipeline = getattr(repository.diffusers, name).from_pretrained(repository.source, **parts, **repository.options)
    with torch.no_grad():
        found = pipeline.encode_prompt(
            "", **more, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    if name.startswith("StableDiffusionXL"):
        _, states, _, pooled = found  # Those of the negative prompt are zeros where the pipeline was trained so.
        # A refiner reads an aesthetic score in the place of the size after cropping.
        last = [6.0] if index.get("requires_aesthetics_score") else [1024.0, 1024.0]
        times = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, *last]])
        return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
    if name.startswith("StableDiffusion3"):
        states, _, pooled, _ = found
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
    return found[0]  # type: ignore[no-any-return]


def _from_file(
    path: Path, conditioning: Conditioning | None, schedule: Any, prediction_type: PredictionType | None,
    head_channels: int | None, grouped_heads: bool | None,
) -> Denoiser | LatentPrior:  # fmt: skip
    contents = read_file(path)
    weights = weights_in(contents, path)
    try:
        if layouts.is_latent_diffusion(weights):
            unet, vae, table = layouts.latent_diffusion(weights)
            step = contents.get("global_step")
            found = _latent_schedule(path, weights, unet.config, table, step, schedule, prediction_type)
            return LatentPrior(vae, unet, conditioning, schedule=found)
        if prediction_type is not None:
            raise ValueError(f"`prediction_type` should be left out for {path.name}; give `schedule`.")
        if layouts.is_guided_diffusion(weights):
            model, own = layouts.guided_diffusion(weights, head_channels=head_channels, grouped_heads=grouped_heads)
            return as_denoiser(model, own if schedule is None else schedule, conditioning=conditioning)
    except (KeyError, AttributeError, IndexError) as error:  # The layout is read from this weight.
        raise ValueError(f"{path.name} should be {_KNOWN}, found one without {error}.") from error
    first = ", ".join(list(weights)[:3])
    raise ValueError(f"{path.name} should be {_KNOWN}, found {len(weights)} weights: {first}, ...")


def _is_table(schedule: Any) -> bool:
    return isinstance(schedule, Tensor) or type(schedule).__name__ == "ndarray"


def _latent_schedule(
    path: Path, weights: Mapping[str, Tensor], config: Any, table: Tensor | None, step: object, given: Any,
    prediction_type: PredictionType | None,
) -> NoiseSchedule:  # fmt: skip
    """The schedule of a file of latent diffusion: what is given, else what its markers, its table and its step say."""
    if edm := [key for key in ("edm_mean", "edm_vpred.sigma_max") if key in weights]:
        raise ValueError(
            f"{path.name} should hold a model with variance-preserving noise, found one of EDM (it has the key "
            f"{edm[0]}): wrap it in a function f(x_t, t) that returns the noise."
        )
    says_v, says_zero = "v_pred" in weights, "ztsnr" in weights
    if given is not None and not _is_table(given):
        schedule = as_schedule(given)
        if prediction_type not in (None, schedule.prediction_type):
            raise ValueError(
                f"`prediction_type` should be that of `schedule`, {schedule.prediction_type!r}, or left out, found "
                f"{prediction_type!r}."
            )
    else:
        if prediction_type is None:
            prediction_type = "v_prediction" if says_v else "epsilon"
            # The text has the width of Stable Diffusion 2, and one file of it says by its step that it predicts noise.
            if config.cross_attention_dim == 1024 and not (says_v or config.addition_embed_type or step == 875000):
                raise ValueError(
                    f"`prediction_type` should be given for {path.name}, a Stable Diffusion 2 whose file does not say "
                    "it: 'v_prediction' for the models of 768 pixels, 'epsilon' for the base models of 512."
                )
        if given is not None:
            schedule = NoiseSchedule(given, prediction_type=prediction_type)
        elif table is None or table.dtype in HALF:  # The table is rounded.
            schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)
        else:
            schedule = NoiseSchedule(table, prediction_type=prediction_type)
        if given is None and says_zero:
            schedule = schedule.zero_terminal_snr()
    for ignored, read, marker in (
        (says_v and schedule.prediction_type != "v_prediction", f"as {schedule.prediction_type!r}", "v_pred"),
        (says_zero and float(schedule.alphas_cumprod[-1]) > 0, "with a schedule that ends with signal", "ztsnr"),
    ):
        if ignored:
            warnings.warn(f"{path.name} has the key {marker!r}, and is read {read}, as you say.", stacklevel=4)
    return schedule
