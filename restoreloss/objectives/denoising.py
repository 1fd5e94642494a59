"""DenoisingLoss: a network learns to generate by taking noise out of clean images, at every level.

:class:`DenoisingLoss` trains the network itself: it is the generative pre-training of DTP, and that of any diffusion
model. :class:`~restoreloss.DiffLoss` is the other way round: there the denoiser is frozen and the image learns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from restoreloss.checks import check_callable, check_choice, check_integer, describe
from restoreloss.diffusion.denoisers import Denoiser, prediction_in
from restoreloss.diffusion.levels import NoiseLevels
from restoreloss.diffusion.schedule import NoiseSchedule
from restoreloss.distances import Distance, Reduction, distance_per_sample, reduce_samples
from restoreloss.generators import Generators, check_generators, standard_normal, stratified
from restoreloss.images import RangeWatch, check_images, check_pair, check_range, into_range
from restoreloss.objectives.base import total


class DenoisingLoss(nn.Module):
    r"""The distance between what a network answers to a noisy image and what it should.

    .. math:: x_t = a_t x + \sigma_t \epsilon, \qquad
        L = \gamma_t \, d\bigl(f(x_t, t),\ \text{target}(x, \epsilon, t)\bigr), \qquad t \sim U\{t_{low}..t_{high}-1\}

    The target is that of the schedule's prediction type. With :class:`~restoreloss.NoiseLevels` the default, "residual"
    and "l1", is :math:`\lVert x_t - r(x_t, t) - x \rVert_1` of DTP, and so is "sample" and "l1" for a network that
    returns the image itself; with :class:`~restoreloss.NoiseSchedule` it is "epsilon" and "mse" of DDPM.

    The network is live: neither registered nor frozen nor copied. Its parameters get the gradient.

    Args:
        denoiser: ``(x_t, t) -> prediction`` with t of shape (N,), which is :meth:`NoiseSchedule.model_time`: a network,
            DDP around it, or a function; a tensor, an object with ``.sample``, or a tuple that begins with the tensor.
            Channels beyond those of the image (a learned variance) are ignored. A network of one dtype is shown x_t in
            it.
        schedule: :class:`~restoreloss.NoiseLevels` or :class:`~restoreloss.NoiseSchedule`.
        distance: "l1" | "mse" | "rms" | "l2"; the default is "l1" with NoiseLevels and "mse" else.
        timesteps: (low, high), low included. The default is all levels that hold noise.
        weights: :math:`\gamma_t`, one for each timestep of the schedule; 1 by default.
        input_range: of the images; the library maps it to what the schedule's models read. None leaves what is given
            as it is and unchecked: latents have no range.
        reduction: over samples: "mean" | "sum" | "none".

    Raises:
        ValueError: For options that do not fit the schedule, and images or an answer of the wrong shape.

    Example:
        >>> class Network(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Conv2d(3, 3, 3, padding=1)
        ...     def forward(self, image, t):
        ...         return self.layer(image)
        >>> network = Network()
        >>> loss = DenoisingLoss(network, NoiseLevels.ir_sde())
        >>> loss(torch.rand(4, 3, 16, 16)).backward()
        >>> network.layer.weight.grad is not None
        True

    Source: DTP, Eqs. (11), (13); Ho et al. 2020. The equation is lost in the text that we have, and rebuilt from its
    wording and the authors' code, which computes this loss in fine-tuning and does not add it.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        distance: Distance | None = None,
        timesteps: tuple[int, int] | None = None,
        weights: Tensor | Sequence[float] | None = None,
        input_range: tuple[float, float] | None = (0.0, 1.0),
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if isinstance(denoiser, NoiseSchedule | _Loss) or hasattr(denoiser, "terms"):
            raise ValueError(f"`denoiser` should be a network or a function, found {describe(denoiser)}.")
        check_callable("denoiser", denoiser, "x_t", "t")
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(f"`schedule` should be NoiseLevels or a NoiseSchedule, found {describe(schedule)}.")
        if isinstance(denoiser, Denoiser) and schedule.prediction_type != "epsilon":
            raise ValueError(
                "`denoiser` should be the network itself, found a Denoiser, which gives noise, for a schedule of "
                f"prediction type {schedule.prediction_type!r}."
            )
        if distance is None:
            distance = "l1" if isinstance(schedule, NoiseLevels) else "mse"
        check_choice("distance", distance, Distance)
        check_choice("reduction", reduction, Reduction)
        self._denoiser = (denoiser,)  # The tuple keeps it from being registered.
        self.schedule = schedule
        self.distance: Distance = distance
        self.reduction: Reduction = reduction
        self.input_range = None if input_range is None else check_range(input_range)
        self._range = None if self.input_range is None else RangeWatch(self.input_range)
        chosen = (schedule.first_timestep, schedule.num_timesteps) if timesteps is None else timesteps
        if not isinstance(chosen, Sequence) or isinstance(chosen, str) or len(chosen) != 2:
            raise ValueError(f"`timesteps` should be two integers (low, high), found {describe(timesteps)}.")
        low, high = (check_integer("timesteps", step, low=0) for step in chosen)
        if not 0 <= low < high <= schedule.num_timesteps:
            raise ValueError(
                f"`timesteps` should satisfy 0 <= low < high <= {schedule.num_timesteps}, found {timesteps!r}."
            )
        self.timesteps = (low, high)
        table = None if weights is None else _table(weights)
        if table is not None and table.shape != (schedule.num_timesteps,):
            raise ValueError(
                f"`weights` should be one for each of {schedule.num_timesteps} timesteps, found {tuple(table.shape)}."
            )
        self.weights: Tensor | None
        self.register_buffer("weights", table, persistent=False)

    def terms(
        self,
        clean: Tensor,
        *,
        timestep: Tensor | int | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """The one term, "denoising". Arguments as in :meth:`forward`."""
        check_images("clean", clean)
        check_generators(generator, len(clean))
        if self._range is not None:
            self._range.look({"clean": clean})
        if timestep is None:
            timestep = stratified(*self.timesteps, len(clean), generator, clean.device)
        if noise is None:
            noise = standard_normal(clean, generator)
        elif not isinstance(noise, Tensor) or noise.shape != clean.shape or not noise.is_floating_point():
            raise ValueError(f"`noise` should be float {tuple(clean.shape)} like `clean`, found {describe(noise)}.")
        noise = noise.to(clean.device)
        t = self.schedule.expand_timestep(timestep, clean)
        x = clean if self.input_range is None else into_range(clean, self.input_range, self.schedule.model_range)
        (denoiser,) = self._denoiser
        time = t if isinstance(denoiser, Denoiser) else self.schedule.model_time(t)  # a Denoiser asks its own schedule
        noisy = self.schedule.add_noise(x, noise, t)
        if isinstance(denoiser, nn.Module) and not isinstance(denoiser, Denoiser):  # which casts by itself
            dtypes = {weight.dtype for weight in denoiser.parameters() if weight.is_floating_point()}
            noisy = noisy.to(dtypes.pop()) if len(dtypes) == 1 else noisy
        answer = prediction_in(denoiser(noisy, time))
        if answer.ndim != 4 or answer.shape[1] < x.shape[1]:
            raise ValueError(f"`denoiser` should return images like {tuple(x.shape)}, found {tuple(answer.shape)}.")
        answer = answer[:, : x.shape[1]]
        check_pair(answer, x, names=("denoiser(x_t, t)", "clean"))
        values = distance_per_sample(answer, self.schedule.training_target(x, noise, t), self.distance)
        if self.weights is not None:
            values = self.weights.to(t.device)[t] * values
        return {"denoising": reduce_samples(values, self.reduction)}

    def forward(
        self,
        clean: Tensor,
        *,
        timestep: Tensor | int | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """The loss.

        Args:
            clean: images without degradation, float (N, C, H, W) in ``input_range``.
            timestep: fixes t, an integer or (N,). Default: drawn from ``timesteps``.
            noise: fixes epsilon, shape of ``clean``. Default: drawn from N(0, I).
            generator: for what is drawn, t first, then the noise, on the generator's own device; one, or one for each
                sample.

        Returns:
            A scalar, or (N,) with ``reduction="none"``, in float32 or higher.
        """
        return total(self.terms(clean, timestep=timestep, noise=noise, generator=generator))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"timesteps={self.timesteps}, distance={self.distance!r}, reduction={self.reduction!r}"


def _table(weights: Any) -> Tensor:
    try:
        table = torch.as_tensor(weights, dtype=torch.float32)
    except (TypeError, ValueError):
        raise ValueError(f"`weights` should be numbers, one for each timestep, found {describe(weights)}.") from None
    if not bool((table.isfinite() & (table >= 0)).all()):
        raise ValueError("`weights` should be finite and at least 0, found others.")
    if not bool(table.any()):
        raise ValueError("`weights` should leave at least one timestep a weight above 0, found all 0.")
    return table
