"""Recognizing a diffusion model: :func:`as_denoiser` wraps what people have as a :class:`Denoiser`.

A diffusers or guided-diffusion U-Net, a transformer of diffusers, or a function: each has its own bottleneck, its own
conditioning and its own schedule, which are found and checked here.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from restoreloss.checks import describe, signature_of
from restoreloss.diffusion.denoisers import Conditioning, Denoiser, check_conditioning, check_takes_noise
from restoreloss.diffusion.levels import FlowLevels, is_flow_matching
from restoreloss.diffusion.schedule import NoiseSchedule


def as_denoiser(
    model: Callable[..., Any],
    schedule: Any = None,
    *,
    conditioning: Conditioning | None = None,
    bottleneck: str | None = None,
) -> Denoiser:
    """Wrap any diffusion model as a :class:`Denoiser`.

    ============================================ =================== ==========================================
    model                                        bottleneck          conditioning, where the model wants one
    ============================================ =================== ==========================================
    diffusers UNet2DModel                        ``mid_block``       class labels (1,) or (N,)
    diffusers UNet2DConditionModel               ``mid_block``       hidden states (1 or N, L, D), or keywords
    guided-diffusion U-Net, or its (out, h) fork ``middle_block``    ``y``, class labels (1,) or (N,)
    diffusers DiTTransformer2DModel              middle of the       class labels (1,) or (N,)
    diffusers PixArtTransformer2DModel           middle of the       hidden states (1 or N, L, D), or keywords
    diffusers SD3Transformer2DModel              middle of the       keywords
    ``f(x_t, t)``                                none                third argument, or keywords
    ``f(x_t, t)`` that returns (noise, h)        h                   third argument, or keywords
    ============================================ =================== ==========================================

    The model is neither copied, moved nor frozen. Two things are done to it: a U-Net gets one forward hook, and the
    blocks of a guided-diffusion U-Net lose their own activation checkpointing, which raises on frozen weights (the
    numbers are the same; wrap a ``copy.deepcopy`` if you also train it).

    Args:
        model: one of the above. A function that closes over a network keeps that network's gradients: freeze it.
        schedule: a :class:`NoiseSchedule`, a diffusers scheduler or a table of ``alphas_cumprod``; its
            ``prediction_type`` says how the model's output is read. Default: the linear schedule of DDPM, ADM and DiT;
            :class:`FlowLevels` for Stable Diffusion 3.
        conditioning: fixed for every call; tensors with one row are expanded to the batch. A mapping is passed as
            keyword arguments (``{"encoder_hidden_states": ..., "added_cond_kwargs": {...}}`` for SDXL,
            ``{"encoder_hidden_states": ..., "pooled_projections": ...}`` for Stable Diffusion 3).
        bottleneck: name of the layer whose output is the h-space, as in ``model.named_modules()``. Default: as above.

    Returns:
        The denoiser; a ``Denoiser`` is returned as it is.

    Raises:
        ValueError: If ``model`` is no such thing (a name or path, a class, a function that was not called, a loss, an
            autoencoder, a network that does not take an image and timesteps) or needs a conditioning that is not
            given, or ``schedule`` has no ``alphas_cumprod``. No model is run.

    Example:
        >>> denoiser = as_denoiser(lambda x_t, t: (0.5 * x_t, x_t.mean(dim=(2, 3))))
        >>> noise, h = denoiser.with_bottleneck(torch.ones(2, 3, 4, 4), t=10)
        >>> noise.shape, h.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 3]))
    """
    return wrap("model", model, schedule, conditioning=conditioning, bottleneck=bottleneck)


def wrap(
    name: str,
    model: Any,
    schedule: Any = None,
    *,
    conditioning: Conditioning | None = None,
    bottleneck: str | None = None,
) -> Denoiser:
    """What :func:`as_denoiser` does, for callers whose argument has another ``name``, which the messages then give."""
    if isinstance(model, Denoiser):
        given = conditioning is not None or bottleneck is not None
        if given or (schedule is not None and schedule is not model.schedule):
            raise ValueError(
                f"`{name}` is a Denoiser, which has its schedule, conditioning and bottleneck already: give them to "
                "`as_denoiser` with the model itself instead."
            )
        return model
    if hasattr(model, "unet") and hasattr(model, "scheduler"):
        raise ValueError(
            f"`{name}` should be a network, found a {type(model).__name__}: pass `pipeline.unet` and, as `schedule`, "
            "`pipeline.scheduler`."
        )
    if isinstance(model, str | os.PathLike):
        raise ValueError(
            f"`{name}` should be a network, found the name {str(model)!r}: load_prior({str(model)!r}) reads one from a "
            "folder, a file or the hub."
        )
    check_conditioning(conditioning)
    if bottleneck is not None and not isinstance(bottleneck, str):
        raise ValueError(f"`bottleneck` should be the name of a layer, found {describe(bottleneck)}.")

    inner: Any = getattr(model, "_orig_mod", model)  # This is what torch.compile wraps.
    is_network = isinstance(inner, nn.Module)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"`{name}` should be the network itself, found a {type(inner).__name__}: pass its `.module`.")
    if is_network and isinstance(conditioning, Mapping):
        _check_keywords(inner, conditioning)
    layer = None if bottleneck is None else _layer_of(inner, bottleneck)
    if is_network and _is_layer(getattr(inner, "mid_block", "absent")):
        _check_diffusers_conditioning(inner, conditioning)
        if schedule is None and _is_conditional(inner):
            warnings.warn(
                f"{type(inner).__name__} without a `schedule` is read with the linear schedule of DDPM; Stable "
                "Diffusion was trained with NoiseSchedule.scaled_linear(). Pass its scheduler, or "
                "NoiseSchedule.linear() to confirm.",
                stacklevel=2,
            )
        downsamplers = [getattr(block, "downsamplers", None) for block in getattr(inner, "down_blocks", ())]
        return Denoiser(
            model,
            as_schedule(schedule),
            conditioning=conditioning,
            conditioning_name="encoder_hidden_states" if _is_conditional(inner) else "class_labels",
            bottleneck=layer or inner.mid_block,
            has_bottleneck=(layer or inner.mid_block) is not None,
            multiple=2 ** sum(downsampler is not None for downsampler in downsamplers),
            in_channels=getattr(getattr(inner, "config", None), "in_channels", None),
        )
    if is_network and _is_layer(getattr(inner, "middle_block", "absent")):
        if getattr(inner, "num_classes", None) is not None and conditioning is None:
            raise ValueError("`conditioning` should be class labels of shape (1,) or (N,) for this model, found None.")
        _bypass_own_checkpointing(inner)
        return Denoiser(
            model,
            as_schedule(schedule),
            conditioning=conditioning,
            conditioning_name="y",
            bottleneck=layer or inner.middle_block,
            has_bottleneck=(layer or inner.middle_block) is not None,
            multiple=2 ** sum(map(_downsamples, getattr(inner, "input_blocks", ()))),
            in_channels=getattr(inner, "in_channels", None),
        )
    if is_network and type(inner).__name__ in TRANSFORMERS:
        return _transformer(model, inner, schedule, conditioning, layer)
    if type(inner).__name__.startswith("Flux"):
        raise ValueError(
            f"`{name}` should be wrapped in a function f(x_t, t) for {type(inner).__name__}, which wants packed tokens "
            "and their positions: docs/guides/priors.md has one."
        )
    if hasattr(inner, "encode") and hasattr(inner, "decode") and hasattr(inner, "config"):
        raise ValueError(
            f"`{name}` should be called as f(x_t, t) with the noisy image and timesteps (N,), found {describe(inner)}, "
            "which encodes images: give the diffusion model, and this as LatentPrior(vae, unet) or as `encoder`."
        )
    check_takes_noise(name, model, conditioning)
    return Denoiser(
        model,
        as_schedule(schedule),
        conditioning=conditioning,
        bottleneck=layer,
        has_bottleneck=None if layer is None else True,
    )


TRANSFORMERS: Mapping[str, tuple[str, int]] = {
    "DiTTransformer2DModel": ("class_labels", 0),
    "PixArtTransformer2DModel": ("encoder_hidden_states", 0),
    "SD3Transformer2DModel": ("encoder_hidden_states", 1),
}
"""By class name: the keyword for a conditioning tensor, and which part of a block's output is the image."""


def _transformer(
    model: Any, inner: Any, schedule: Any, conditioning: Conditioning | None, layer: nn.Module | None
) -> Denoiser:
    """One of :data:`TRANSFORMERS`; its h-space is what the block in the middle makes of the tokens of the image."""
    kind, config = type(inner).__name__, inner.config
    name, part = TRANSFORMERS[kind]
    if kind == "SD3Transformer2DModel":
        schedule = FlowLevels.uniform(shift=3.0) if schedule is None else schedule
        _check_states(conditioning, kind, config.joint_attention_dim)
        pooled = conditioning.get("pooled_projections") if isinstance(conditioning, Mapping) else None
        if not isinstance(pooled, Tensor) or pooled.shape[-1] != config.pooled_projection_dim:
            found = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(conditioning).__name__
            raise ValueError(
                "`conditioning` should be a mapping with `pooled_projections` of shape "
                f"(1 or N, {config.pooled_projection_dim}) for {kind}, found {found}."
            )
    elif kind == "PixArtTransformer2DModel":
        _check_states(conditioning, kind, config.caption_channels or config.cross_attention_dim)
    else:
        # One more label than there are classes stands for none.
        _check_labels(conditioning, kind, None if (count := config.num_embeds_ada_norm) is None else count + 1)
    blocks = inner.transformer_blocks
    return Denoiser(
        model,
        as_schedule(schedule),
        conditioning=conditioning,
        conditioning_name=name,
        time_name="timestep",
        bottleneck=blocks[len(blocks) // 2] if layer is None else layer,
        part=part,
        patch=config.patch_size,
        has_bottleneck=True,
        multiple=config.patch_size,
        square=kind == "DiTTransformer2DModel",  # Its tokens become an image of as many rows as columns.
        in_channels=config.in_channels,
    )


def _layer_of(model: Any, name: str) -> nn.Module:
    layers: dict[str, nn.Module] = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    if not name or name not in layers:
        some = ", ".join([layer for layer in layers if layer.count(".") < 2 and layer][:12]) or "none"
        raise ValueError(f"`bottleneck` should name a layer of {type(model).__name__} ({some}, ...), found {name!r}.")
    return layers[name]


def _check_keywords(model: Any, conditioning: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for keyword arguments that a network does not have."""
    signature = signature_of(model)
    parameters = {} if signature is None else signature.parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    if parameters and (unknown := [name for name in conditioning if name not in parameters]):
        raise ValueError(
            f"`conditioning` should be keyword arguments of {type(model).__name__} ({', '.join(parameters)}), found "
            f"{unknown[0]!r}."
        )


def as_schedule(schedule: Any) -> NoiseSchedule:
    """A :class:`NoiseSchedule` from one, a diffusers scheduler, a table of ``alphas_cumprod``, or None (linear)."""
    if is_flow_matching(schedule):
        return FlowLevels.from_diffusers(schedule)
    if schedule is None:
        return NoiseSchedule.linear()
    if isinstance(schedule, NoiseSchedule):
        return schedule
    if isinstance(schedule, Tensor) or (hasattr(schedule, "__array__") and not isinstance(schedule, type)):
        return NoiseSchedule(schedule)
    return NoiseSchedule.from_diffusers(schedule)


def _is_layer(block: Any) -> bool:
    """Whether a model's ``mid_block`` is one that runs; None is a U-Net that has none."""
    return block is None or (isinstance(block, nn.Module) and not isinstance(block, nn.ModuleList | nn.ModuleDict))


def _is_conditional(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "cross_attention_dim", None) is not None


def _check_diffusers_conditioning(model: Any, conditioning: Conditioning | None) -> None:
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None:
        return
    if _is_conditional(model):
        _check_states(conditioning, name, getattr(config, "encoder_hid_dim", None) or config.cross_attention_dim)
    if getattr(config, "addition_embed_type", None) is not None and not (
        isinstance(conditioning, Mapping) and "added_cond_kwargs" in conditioning
    ):
        raise ValueError(
            f"`conditioning` should be a mapping with `added_cond_kwargs` for this {name} "
            f"(addition_embed_type={config.addition_embed_type!r}), found {describe(conditioning)}."
        )
    if getattr(config, "addition_embed_type", None) == "text_time" and isinstance(conditioning, Mapping):
        _check_text_time(conditioning["added_cond_kwargs"], name, config)
    if _is_conditional(model):
        return
    if getattr(model, "class_embedding", None) is not None:
        _check_labels(conditioning, name, getattr(config, "num_class_embeds", None))
    elif isinstance(conditioning, Tensor):
        raise ValueError(f"`conditioning` should be None for this {name}, which reads none, found a tensor.")


def _check_labels(conditioning: Conditioning | None, name: str, count: int | None) -> None:
    """Raise ``ValueError`` unless there are class labels, of classes that there are."""
    labels = conditioning.get("class_labels") if isinstance(conditioning, Mapping) else conditioning
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim > 1:
        raise ValueError(
            f"`conditioning` should be class labels of shape (1,) or (N,) for this {name}, found {describe(labels)}."
        )
    if count is not None and labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < count)).all()):
        raise ValueError(f"`conditioning` should be class labels below {count} for this {name}, found {labels}.")


def _check_text_time(added: Any, name: str, config: Any) -> None:
    """Raise ``ValueError`` unless the pooled text and the sizes have the width that this model adds to its time."""
    parts = [added.get(key) if isinstance(added, Mapping) else None for key in ("text_embeds", "time_ids")]
    if not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
        raise ValueError(f"`added_cond_kwargs` should have text_embeds and time_ids of two dimensions for this {name}.")
    text, times = (part.shape[1] for part in parts if isinstance(part, Tensor))
    width = config.projection_class_embeddings_input_dim
    if width is not None and text + times * config.addition_time_embed_dim != width:
        raise ValueError(
            f"`added_cond_kwargs` should have text_embeds and time_ids of widths p and k with p + k * "
            f"{config.addition_time_embed_dim} = {width} for this {name}, found {text} and {times}."
        )


def _check_states(conditioning: Conditioning | None, name: str, width: Any) -> None:
    """Raise ``ValueError`` unless there are hidden states, of this width where a model has one for all layers."""
    states = conditioning.get("encoder_hidden_states") if isinstance(conditioning, Mapping) else conditioning
    fits = isinstance(states, Tensor) and states.ndim == 3 and (not isinstance(width, int) or states.shape[2] == width)
    if not fits:
        raise ValueError(
            f"`conditioning` should be hidden states of shape (1 or N, tokens, {width}) for {name}, found "
            f"{describe(states)}."
        )


def _downsamples(block: nn.Module) -> bool:
    # It is known by its name, because guided-diffusion is copied from repository to repository, not installed.
    return any(type(module).__name__ == "Downsample" for module in block.modules())


def _bypass_own_checkpointing(model: nn.Module) -> None:
    """Let guided-diffusion's blocks run directly.

    Their ``forward`` is ``checkpoint(self._forward, ...)``, whose backward asks for the gradient of every parameter and
    raises on frozen ones; the attention blocks leave no switch for it.
    """
    for module in model.modules():
        if callable(getattr(module, "_forward", None)):
            module.forward = module._forward  # type: ignore[assignment]
