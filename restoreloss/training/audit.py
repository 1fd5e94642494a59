"""audit and calibrate: which term of a loss moves the image, by how much, and weights by their share.

:func:`audit` measures every term's gradient at the restored image on one batch and flags those that do nothing, break,
drown the others or fight them. :func:`calibrate` finds the weights that give each term a chosen share.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from restoreloss._optional import require
from restoreloss.checks import check_choice, check_integer, check_number, describe
from restoreloss.generators import forked
from restoreloss.gradients import gradient_at, gradient_norm
from restoreloss.images import check_pair
from restoreloss.objectives.base import check_objective, check_sign, named_terms
from restoreloss.objectives.diffloss import DiffLoss
from restoreloss.objectives.subsampled import Subsampled
from restoreloss.objectives.weighted_sum import WeightedSum

Objectives: TypeAlias = (
    Mapping[str, Callable[[Tensor, Tensor], Tensor]] | WeightedSum | Callable[[Tensor, Tensor], Tensor]
)
Flag = Literal["DEAD", "NON-FINITE", "DOMINATES", "OPPOSES"]


@dataclass(frozen=True)
class TermAudit:
    """One row: what a term does to the restored image.

    Attributes:
        name: "diff/noise" for a term of an objective, "pixel" for an objective without terms.
        value: of the term, mean over the draws.
        gradient_norm: Euclidean norm of its gradient at the restored image, mean over the draws.
        share: its norm divided by the sum of all terms' norms, in [0, 1].
        cosine: between its gradient and the first term's, mean over the draws; NaN where one of them is zero.
        seconds: forward and backward of this term, median over the draws.
        time_share: its seconds divided by the sum over all terms. Terms of one objective share its forward pass
            evenly, and each has its own backward.
        flags: any of "DEAD", "NON-FINITE", "DOMINATES", "OPPOSES".
    """

    name: str
    value: float
    gradient_norm: float
    share: float
    cosine: float
    seconds: float
    time_share: float
    flags: tuple[str, ...]


@dataclass(frozen=True)
class AuditReport:
    """What :func:`audit` found: print it, index it by a term's name, iterate over its rows.

    Attributes:
        terms: a row for each term, in order.
        first_non_finite: name of the first term with NaN or infinity, or None.
        notes: what is to be said of the images, and of shares that nothing has measured.
    """

    terms: tuple[TermAudit, ...]
    first_non_finite: str | None
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> TermAudit:
        known = {term.name: term for term in self.terms}
        if name not in known:
            raise KeyError(f"A term should be one of {list(known)}, found {name!r}.")
        return known[name]

    def __contains__(self, name: object) -> bool:
        return any(term.name == name for term in self.terms)

    def __iter__(self) -> Iterator[TermAudit]:
        return iter(self.terms)

    def flagged(self, flag: Flag) -> list[str]:
        """Names of the terms with this flag: "DEAD", "NON-FINITE", "DOMINATES" or "OPPOSES".

        Raises:
            ValueError: For another flag.
        """
        check_choice("flag", flag, Flag)
        return [term.name for term in self.terms if flag in term.flags]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON (NaN stays NaN)."""
        return {
            "terms": {term.name: {**asdict(term), "flags": list(term.flags)} for term in self.terms},
            "first_non_finite": self.first_non_finite,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        width = max(len("term"), *(len(term.name) for term in self.terms))
        header = (
            f"{'term':<{width}}  {'value':>10}  {'|gradient|':>10}  {'share':>6}  {'cosine':>6}  {'time':>5}  flags"
        )
        lines = [header, "-" * len(header)]
        for term in self.terms:
            lines.append(
                f"{term.name:<{width}}  {term.value:>10.4g}  {term.gradient_norm:>10.3g}  {term.share:>6.1%}  "
                f"{term.cosine:>6.2f}  {term.time_share:>5.0%}  {' '.join(term.flags)}".rstrip()
            )
        if self.first_non_finite is not None:
            lines.append(f"first to be NaN or infinite: {self.first_non_finite}")
        return "\n".join([*lines, *self.notes])

    def plot(self, path: str | Path) -> Path:
        """Write a bar chart of each term's share of the gradient, flags beside the bars.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        require("matplotlib", purpose="AuditReport.plot", install="matplotlib")
        from matplotlib.figure import Figure

        names = [term.name for term in self.terms]
        figure = Figure(figsize=(7, 1 + 0.45 * len(names)), layout="constrained")
        axes = figure.subplots()
        colors = ["tab:red" if term.flags else "tab:blue" for term in self.terms]
        shares = [0.0 if math.isnan(term.share) else term.share for term in self.terms]
        bars = axes.barh(names, shares, color=colors)
        labels = [f"{term.share:.1%}  {' '.join(term.flags)}" for term in self.terms]
        axes.bar_label(bars, labels=labels, padding=3)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.45), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="share of the gradient at the restored image")
        axes.spines[["top", "right"]].set_visible(False)
        known = figure.canvas.get_supported_filetypes()
        if Path(path).suffix and Path(path).suffix[1:].lower() not in known:
            raise ValueError(f"`path` should end in one of {', '.join(known)}, found {Path(path).name!r}.")
        figure.savefig(path, dpi=130)
        return Path(path)


def audit(
    objectives: Objectives,
    restored: Tensor,
    target: Tensor,
    *,
    draws: int = 4,
    seed: int = 0,
    dominates: float = 0.9,
    opposes: float = -0.1,
) -> AuditReport:
    r"""Measure what each term of a loss does to the restored image.

    For a term :math:`L_k` with :math:`g_k = \partial L_k / \partial z` it reports :math:`\|g_k\|`, the share
    :math:`\|g_k\| / \sum_j \|g_j\|` and the cosine :math:`\langle g_k, g_1\rangle / \|g_k\|\|g_1\|`, and flags

    - DEAD: no gradient reaches the restored image, or it is zero in every element: a term under ``no_grad``, behind a
      ``detach`` or saturated by a clamp;
    - NON-FINITE: its value or gradient holds NaN or infinity (the first such term is named);
    - DOMINATES: it has more than ``dominates`` of the gradient, and is not alone;
    - OPPOSES: its cosine with the first term is below ``opposes``.

    Args:
        objectives: by name, anything called with (restored, target); or a :class:`WeightedSum`, whose weights count (a
            share that no call in training has measured weighs 1, of which there is a note); or a single objective.
            Objectives with ``.terms`` are taken apart.
        restored: what your network made of a batch, float (N, C, H, W). Nothing is written to its ``.grad``.
        target: the same shape.
        draws: how often each objective is computed and averaged: losses that draw timesteps or noise vary. Objectives
            run as they are: one that holds a batch norm in train mode moves its statistics.
        seed: of those draws; the global random state is left as it was.
        dominates: share above which a term is flagged.
        opposes: cosine below which a term is flagged.

    Returns:
        The report.

    Raises:
        ValueError: For an empty mapping, images that do not fit or are exchanged, an objective that returns no scalar,
            and options that are no numbers.

    Example:
        >>> def forgotten(restored, target):
        ...     with torch.no_grad():
        ...         return (restored - target).square().mean()
        >>> restored, clean = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
        >>> audit({"pixel": torch.nn.L1Loss(), "prior": forgotten}, restored, clean)["prior"].flags
        ('DEAD',)
    """
    _weighed(objectives)  # before the images, which may stand in their place
    check_pair(restored, target)
    draws, seed = check_integer("draws", draws), check_integer("seed", seed, low=-(2**63))
    dominates, opposes = check_number("dominates", dominates), check_number("opposes", opposes)
    measured = _measure(objectives, restored, target, draws, seed)
    first = next(iter(measured.values())).gradients

    norms = {name: _mean([float(gradient_norm(g)) for g in term.gradients]) for name, term in measured.items()}
    seconds = {name: sorted(term.seconds)[draws // 2] for name, term in measured.items()}
    finite = {
        name: all(map(math.isfinite, term.values)) and all(bool(g.isfinite().all()) for g in term.gradients)
        for name, term in measured.items()
    }
    # a broken term has no share, and does not hide those of the others
    total_norm = sum(norm for name, norm in norms.items() if finite[name])
    rows = []
    for name, term in measured.items():
        share = math.nan if not finite[name] else norms[name] / total_norm if total_norm else 0.0
        cosine = _mean([_cosine(g, reference) for g, reference in zip(term.gradients, first, strict=True)])
        flags = []
        if not finite[name]:
            flags.append("NON-FINITE")
        elif norms[name] == 0:
            flags.append("DEAD")
        elif len(measured) > 1 and share > dominates:
            flags.append("DOMINATES")
        if cosine < opposes:
            flags.append("OPPOSES")
        rows.append(
            TermAudit(
                name=name,
                value=_mean(term.values),
                gradient_norm=norms[name],
                share=share,
                cosine=cosine,
                seconds=seconds[name],
                time_share=seconds[name] / sum(seconds.values()),
                flags=tuple(flags),
            )
        )
    non_finite = [row.name for row in rows if "NON-FINITE" in row.flags]
    notes = [*_input_notes(restored, target), *_notes_of_shares(objectives)]
    return AuditReport(tuple(rows), non_finite[0] if non_finite else None, tuple(notes))


def calibrate(
    objectives: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | WeightedSum,
    restored: Tensor,
    target: Tensor,
    *,
    shares: Mapping[str, float],
    draws: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    r"""Weights that give objectives chosen shares of the gradient at the restored image.

    .. math:: w_k = \frac{s_k}{s_1} \cdot \frac{\|g_1\|}{\|g_k\|}, \qquad w_1 = 1

    A weight from a paper belongs to that paper's networks and loss scales. A share means the same everywhere.

    Args:
        objectives: by name, or a :class:`WeightedSum` (whose own weights do not count); the first is the reference and
            keeps weight 1.
        restored: what your network made of a batch, float (N, C, H, W): after some steps rather than none.
        target: the same shape.
        shares: :math:`s_k` of all but the first objective, each above 0; the first has what they leave of 1.
        draws: how often each objective is computed (:func:`audit`).
        seed: of those draws.

    Returns:
        Weights by name, as :class:`WeightedSum` takes them.

    Raises:
        ValueError: For shares that do not name all objectives but the first or do not leave it anything, and for
            objectives that are DEAD or NON-FINITE.

    Example:
        >>> objectives = {"l1": torch.nn.L1Loss(), "l2": torch.nn.MSELoss()}
        >>> restored, clean = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
        >>> weights = calibrate(objectives, restored, clean, shares={"l2": 0.25})
        >>> report = audit(WeightedSum(objectives, weights), restored, clean)
        >>> round(report["l2"].share, 3)
        0.25
    """
    if isinstance(objectives, WeightedSum):
        objectives = objectives.objectives
    if not isinstance(objectives, Mapping) or not isinstance(shares, Mapping):
        found = f"{describe(objectives)} and {describe(shares)}"
        raise ValueError(f"`objectives` and `shares` should be mappings by name, found {found}.")
    _weighed(objectives)
    for name, share in shares.items():
        if not isinstance(share, Real) or isinstance(share, bool):
            check_number(f"shares[{name!r}]", share)
    first, *others = objectives
    if sorted(shares) != sorted(others) or not all(share > 0 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(
            f"`shares` should give each of {others} more than 0 and leave some of 1 to {first!r}, found {dict(shares)}."
        )
    # by their calls, which have no `.terms`: one weight is sought for each whole objective
    whole: dict[str, Any] = {name: objective.__call__ for name, objective in objectives.items()}  # type: ignore[operator]
    with _whole(*objectives.values()):
        report = audit(whole, restored, target, draws=draws, seed=seed)
    broken = [f"{term.name} ({flag})" for term in report.terms for flag in term.flags if flag in ("DEAD", "NON-FINITE")]
    if broken:
        raise ValueError(f"`objectives` should all have a finite gradient at `restored`, found {', '.join(broken)}.")
    left = 1 - sum(shares.values())
    norms = {term.name: term.gradient_norm for term in report.terms}
    return {first: 1.0} | {name: shares[name] / left * norms[first] / norms[name] for name in others}


@dataclass
class _Measured:
    values: list[float]
    gradients: list[Tensor]
    seconds: list[float]


def _weighed(objectives: Objectives) -> list[tuple[str, float, Callable[..., Tensor]]]:
    """(name, weight, objective) for each objective."""
    if isinstance(objectives, WeightedSum):
        weights = objectives.current_weights()
        weighed = [(name, weights[name], f) for name, f in objectives.objectives.items() if weights[name]]
        if not weighed:
            raise ValueError(f"`objectives` should weigh something, found the weights {dict(objectives.weights)}.")
        return weighed
    if isinstance(objectives, Mapping):
        if not objectives:
            raise ValueError("`objectives` should name at least one objective, found none.")
        for name, objective in objectives.items():
            check_objective(f"objectives[{name!r}]", objective)
            check_sign(f"objectives[{name!r}]", objective)
        return [(name, 1.0, objective) for name, objective in objectives.items()]
    if isinstance(objectives, type) or not callable(objectives):
        raise ValueError(
            "`objectives` should be callables by name in a mapping, a WeightedSum or one objective, found "
            f"{describe(objectives)}."
        )
    check_sign("objectives", objectives)
    return [(getattr(objectives, "__name__", type(objectives).__name__), 1.0, objectives)]


def _measure(objectives: Objectives, restored: Tensor, target: Tensor, draws: int, seed: int) -> dict[str, _Measured]:
    """Values, gradients at ``restored`` and times of every term; each objective sees the same random numbers."""
    measured: dict[str, _Measured] = {}
    for name, weight, objective in _weighed(objectives):
        for draw in range(draws):
            # images made in inference mode cannot be differentiated until they are copied outside of it
            seeded = seeded_draw(seed + draw, restored.device)
            with torch.inference_mode(False), torch.enable_grad(), seeded, _whole(objective):
                image = restored.detach().clone().requires_grad_()
                started = _now(image)
                # copies, which an objective may change in place
                terms = named_terms(name, objective, image.clone(), target.detach().clone())
                forward_seconds = (_now(image) - started) / len(terms)  # the terms share the forward pass
                for key, term in terms.items():
                    if not isinstance(term, Tensor) or term.numel() != 1:
                        found = tuple(term.shape) if isinstance(term, Tensor) else describe(term)
                        raise ValueError(f"Term {key!r} should be a scalar tensor (reduction='mean'), found {found}.")
                    started = _now(image)
                    gradient = gradient_at(image, weight * term.sum())
                    row = measured.setdefault(key, _Measured([], [], []))
                    if len(row.values) > draw:
                        raise ValueError(f"`objectives` should give each term a name of its own, found {key!r} twice.")
                    row.seconds.append(forward_seconds + _now(image) - started)
                    row.values.append(weight * float(term.detach()))
                    row.gradients.append(torch.zeros_like(image) if gradient is None else gradient)
    for key, row in measured.items():
        if len(row.values) != draws:
            raise ValueError(f"`objectives` should give the same terms at every call, found {key!r} in some only.")
    return measured


@contextmanager
def _whole(*objectives: Any) -> Iterator[None]:
    """Let losses look at all that train on a part: tiles, some samples, every k-th call. No share is measured."""
    trees = [objective.modules() for objective in objectives if isinstance(objective, nn.Module)]
    parts = [module for tree in trees for module in tree if isinstance(module, DiffLoss | Subsampled | WeightedSum)]
    sums = [part for part in parts if isinstance(part, WeightedSum)]
    modes, told = [part.training for part in parts], [part._told for part in sums]
    try:
        for part in parts:
            part.training = False
        for part in sums:
            part._told = True  # in the notes, and not as of a loss in eval mode
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
        for part, was in zip(sums, told, strict=True):
            part._told = was


@contextmanager
def seeded_draw(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the CPU and ``device``, and no other device, for the length of the block."""
    with forked(device):
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield


def _now(image: Tensor) -> float:
    if image.device.type != "cpu":
        torch.accelerator.synchronize(image.device)
    return time.perf_counter()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cosine(gradient: Tensor, reference: Tensor) -> float:
    peaks = [float(g.abs().max()) for g in (gradient, reference)]
    if not all(0 < peak < math.inf for peak in peaks):
        return math.nan
    return float(torch.cosine_similarity((gradient / peaks[0]).flatten(), (reference / peaks[1]).flatten(), dim=0))


def _notes_of_shares(objectives: Objectives) -> list[str]:
    given = objectives.values() if isinstance(objectives, Mapping) else [objectives]
    parts = [part for one in given if isinstance(one, nn.Module) for part in one.modules()]
    unmeasured = [name for part in parts if isinstance(part, WeightedSum) for name in part.unmeasured()]
    return [f"No call in training has measured the share of {name} yet: it weighs 1." for name in unmeasured]


def _input_notes(restored: Tensor, target: Tensor) -> tuple[str, ...]:
    notes = []
    for name, image in (("restored", restored), ("target", target)):
        bad = ~image.detach().isfinite().flatten(1).all(dim=1)
        if bool(bad.any()):
            notes.append(f"`{name}` itself holds NaN or infinity in samples {bad.nonzero().flatten().tolist()}.")
    if torch.equal(restored, target):
        notes.append("`restored` equals `target`, where every gradient is zero: audit a batch that is not solved.")
    return tuple(notes)
