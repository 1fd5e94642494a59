"""audit_timesteps: what DiffLoss says at each timestep, and how much of it a linear filter would say as well."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from restoreloss._optional import require
from restoreloss.checks import check_integer
from restoreloss.images import check_pair
from restoreloss.objectives.diffloss import DiffLoss
from restoreloss.training.audit import seeded_draw


@dataclass(frozen=True)
class TimestepAudit:
    """One row: the gradient of the loss at one timestep.

    Attributes:
        timestep: t.
        gradient_norm: Euclidean norm of the gradient at the restored image, mean over images and draws.
        spread: standard deviation of that norm divided by its mean, over images and draws.
        cosine: between the gradient and the error (restored - target), which is the gradient of the squared error; mean
            over images and draws.
        filtered: share of the gradient's energy that an isotropic linear filter of the error explains, in [0, 1]: its
            squared coherence, by frequency. The rest is what the prior knows and no filter does, or chance.
        bands: the same by band of frequency, from the lowest to the highest that an image has.
    """

    timestep: int
    gradient_norm: float
    spread: float
    cosine: float
    filtered: float
    bands: tuple[float, ...]


@dataclass(frozen=True)
class TimestepReport:
    """What :func:`audit_timesteps` found: print it, plot it, iterate over its rows."""

    rows: tuple[TimestepAudit, ...]

    def __iter__(self) -> Iterator[TimestepAudit]:
        return iter(self.rows)

    def __str__(self) -> str:
        bands = len(self.rows[0].bands)
        lines = [f"{'t':>5}  {'|gradient|':>10}  {'spread':>6}  {'cosine':>6}  {'filter':>6}  by band, low to high"]
        lines.append("-" * max(len(lines[0]), 43 + 6 * bands))
        for row in self.rows:
            by_band = " ".join(f"{share:>5.2f}" for share in row.bands)
            lines.append(
                f"{row.timestep:>5}  {row.gradient_norm:>10.3g}  {row.spread:>6.2f}  {row.cosine:>6.2f}  "
                f"{row.filtered:>6.0%}  {by_band}"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Write a chart of norm, cosine and what a filter explains, by timestep.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        require("matplotlib", purpose="TimestepReport.plot", install="matplotlib")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        t = [row.timestep for row in self.rows]
        axes.plot(t, [row.cosine for row in self.rows], "o-", label="cosine with the squared error")
        axes.plot(t, [row.filtered for row in self.rows], "o-", label="explained by a linear filter")
        axes.set(xlabel="timestep", ylim=(min(-0.1, *(row.cosine for row in self.rows)), 1.05))
        norms = axes.twinx()
        norms.semilogy(t, [row.gradient_norm for row in self.rows], "k.--", label="norm of the gradient (right)")
        handles = [*axes.get_legend_handles_labels()[0], *norms.get_legend_handles_labels()[0]]
        axes.legend(handles, [str(handle.get_label()) for handle in handles], loc="center right", fontsize=8)
        figure.savefig(path, dpi=130)
        return Path(path)


def audit_timesteps(
    loss: DiffLoss,
    restored: Tensor,
    target: Tensor,
    *,
    timesteps: Sequence[int] | None = None,
    bands: int = 4,
    draws: int = 4,
    seed: int = 0,
) -> TimestepReport:
    r"""Measure what a DiffLoss says at each timestep, and how much of it needs no network.

    With the error :math:`e = z - x` and the gradient :math:`g_t = \partial L_t / \partial z`, both in the frequency
    domain, the best isotropic filter :math:`g_t \approx H(|f|)\, e` explains in a ring of frequencies the share

    .. math:: \gamma^2 = \frac{|\sum \bar e\, g_t|^2}{\sum |e|^2 \sum |g_t|^2}

    of the gradient's energy, where the sums are over images, channels, draws and the frequencies of the ring. Where
    that is near 1, a squared error of filtered images does the same for nothing.

    Args:
        loss: as it is trained with.
        restored: what your network made of a batch, float (N, C, H, W): at least 8 images, since a filter is fitted.
        target: the clean images, same shape.
        timesteps: the default is 12, evenly spread over those that the loss draws from (or all, for a sampler).
        bands: number of bands of frequency that are told apart.
        draws: of the noise, for each timestep.
        seed: of those draws; the global random state is left as it was.

    Returns:
        A row for each timestep.

    Raises:
        ValueError: For what is no DiffLoss, images that do not fit, and timesteps that the schedule does not have.

    Example:
        >>> from restoreloss import DiffLoss, audit_timesteps, small_prior
        >>> restored, clean = torch.rand(2, 2, 3, 16, 16)
        >>> report = audit_timesteps(DiffLoss(small_prior()), restored, clean, timesteps=[50, 500], draws=1)
        >>> [row.timestep for row in report]
        [50, 500]
    """
    if not isinstance(loss, DiffLoss):
        raise ValueError(f"`loss` should be a DiffLoss, found {type(loss).__name__}.")
    check_pair(restored, target)
    bands, draws = check_integer("bands", bands), check_integer("draws", draws)
    chosen = _spread(loss) if timesteps is None else [check_integer("timesteps", t, low=0) for t in timesteps]
    if not chosen:
        raise ValueError("`timesteps` should have at least one, found none.")
    training, reduction = loss.training, loss.reduction
    try:
        loss.training, loss.reduction = False, "sum"  # all of each image, each by itself
        rows = [_row(loss, restored, target, t, bands, draws, seed) for t in chosen]
    finally:
        loss.training, loss.reduction = training, reduction
    return TimestepReport(tuple(rows))


def _spread(loss: DiffLoss, count: int = 12) -> list[int]:
    levels = loss._denoiser.network.schedule
    low, high = (levels.first_timestep, levels.num_timesteps) if callable(loss.timesteps) else loss.timesteps
    return sorted({round(low + (high - 1 - low) * place / (count - 1)) for place in range(count)})


def _row(loss: DiffLoss, restored: Tensor, target: Tensor, t: int, bands: int, draws: int, seed: int) -> TimestepAudit:
    error = (restored.detach() - target.detach()).double()
    seen = torch.fft.rfft2(error)
    ring = _rings(error, len_of_rings := max(error.shape[-2:]) // 2)
    weight = _hermitian(error)
    cross = seen.new_zeros(len_of_rings)
    of_error, of_gradient = error.new_zeros(len_of_rings), error.new_zeros(len_of_rings)
    norms, cosines = [], []
    for draw in range(draws):
        with torch.inference_mode(False), torch.enable_grad(), seeded_draw(seed + draw, restored.device):
            image = restored.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(image, target.detach().clone(), timestep=t), image)
        gradient = gradient.double()
        norms.append(gradient.flatten(1).norm(dim=1))
        cosines.append(torch.cosine_similarity(gradient.flatten(1), error.flatten(1), dim=1))
        found = torch.fft.rfft2(gradient)
        cross.index_add_(0, ring, (weight * seen.conj() * found).sum(dim=(0, 1)).flatten())
        of_error.index_add_(0, ring, (weight * seen.abs().square()).sum(dim=(0, 1)).flatten())
        of_gradient.index_add_(0, ring, (weight * found.abs().square()).sum(dim=(0, 1)).flatten())
    explained = torch.where(of_error > 0, cross.abs().square() / of_error.clamp_min(1e-300), 0.0)
    edges = torch.linspace(0, len_of_rings, bands + 1).round().long().tolist()
    parts = [slice(low, high) for low, high in itertools.pairwise(edges)]
    norm = torch.cat(norms)
    return TimestepAudit(
        timestep=t, gradient_norm=float(norm.mean()), spread=float(norm.std(correction=0) / norm.mean()),
        cosine=float(torch.cat(cosines).mean()), filtered=_share(explained, of_gradient),
        bands=tuple(_share(explained[part], of_gradient[part]) for part in parts),
    )  # fmt: skip


def _rings(image: Tensor, count: int) -> Tensor:
    """The number of the ring of each frequency of ``rfft2``, flat: 0 to ``count`` - 1, by its distance from 0."""
    height, width = image.shape[-2:]
    across = torch.fft.rfftfreq(width, device=image.device)
    down = torch.fft.fftfreq(height, device=image.device)
    radius = torch.hypot(down[:, None], across)  # cycles a pixel, to the corners' 0.71
    return (radius / 0.5 * count).long().clamp(max=count - 1).flatten()


def _hermitian(image: Tensor) -> Tensor:
    """How often each column of ``rfft2`` stands in the whole transform: twice, but for the first and the middle one."""
    width = image.shape[-1]
    weight = image.new_full((width // 2 + 1,), 2.0)
    weight[0] = 1.0
    if width % 2 == 0:
        weight[-1] = 1.0
    return weight


def _share(explained: Tensor, whole: Tensor) -> float:
    return float(explained.sum() / whole.sum()) if float(whole.sum()) > 0 else 0.0
