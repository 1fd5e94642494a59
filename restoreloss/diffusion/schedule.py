"""NoiseSchedule: how much noise is in ``x_t``, and conversions between the ways to describe it.

A :class:`NoiseSchedule` is the table ``alphas_cumprod`` of a discrete diffusion model together with what the model
predicts. All code of this library that mixes, removes or converts noise uses it.
"""

import math
import warnings
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor

from restoreloss.checks import check_choice, check_integer, check_number, describe
from restoreloss.precision import ExactBuffers

PredictionType = Literal["epsilon", "v_prediction", "sample", "residual", "flow_prediction"]


class NoiseSchedule(ExactBuffers):
    r"""The noise levels of a variance-preserving diffusion model.

    .. math:: x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon

    The square roots are computed once in float64 and kept in float32. They follow ``.to(device)`` but not
    ``.half()``: in bfloat16 the noise of the first timesteps would round to none at all.

    Args:
        alphas_cumprod: :math:`\bar\alpha_t` for t = 0..T-1, shape (T,), within [0, 1], never rising.
        prediction_type: what the model that was trained with this schedule predicts: the noise ("epsilon"), the
            velocity :math:`\sqrt{\bar\alpha_t}\epsilon - \sqrt{1 - \bar\alpha_t}x` ("v_prediction"), the clean
            image ("sample"), the noise as it was added, :math:`\sqrt{1 - \bar\alpha_t}\epsilon` ("residual"), or
            :math:`\epsilon - x` ("flow_prediction").

    Raises:
        ValueError: If ``alphas_cumprod`` is no such table, or ``prediction_type`` is unknown. A table that hardly falls
            is refused where it must be that of ``1 - betas``, not multiplied up, and warned of where it may be.

    Example:
        >>> schedule = NoiseSchedule.linear()
        >>> x, noise, t = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([10, 500])
        >>> x_t = schedule.add_noise(x, noise, t)
        >>> torch.allclose(schedule.predict_x0(x_t, noise, t), x, atol=1e-5)
        True

    Source: Ho et al. 2020 (Eq. 4); Salimans & Ho 2022 for v. In DiffLoss it is Eq. (7).
    """

    model_range = (-1.0, 1.0)
    """The range of the images that a model of this schedule reads."""

    alphas_cumprod: Tensor
    signal: Tensor
    sigma: Tensor

    def __init__(self, alphas_cumprod: Tensor, *, prediction_type: PredictionType = "epsilon") -> None:
        super().__init__()
        alphas_cumprod = table("alphas_cumprod", alphas_cumprod)
        exact = alphas_cumprod.to("cpu", torch.float64)
        if not (exact.min() >= 0 and exact.max() <= 1 and bool((exact.diff() <= 0).all())):
            raise ValueError(
                "`alphas_cumprod` should fall from at most 1 to at least 0, found values from "
                f"{exact[0]:.6g} to {exact[-1]:.6g} (is it a table of betas or of sigmas?)."
            )
        _check_cumulated(exact)
        check_choice("prediction_type", prediction_type, PredictionType)
        self.prediction_type: PredictionType = prediction_type
        self._keep(exact, exact.sqrt(), (1 - exact).sqrt(), alphas_cumprod.device)

    def _keep(self, alphas_cumprod: Tensor, signal: Tensor, sigma: Tensor, device: torch.device) -> None:
        """Register the tables, computed in float64 on the CPU."""
        for name, exact in (("alphas_cumprod", alphas_cumprod), ("signal", signal), ("sigma", sigma)):
            self.register_buffer(name, exact.to(device, torch.float32), persistent=False)
        # They are counted once, because reading a table on an accelerator waits for it.
        self._silent_from = int((signal.float() > 0).sum())
        self._noisy_from = int(sigma.float()[0] == 0)

    @classmethod
    def linear(
        cls,
        num_timesteps: int = 1000,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction_type: PredictionType = "epsilon",
    ) -> "NoiseSchedule":
        """Betas on a line from ``beta_start`` to ``beta_end``: DDPM, ADM and the prior of DiffLoss."""
        first, last = (
            check_number("beta_start", beta_start, low=0, high=1),
            check_number("beta_end", beta_end, low=0, high=1),
        )
        betas = torch.linspace(first, last, check_integer("num_timesteps", num_timesteps), dtype=torch.float64)
        return cls(torch.cumprod(1 - betas, dim=0), prediction_type=prediction_type)

    @classmethod
    def scaled_linear(
        cls,
        num_timesteps: int = 1000,
        *,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction_type: PredictionType = "epsilon",
    ) -> "NoiseSchedule":
        """Square roots of the betas on a line between those of the ends: latent diffusion and Stable Diffusion."""
        first, last = (
            check_number("beta_start", beta_start, low=0, high=1),
            check_number("beta_end", beta_end, low=0, high=1),
        )
        count = check_integer("num_timesteps", num_timesteps)
        betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64) ** 2
        return cls(torch.cumprod(1 - betas, dim=0), prediction_type=prediction_type)

    @classmethod
    def cosine(
        cls,
        num_timesteps: int = 1000,
        *,
        offset: float = 0.008,
        max_beta: float = 0.999,
        prediction_type: PredictionType = "epsilon",
    ) -> "NoiseSchedule":
        r""":math:`\bar\alpha` a squared cosine (Nichol & Dhariwal 2021, Eq. 17), betas clipped at ``max_beta``."""
        offset, max_beta = check_number("offset", offset, low=0), check_number("max_beta", max_beta, low=0, high=1)
        time = torch.linspace(0, 1, check_integer("num_timesteps", num_timesteps) + 1, dtype=torch.float64)
        abar = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=max_beta)
        return cls(torch.cumprod(1 - betas, dim=0), prediction_type=prediction_type)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> "NoiseSchedule":
        """Take ``alphas_cumprod`` and ``config.prediction_type`` from a diffusers scheduler.

        Args:
            scheduler: DDPM, DDIM, PNDM, DPM-Solver, Euler, ...: whatever has ``alphas_cumprod``.

        Returns:
            The schedule, with the scheduler's prediction type ("epsilon" where it names none).

        Raises:
            ValueError: If the scheduler has no ``alphas_cumprod``: flow-matching, EDM, VE and consistency schedulers
                describe their noise by sigmas, and reading those as a variance-preserving table would be wrong.
        """
        alphas_cumprod, config = (getattr(scheduler, name, None) for name in ("alphas_cumprod", "config"))
        if not isinstance(alphas_cumprod, Tensor) or getattr(config, "use_flow_sigmas", False):
            raise ValueError(
                "A schedule should be a NoiseSchedule, a table of `alphas_cumprod` or a diffusers scheduler that has "
                f"one (DDPM, DDIM, PNDM, DPM-Solver, Euler, ...), found {describe(scheduler)}. Flow matching has "
                "FlowLevels; EDM and consistency schedulers are not variance preserving: wrap such a model in a "
                "callable f(x_t, t) that returns the noise."
            )
        # In every scheduler of diffusers a missing entry means epsilon.
        prediction_type: Any = getattr(config, "prediction_type", None) or "epsilon"
        return cls(alphas_cumprod, prediction_type=prediction_type)

    def zero_terminal_snr(self) -> "NoiseSchedule":
        r"""A copy that is rescaled so that its last level holds no signal at all.

        .. math:: \sqrt{\bar\alpha_t} \leftarrow
            \frac{\sqrt{\bar\alpha_t} - \sqrt{\bar\alpha_{T-1}}}{\sqrt{\bar\alpha_0} - \sqrt{\bar\alpha_{T-1}}}
            \sqrt{\bar\alpha_0}

        Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Algorithm 1.
        """
        root = self.alphas_cumprod.double().sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return NoiseSchedule(root.square(), prediction_type=self.prediction_type)

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels."""
        return len(self.alphas_cumprod)

    @property
    def first_timestep(self) -> int:
        """The lowest level that holds noise: 1 where level 0 is the image itself."""
        return self._noisy_from

    @property
    def last_timestep(self) -> int:
        """The highest level that holds signal: T - 2 where the last one is noise alone, else T - 1."""
        return self._silent_from - 1

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        r""":math:`x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon`.

        Args:
            x: clean images or latents in the range of the model, shape (N, ...).
            noise: standard normal, same shape.
            t: timesteps in [0, T), shape (N,), or one for all.

        Returns:
            x_t, same shape, mixed in float32 or higher and returned in the dtype of ``x``.

        Raises:
            ValueError: If shapes differ or a timestep does not fit.
        """
        _check_alike(x, noise, "x", "noise")
        signal, sigma = self._levels(t, x)
        return (signal * x + sigma * noise).to(x.dtype)

    def predict_x0(self, x_t: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        r""":math:`\hat x_0 = (x_t - \sqrt{1 - \bar\alpha_t}\,\epsilon) / \sqrt{\bar\alpha_t}`, the inverse of mixing.

        Errors in ``noise`` come back multiplied by :math:`\sqrt{1/\bar\alpha_t - 1}`: about 160 at the last step of the
        linear schedule. Where :math:`\bar\alpha_t = 0` there is no image in ``x_t`` to find.

        Args:
            x_t: noisy images or latents, shape (N, ...).
            noise: the noise in them, same shape.
            t: timesteps in [0, T), shape (N,), or one for all.

        Returns:
            The clean images, same shape and dtype as ``x_t``.

        Raises:
            ValueError: If shapes differ, a timestep does not fit, or there is no signal at it
                (:attr:`last_timestep`; timesteps on an accelerator are not read).
        """
        _check_alike(x_t, noise, "x_t", "noise")
        self.check_signal(t)
        signal, sigma = self._levels(t, x_t)
        return ((x_t - sigma * noise) / signal).to(x_t.dtype)

    def posterior(self, x_t: Tensor, x0: Tensor, t: Tensor | int, previous: Tensor | int) -> tuple[Tensor, Tensor]:
        r"""Mean and standard deviation of :math:`q(x_s \mid x_t, x_0)` for any s = ``previous`` <= t.

        .. math:: \mu = \frac{\sqrt{\bar\alpha_s}\,\beta}{1 - \bar\alpha_t} x_0
            + \frac{\sqrt{\alpha}\,(1 - \bar\alpha_s)}{1 - \bar\alpha_t} x_t, \qquad
            \sigma^2 = \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t} \beta, \qquad
            \alpha = 1 - \beta = \bar\alpha_t / \bar\alpha_s

        With s = t - 1 it is the posterior of DDPM, with larger strides that of a chain of fewer timesteps.

        Args:
            x_t: noisy images or latents, shape (N, ...).
            x0: the clean ones, or a guess of them, same shape.
            t: timesteps in [0, T), shape (N,), or one for all.
            previous: less noisy timesteps, likewise.

        Returns:
            The mean in the dtype of ``x_t``, and the standard deviation of shape (N, 1, ...) in float32 or higher.

        Raises:
            ValueError: If shapes differ, a timestep does not fit, or there is no noise at ``t``.

        Source: Ho et al. 2020 (Eqs. 6, 7); Nichol & Dhariwal 2021 (Section 4) for strides.
        """
        _check_alike(x_t, x0, "x_t", "x0")
        self._check_noisy(t)
        signal, sigma = self._levels(t, x_t)
        signal_s, sigma_s = self._levels(previous, x_t)
        unread = any(isinstance(step, Tensor) and step.device.type != "cpu" for step in (t, previous))
        if not (unread or torch.compiler.is_compiling()) and bool(
            (torch.as_tensor(previous) > torch.as_tensor(t)).any()
        ):
            raise ValueError(f"`previous` should be at most `t` ({t}), found {previous}.")
        beta, variance = self._fallen((signal, sigma), (signal_s, sigma_s)) / signal_s**2, sigma**2
        mean = signal_s * beta / variance * x0 + signal / signal_s * sigma_s**2 / variance * x_t
        return mean.to(x_t.dtype), (beta / variance).sqrt() * sigma_s

    def to_noise(
        self, output: Tensor, x_t: Tensor, t: Tensor | int, *, prediction_type: PredictionType | None = None
    ) -> Tensor:
        r"""Turn what a model predicts into the noise it implies.

        ========== =====================================================================================
        epsilon    ``output``
        v          :math:`\sqrt{\bar\alpha_t}\, v + \sqrt{1 - \bar\alpha_t}\, x_t`
        sample     :math:`(x_t - \sqrt{\bar\alpha_t}\, \hat x_0) / \sqrt{1 - \bar\alpha_t}`
        residual   ``output`` :math:`/ \sqrt{1 - \bar\alpha_t}`
        flow       :math:`(x_t + \sqrt{\bar\alpha_t}\, u) / (\sqrt{\bar\alpha_t} + \sqrt{1 - \bar\alpha_t})`
        ========== =====================================================================================

        Args:
            output: the prediction of the model, shape (N, ...).
            x_t: the noisy input it was made from, same shape.
            t: timesteps, shape (N,), or one for all.
            prediction_type: overrides the schedule's own.

        Raises:
            ValueError: If shapes differ, or a timestep does not fit or holds no noise that a "sample" or a "residual"
                could be divided into.

        Returns:
            The noise, same shape, in float32 or higher: near the last timestep :meth:`predict_x0` multiplies what is
            rounded here by more than a hundred. Of a "sample" prediction it amplifies errors by
            :math:`\sqrt{\bar\alpha_t / (1 - \bar\alpha_t)}` (100 at t = 0 of the linear schedule): draw timesteps from
            a range that starts above 0 for such priors.
        """
        if prediction_type is None:  # checked when the schedule was made; torch 2.6 cannot compile the check
            prediction_type = self.prediction_type
        else:
            check_choice("prediction_type", prediction_type, PredictionType)
        _check_alike(output, x_t, "output", "x_t")
        output = output.to(torch.promote_types(torch.promote_types(output.dtype, x_t.dtype), torch.float32))
        if prediction_type == "epsilon":
            return output
        signal, sigma = self._levels(t, x_t)
        if prediction_type == "v_prediction":
            return signal * output + sigma * x_t
        if prediction_type in ("sample", "residual"):
            self._check_noisy(t)
        if prediction_type == "sample":
            return (x_t - signal * output) / sigma
        if prediction_type == "residual":
            return output / sigma
        return (x_t + signal * output) / (signal + sigma)

    def training_target(self, x: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What a model of this prediction type should answer to ``add_noise(x, noise, t)``.

        Args:
            x: clean images or latents, shape (N, ...).
            noise: the noise added to them, same shape.
            t: timesteps, shape (N,), or one for all.

        Returns:
            The target, same shape, in float32 or higher.
        """
        _check_alike(x, noise, "x", "noise")
        signal, sigma = self._levels(t, x)
        if self.prediction_type == "epsilon":
            return noise.to(torch.promote_types(noise.dtype, torch.float32))
        if self.prediction_type == "sample":
            return x.to(torch.promote_types(x.dtype, torch.float32))
        if self.prediction_type == "flow_prediction":
            signal = sigma = torch.ones_like(signal)
        return sigma * noise if self.prediction_type == "residual" else signal * noise - sigma * x

    def model_time(self, t: Tensor) -> Tensor:
        """What a model of this schedule receives at timesteps (N,): these; in a flow, its noise level."""
        return t

    def snr(self) -> Tensor:
        r"""The ratio of signal to noise at each timestep, :math:`\bar\alpha_t / (1 - \bar\alpha_t)`, shape (T,)."""
        return (self.signal / self.sigma).square()

    def check_timestep(self, t: Tensor | int, name: str = "timestep") -> None:
        """Raise ``ValueError`` for a timestep outside [0, T). Tensors on an accelerator pass unread: no device sync."""
        read = _ends(t, name)
        if read is not None and not 0 <= read[0] <= read[1] < self.num_timesteps:
            raise ValueError(
                f"`{name}` should be in [0, {self.num_timesteps}), found {read[0] if read[0] < 0 else read[1]}."
            )

    def check_signal(self, t: Tensor | int, name: str = "timestep") -> None:
        """Raise ``ValueError`` for a timestep at which there is noise alone. Tensors on an accelerator pass unread."""
        read = _ends(t, name)
        if read is not None and self.last_timestep < read[1] < self.num_timesteps:
            raise ValueError(
                f"`{name}` should be at most {self.last_timestep}, the last level of this schedule that holds signal "
                f"(alphas_cumprod is 0 above it), found {read[1]}."
            )

    def _check_noisy(self, t: Tensor | int) -> None:
        """Raise ``ValueError`` for a timestep at which there is no noise to find. Accelerators are not read."""
        read = _ends(t, "timestep")
        if read is not None and 0 <= read[0] < self.first_timestep:
            raise ValueError(
                f"`timestep` should be at least {self.first_timestep}, the first level of this schedule that holds "
                f"noise, found {read[0]}."
            )

    def expand_timestep(self, t: Tensor | int, like: Tensor) -> Tensor:
        """Timesteps of shape (N,) on the device of ``like``, which has N rows, from as many or from one.

        Raises:
            ValueError: If they are not integers in [0, T), or neither one nor N.
        """
        self.check_timestep(t)
        steps = torch.as_tensor(t, device=like.device).long()
        if steps.ndim > 1 or steps.numel() not in (1, len(like)):
            found = tuple(steps.shape)
            raise ValueError(f"`timestep` should be one integer or {len(like)} of them, found shape {found}.")
        return steps.reshape(-1).expand(len(like))

    def _levels(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) in float32, shaped to multiply ``like`` (half precision is promoted)."""
        steps = self.expand_timestep(t, like)
        # index_select refuses what is out of range where check_timestep could not read; indexing would wrap around.
        levels = (table.to(like.device).index_select(0, steps) for table in (self.signal, self.sigma))
        signal, sigma = (level.reshape(-1, *(1,) * (like.ndim - 1)) for level in levels)
        return signal, sigma

    @staticmethod
    def _fallen(level: tuple[Tensor, Tensor], previous: tuple[Tensor, Tensor]) -> Tensor:
        """(signal_s sigma)^2 - (signal sigma_s)^2 of two (signal, sigma); here abar_s - abar_t."""
        (signal, sigma), (signal_s, sigma_s) = level, previous
        # Each of the two forms loses its digits where the other keeps them.
        of_noise, of_signal = (sigma - sigma_s) * (sigma + sigma_s), (signal_s - signal) * (signal_s + signal)
        return torch.where(signal > sigma, of_noise, of_signal)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"num_timesteps={self.num_timesteps}, prediction_type={self.prediction_type!r}"


def table(name: str, values: Any, *, integers: bool = False) -> Tensor:
    """A table of numbers, detached, of shape (T,); ``ValueError`` for anything else, and for integers by default."""
    try:
        found = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"`{name}` should be a table of numbers, found {describe(values)}.") from None
    fits = found.is_floating_point() or (integers and found.dtype == torch.int64)
    if found.ndim != 1 or len(found) == 0 or not fits:
        raise ValueError(f"`{name}` should be a floating-point tensor of shape (T,), found {describe(found)}.")
    return found


def _check_cumulated(abar: Tensor) -> None:
    """Refuse, or warn of, a table of ``1 - betas`` in the place of its cumulative product.

    Such a table stays near 1, or does so for more than half of its length and then drops (cosine). Read as cumulated,
    its betas fall after the first one, which those of no schedule do.
    """
    near_one = abar[-1] > 0.9 or (abar[len(abar) // 2] > 0.9 and abar[-1] < 0.5)
    if len(abar) < 50 or abar[0] == abar[-1] or not near_one:  # A short table, or one level of noise, may stay near 1.
        return
    said = "`alphas_cumprod` should be the cumulative product of 1 - betas (torch.cumprod)"
    found = f"found a table that is {abar[len(abar) // 2]:.4g} in its middle and {abar[-1]:.4g} at its end"
    first, following = float(1 - abar[0]), float(1 - abar[5] / abar[0]) / 5
    if 0 < following < first:
        raise ValueError(f"{said}, {found}: it seems to be 1 - betas itself.")
    warnings.warn(f"{said}, {found}. Is it 1 - betas itself?", stacklevel=4)


def _ends(t: Tensor | int, name: str) -> tuple[int, int] | None:
    """The lowest and the highest of timesteps, or None where they cannot be read without waiting for a device."""
    if isinstance(t, Tensor):
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"`{name}` should be an integer or an integer tensor, found dtype {t.dtype}.")
        if t.device.type != "cpu" or torch.compiler.is_compiling() or t.numel() == 0:
            return None
        return int(t.min()), int(t.max())
    try:
        if not isinstance(t, bool):
            return index(t), index(t)
    except TypeError:
        pass
    raise ValueError(f"`{name}` should be an integer or an integer tensor, found {describe(t)}.")


def _check_alike(one: Tensor, other: Tensor, name: str, other_name: str) -> None:
    for value, its_name in ((one, name), (other, other_name)):
        if not isinstance(value, Tensor):
            raise ValueError(f"`{its_name}` should be a tensor, found {describe(value)}.")
    if one.shape != other.shape or not one.is_floating_point():
        raise ValueError(
            f"`{name}` and `{other_name}` should be floating point and of one shape, found {one.dtype} of "
            f"{tuple(one.shape)} and {other.dtype} of {tuple(other.shape)}."
        )
