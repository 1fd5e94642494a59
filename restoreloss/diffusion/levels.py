"""How much noise does a restoration network learn to remove before it learns to restore?

Next to nothing: the noise of generative pre-training is added to the picture, not mixed with it, and its strongest
level is 10 of 255. :class:`NoiseLevels` is such a schedule.
"""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from restoreloss.diffusion.schedule import NoiseSchedule, PredictionType


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
    _preserves_variance = False

    def __init__(self, sigmas: Tensor | Sequence[float], *, prediction_type: PredictionType = "residual") -> None:
        exact = torch.as_tensor(sigmas).detach().to("cpu", torch.float64)
        if exact.ndim != 1 or len(exact) < 2:
            raise ValueError(f"`sigmas` should be a table of shape (T + 1,), found shape {tuple(exact.shape)}.")
        if not (bool(exact.isfinite().all()) and exact[0] >= 0 and bool((exact.diff() >= 0).all())):
            raise ValueError(f"`sigmas` should rise from at least 0, found values from {exact[0]:g} to {exact[-1]:g}.")
        if prediction_type not in get_args(PredictionType) or prediction_type == "v_prediction":
            raise ValueError(f"`prediction_type` should be residual, epsilon or sample, found {prediction_type!r}.")
        nn.Module.__init__(self)
        self.prediction_type = prediction_type
        device = torch.as_tensor(sigmas).device
        for name, table in (
            ("alphas_cumprod", 1 / (1 + exact.square())), ("signal", torch.ones_like(exact)), ("sigma", exact),
        ):  # fmt: skip
            self.register_buffer(name, table.to(device, torch.float32), persistent=False)

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
        if not isinstance(num_timesteps, int) or num_timesteps < 1:
            raise ValueError(f"`num_timesteps` should be a whole number above 0, found {num_timesteps!r}.")
        scale = 1000 / (num_timesteps + 1)
        theta = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps + 1, dtype=torch.float64)
        total = theta.cumsum(0) - theta[0]
        sigma = sigma_max * (1 - torch.exp(2 * math.log(0.005) * total / total[-1])).sqrt()
        return cls(sigma, prediction_type=prediction_type)
