"""How does any diffusion model become "noisy image and timestep in, noise and h-space out"?

:func:`as_denoiser` wraps what people have (a diffusers U-Net, a guided-diffusion U-Net, a function) in a
:class:`Denoiser`, which hides the differences: conditioning, learned variance, prediction type, dtype, and where the
bottleneck is.
"""

import copy
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from restoreloss.checks import check_whole, describe
from restoreloss.diffusion.levels import FlowLevels, is_flow_matching
from restoreloss.diffusion.schedule import NoiseSchedule
from restoreloss.precision import enter, leave, reference_weight

Conditioning: TypeAlias = Tensor | Mapping[str, Any]
"""A tensor for the model's one conditioning argument, or its keyword arguments; tensors of 1 or N rows."""


class _Reached(Exception):
    """The bottleneck has been computed and nothing after it is wanted."""


class _Tap:
    """A forward hook that hands the bottleneck to the call that asked for it, in the thread that asked.

    It is set once, when the denoiser is made, because a hook that is set after a network's first compiled call never
    fires. While nobody asks it does nothing.
    """

    def __init__(self, part: int) -> None:
        self.part = part  # of an output that is a tuple
        self.wanted: dict[int, bool] = {}  # thread -> stop there?
        self.taken: dict[int, Tensor] = {}

    @classmethod
    def on(cls, bottleneck: nn.Module, part: int) -> "_Tap":
        """The tap of this module: one serves every denoiser that is made of it."""
        hooks = bottleneck._forward_hooks.values()
        tap = next((hook for hook in hooks if isinstance(hook, cls) and hook.part == part), None)
        if tap is None:
            tap = cls(part)
            bottleneck.register_forward_hook(tap)
        return tap

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        key = _thread()
        if key in self.wanted:
            self.taken[key] = output[self.part] if isinstance(output, tuple) else output
            if self.wanted[key]:
                raise _Reached

    def __getstate__(self) -> dict[str, Any]:
        return {"part": self.part, "wanted": {}, "taken": {}}  # a copy is made between calls, and belongs to none


_COMPILED = 0


def _thread() -> int:
    # dynamo cannot trace get_ident
    return _COMPILED if torch.compiler.is_compiling() else threading.get_ident()


class Denoiser(nn.Module):
    """A diffusion model seen as ``(x_t, t) -> noise`` with a bottleneck. Usually made by :func:`as_denoiser`.

    Build one directly for a model that ``as_denoiser`` cannot read: to name its bottleneck, or its ``multiple``.

    Args:
        model: called as ``model(x_t, t)``; returns a tensor, (noise, h) or an object with ``.sample``.
        schedule: the :class:`NoiseSchedule` it was trained with.
        conditioning: fixed for every call, see :func:`as_denoiser`.
        conditioning_name: the keyword for a conditioning tensor; None passes it third.
        time_name: the keyword for the timesteps; None passes them second.
        bottleneck: the layer of ``model`` whose output is the h-space.
        part: which part of that output, where it is a tuple.
        patch: the pixels along one side of a token; tokens (N, h w, C) then become a map (N, C, h, w).
        has_bottleneck: True, False, or None where only a call can tell (plain callables).
        multiple: what height and width must be multiples of.
        square: whether it reads square images only.
        in_channels: the channels it reads, or None where that is not known.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.ConvTranspose2d(8, 3, 2, stride=2))
        >>> class Timeless(nn.Module):
        ...     def forward(self, x_t, t):
        ...         return net(x_t)
        >>> denoiser = Denoiser(Timeless(), NoiseSchedule.linear(), bottleneck=net[0], multiple=2)
        >>> denoiser.bottleneck(torch.ones(1, 3, 4, 4), 10).shape
        torch.Size([1, 8, 2, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        conditioning: Conditioning | None = None,
        conditioning_name: str | None = None,
        time_name: str | None = None,
        bottleneck: nn.Module | None = None,
        part: int = 0,
        patch: int | None = None,
        has_bottleneck: bool | None = None,
        multiple: int = 1,
        square: bool = False,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, type) or not callable(model) or (conditioning is None and not takes(model, 2)):
            raise ValueError(f"`model` should be a network or a callable f(x_t, t), found {describe(model)}.")
        if isinstance(model, nn.Module) and time_name is None and second_argument(model) in _NO_TIME:
            raise ValueError(f"`model` should take timesteps after the noisy image, found {describe(model)}.")
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(
                f"`schedule` should be a NoiseSchedule, found {describe(schedule)}; `as_denoiser` takes schedulers too."
            )
        check_whole("multiple", multiple)
        check_conditioning(conditioning)
        self.model = model
        self.schedule = schedule
        self.multiple = multiple
        self.square = square
        self.in_channels = in_channels
        self.has_bottleneck = has_bottleneck
        self._conditioning_name = conditioning_name
        self._time_name = time_name
        self._patch = patch
        weight = reference_weight(self)
        if weight is not None and weight.device != schedule.signal.device:
            self.schedule = copy.deepcopy(schedule).to(weight.device)  # once, rather than at every call
        # fixed: no graph may lead out of it
        self._conditioning = _map_tensors(
            lambda v: v.detach() if weight is None else v.detach().to(weight.device), conditioning
        )
        self._tap = None if bottleneck is None else _Tap.on(bottleneck, part)

    def forward(self, noisy: Tensor, t: Tensor | int, *, native: bool = False) -> Tensor:
        """The predicted noise.

        Args:
            noisy: x_t in the range the model was trained on, float (N, C, H, W).
            t: timesteps in [0, T), shape (N,), or one for all.
            native: what the model itself predicts, be it noise, velocity or image.

        Returns:
            The noise in the shape of ``noisy``, in float32 or higher, whatever the model predicts and computes in.

        Raises:
            ValueError: If the shape, the device or a timestep does not fit the model.
        """
        t = self._check(noisy, t)
        (prediction,) = self._seen(noisy, t, noise=True, h=False)
        return self._noise(prediction, noisy, t, native)

    def with_bottleneck(self, noisy: Tensor, t: Tensor | int, *, native: bool = False) -> tuple[Tensor, Tensor]:
        """The predicted noise and the h-space of the same pass (arguments as in :meth:`forward`).

        Raises:
            ValueError: If the model has no bottleneck that can be found.
        """
        t = self._check(noisy, t)
        prediction, h = self._seen(noisy, t, noise=True, h=True)
        return self._noise(prediction, noisy, t, native), h

    def bottleneck(self, noisy: Tensor, t: Tensor | int) -> Tensor:
        """The h-space alone; a U-Net stops there and its decoder is never run (arguments as in :meth:`forward`).

        Raises:
            ValueError: If the model has no bottleneck that can be found.
        """
        (h,) = self._seen(noisy, self._check(noisy, t), noise=False, h=True)
        return h

    def _seen(self, noisy: Tensor, t: Tensor, *, noise: bool, h: bool) -> tuple[Tensor, ...]:
        """What the model predicts, what its bottleneck holds, or both, of one pass."""
        weight = reference_weight(self)
        dtype = noisy.dtype if weight is None else weight.dtype
        (cast,), door = enter([noisy], dtype, self)
        output, tapped = (self._run(cast, t), None) if self._tap is None or not h else self._tapped(cast, t, not noise)
        parts = [self._prediction(output, noisy)] if noise else []
        if h:
            parts.append(self._second(output, noisy) if tapped is None else self._as_map(tapped, noisy))
        return leave(door, *parts)

    def _tapped(self, cast: Tensor, t: Tensor, stop: bool) -> tuple[Any, Tensor]:
        tap, output, h = self._tap, None, None
        assert tap is not None
        keys = (_COMPILED, _thread())  # a compiled part of the model cannot tell the thread it is called from
        for key in keys:
            tap.wanted[key] = stop
        try:
            output = self._run(cast, t)
        except _Reached:
            pass
        finally:
            for key in keys:
                tap.wanted.pop(key, None)
                h = tap.taken.pop(key, h)
        if h is None:
            raise RuntimeError(
                "The model ran without passing its bottleneck. If it was compiled and called before it was wrapped, "
                "wrap it first: hooks set after the first compiled call never fire."
            )
        return output, _check_rows(h, cast)

    def _as_map(self, h: Tensor, noisy: Tensor) -> Tensor:
        """Tokens (N, h w, C) as a map (N, C, h, w)."""
        if self._patch is None or h.ndim != 3:
            return h
        rows, columns = (side // self._patch for side in noisy.shape[-2:])
        return h.transpose(1, 2).reshape(len(h), -1, rows, columns)

    def _run(self, cast: Tensor, t: Tensor) -> Any:
        conditioning = _rows(self._conditioning, like=cast, dtype=cast.dtype)
        given: list[Any] = [cast]
        named: dict[str, Any] = {}
        for name, value in ((self._time_name, self.schedule.model_time(t)), (self._conditioning_name, conditioning)):
            if isinstance(value, dict):
                named |= value
            elif name is not None and value is not None:
                named[name] = value
            elif value is not None:
                given.append(value)
        return self.model(*given, **named)

    def _prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """What the model predicts, without a learned variance."""
        prediction = prediction_in(output)
        channels = noisy.shape[1]
        if prediction.ndim == noisy.ndim and prediction.shape[1] == 2 * channels:
            prediction = prediction[:, :channels]  # learned variance: the second half is not the noise
        if prediction.shape != noisy.shape:
            raise ValueError(
                f"The denoiser should return the shape of its input {tuple(noisy.shape)} (or twice its channels, with "
                f"a learned variance), found {tuple(prediction.shape)}."
            )
        return prediction

    def _noise(self, prediction: Tensor, noisy: Tensor, t: Tensor, native: bool) -> Tensor:
        prediction = prediction.to(torch.promote_types(noisy.dtype, torch.float32))
        return prediction if native else self.schedule.to_noise(prediction, noisy, t)

    def _second(self, output: Any, noisy: Tensor) -> Tensor:
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor):
            return _check_rows(output[1], noisy)
        raise ValueError(
            f"{type(self.model).__name__} has no bottleneck: expected a `mid_block` (diffusers), a `middle_block` "
            "(guided-diffusion) or a callable that returns (noise, h), found none of them. Name a layer "
            "(as_denoiser(..., bottleneck=...)), leave the h-space out (h_space_weight=0), or return (noise, h)."
        )

    def answer(self, noisy: Tensor, t: Tensor | int) -> Any:
        """What the model returns for an image, unread (arguments as in :meth:`forward`)."""
        return self._run(noisy, self._check(noisy, t))

    def check_answer(self, output: Any, noisy: Tensor) -> None:
        """Raise ``ValueError`` unless what the model returned holds a prediction for ``noisy``."""
        self._prediction(output, noisy)

    def check_input(self, image: Tensor, name: str = "noisy") -> None:
        """Raise ``ValueError`` unless ``image`` has the rank, the channels and the device that the model needs."""
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise ValueError(f"`{name}` should be a floating point tensor (N, C, H, W), found {describe(image)}.")
        if image.numel() == 0:
            raise ValueError(f"`{name}` should hold at least one image and one pixel, found {tuple(image.shape)}.")
        if image.ndim != 4 or self.in_channels not in (None, image.shape[1]):
            channels = "C" if self.in_channels is None else self.in_channels
            hint = "; a latent prior needs an `encoder`" if self.in_channels == 4 and image.ndim == 4 else ""
            raise ValueError(
                f"`{name}` should have shape (N, {channels}, H, W) for this denoiser, found {tuple(image.shape)}{hint}."
            )
        weight = reference_weight(self)
        if weight is not None and weight.device != image.device:
            raise ValueError(f"`{name}` should be on the denoiser's device {weight.device}, found {image.device}.")

    def _check(self, noisy: Tensor, t: Tensor | int) -> Tensor:
        self.check_input(noisy)
        height, width = noisy.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"`noisy` should have height and width that are multiples of {self.multiple} for this denoiser, found "
                f"{height}x{width}."
            )
        if self.square and height != width:
            raise ValueError(f"`noisy` should be square for {type(self.model).__name__}, found {height}x{width}.")
        return self.schedule.expand_timestep(t, noisy).clone()  # a model may change its own

    def _apply(self, fn: Any, recurse: bool = True) -> "Denoiser":
        super()._apply(fn, recurse)
        self._conditioning = _map_tensors(fn, self._conditioning)
        return self


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
    guided-diffusion U-Net (or its (out, h) fork) ``middle_block``   ``y``, class labels (1,) or (N,)
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
                "`as_denoiser` with the bare model instead."
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
    if isinstance(model, type) or not callable(model):
        raise ValueError(f"`{name}` should be a network or a callable f(x_t, t), found {describe(model)}.")
    check_conditioning(conditioning)
    if bottleneck is not None and not isinstance(bottleneck, str):
        raise ValueError(f"`bottleneck` should be the name of a layer, found {describe(bottleneck)}.")

    inner: Any = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    is_network = isinstance(inner, nn.Module)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"`{name}` should be a bare network, found a {type(inner).__name__}: pass its `.module`.")
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
            "and their positions: docs/priors.md has one."
        )
    _check_takes_noise(name, inner, conditioning)
    has_bottleneck = None if layer is None else True
    return Denoiser(
        model, as_schedule(schedule), conditioning=conditioning, bottleneck=layer, has_bottleneck=has_bottleneck
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
        # one more than there are classes: none
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
        square=kind == "DiTTransformer2DModel",  # its tokens become an image of as many rows as columns
        in_channels=config.in_channels,
    )


def _layer_of(model: Any, name: str) -> nn.Module:
    layers: dict[str, nn.Module] = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    if not name or name not in layers:
        some = ", ".join([layer for layer in layers if layer.count(".") < 2 and layer][:12]) or "none"
        raise ValueError(f"`bottleneck` should name a layer of {type(model).__name__} ({some}, ...), found {name!r}.")
    return layers[name]


_NO_TIME = ("target", "targets", "label", "labels", "mask", "encoder_hidden_states")
"""Names of a second argument that is no timestep: of losses, detectors, and transformers that take their time later."""


def _check_takes_noise(name: str, model: Any, conditioning: Conditioning | None) -> None:
    """Raise ``ValueError`` for what cannot be called as f(x_t, t), as far as its signature tells."""
    said = f"`{name}` should be called as f(x_t, t) with the noisy image and timesteps (N,)"
    if hasattr(model, "encode") and hasattr(model, "decode") and hasattr(model, "config"):
        raise ValueError(
            f"{said}, found {describe(model)}, which encodes images: give the diffusion model, and this as "
            "LatentPrior(vae, unet) or as `encoder`."
        )
    scripted = isinstance(model, torch.jit.ScriptModule)
    if isinstance(model, nn.Module) and not scripted and type(model).forward is nn.Module.forward:
        raise ValueError(f"{said}, found {describe(model)}, which has no forward pass.")
    more = [] if conditioning is None or isinstance(conditioning, Mapping) else [conditioning]
    named = dict(conditioning) if isinstance(conditioning, Mapping) else {}
    signature = _signature(model)
    if signature is None:
        return
    if not takes(model, 2 + len(more), named):
        hint = f"; with the `conditioning` {'third' if more else sorted(named)}" if conditioning is not None else ""
        raise ValueError(f"{said}{hint}, found {describe(model)}, which takes {signature}.")
    second = list(signature.bind(None, None, *more, **named).arguments)[1:2]
    by_default = signature.parameters[second[0]].default if second else None
    if second and (second[0] in _NO_TIME or isinstance(by_default, bool | str)):
        raise ValueError(
            f"{said}, found {describe(model)}, which takes {signature}: wrap it in a function if it is a denoiser."
        )


def _check_keywords(model: Any, conditioning: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for keyword arguments that a network does not have."""
    signature = _signature(model)
    parameters = {} if signature is None else signature.parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    if parameters and (unknown := [name for name in conditioning if name not in parameters]):
        raise ValueError(
            f"`conditioning` should be keyword arguments of {type(model).__name__} ({', '.join(parameters)}), found "
            f"{unknown[0]!r}."
        )


def takes(function: Any, count: int, names: Iterable[str] = ()) -> bool:
    """Whether a module or function takes so many arguments and these keywords; True where nothing tells."""
    signature = _signature(function)
    try:
        if signature is not None:
            signature.bind(*[None] * count, **dict.fromkeys(names))
        return callable(function)
    except TypeError:
        return False


def second_argument(function: Any) -> str | None:
    """The name of the second argument of a module or function, None where its signature does not say."""
    signature = _signature(function)
    names = [] if signature is None else list(signature.parameters)
    return names[1] if len(names) > 1 else None


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # compiled code does not say
        return None


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


def check_conditioning(conditioning: Any) -> None:
    """Raise ``ValueError`` for what is neither a tensor, nor keyword arguments, nor None."""
    if conditioning is not None and not isinstance(conditioning, Tensor | Mapping):
        raise ValueError(
            f"`conditioning` should be a tensor or a mapping of keyword arguments, found {describe(conditioning)}."
        )


def _downsamples(block: nn.Module) -> bool:
    # by name: guided-diffusion is copied from repository to repository, not installed
    return any(type(module).__name__ == "Downsample" for module in block.modules())


def _bypass_own_checkpointing(model: nn.Module) -> None:
    """Let guided-diffusion's blocks run directly.

    Their ``forward`` is ``checkpoint(self._forward, ...)``, whose backward asks for the gradient of every parameter and
    raises on frozen ones; the attention blocks leave no switch for it.
    """
    for module in model.modules():
        if callable(getattr(module, "_forward", None)):
            module.forward = module._forward  # type: ignore[assignment]


def _check_rows(h: Tensor, noisy: Tensor) -> Tensor:
    if h.ndim == 0 or len(h) != len(noisy):
        raise ValueError(f"The bottleneck should have {len(noisy)} rows for this batch, found shape {tuple(h.shape)}.")
    return h


def prediction_in(output: Any) -> Tensor:
    """The prediction in a tensor, a tuple or a diffusers output."""
    prediction = getattr(output, "sample", output)
    if isinstance(prediction, tuple) and prediction:
        prediction = prediction[0]
    if not isinstance(prediction, Tensor):
        kind = type(output).__name__
        raise ValueError(f"The denoiser should return a tensor, (noise, h) or an object with `.sample`, found {kind}.")
    return prediction


def _rows(conditioning: Any, *, like: Tensor, dtype: torch.dtype) -> Any:
    """Conditioning for this batch: tensors on its device, in the model's dtype, expanded to its rows."""

    def fit(value: Tensor) -> Tensor:
        value = value.to(like.device, dtype if value.is_floating_point() else None)
        if value.ndim == 0 or len(value) == 1:
            return value.expand(len(like), *value.shape[1:])
        if len(value) != len(like):
            raise ValueError(f"`conditioning` should have 1 or {len(like)} rows for this batch, found {len(value)}.")
        return value

    return _map_tensors(fit, conditioning)


def _map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(fn, item) for key, item in value.items()}
    return value
