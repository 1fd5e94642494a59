"""DiffLoss: the distance of two images as a frozen diffusion model sees them.

The model is shown the restored and the clean image under the same noise at the same timestep. What it sees in one and
not in the other (the noise it predicts, the semantics in its bottleneck) is the loss.
"""

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from restoreloss.checks import check_callable, check_choice, check_number, describe
from restoreloss.diffusion.adapt import as_schedule, wrap
from restoreloss.diffusion.denoisers import Conditioning, Denoiser
from restoreloss.diffusion.latents import LatentEncoder, LatentPrior
from restoreloss.diffusion.schedule import NoiseSchedule
from restoreloss.distances import Distance, Reduction, distance_per_sample, reduce_samples
from restoreloss.frozen import FrozenNetwork, frozen, serving, warn_before_freezing
from restoreloss.generators import Generators, check_generators, draw_per_sample, standard_normal, stratified
from restoreloss.images import RangeWatch, check_pair, check_range, into_range, to_signed_range
from restoreloss.objectives.base import Objective, total
from restoreloss.objectives.tiles import Tiles, check_share
from restoreloss.precision import reference_weight
from restoreloss.sizes import SizePolicy, crop_map, fit_size, pad_to

logger = logging.getLogger(__name__)

TimestepSampler: TypeAlias = Callable[[int, torch.Generator | None], Tensor]
"""(number of samples, generator or None) -> timesteps, an integer tensor of shape (N,)."""
Compare: TypeAlias = Literal["noise", "native"]


class DiffLoss(Objective):
    r"""Distance of two images as a frozen diffusion model sees them.

    .. math::
        z_t = \sqrt{\bar\alpha_t}\,z + \sqrt{1-\bar\alpha_t}\,\epsilon, \quad
        x_t = \sqrt{\bar\alpha_t}\,x + \sqrt{1-\bar\alpha_t}\,\epsilon \quad\text{(Eq. 7)}

        L = w_\text{noise}\, d\big(f(z_t, t), f(x_t, t)\big) + w_h\, d\big(h(z_t, t), h(x_t, t)\big)
        \quad\text{(Eqs. 11, 14, 15)}

    where z is the restored and x the clean image, mapped to [-1, 1]; one t for each sample and ONE
    :math:`\epsilon \sim N(0, I)` are shared by both; f is the noise predicted by the denoiser, h the output of its
    bottleneck ("h-space") and d the ``distance``. The gradient reaches z through f and h, and nothing else.

    Args:
        denoiser: what :func:`as_denoiser` takes: a diffusers or guided-diffusion U-Net, a :class:`Denoiser`, or a
            callable ``f(x_t, t)``; or a :class:`LatentPrior`, which has its ``schedule``, ``conditioning`` and
            ``encoder``. A module is taken over: frozen, eval-locked and hidden (:class:`FrozenNetwork`).
        schedule: the denoiser's :class:`NoiseSchedule`, a diffusers scheduler or a table of ``alphas_cumprod``.
            Default: the linear schedule of DDPM and ADM.
        noise_weight: weight of the noise term. With 0 the decoder of a U-Net is not run.
        h_space_weight: weight of the h-space term, lambda in the paper.
        timesteps: draw t uniformly from ``low <= t < high`` for ``(low, high)``, the samples of a batch one from
            each equal part of it, or by a sampler ``(n, generator) -> (n,) integers``. Default: all that hold noise.
        distance: "mse" | "rms" | "l2" | "l1", per sample (:func:`distance_per_sample`).
        input_range: what YOUR images span.
        conditioning: for denoisers that need it, fixed for all calls (:func:`as_denoiser`).
        encoder: for latent priors: maps images in [-1, 1] to latents, e.g. an ``AutoencoderKL`` (its mode, shifted and
            scaled as its config says) or a callable. A module is frozen and hidden like the denoiser.
        size: "pad" (reflect, and crop what comes out) | "resize" | "error", for sizes that the networks cannot halve.
        reduction: over samples: "mean" | "sum" | "none" (returns (N,)).
        compare: the "noise" that the denoiser predicts, or what it predicts by itself ("native"): velocity or image.
        snr_power: weigh timesteps by :math:`\text{SNR}_t^p`, of mean 1 over ``timesteps``. With p = -1 noise counts as
            it enters the denoised image; p > 0 prefers little noise.
        crop: look at one random tile of each image, of so many pixels or such a share of each side.
        jacobian: False leaves out the derivative of the denoiser, as score distillation does: the gradient at
            :math:`z_t` is that of :math:`d(z_t + \delta, x_t)` at the fixed
            :math:`\delta = f(z_t) - z_t - f(x_t) + x_t`, for "mse" the difference of the predicted noises. Without
            a backward pass through the denoiser, and memory for one; for the noise term alone.
        checkpointing: recompute the blocks of a diffusers model in the backward pass, for less memory.

    Raises:
        ValueError: At construction for options that contradict each other or the denoiser, at a call for images that
            do not fit (shape, dtype, device, channels, an empty batch) or a timestep outside the schedule.

    ``crop`` applies where a gradient is asked for in training mode; ``loss.eval()`` and inputs without gradient get the
    whole. Its average is the whole but for what lies beyond the edge of a tile, which a network with a receptive field
    sees; docs/guides/diffloss.md has measurements. :class:`Subsampled` looks at fewer samples, or at fewer calls.

    NaN pixels give NaN, in their own sample with ``reduction="none"``. Images clearly outside ``input_range`` warn
    once, at the first call that is not compiled. Images of one pixel are continued by it.

    Example:
        >>> from diffusers import UNet2DModel
        >>> prior = UNet2DModel(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        ...                     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> loss = DiffLoss(prior, timesteps=(100, 600))
        >>> restored, clean = torch.rand(2, 3, 15, 17, requires_grad=True), torch.rand(2, 3, 15, 17)
        >>> objective = WeightedSum({"pixel": nn.L1Loss(), "diff": loss}, shares={"diff": 0.5})
        >>> objective(restored, clean).backward()
        >>> sorted(loss.terms(restored, clean))
        ['h_space', 'noise']

    Source: Tan et al., "DiffLoss: Unleashing Diffusion Model as Constraint for Training Image Restoration Network".
    The paper writes :math:`\|\cdot\|_2` and calls it L2 loss; "mse" is that loss, "l2" the norm to the letter. The
    published code runs both passes under ``no_grad``, so that its terms give the restoration network no gradient; its
    weights (1e-3 and 1e-6 with mse) are ``h_space_weight=1e-3`` and an outer weight of 1e-3. The paper tries a weight
    "correlated with t" and does not say which: ``snr_power`` is ours.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        schedule: Any = None,
        *,
        noise_weight: float = 1.0,
        h_space_weight: float = 0.01,
        timesteps: tuple[int, int] | TimestepSampler | None = None,
        distance: Distance = "mse",
        input_range: tuple[float, float] = (0.0, 1.0),
        conditioning: Conditioning | None = None,
        encoder: Callable[[Tensor], Tensor] | nn.Module | None = None,
        size: SizePolicy = "pad",
        reduction: Reduction = "mean",
        compare: Compare = "noise",
        snr_power: float = 0.0,
        crop: int | float | None = None,
        jacobian: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_number("noise_weight", noise_weight, low=0)
        check_number("h_space_weight", h_space_weight, low=0)
        check_number("snr_power", snr_power)
        if noise_weight == 0 and h_space_weight == 0:
            raise ValueError("`noise_weight` or `h_space_weight` should be above 0, found both 0.")
        check_choice("distance", distance, Distance)
        check_choice("size", size, SizePolicy)
        check_choice("reduction", reduction, Reduction)
        check_choice("compare", compare, Compare)
        crop = None if crop is None else check_share("crop", crop)
        if crop is not None and distance not in ("mse", "l1"):
            raise ValueError(f"`crop` should go with the distance mse or l1, means over pixels, found {distance!r}.")
        latents: LatentEncoder | None = None
        if isinstance(denoiser, LatentPrior):
            given = {"schedule": schedule, "conditioning": conditioning, "encoder": encoder}
            if twice := [name for name, value in given.items() if value is not None]:
                raise ValueError(
                    f"`{twice[0]}` should be None for a LatentPrior, which has its own, found "
                    f"{describe(given[twice[0]])}."
                )
            latents, denoiser = denoiser.encoder, denoiser.denoiser
        elif encoder is not None:
            latents = LatentEncoder(encoder)
        elif isinstance(denoiser, NoiseSchedule):
            raise ValueError("`denoiser` should come first and `schedule` second, found a schedule in its place.")
        elif isinstance(denoiser, str | Path):
            raise ValueError(
                f"`denoiser` should be a network or a function, found {str(denoiser)!r}: "
                "`load_prior` reads names, folders and files."
            )
        self.noise_weight = float(noise_weight)
        self.h_space_weight = float(h_space_weight)
        self.distance: Distance = distance
        self.input_range = check_range(input_range)
        self.size: SizePolicy = size
        self.reduction: Reduction = reduction
        self.compare: Compare = compare
        self.crop = crop
        levels = denoiser.schedule if isinstance(denoiser, Denoiser) else as_schedule(schedule)
        self.timesteps = _check_timesteps(timesteps, levels.first_timestep, levels.num_timesteps)
        for option, value in (("jacobian", jacobian), ("checkpointing", checkpointing)):
            if not isinstance(value, bool):
                raise ValueError(f"`{option}` should be True or False, found {value!r}.")
        if not jacobian and (h_space_weight > 0 or compare != "noise" or checkpointing):
            found = f"h_space_weight={h_space_weight:g}, compare={compare!r}, checkpointing={checkpointing}"
            raise ValueError(
                "`jacobian=False` should go with `h_space_weight=0`, `compare='noise'` and no `checkpointing`, found "
                f"{found}."
            )
        self.jacobian = jacobian
        # last, so that a refused call leaves the caller's networks as they were
        wrapped = wrap("denoiser", denoiser, schedule, conditioning=conditioning)
        if h_space_weight > 0 and wrapped.has_bottleneck is False:
            raise ValueError(
                f"`h_space_weight` should be 0 for {type(wrapped.model).__name__}, whose `mid_block` is None; found "
                f"{h_space_weight}."
            )
        self.snr_power = float(snr_power)
        self._snr_weights = None if snr_power == 0 else _snr_weights(wrapped.schedule, self.snr_power, self.timesteps)
        if checkpointing:
            _enable_checkpointing(wrapped.model)
        _check_that_it_answers(wrapped)
        warn_before_freezing(wrapped, "denoiser")
        self._denoiser = FrozenNetwork(wrapped)
        self._encoder: FrozenNetwork[LatentEncoder] | None = None
        if latents is not None:
            warn_before_freezing(latents, "encoder")
            self._encoder = FrozenNetwork(latents.without_decoder())
        self._range = RangeWatch(self.input_range)

    def terms(
        self,
        restored: Tensor,
        target: Tensor,
        *,
        timestep: Tensor | int | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """The weighted terms "noise" and "h_space"; one of weight 0 is absent. Arguments as in :meth:`forward`."""
        check_pair(restored, target)
        check_generators(generator, len(restored))
        # Autocast would cast the frozen weights in each pass, keep every copy for the backward pass, and round two
        # nearly equal images to half: the prior computes in the dtype of its own weights instead.
        kind = restored.device.type
        leaving = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with serving(*self._frozen), leaving:
            return self._terms(restored, target, timestep, noise, generator)

    def _terms(
        self, restored: Tensor, target: Tensor, timestep: Tensor | int | None, noise: Tensor | None,
        generator: Generators,
    ) -> dict[str, Tensor]:  # fmt: skip
        self._range.look({"restored": restored, "target": target})
        denoiser = self._denoiser.network
        z, x, t, noise, valid, tiles = self._prepare(denoiser, restored, target, timestep, noise, generator)
        # Eq. 7: both images under the same noise at the same timestep
        with torch.no_grad():
            seen_in_target = self._look(denoiser, denoiser.schedule.add_noise(x, noise, t), t)
        seen_in_restored = self._look_with_gradient(denoiser, denoiser.schedule.add_noise(z, noise, t), t)
        terms = {}
        for name, reference in seen_in_target.items():
            values = distance_per_sample(
                crop_map(seen_in_restored[name], _height_width(z), valid),
                crop_map(reference, _height_width(z), valid),
                self.distance,
                weights=None if tiles is None else tiles.weights(reference),
            )
            if self._snr_weights is not None:
                self._snr_weights = self._snr_weights.to(values.device)
                values = values * self._snr_weights[t]
            terms[name] = self._weights[name] * reduce_samples(values, self.reduction)
        return terms

    def _prepare(
        self, denoiser: Denoiser, restored: Tensor, target: Tensor, timestep: Tensor | int | None,
        noise: Tensor | None, generator: Generators,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int], Tiles | None]:  # fmt: skip
        """Both images as the denoiser takes them, t and the noise; the size of what is compared, and its tiles."""
        tiles = None
        if self.crop is not None and self.training and restored.requires_grad and torch.is_grad_enabled():
            tiles, restored, target = self._tiles(self.crop, restored, target, generator)
        z = self._to_model_space(restored)
        with torch.no_grad():
            x = self._to_model_space(target)
        denoiser.check_input(z, "restored" if self._encoder is None else "encoder(restored)")
        if tiles is not None:
            tiles.check_steps(z)
        valid = _height_width(z)
        z, x = (fit_size(image, denoiser.multiple, self.size, square=denoiser.square) for image in (z, x))
        if self.size == "resize":
            valid = _height_width(z)  # nothing to crop
        t = denoiser.schedule.expand_timestep(self._timestep(z, generator) if timestep is None else timestep, z)
        noise = standard_normal(z, generator) if noise is None else self._fit_noise(noise, z, valid)
        return z, x, t, noise, valid, tiles

    def forward(
        self,
        restored: Tensor,
        target: Tensor,
        *,
        timestep: Tensor | int | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """The loss.

        Args:
            restored: output of the restoration network, float (N, C, H, W) in ``input_range``.
            target: the clean images, same shape.
            timestep: fixes t, an integer or (N,). Default: drawn from ``timesteps``.
            noise: fixes epsilon, in the shape of what the denoiser sees: the images, or the latents, resized where
                ``size="resize"`` had to. Default: drawn from N(0, I).
            generator: for what is drawn, on the generator's own device: with ``crop`` the tiles, then t, then the
                noise. One, or one for each sample, whose draws then do not depend on the batch that it is in, nor on
                the process.

        Returns:
            A scalar, or (N,) with ``reduction="none"``, in float32 or higher.
        """
        return total(self.terms(restored, target, timestep=timestep, noise=noise, generator=generator))

    @property
    def _frozen(self) -> list[FrozenNetwork[Any]]:
        return [self._denoiser] if self._encoder is None else [self._denoiser, self._encoder]

    @property
    def _weights(self) -> dict[str, float]:
        weights = {"noise": self.noise_weight, "h_space": self.h_space_weight}
        if not any(weights.values()):
            raise ValueError("`noise_weight` or `h_space_weight` should be above 0, found that both were set to 0.")
        return {name: weight for name, weight in weights.items() if weight > 0}

    def _tiles(
        self, crop: int | float, restored: Tensor, target: Tensor, generator: Generators
    ) -> tuple[Tiles, Tensor, Tensor]:
        """The tiles that are looked at, and what they show of both images."""
        encoder, multiple = self._encoder, self._denoiser.network.multiple
        if encoder is not None:
            multiple *= encoder.network.multiple
        valid = _height_width(restored)
        restored, target = (fit_size(image, multiple, self.size) for image in (restored, target))
        if self.size == "resize":
            valid = _height_width(restored)
        square = self._denoiser.network.square
        tiles = Tiles.draw(restored, crop, valid=valid, multiple=multiple, square=square, generator=generator)
        return tiles, tiles.cut(restored), tiles.cut(target)

    def _to_model_space(self, image: Tensor) -> Tensor:
        image = to_signed_range(image, self.input_range)
        if self._encoder is None:
            return into_range(image, (-1.0, 1.0), self._denoiser.network.schedule.model_range)
        encoder = self._encoder.network
        latents: Tensor = encoder(fit_size(image, encoder.multiple, self.size))
        return latents

    def _timestep(self, z: Tensor, generator: Generators) -> Tensor:
        sampler = self.timesteps
        if not callable(sampler):
            return stratified(*sampler, len(z), generator, z.device)

        def sample(count: int, one: torch.Generator | None) -> Tensor:
            drawn = sampler(count, one)
            if not isinstance(drawn, Tensor) or drawn.shape != (count,):
                found = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
                raise ValueError(f"The sampler `timesteps` should return integers of shape ({count},), found {found}.")
            return drawn

        return draw_per_sample(sample, len(z), generator)

    @staticmethod
    def _fit_noise(noise: Tensor, z: Tensor, size: tuple[int, int]) -> Tensor:
        """Noise given for images of ``size``, continued over what padding added."""
        expected = (*z.shape[:2], *size)
        if not isinstance(noise, Tensor):
            raise ValueError(f"`noise` should be a tensor of shape {expected}, found {describe(noise)}.")
        if noise.shape != expected or noise.device != z.device or not noise.is_floating_point():
            raise ValueError(
                f"`noise` should be floating point, of shape {tuple(expected)} and on {z.device}, found {noise.dtype} "
                f"of shape {tuple(noise.shape)} on {noise.device}."
            )
        return pad_to(noise.detach().to(z.dtype), _height_width(z))

    def _look(self, denoiser: Denoiser, noisy: Tensor, t: Tensor) -> dict[str, Tensor]:
        """What the denoiser sees, computing no more than the weights ask for."""
        native = self.compare == "native"
        if self.h_space_weight == 0:
            return {"noise": denoiser(noisy, t, native=native)}
        if self.noise_weight == 0:
            return {"h_space": denoiser.bottleneck(noisy, t)}
        noise, h = denoiser.with_bottleneck(noisy, t, native=native)
        return {"noise": noise, "h_space": h}

    def _look_with_gradient(self, denoiser: Denoiser, noisy: Tensor, t: Tensor) -> dict[str, Tensor]:
        """What it sees in the restored image, through which the gradient comes back, or past which."""
        with torch.set_grad_enabled(self.jacobian and torch.is_grad_enabled()):
            found = self._look(denoiser, noisy, t)
        if not self.jacobian:  # the value of what is seen, with the derivative of what is shown
            found = {name: seen + (noisy - noisy.detach()) for name, seen in found.items()}
        if noisy.requires_grad and torch.is_grad_enabled():
            for name, seen in found.items():
                if not seen.requires_grad:
                    raise ValueError(
                        f"`denoiser` should pass a gradient to `restored`, found none in {name!r}: its forward pass is "
                        "under `no_grad` or `inference_mode`, or detaches the image."
                    )
        return found

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"noise_weight={self.noise_weight:g}, h_space_weight={self.h_space_weight:g}, timesteps={self.timesteps}, "
            f"distance={self.distance!r}, input_range={self.input_range}, size={self.size!r}, "
            f"reduction={self.reduction!r}, compare={self.compare!r}, snr_power={self.snr_power:g}, crop={self.crop}, "
            f"jacobian={self.jacobian}"
        )


def _height_width(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _snr_weights(schedule: NoiseSchedule, power: float, timesteps: Any) -> Tensor:
    """SNR_t^power for every t, of mean 1 over those that are drawn."""
    weights = schedule.snr().double() ** power
    drawn = weights if callable(timesteps) else weights[slice(*timesteps)]
    if not bool(drawn.isfinite().all()) or drawn.sum() == 0:
        raise ValueError(
            f"`snr_power` should give finite weights over `timesteps` {timesteps}, found {power}: leave out the levels "
            "without noise or without signal."
        )
    return (weights / drawn.mean()).float()


def _enable_checkpointing(model: Any) -> None:
    inner = getattr(model, "_orig_mod", model)
    if not hasattr(inner, "enable_gradient_checkpointing"):
        raise ValueError(
            f"`checkpointing` should be False for {type(inner).__name__}, which has no "
            "`enable_gradient_checkpointing()`, as diffusers models have."
        )
    inner.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))  # their default cannot be pickled


@torch.no_grad()
def _check_that_it_answers(denoiser: Denoiser) -> None:
    """Try a copy of a network of unknown kind on a small image: what a restorer or a classifier returns is no noise.

    Large, compiled and conditional networks are not tried, and one that raises may want another size.

    Raises:
        ValueError: If it returns nothing that could be a prediction.
    """
    model = denoiser.model
    known = denoiser.in_channels is not None or denoiser.conditioning is not None
    if known or not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        return
    convolution = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    weight = reference_weight(model)
    if weight is not None and (weight.is_meta or sum(p.numel() for p in model.parameters()) > 50_000_000):
        return
    like = torch.empty(0) if weight is None else weight
    image = like.new_zeros(1, 3 if convolution is None else convolution.in_channels, 64, 64)
    devices = [image.device] if image.device.type == "cuda" else []
    try:
        tried = copy.deepcopy(denoiser)
        with frozen(tried), torch.random.fork_rng(devices=devices):
            output = tried.answer(image, denoiser.schedule.num_timesteps // 2)
    except Exception as error:  # of a size, a range of timesteps or a copy that it does not have: the first call tells
        logger.debug("%s was tried on 64x64 pixels: %s", type(model).__name__, error)
        return
    try:
        denoiser.check_answer(output, image)
    except ValueError as error:
        raise ValueError(
            f"`denoiser` should be a diffusion model, called with (x_t, t), found a {type(model).__name__}: {error}"
        ) from error


def _check_timesteps(timesteps: Any, first: int, num_timesteps: int) -> tuple[int, int] | TimestepSampler:
    if timesteps is None:
        return first, num_timesteps
    if callable(timesteps):
        check_callable("timesteps", timesteps, "count", "generator")
        return timesteps  # type: ignore[no-any-return]
    try:
        low, high = map(index, timesteps)
    except (TypeError, ValueError):
        raise ValueError(
            f"`timesteps` should be two integers (low, high) or a sampler (n, generator) -> (n,), found {timesteps!r}."
        ) from None
    if not 0 <= low < high <= num_timesteps:
        raise ValueError(f"`timesteps` should satisfy 0 <= low < high <= {num_timesteps}, found {timesteps!r}.")
    return low, high
