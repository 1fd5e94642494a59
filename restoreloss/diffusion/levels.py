"""NoiseLevels and FlowLevels: noise that is not mixed with the image as in DDPM.

The noise of generative pre-training is weak and added to the image (:class:`NoiseLevels`). That of flow matching lies
at the other end of a straight line from the image (:class:`FlowLevels`).
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn

from restoreloss.checks import check_integer, check_number, describe
from restoreloss.diffusion.schedule import NoiseSchedule, PredictionType, table


class NoiseLevels(NoiseSchedule):
    r"""The noise levels of a variance-exploding diffusion.

    .. math:: x_t = x + \sigma_t\, \epsilon

    All that is said of :class:`NoiseSchedule` holds with a signal of 1. Level 0 is no noise at all, so that timesteps
    count from 1 to T. Images are in [0, 1], as restoration networks have them. ``alphas_cumprod`` is
    :math:`1 / (1 + \sigma_t^2)`, that of the variance-preserving schedule with the same ratio of signal to noise.

    Args:
        sigmas: :math:`\sigma_t` for t = 0..T, never falling, shape (T + 1,); the first should be 0.
        prediction_type: what the network predicts: "residual", :math:`\sigma_t \epsilon`, is what a restoration
            network subtracts from its input; "epsilon" and "sample" as for :class:`NoiseSchedule`.

    Raises:
        ValueError: For a table that falls or is negative, or an unknown prediction type.

    Example:
        >>> levels = NoiseLevels.ir_sde()
        >>> [round(255 * float(levels.sigma[t]), 3) for t in (0, 1, 4, 12, 50)]
        [0.0, 1.012, 2.943, 6.976, 10.0]
        >>> x, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        >>> torch.allclose(levels.add_noise(x, noise, 50) - x, 10 / 255 * noise, atol=1e-4)
        True
    """

    model_range = (0.0, 1.0)

    def __init__(self, sigmas: Tensor | Sequence[float], *, prediction_type: PredictionType = "residual") -> None:
        given = table("sigmas", sigmas, integers=True)
        exact = given.to("cpu", torch.float64)
        if len(exact) < 2:
            raise ValueError(f"`sigmas` should be a table of shape (T + 1,), found shape {tuple(exact.shape)}.")
        if not (bool(exact.isfinite().all()) and exact[0] >= 0 and bool((exact.diff() >= 0).all())):
            raise ValueError(f"`sigmas` should rise from at least 0, found values from {exact[0]:g} to {exact[-1]:g}.")
        if prediction_type not in ("residual", "epsilon", "sample"):
            raise ValueError(f"`prediction_type` should be residual, epsilon or sample, found {prediction_type!r}.")
        nn.Module.__init__(self)
        self.prediction_type = prediction_type
        self._keep(1 / (1 + exact.square()), torch.ones_like(exact), exact, given.device)

    @classmethod
    def ir_sde(
        cls,
        num_timesteps: int = 50,
        *,
        sigma_max: float = 10 / 255,
        prediction_type: PredictionType = "residual",
    ) -> "NoiseLevels":
        r"""The levels of IR-SDE, with which DTP pre-trains.

        .. math:: \sigma_t = \sigma_{max} \sqrt{1 - e^{-2 \Theta_t\, \Delta}}, \qquad
            \Theta_t = \sum_{i \le t} \theta_i - \theta_0, \qquad \Delta = -\ln(0.005) / \Theta_T

        with :math:`\theta` on a line from 1e-4 s to 0.02 s over T + 1 points, s = 1000 / (T + 1).

        Args:
            num_timesteps: T; 50 in DTP.
            sigma_max: of images in [0, 1].
            prediction_type: what the network predicts.

        Source: Luo et al. 2023, "Image Restoration with Mean-Reverting Stochastic Differential Equations"; DTP's code.
        """
        num_timesteps = check_integer("num_timesteps", num_timesteps)
        sigma_max = check_number("sigma_max", sigma_max, low=0, above=True)
        scale = 1000 / (num_timesteps + 1)
        theta = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps + 1, dtype=torch.float64)
        total = theta.cumsum(0) - theta[0]
        sigma = sigma_max * (1 - torch.exp(2 * math.log(0.005) * total / total[-1])).sqrt()
        return cls(sigma, prediction_type=prediction_type)

    def zero_terminal_snr(self) -> NoReturn:
        """Raise ``ValueError``: the signal stays 1."""
        raise ValueError("`zero_terminal_snr` is for schedules that mix noise in, found NoiseLevels, which add it.")

    @staticmethod
    def _fallen(level: tuple[Tensor, Tensor], previous: tuple[Tensor, Tensor]) -> Tensor:
        (_, sigma), (_, sigma_s) = level, previous
        return (sigma - sigma_s) * (sigma + sigma_s)


class FlowLevels(NoiseSchedule):
    r"""The noise levels of a rectified flow: Stable Diffusion 3, Flux.

    .. math:: x_s = (1 - s)\, x + s\, \epsilon, \qquad u = \epsilon - x

    Timesteps 0..T-1 count the levels s in (0, 1], and the model receives :math:`1000\,s`. All that is said of
    :class:`NoiseSchedule` holds with a signal of 1 - s and a sigma of s. ``alphas_cumprod`` is
    :math:`(1 - s)^2 / ((1 - s)^2 + s^2)`, that of the variance-preserving schedule with the same ratio of signal to
    noise.

    Args:
        levels: s, rising, shape (T,).
        prediction_type: what the model predicts: "flow_prediction" is u; "epsilon", "sample" and "residual" as for
            :class:`NoiseSchedule`.
        time_scale: what the model receives at s = 1.

    Raises:
        ValueError: For levels that do not rise within (0, 1], or another prediction type.

    Example:
        >>> levels = FlowLevels.uniform(shift=3.0)
        >>> x, noise, t = torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([249])
        >>> round(float(levels.sigma[249]), 3)
        0.5
        >>> torch.allclose(levels.add_noise(x, noise, t), (x + noise) / 2)
        True
        >>> torch.allclose(levels.to_noise(noise - x, levels.add_noise(x, noise, t), t), noise, atol=1e-6)
        True

    Source: Liu et al. 2022, "Flow Straight and Fast"; Esser et al. 2024 for the shift.
    """

    def __init__(
        self,
        levels: Tensor | Sequence[float],
        *,
        prediction_type: PredictionType = "flow_prediction",
        time_scale: float = 1000.0,
    ) -> None:
        given = table("levels", levels, integers=True)
        exact = given.to("cpu", torch.float64)
        if not (exact[0] > 0 and exact[-1] <= 1 and bool((exact.diff() > 0).all())):
            raise ValueError(f"`levels` should rise within (0, 1], found values from {exact[0]:g} to {exact[-1]:g}.")
        if prediction_type not in get_args(PredictionType) or prediction_type == "v_prediction":
            raise ValueError(
                f"`prediction_type` should be flow_prediction, epsilon, sample or residual, found {prediction_type!r}."
            )
        nn.Module.__init__(self)
        self.prediction_type = prediction_type
        self.time_scale = check_number("time_scale", time_scale, low=0, above=True)
        signal = 1 - exact
        self._keep(signal.square() / (signal.square() + exact.square()), signal, exact, given.device)

    @classmethod
    def uniform(
        cls, num_timesteps: int = 1000, *, shift: float = 1.0, prediction_type: PredictionType = "flow_prediction"
    ) -> "FlowLevels":
        r"""Levels k/T, k = 1..T, moved towards more noise: :math:`s = a k / (T + (a - 1) k)` for a ``shift`` of a.

        Args:
            num_timesteps: T.
            shift: 1 for none, 3 in Stable Diffusion 3.
            prediction_type: what the model predicts.
        """
        num_timesteps = check_integer("num_timesteps", num_timesteps)
        shift = check_number("shift", shift, low=0, above=True)
        k = torch.arange(1, num_timesteps + 1, dtype=torch.float64)
        return cls(shift * k / (num_timesteps + (shift - 1) * k), prediction_type=prediction_type)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> "FlowLevels":
        """The levels that a ``FlowMatchEulerDiscreteScheduler`` was trained with, from its config.

        Raises:
            ValueError: For another scheduler, or one that counts its levels the other way.
        """
        config: Any = getattr(scheduler, "config", None)
        if not is_flow_matching(scheduler) or getattr(config, "invert_sigmas", False):
            raise ValueError(
                "`scheduler` should be a flow-matching scheduler of diffusers without `invert_sigmas`, found "
                f"{describe(scheduler)}."
            )
        # A shift that depends on the size of the image is one of sampling, not of training.
        dynamic = getattr(config, "use_dynamic_shifting", False)
        return cls.uniform(config.num_train_timesteps, shift=1.0 if dynamic else getattr(config, "shift", 1.0))

    def zero_terminal_snr(self) -> NoReturn:
        """Raise ``ValueError``: levels up to 1 say it."""
        raise ValueError("`zero_terminal_snr` is not for FlowLevels, found them: a last level of 1 is noise alone.")

    def model_time(self, t: Tensor) -> Tensor:
        """``time_scale`` times s at timesteps (N,)."""
        return self.time_scale * self.sigma.to(t.device).index_select(0, t)

    @staticmethod
    def _fallen(level: tuple[Tensor, Tensor], previous: tuple[Tensor, Tensor]) -> Tensor:
        (signal, sigma), (signal_s, sigma_s) = level, previous
        return (sigma - sigma_s) * (sigma * signal_s + signal * sigma_s)


def is_flow_matching(scheduler: Any) -> bool:
    """Whether this is a flow-matching scheduler of diffusers; by name, so that diffusers need not be installed."""
    return any(kind.__name__.startswith("FlowMatch") for kind in type(scheduler).__mro__)
