"""RestorelossModel: an SRModel of BasicSR with a task network, importances, and a line in the log for each term.

:func:`restoreloss.integrations.basicsr.register` puts it into the registry; docs/integrations/basicsr.md has the YAML.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import restoreloss
from restoreloss.distances import Distance
from restoreloss.integrations.checks import build_from, check_numbers, did_you_mean
from restoreloss.integrations.options import Criterion
from restoreloss.integrations.task_networks import normalization, task_network
from restoreloss.objectives.shares import take_in_norms
from restoreloss.regularizers.per_sample import Estimator

_log = logging.getLogger(__name__)
_LOSSES = ("pixel_opt", "perceptual_opt")
_OURS = ("task_opt", "importance_opt")

Batch: TypeAlias = tuple[Tensor, Tensor, Sequence[str] | None]
"""Degraded and clean images, and the paths of the clean ones."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """``train: task_opt``: what restorer and task network ``network_t`` learn from each other.

    Attributes:
        labels: a text file with a line "name label" for each clean image, the name as below ``dataroot_gt``.
        tdp_weight: of the TDP loss of the restorer, 0 for none.
        hlf_weight: of :class:`restoreloss.HLFLoss` of the restorer, which looks through ``reference`` as well.
        fm_weight: of :class:`restoreloss.FeatureMatchingLoss` of the task network, whose teacher is ``reference``.
        reference: a file of weights of the same network, trained on clean images.
        layers: of the task network; the default is that of :class:`restoreloss.TDPLoss`.
        distance: of the features.
        layer_weights: by the layers' names.
        grid: (rows, columns) of the cells of CQMix.
        p: probability that a cell shows the restored image.
    """

    labels: str
    tdp_weight: float = 1.0
    hlf_weight: float = 0.0
    fm_weight: float = 0.0
    reference: str | None = None
    layers: Sequence[str] | None = None
    distance: Distance = "l1"
    layer_weights: Mapping[str, float] | None = None
    grid: Sequence[int] = (4, 4)
    p: float = 0.5


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions:
    """``train: importance_opt``: what keeps the restorer near an earlier training.

    Attributes:
        path: of what ``torch.save(importance.state_dict(), path)`` wrote; in a resumed run the training state has it.
        estimator: with which it was measured.
        strength: of the penalty.
        normalize: "sum" or "mean" over the parameters.
        layer_weights: by the names of modules or parameters.
    """

    path: str
    estimator: Estimator = "taylor2"
    strength: float = 0.01
    normalize: Literal["sum", "mean"] = "sum"
    layer_weights: Mapping[str, float] | None = None


class WithRestoreloss:
    """What ``RestorelossModel`` adds to an ``SRModel``. Put it before a model of your own that trains as SRModel does.

    - Each term of our losses has a line in the log: ``l_pix/diff/noise``, ``l_percep/layer4``.
    - ``network_t`` with ``train: task_opt`` and ``train: optim_t``: a task network that learns, in a phase of its own
      after the restorer's, from restored, clean and mixed images, and that the restorer is asked to serve (TDP loss).
      It is saved as ``net_t_ITERATION.pth``.
    - ``train: importance_opt``: :class:`restoreloss.ParameterImportance`.
    - Training states hold also what our losses count and measure, and the importances. What an iteration draws follows
      from ``manual_seed`` and its number, so that a resumed run draws what it would have drawn.

    Raises:
        ValueError: For an option that is unknown, missing or of no use, naming it.
    """

    opt: dict[str, Any]
    device: torch.device
    net_g: nn.Module
    optimizer_g: Optimizer
    optimizers: list[Optimizer]
    schedulers: list[Any]
    cri_pix: nn.Module | None
    cri_perceptual: nn.Module | None
    ema_decay: float
    lq: Tensor
    gt: Tensor
    output: Tensor
    log_dict: Mapping[str, float]

    known_options: Sequence[str] = (*_LOSSES, *_OURS)
    """The ``*_opt`` of ``train``; a model of your own adds its own to them."""
    net_t: nn.Module | None = None
    importance: restoreloss.ParameterImportance | None = None
    gt_path: Sequence[str] | None = None

    def init_training_settings(self) -> None:
        """Networks, losses, optimizers and schedulers."""
        this: Any = super()
        train = self.opt["train"]
        _check_options(self.opt, self.known_options)
        if self.opt.get("network_t"):
            self._build_task_network()
        this.init_training_settings()
        for key, loss in (("pixel_opt", self.cri_pix), ("perceptual_opt", self.cri_perceptual)):
            _check_slot(key, loss)
        if train.get("importance_opt"):
            self._build_importance()
        phases = [restoreloss.Phase("restorer", [self.net_g], self._restore, self.optimizer_g)]
        if self.net_t is not None:
            phases.append(restoreloss.Phase("task", [self.net_t], self._recognize, self.optimizer_t))
        self.alternation = restoreloss.Alternation(phases, on_non_finite="ignore")

    def setup_optimizers(self) -> None:
        """Also that of the task network; the schedulers of BasicSR are for all."""
        this: Any = super()
        this.setup_optimizers()
        if self.net_t is None:
            return
        given = dict(self.opt["train"]["optim_t"])
        kind = getattr(torch.optim, str(given.pop("type", None)), None)
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            found = self.opt["train"]["optim_t"].get("type")
            raise ValueError(f"`type` of `optim_t` should be an optimizer of torch.optim, found {found!r}.")
        learning = [parameter for parameter in self.net_t.parameters() if parameter.requires_grad]
        self.optimizer_t: Optimizer = _call(partial(kind, learning), "optim_t", given)
        self.optimizers.append(self.optimizer_t)

    def feed_data(self, data: Mapping[str, Any]) -> None:
        """The batch, and where its clean images come from."""
        this: Any = super()
        this.feed_data(data)
        self.gt_path = data.get("gt_path")

    def optimize_parameters(self, current_iter: int) -> None:
        """One iteration: the restorer's phase, then that of the task network."""
        this: Any = self
        with self._draws(current_iter):
            logs: dict[str, Tensor] = {}
            if self.importance is not None:
                with torch.no_grad():
                    logs["l_importance"] = self.importance()
            found = self.alternation.step((self.lq, self.gt, self.gt_path))
        take_in_norms(self._losses())  # By all processes; the first alone saves them.
        self.output = self.output.detach()
        for key, value in found.items():
            name = key.partition("/")[2]  # The name without that of the phase.
            whole = name.partition("/")[0]
            if name != whole:
                logs[whole] = logs.get(whole, 0) + value
            logs[name] = value
        self.log_dict = this.reduce_loss_dict(logs)
        if self.ema_decay > 0:
            this.model_ema(decay=self.ema_decay)

    def save(self, epoch: int, current_iter: int) -> None:
        """The networks, and last the training state that stands for all."""
        this: Any = super()
        if self.net_t is not None:
            this.save_network(self.net_t, "net_t", current_iter)
        this.save(epoch, current_iter)

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """What BasicSR saves, and under "restoreloss" the state of our losses and the importances; all or nothing."""
        if current_iter == -1 or self.opt["rank"] != 0:
            return
        losses = self._losses()
        frozen = _frozen_in(losses)
        state = {
            "epoch": epoch,
            "iter": current_iter,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "restoreloss": {
                "losses": {name: value for name, value in losses.state_dict().items() if name not in frozen},
                "importance": None if self.importance is None else self.importance.state_dict(),
            },
        }
        path = Path(self.opt["path"]["training_states"]) / f"{current_iter}.state"
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def resume_training(self, resume_state: Mapping[str, Any]) -> None:
        """What :meth:`save_training_state` saved, or a plain SRModel, whose losses then begin to count."""
        this: Any = super()
        if len(resume_state["optimizers"]) != len(self.optimizers):
            raise ValueError(
                f"The training state should have {len(self.optimizers)} optimizers, found "
                f"{len(resume_state['optimizers'])}: was it saved with another choice of `network_t`? Begin from its "
                "weights with `pretrain_network_g`."
            )
        this.resume_training(resume_state)
        state = resume_state.get("restoreloss")
        if state is None:
            _log.warning("The training state is of another model: what our losses count begins at 0.")
            return
        losses = self._losses()
        changed = losses.load_state_dict(state["losses"], strict=False)
        if others := sorted({*changed.unexpected_keys, *changed.missing_keys} - _frozen_in(losses)):
            _log.warning("The losses are others than before, and begin anew where they are: %s.", others)
        if self.importance is not None and state["importance"] is not None:
            self.importance.load_state_dict(state["importance"])

    def _build_task_network(self) -> None:
        this: Any = self
        given = self.opt["network_t"]
        self.task: TaskOptions = _call(TaskOptions, "task_opt", self.opt["train"]["task_opt"])
        self.labels = read_labels(self.task.labels)
        network = _call(task_network, "network_t", given)
        self.net_t = this.model_to_device(network.train())
        load_path = self.opt["path"].get("pretrain_network_t")  # BasicSR sets it in a resumed run.
        if load_path is not None:
            this.load_network(self.net_t, load_path, self.opt["path"].get("strict_load_t", True))
        self.mix = restoreloss.CQMix(self.task.grid, p=self.task.p)
        self.normalize = normalization(given["name"])
        seen: dict[str, Any] = {
            "layers": self.task.layers, "normalize": self.normalize, "distance": self.task.distance,
            "layer_weights": self.task.layer_weights,
        }  # fmt: skip
        task = this.get_bare_model(self.net_t)
        self.tdp = restoreloss.TDPLoss(task, **seen)
        if (self.task.reference is not None) != bool(self.task.hlf_weight or self.task.fm_weight):
            raise ValueError(
                "`reference` of `task_opt` should be given with `hlf_weight` or `fm_weight`, found "
                f"{self.task.reference!r} with {self.task.hlf_weight:g} and {self.task.fm_weight:g}."
            )
        if self.task.reference is not None:
            reference = _call(task_network, "network_t", {**given, "weights": self.task.reference})
            reference = reference.requires_grad_(False).to(self.device)
            self.hlf = restoreloss.HLFLoss(task, reference, **seen)
            self.matching = restoreloss.FeatureMatchingLoss(task, reference, **seen)

    def _build_importance(self) -> None:
        given: ImportanceOptions = _call(ImportanceOptions, "importance_opt", self.opt["train"]["importance_opt"])
        self.importance = restoreloss.ParameterImportance(
            self.net_g, estimator=given.estimator, strength=given.strength, layer_weights=given.layer_weights,
            normalize=given.normalize,
        )  # fmt: skip
        path = Path(given.path).expanduser()
        if path.is_file():
            self.importance.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            with torch.no_grad():
                self.importance()  # It raises if it was measured on another network.
        elif not self.opt["path"].get("resume_state"):
            raise ValueError(f"`path` of `importance_opt` should be a file, found none at {given.path}.")
        self.importance.attach(self.optimizer_g)

    def _restore(self, batch: Batch) -> dict[str, Tensor]:
        lq, gt, _ = batch
        self.output = self.net_g(lq)
        terms: dict[str, Tensor] = {}
        for label, loss in (("l_pix", self.cri_pix), ("l_percep", self.cri_perceptual)):
            if isinstance(loss, Criterion):
                terms |= {f"{label}/{name}": value for name, value in loss.terms(self.output, gt).items()}
            elif loss is not None:
                found = loss(self.output, gt)
                pair = zip(("l_percep", "l_style"), found, strict=True) if label == "l_percep" else [(label, found)]
                terms |= {name: value for name, value in pair if value is not None}
        if self.net_t is not None and self.task.tdp_weight != 0:
            seen = self.tdp.terms(self.output, gt)
            terms |= {f"l_tdp/{name}": self.task.tdp_weight * value for name, value in seen.items()}
        if self.net_t is not None and self.task.hlf_weight != 0:
            seen = self.hlf.terms(self.output, gt)
            terms |= {f"l_hlf/{name}": self.task.hlf_weight * value for name, value in seen.items()}
        return terms

    def _recognize(self, batch: Batch) -> dict[str, Tensor]:
        lq, gt, paths = batch
        assert self.net_t is not None
        labels, restored = self._labels(paths), self.net_g(lq)
        images = torch.cat([restored, gt, self.mix(restored, gt)])
        if self.normalize is not None:
            mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in self.normalize)
            images = (images - mean) / std
        logits = self.net_t(images)
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] <= int(labels.max()):
            found = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"`network_t` should give a number for each class, (N, {int(labels.max()) + 1} or more), found {found}."
            )
        terms = {"l_task": nn.functional.cross_entropy(logits, labels.to(logits.device).repeat(3))}
        if self.task.fm_weight != 0:
            matched = self.matching.terms(restored, gt)
            terms |= {f"l_fm/{name}": self.task.fm_weight * value for name, value in matched.items()}
        return terms

    def _labels(self, paths: Sequence[str] | None) -> Tensor:
        if paths is None:
            raise ValueError("`task_opt` needs a data set that gives `gt_path`, as PairedImageDataset does.")
        root = str(self.opt["datasets"]["train"].get("dataroot_gt"))
        names = [path.removeprefix(root).lstrip("/\\") for path in paths]
        if unknown := [name for name in names if name not in self.labels]:
            raise ValueError(f"`labels` should have a line for each clean image, found none for {unknown[0]!r}.")
        return torch.tensor([self.labels[name] for name in names])

    def _losses(self) -> nn.ModuleDict:
        losses = {"pixel": self.cri_pix, "perceptual": self.cri_perceptual}
        return nn.ModuleDict({name: loss for name, loss in losses.items() if loss is not None})

    @contextmanager
    def _draws(self, current_iter: int) -> Iterator[None]:
        """Noise, timesteps and masks by seed, rank and iteration, and the generators of torch left as they were."""
        devices = [torch.cuda.current_device()] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(1_000_003 * (self.opt["manual_seed"] + self.opt["rank"]) + current_iter)
            yield


def _frozen_in(losses: nn.Module) -> set[str]:
    """The names of what is not trained, as the VGG of a perceptual loss, which needs no place in a checkpoint."""
    return {name for name, parameter in losses.named_parameters() if not parameter.requires_grad}


def read_labels(path: str | Path) -> dict[str, int]:
    """Labels by the names of images, from lines "name label".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a line of another form, a name given twice, and no line at all.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`labels` should be a text file, found none at {path}.")
    labels: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.rsplit(maxsplit=1)
        if not parts:
            continue
        name, label = parts[0].strip(), parts[-1]
        if len(parts) < 2 or not label.isdecimal() or name in labels:
            raise ValueError(
                f"`labels` should have lines of a name, once, and an integer from 0, found {line!r} in line {number} "
                f"of {path}."
            )
        labels[name] = int(label)
    if not labels:
        raise ValueError(f"`labels` should have at least one line, found none in {path}.")
    return labels


@cache
def restoreloss_model() -> type:
    """``RestorelossModel``, one class however often it is asked for."""
    base: Any = import_module("basicsr.models.sr_model").SRModel
    return type("RestorelossModel", (WithRestoreloss, base), {"__doc__": WithRestoreloss.__doc__})


def _check_options(opt: Mapping[str, Any], known: Sequence[str]) -> None:
    """BasicSR ignores what it does not know."""
    train = opt["train"]
    for key in train:
        if key.endswith("_opt") and key not in known:
            raise ValueError(f"`train` has no option {key!r}; {did_you_mean(key, known)}")
    together = {"network_t": opt.get("network_t"), **{key: train.get(key) for key in ("task_opt", "optim_t")}}
    missing = [key for key, value in together.items() if not value]
    if 0 < len(missing) < len(together):
        raise ValueError(f"{', '.join(f'`{key}`' for key in together)} should be given together, found no {missing}.")


def _check_slot(key: str, loss: nn.Module | None) -> None:
    name = type(loss).__name__
    if isinstance(loss, Criterion) and name.startswith("Perceptual") != (key == "perceptual_opt"):
        other = name.removeprefix("Perceptual") if name.startswith("Perceptual") else f"Perceptual{name}"
        raise ValueError(f"`type` of `{key}` should be {other!r}, found {name!r}.")


def _call(function: Callable[..., Any], where: str, given: Any) -> Any:
    """What a function makes of its options, none of which is a number by name."""
    for option, value in given.items() if isinstance(given, Mapping) else ():
        if option not in ("layers", "weights"):
            check_numbers(f"{option}` of `{where}", value)
    return build_from(function, where, given)
