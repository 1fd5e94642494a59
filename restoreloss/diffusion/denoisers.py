"""Running a diffusion model: a :class:`Denoiser` is a noisy image and timesteps in, noise and h-space out.

It hides what differs between models: conditioning, learned variance, prediction type, dtype, and where the bottleneck
is. :func:`restoreloss.as_denoiser` makes one of what people have.
"""

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from restoreloss.checks import check_integer, describe, signature_of
from restoreloss.diffusion.schedule import NoiseSchedule
from restoreloss.features import Reached
from restoreloss.precision import enter, leave, reference_weight

Conditioning: TypeAlias = Tensor | Mapping[str, Any]
"""A tensor for the model's one conditioning argument, or its keyword arguments; tensors of 1 or N rows."""


class _Tap:
    """A forward hook that hands the bottleneck to the call that wants it, in the thread of that call.

    It is set once, when the denoiser is made, because a hook that is set after a network's first compiled call never
    fires. It does nothing in other calls.
    """

    def __init__(self, part: int) -> None:
        self.part = part  # This part is taken of an output that is a tuple.
        self.wanted: dict[int, bool] = {}  # For each thread that wants it: whether to stop there.
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
                raise Reached

    def __getstate__(self) -> dict[str, Any]:
        return {"part": self.part, "wanted": {}, "taken": {}}  # A copy is made between calls, and belongs to none.


_COMPILED = 0


def _thread() -> int:
    # Dynamo cannot trace get_ident.
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
        check_conditioning(conditioning)
        check_takes_noise("model", model, conditioning, conditioning_name=conditioning_name, time_name=time_name)
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(
                f"`schedule` should be a NoiseSchedule, found {describe(schedule)}; `as_denoiser` takes schedulers too."
            )
        check_integer("multiple", multiple)
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
            self.schedule = copy.deepcopy(schedule).to(weight.device)  # Moved once, rather than at every call.
        # It is fixed, so that no graph may lead out of it.
        self.conditioning = _map_tensors(
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
        (prediction,) = self._look(noisy, t, noise=True, h=False)
        return self._noise(prediction, noisy, t, native)

    def with_bottleneck(self, noisy: Tensor, t: Tensor | int, *, native: bool = False) -> tuple[Tensor, Tensor]:
        """The predicted noise and the h-space of the same pass (arguments as in :meth:`forward`).

        Raises:
            ValueError: If the model has no bottleneck that can be found.
        """
        t = self._check(noisy, t)
        prediction, h = self._look(noisy, t, noise=True, h=True)
        return self._noise(prediction, noisy, t, native), h

    def bottleneck(self, noisy: Tensor, t: Tensor | int) -> Tensor:
        """The h-space alone; a U-Net stops there and its decoder is never run (arguments as in :meth:`forward`).

        Raises:
            ValueError: If the model has no bottleneck that can be found.
        """
        (h,) = self._look(noisy, self._check(noisy, t), noise=False, h=True)
        return h

    def _look(self, noisy: Tensor, t: Tensor, *, noise: bool, h: bool) -> tuple[Tensor, ...]:
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
        keys = (_COMPILED, _thread())  # A compiled part of the model cannot tell its thread.
        for key in keys:
            tap.wanted[key] = stop
        try:
            output = self._run(cast, t)
        except Reached:
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
        as_map: Tensor = h.transpose(1, 2).unflatten(2, (rows, columns))
        return as_map

    def _run(self, cast: Tensor, t: Tensor) -> Any:
        conditioning = _rows(self.conditioning, like=cast, dtype=cast.dtype)
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
            prediction = prediction[:, :channels]  # The second half is a learned variance.
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
        """What the model itself returns for an image (arguments as in :meth:`forward`)."""
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
        return self.schedule.expand_timestep(t, noisy).clone()  # A model may change the timesteps that it is given.

    def _apply(self, fn: Any, recurse: bool = True) -> "Denoiser":
        super()._apply(fn, recurse)
        self.conditioning = _map_tensors(fn, self.conditioning)
        return self


_NO_TIME = ("target", "targets", "label", "labels", "mask", "encoder_hidden_states")
"""Names of a second argument that is no timestep: of losses, detectors, and transformers that take their time later."""


def check_takes_noise(
    name: str,
    model: Any,
    conditioning: Conditioning | None = None,
    *,
    conditioning_name: str | None = None,
    time_name: str | None = None,
) -> None:
    """Raise ``ValueError`` for what cannot be called as f(x_t, t), as far as its signature tells.

    Args:
        name: of the argument, for the message.
        model: it is not called. Compiled code that does not tell what it takes is accepted.
        conditioning: see :class:`Denoiser`, as what follows.
        conditioning_name: the keyword of a conditioning tensor.
        time_name: the keyword of the timesteps.
    """
    model = getattr(model, "_orig_mod", model)  # This is what torch.compile wraps.
    if isinstance(model, type) or not callable(model):
        raise ValueError(f"`{name}` should be a network or a callable f(x_t, t), found {describe(model)}.")
    said = f"`{name}` should be called as f(x_t, t) with the noisy image and timesteps (N,)"
    scripted = isinstance(model, torch.jit.ScriptModule)
    if isinstance(model, nn.Module) and not scripted and type(model).forward is nn.Module.forward:
        raise ValueError(f"{said}, found {describe(model)}, which has no forward pass.")
    if (signature := signature_of(model)) is None:
        return
    third = conditioning is not None and not isinstance(conditioning, Mapping) and conditioning_name is None
    keywords = sorted(conditioning) if isinstance(conditioning, Mapping) else []
    if isinstance(conditioning, Tensor) and conditioning_name is not None:
        keywords = [conditioning_name]
    try:
        given = [None] * (1 + (time_name is None) + third)
        bound = signature.bind(*given, **dict.fromkeys(keywords), **({} if time_name is None else {time_name: None}))
    except TypeError:
        hint = f"; with the `conditioning` {'third' if third else keywords}" if conditioning is not None else ""
        raise ValueError(f"{said}{hint}, found {describe(model)}, which takes {signature}.") from None
    second = list(bound.arguments)[1:2]
    by_default = signature.parameters[second[0]].default if second else None
    if time_name is None and second and (second[0] in _NO_TIME or isinstance(by_default, bool | str)):
        raise ValueError(
            f"{said}, found {describe(model)}, which takes {signature}: wrap it in a function if it is a denoiser."
        )


def check_conditioning(conditioning: Any) -> None:
    """Raise ``ValueError`` for what is neither a tensor, nor keyword arguments, nor None."""
    if conditioning is not None and not isinstance(conditioning, Tensor | Mapping):
        raise ValueError(
            f"`conditioning` should be a tensor or a mapping of keyword arguments, found {describe(conditioning)}."
        )


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
