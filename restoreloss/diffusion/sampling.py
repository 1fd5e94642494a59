"""Sampling: from noisy images or latents to clean ones in a few steps, from pure noise or from a first restoration.

An image that has lost its detail is made noisy up to a small timestep, which buries what is wrong with it and keeps
what is right, and is then denoised in one or a few long strides. Between two steps the noise is drawn anew from the
posterior (DDPM) or put back as it was found (DDIM).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

from restoreloss.checks import check_choice, check_integer, describe
from restoreloss.diffusion.denoisers import check_takes_noise
from restoreloss.diffusion.schedule import NoiseSchedule
from restoreloss.generators import Generators, check_generators, standard_normal

PredictsNoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(x_t, t) -> noise`` with t of shape (N,): a :class:`~restoreloss.Denoiser`, or your own function of a network."""

Sampler = Literal["posterior", "deterministic"]


def short_steps(t_p: int = 200, n: int = 1) -> list[int]:
    r"""The n timesteps that a partial diffusion goes through, the noisiest first.

    .. math:: T_n = \big[t_p,\ \lfloor t_p (n-1)/n \rfloor,\ \dots,\ \lfloor t_p / n \rfloor\big]

    Args:
        t_p: the timestep up to which images are made noisy, at least 1.
        n: how many steps, from 1 to ``t_p``.

    Raises:
        ValueError: For numbers that are not whole, or out of these bounds.

    Example:
        >>> short_steps(200, 4)
        [200, 150, 100, 50]

    Source: Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", Section 3.2 and Algorithm S1.
    """
    t_p, n = check_integer("t_p", t_p), check_integer("n", n)
    if n > t_p:
        raise ValueError(f"`n` should be at most `t_p` ({t_p}), found {n}.")
    return [t_p * k // n for k in range(n, 0, -1)]


def partial_diffusion(
    denoiser: PredictsNoise,
    x: Tensor,
    steps: int | Tensor | Sequence[int],
    schedule: NoiseSchedule | None = None,
    *,
    sampler: Sampler = "posterior",
    noise: Tensor | Sequence[Tensor] | None = None,
    generator: Generators = None,
) -> Tensor:
    r"""Make images or latents noisy up to the first of ``steps``, then :func:`denoise` them through all of them.

    .. math:: x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon \quad\text{(Eq. 4)}, \qquad
        \hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon_\theta(x_t, t)}{\sqrt{\bar\alpha_t}}
        \quad\text{(Eq. 5, for one step)}

    Gradients reach ``x`` and the denoiser's weights as in any forward pass. Training wants one step, of a timestep that
    is drawn for each sample; several steps keep the activations of each: run them under ``torch.no_grad()``, as
    Algorithm S1 does.

    Args:
        denoiser: ``(x_t, t) -> noise``.
        x: images or latents of a first restoration, float (N, ...), in the range the denoiser was trained on.
        steps: those of :func:`short_steps`; or one, as an integer or a tensor of one for each sample (N,).
        schedule: of the denoiser; by default the one it carries.
        sampler: see :func:`denoise`.
        noise: standard normal, shape of ``x``; or as many as there are steps, the others for between them. What is not
            given is drawn.
        generator: for the noise, here and between the steps; one, or one for each sample.

    Returns:
        The denoised images or latents, shape and dtype of ``x``.

    Raises:
        ValueError: For no steps, steps that do not fall, leave the schedule or hold no signal, shapes that differ, no
            schedule, an unknown sampler, and arguments of another kind.

    Example:
        >>> schedule = NoiseSchedule.scaled_linear()
        >>> perfect = lambda x_t, t: schedule.to_noise(latents, x_t, t, prediction_type="sample")
        >>> latents = torch.rand(2, 4, 8, 8)
        >>> restored = partial_diffusion(perfect, latents, short_steps(200, 4), schedule)
        >>> torch.allclose(restored, latents, atol=1e-4)
        True

    Source: Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", Eqs. 4 and 5, whose alpha is the
    cumulative product (its Eq. 1 and Algorithm S1 say so). Timesteps count from 0, as in all of this library.
    """
    schedule = _schedule(denoiser, schedule)
    _check_images("x", x, generator)
    if not (noise is None or isinstance(noise, Tensor | Sequence)):
        raise ValueError(f"`noise` should be a tensor, or one for each step, found {describe(noise)}.")
    others = None if noise is None or isinstance(noise, Tensor) else noise[1:]
    start = noise if noise is None or isinstance(noise, Tensor) else next(iter(noise), None)
    if start is None:
        start = standard_normal(x, generator)
    x_t = schedule.add_noise(x, start, _as_list(steps, schedule)[0])
    return denoise(denoiser, x_t, steps, schedule, sampler=sampler, noise=others, generator=generator)


def denoise(
    denoiser: PredictsNoise,
    x_t: Tensor,
    steps: int | Tensor | Sequence[int],
    schedule: NoiseSchedule | None = None,
    *,
    sampler: Sampler = "posterior",
    noise: Sequence[Tensor] | None = None,
    generator: Generators = None,
) -> Tensor:
    r"""From noisy images or latents to clean ones, in the given steps.

    At each step the clean image :math:`\hat x_0` is predicted; at all but the last one it is made noisy again:

    ============= =================================================================================================
    posterior     :math:`x_s \sim q(x_s \mid x_t, \hat x_0)` of the chain that has these steps only
                  (:meth:`NoiseSchedule.posterior`). With ``short_steps(T - 1, 50)`` on pure noise it is the usual
                  DDPM sampler of 50 steps.
    deterministic :math:`x_s = a_s \hat x_0 + \sigma_s \epsilon_\theta(x_t, t)`, with the noise that was found (DDIM).
    ============= =================================================================================================

    Args:
        denoiser: ``(x_t, t) -> noise``.
        x_t: noisy up to the first of ``steps``, float (N, ...).
        steps: falling timesteps; or one, as an integer or a tensor (N,).
        schedule: of the denoiser; by default the one it carries.
        sampler: "posterior" | "deterministic".
        noise: standard normal, shape of ``x_t``, one for between each two steps of "posterior"; drawn by default.
        generator: for the noise between the steps of "posterior"; one, or one for each sample.

    Returns:
        The last prediction of the clean image, shape and dtype of ``x_t``.

    Raises:
        ValueError: As :func:`partial_diffusion`.

    Example:
        >>> schedule = NoiseSchedule.scaled_linear()
        >>> denoise(lambda x_t, t: torch.zeros_like(x_t), torch.ones(1, 4, 8, 8), 999, schedule).mean() > 14
        tensor(True)

    Source: Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", Algorithm S1, lines 15-20; Song
    et al. 2021, Eq. 12 with a variance of 0.
    """
    schedule = _schedule(denoiser, schedule)
    _check_images("x_t", x_t, generator)
    check_choice("sampler", sampler, Sampler)
    chain = _as_list(steps, schedule)
    if noise is not None and len(noise) != len(chain) - 1:
        raise ValueError(f"`noise` should be one for between each two of {len(chain)} steps, found {len(noise)}.")
    for number, (step, following) in enumerate(zip(chain, [*chain[1:], None], strict=True)):
        t = schedule.expand_timestep(step, x_t)
        found = denoiser(x_t, t)
        if not isinstance(found, Tensor) or found.shape != x_t.shape:
            raise ValueError(f"`denoiser` should return noise of shape {tuple(x_t.shape)}, found {describe(found)}.")
        x0 = schedule.predict_x0(x_t, found, t)
        if following is None:
            break
        if sampler == "deterministic":
            x_t = schedule.add_noise(x0, found, following)
        else:
            mean, deviation = schedule.posterior(x_t, x0, t, following)
            drawn = standard_normal(x_t, generator) if noise is None else noise[number]
            x_t = (mean + deviation * drawn).to(x_t.dtype)
    return x0


def _check_images(name: str, images: Any, generator: Generators) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim == 0:
        raise ValueError(f"`{name}` should be a floating point tensor (N, ...), found {describe(images)}.")
    check_generators(generator, len(images))


def _schedule(denoiser: PredictsNoise, schedule: NoiseSchedule | None) -> NoiseSchedule:
    check_takes_noise("denoiser", denoiser)
    found = getattr(denoiser, "schedule", None) if schedule is None else schedule
    if not isinstance(found, NoiseSchedule):
        carried = " (it carries none)" if schedule is None else ""
        raise ValueError(
            f"`schedule` should be the NoiseSchedule that the denoiser was trained with{carried}, found "
            f"{describe(found)}."
        )
    return found


def _as_list(steps: int | Tensor | Sequence[int], schedule: NoiseSchedule) -> list[int | Tensor]:
    chain: list[int | Tensor] = list(steps) if isinstance(steps, Sequence) else [steps]
    if not chain:
        raise ValueError("`steps` should be at least one timestep, found none.")
    for step in chain:
        schedule.check_timestep(step, "steps")
        schedule.check_signal(step, "steps")
    if len(chain) > 1 and any(isinstance(step, Tensor) and step.numel() > 1 for step in chain):
        raise ValueError("`steps` should be integers where there are several, found a tensor of one for each sample.")
    if not all(int(t) > int(s) for t, s in itertools.pairwise(chain)):
        raise ValueError(f"`steps` should fall, found {chain}.")
    return chain
