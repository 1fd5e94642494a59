"""Timestep matching: the noise that a degradation is most like, by the timestep at which a denoiser restores it best.

A restoration network that was pre-trained to remove noise of T strengths is conditioned on that timestep when it learns
the degradation, and several degradations are learned in its order.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from restoreloss._optional import require
from restoreloss.checks import check_choice, check_integer, check_number, describe
from restoreloss.diffusion.adapt import wrap
from restoreloss.diffusion.sampling import denoise
from restoreloss.diffusion.schedule import NoiseSchedule
from restoreloss.distances import Distance, distance_per_sample
from restoreloss.frozen import frozen
from restoreloss.generators import Generators, check_generators, standard_normal
from restoreloss.images import check_pair, check_range, into_range, warn_if_out_of_range

logger = logging.getLogger(__name__)

Mode = Literal["direct", "diffuse", "ddim"]


@dataclass(frozen=True)
class TimestepMatch:
    """What :func:`match_timestep` finds.

    Attributes:
        timesteps: that were tried, rising, shape (K,).
        per_image: distance of each restored image to its clean one, (N, K).
        unrestored: distance of each degraded image to its clean one, (N,).
    """

    timesteps: Tensor
    per_image: Tensor
    unrestored: Tensor

    @property
    def curve(self) -> Tensor:
        """The distance over all images, (K,)."""
        return self.per_image.mean(dim=0)

    @property
    def best(self) -> int:
        """t*: where the curve is lowest, the smallest of equals."""
        return int(self.timesteps[self.curve.argmin()])

    @property
    def best_per_image(self) -> Tensor:
        """Where each image's own curve is lowest, (N,)."""
        return self.timesteps[self.per_image.argmin(dim=1)]

    @property
    def gain(self) -> float:
        """The share of the distance that the best timestep removes; at most 0 if none removes any."""
        before = float(self.unrestored.mean())
        return 1 - float(self.curve.min()) / before if before > 0 else 0.0

    @property
    def degenerate(self) -> bool:
        """True if no timestep brings the degraded images closer: ``best`` then only tells what does the least harm."""
        return not self.gain > 0  # True of NaN as well.

    @classmethod
    def pool(cls, matches: Sequence["TimestepMatch"]) -> "TimestepMatch":
        """One match of the images of several batches.

        Raises:
            ValueError: For none, or different timesteps.
        """
        if not isinstance(matches, Sequence) or not all(isinstance(match, TimestepMatch) for match in matches):
            found = [describe(one) for one in matches] if isinstance(matches, Sequence) else describe(matches)
            raise ValueError(f"`matches` should be a list of TimestepMatch, found {found}.")
        if not matches:
            raise ValueError("`matches` should be at least one, found none.")
        tried = [match.timesteps.tolist() for match in matches]
        if any(timesteps != tried[0] for timesteps in tried):
            raise ValueError(f"`matches` should be of the same `timesteps`, found {tried}.")
        return cls(
            matches[0].timesteps,
            torch.cat([match.per_image for match in matches]),
            torch.cat([match.unrestored for match in matches]),
        )


def match_timestep(
    denoiser: Any,
    schedule: NoiseSchedule,
    degraded: Tensor,
    clean: Tensor,
    *,
    timesteps: Sequence[int] | None = None,
    mode: Mode = "direct",
    distance: Distance = "l1",
    input_range: tuple[float, float] = (0.0, 1.0),
    ddim_steps: int = 5,
    generator: Generators = None,
) -> TimestepMatch:
    r"""Find the timestep at which a denoiser restores degraded images best.

    .. math:: t^* = \arg\min_t\ \mathrm{E}\, d\bigl(\hat x_0(x_t, t),\ x\bigr)

    ======= ================================================================================ ====================
    direct  :math:`x_t = a_t y`: what the network takes for noise at t is taken from y       K passes
    diffuse :math:`x_t = a_t y + \sigma_t \epsilon`, one prediction                          K passes
    ddim    the same :math:`x_t`, back to level 0 in ``ddim_steps`` strides without noise    K times ``ddim_steps``
    ======= ================================================================================ ====================

    A network runs in eval mode and without gradient, and is left as it was; a function cannot be asked which network it
    uses. All timesteps see the same noise.

    Args:
        denoiser: a network ``(x_t, t) -> prediction``, or a :class:`~restoreloss.Denoiser`.
        schedule: that it was trained with; ``NoiseLevels.ir_sde(prediction_type="sample")`` for a network that returns
            the image.
        degraded: y, float (N, C, H, W) in ``input_range``.
        clean: x, same shape.
        timesteps: to try. The default is every level that holds noise, or 50 of them, evenly spread, if there are more
            than 100.
        mode: Algorithm 2 is "direct"; Section 2.1 speaks of "diffusion and reverse diffusion", the other two.
        distance: d.
        input_range: of the images.
        ddim_steps: for "ddim".
        generator: of the noise; one, or one for each sample.

    Returns:
        The curve over timesteps, of each image and of all, its minimum, and whether that is any use at all. What is
        degenerate is said in a log entry as well: blur and haze are for small networks. Take a timestep of your own
        then, or one of ``mode="diffuse"``.

    Raises:
        ValueError: For images that do not fit each other or the denoiser, images or predictions that are not finite,
            unknown options, or timesteps outside the schedule or without noise.

    Example:
        >>> levels = NoiseLevels.ir_sde()
        >>> clean, noise = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
        >>> residual = lambda x, t: levels.sigma[t].view(-1, 1, 1, 1) * noise     # knows the noise, not its level
        >>> match_timestep(residual, levels, levels.add_noise(clean, noise, 20), clean).best
        20

    Source: DTP, Section 3.1, Appendix G.3 and Algorithm 2, of which our text holds the wording only. The authors' code
    has a table of the result instead of the search.
    """
    check_pair(degraded, clean, names=("degraded", "clean"))
    check_choice("mode", mode, Mode)
    check_choice("distance", distance, Distance)
    check_integer("ddim_steps", ddim_steps)
    check_generators(generator, len(degraded))
    wrapped = wrap("denoiser", denoiser, schedule)
    schedule = wrapped.schedule
    tried = _tried(timesteps, schedule)
    source, target = check_range(input_range), schedule.model_range
    warn_if_out_of_range({"degraded": degraded, "clean": clean}, source)
    y, x = (into_range(images, source, target) for images in (degraded, clean))
    noise = standard_normal(y, generator)

    def restore(t: int) -> Tensor:
        x_t = schedule.add_noise(y, torch.zeros_like(y) if mode == "direct" else noise, t)
        steps = [t * k // ddim_steps for k in range(ddim_steps, 0, -1)] if mode == "ddim" else [t]
        steps = sorted({step for step in steps if step >= schedule.first_timestep} | {t}, reverse=True)
        return denoise(wrapped, x_t, steps, sampler="deterministic")

    with torch.no_grad(), frozen(wrapped):
        distances = [distance_per_sample(restore(t), x, distance) for t in tried]
        match = TimestepMatch(
            torch.tensor(tried), torch.stack(distances, 1).cpu(), distance_per_sample(y, x, distance).cpu()
        )
    if not match.unrestored.isfinite().all():
        where = (~match.unrestored.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"`degraded` and `clean` should be finite, found images {where} that are not.")
    if not match.per_image.isfinite().all():
        where = match.timesteps[~match.per_image.isfinite().all(dim=0)].tolist()
        raise ValueError(f"`denoiser` should give finite images, found others at timesteps {where}.")
    if match.degenerate:
        logger.warning(
            "No timestep brings the degraded images closer to the clean ones: t* = %d says little.", match.best
        )
    return match


def order_by_timestep(matches: Mapping[str, TimestepMatch | float]) -> list[str]:
    """The names of degradations by rising t*: the order in which time-sequential incremental training adds them.

    Args:
        matches: what was found for each, or a table of your own.

    Returns:
        The names; those of one t* stay in the order given.

    Raises:
        ValueError: For something else than a mapping of names to matches or numbers.

    Example:
        >>> order_by_timestep({"hazy": 47, "noisy": 4, "rainy": 8})
        ['noisy', 'rainy', 'hazy']

    Source: DTP, Section 3.3.
    """
    if not isinstance(matches, Mapping):
        raise ValueError(f"`matches` should be a mapping of names to what was found, found {describe(matches)}.")
    found = {
        name: match.best if isinstance(match, TimestepMatch) else check_number(f"matches[{name!r}]", match)
        for name, match in matches.items()
    }
    return sorted(found, key=lambda name: found[name])


def plot_matches(matches: Mapping[str, TimestepMatch], path: str | Path) -> Path:
    """Draw the curves of several degradations, each relative to the unrestored image, with t* marked and written.

    Args:
        matches: by name.
        path: of the plot, by its ending PNG, SVG or PDF.

    Returns:
        The path.

    Raises:
        ImportError: Without matplotlib.
    """
    drawing = require("matplotlib.figure", purpose="plot_matches", install="matplotlib")
    figure = drawing.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    ends = {}
    for name, match in matches.items():
        relative = match.curve / match.unrestored.mean()
        (line,) = axes.plot(match.timesteps, relative)
        axes.plot(match.best, float(relative.min()), "o", color=line.get_color())
        ends[name] = float(relative[-1]), line.get_color()
    axes.axhline(1.0, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="timestep", ylabel="distance to the clean image / unrestored", yscale="log")
    places = sorted(ends, key=lambda name: ends[name][0])
    for row, name in enumerate(places):  # The labels are in the order of the ends of the curves.
        match, (end, color) = matches[name], ends[name]
        said = "no timestep helps" if match.degenerate else f"t* = {match.best}"
        height = (row + 0.5) / len(places)
        axes.annotate(
            f"{name}: {said}", (float(match.timesteps[-1]), end), xytext=(1.04, height), textcoords="axes fraction",
            va="center", fontsize="small", color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip
    figure.savefig(path, dpi=120)
    return Path(path)


def _tried(timesteps: Sequence[int] | None, schedule: NoiseSchedule) -> list[int]:
    first = schedule.first_timestep
    every = range(first, schedule.num_timesteps)
    if timesteps is None:
        return list(every) if len(every) <= 100 else [every[k * (len(every) - 1) // 49] for k in range(50)]
    if isinstance(timesteps, str) or not isinstance(timesteps, Iterable):
        raise ValueError(f"`timesteps` should be a list of integers, found {describe(timesteps)}.")
    tried = sorted(set(timesteps))
    if not tried:
        raise ValueError("`timesteps` should be at least one, found none.")
    for t in tried:
        schedule.check_timestep(t)
        if t < first:
            raise ValueError(f"`timesteps` should hold noise, found {t}, which holds none.")
    return tried
