"""How is one restorer trained for people and for several task networks, and how does it learn another task?

    python -m examples.unirestore.prepare --out runs/prepared
    python -m examples.unirestore.train stage1 --prepared runs/prepared --out runs/stage1
    python -m examples.unirestore.train stage2 --prepared runs/prepared --after runs/stage1 --out runs/stage2
    python -m examples.unirestore.train add-task detection --prepared runs/prepared --after runs/stage2 --out runs/det

Every option of examples/unirestore/config.py may stand in a YAML file (``--config``) or on the command line, which
wins. The same command resumes a killed run. Several processes:
``python -m torch.distributed.run --nproc_per_node 8 -m examples.unirestore.train ...``.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from examples.common.data.degrade import Degrade, degradation
from examples.common.data.task_data import TEST_SEED
from examples.common.data.tasks import TaskData, each, to_device
from examples.common.engine import command_line
from examples.common.engine.batches import chance
from examples.common.engine.evaluation import Judges, evaluate, first_usable, load_recogniser
from examples.common.engine.options import check_numbers
from examples.common.engine.recipe import Recipe, Stage
from examples.common.engine.recognition import Recognition
from examples.common.networks.latent_diffusion import load_latent_diffusion
from examples.common.networks.restorers import restorer
from examples.unirestore.adapters import build_adapters
from examples.unirestore.config import TASKS, WEIGHTS, Config, StageName
from examples.unirestore.data import data_of
from restoreloss import Alternation, Phase
from restoreloss.frozen import unwrap
from restoreloss.generators import standard_normal
from restoreloss.restorers import UniRestore
from restoreloss.restorers.tiling import enlarged, reduced, reflected

logger = logging.getLogger(__name__)

TIMESTEPS = (249, 499, 749, 999, 999, 999)
"""That the noise of stage 1 is drawn from, of 1000: the authors'."""
FILE = "unirestore"


@dataclass(frozen=True)
class Part:
    """The pictures of one task in a batch."""

    task: str
    clean: Any
    """(N, 3, H, W), or a list of (3, H, W) for detection."""
    degraded: Any
    targets: Any
    chance: list[torch.Generator]
    """Of each picture."""


@dataclass(frozen=True)
class Batch:
    """Pictures of all tasks."""

    parts: list[Part]

    @property
    def tasks(self) -> list[str]:
        """Of each picture."""
        return [part.task for part in self.parts for _ in part.degraded]

    @property
    def chance(self) -> list[torch.Generator]:
        """Of each picture."""
        return [generator for part in self.parts for generator in part.chance]


@dataclass(frozen=True)
class Reader:
    """A task: its data, and the networks that read what was restored for it; none for restoration."""

    recognition: Recognition
    network: nn.Module | None
    judge: nn.Module | None
    train_data: TaskData
    test_data: TaskData
    degrade: Degrade


class Trainer(Recipe[Batch]):
    """One stage: networks, phases, evaluation."""

    def __init__(self, config: Config) -> None:
        _check(config)
        super().__init__(config)
        self.config = config
        self.title = f"{config.stage}, {config.network or 'UniRestore'}"
        tasks = [config.name] if config.name is not None else config.tasks
        self.readers = {task: self._reader(task) for task in tasks}
        self.trained = config.train_tasks or (["restoration"] if config.stage == "stage1" else tasks)
        self.train_data = self.readers[self.trained[0]].train_data
        first = config.stage == "stage1" and config.network is None
        model = self._unirestore() if config.network is None else _Plain(restorer(config.network, 1))
        self.model: Any = model.to(self.device)
        wrapped = _FirstStage(model, config) if first and isinstance(model, UniRestore) else model
        self.net: nn.Module = self.accelerator.prepare(wrapped)
        self.networks = {FILE: self.model}
        self.before = self._hashes()
        self.begin([Stage(" + ".join(self.trained), self._alternation(first), config.steps)])

    def sources(self) -> list[TaskData]:
        """Of all tasks that are trained on."""
        return [self.readers[task].train_data for task in self.trained]

    def read(self, first: int, last: int, stage: int = 0) -> Iterator[Any]:
        """The batches of all tasks together; a task of whose batch nothing could be read is left out of that step."""
        loads = [self.load(self.readers[task].train_data, first, last) for task in self.trained]
        for reads in zip(*loads, strict=True):
            found = {task: read for task, read in zip(self.trained, reads, strict=True) if read is not None}
            yield (found, None) if found else None

    def batch(self, pictures: Any, targets: Any, step: int, steps: int) -> Batch:
        """Degraded here: what happens to a picture is decided by its number."""
        parts = []
        seed = self.config.seed
        torch.manual_seed(chance(seed, step, self.accelerator.process_index))  # a detector draws its samples from it
        for task, (clean, labels) in pictures.items():
            reader, first = self.readers[task], self.first_number(step)
            reader.recognition.check(labels)
            clean, labels = to_device((clean, labels), self.device)
            numbers = range(first, first + len(clean))
            generators = [torch.Generator().manual_seed(chance(seed, 1, TASKS.index(task), n)) for n in numbers]
            parts.append(Part(task, clean, reader.degrade(clean, first), labels, generators))
        return Batch(parts)

    def _reader(self, task: str) -> Reader:
        config = self.config
        train, test = data_of(task, config)
        networks: dict[str, nn.Module | None] = {"hq": None, "judge": None}
        if task != "restoration" and config.prepared is not None:
            networks = {name: load_recogniser(config.prepared / f"{task}_{name}").to(self.device) for name in networks}
        return Reader(
            Recognition(train.task, train.class_names), networks["hq"], networks["judge"], train, test,
            degradation(config, config.seed, TASKS.index(task)),
        )  # fmt: skip

    def _unirestore(self) -> UniRestore:
        """With what the stage before has learned, and a gradient for what this one learns."""
        config = self.config
        prior = config.prior if config.prepared is None or config.prior is not None else config.prepared / "prior"
        if prior is None:
            raise ValueError("`prior` should be given, or `prepared`, a folder that holds one, found None.")
        second = config.stage != "stage1"
        model = UniRestore(
            load_latent_diffusion(prior), steps=config.steps_of_diffusion, cfrm=config.cfrm, gate=config.gate,
            cfrm_blocks=config.cfrm_blocks, control_channels=config.control_channels, adapters=False,
        )  # fmt: skip
        if second and config.adapter is not None:
            tasks = config.tasks if config.stage == "stage2" else ()
            model.tfa = build_adapters(config.adapter, *model.adapter_channels, tasks, config.gate)
        if second:
            assert config.after is not None
            model.load_trained(config.after / f"{FILE}.safetensors", with_adapters=config.stage == "add-task")
            model.requires_grad_(False)
            if config.name is not None:
                model.add_task(config.name)
            elif model.tfa is not None:
                model.tfa.requires_grad_(True)
        return model

    def _alternation(self, first: bool) -> Alternation[Batch]:
        config = self.config
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [w for name, w in named if "prompts" not in name], "lr": config.lr},
                {"params": [w for name, w in named if "prompts" in name], "lr": config.prompt_lr, "weight_decay": 0.0},
            ],
            weight_decay=config.weight_decay,
        )
        schedule = LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * min(1.0, k / config.steps))))
        readers = [reader for task, reader in self.readers.items() if task in self.trained]
        networks = {reader.network: reader for reader in readers if reader.network is not None}
        # torchvision's detectors give their losses in train mode only
        detectors: Any = {net: "train" for net, reader in networks.items() if reader.recognition.task == "detection"}
        phase = Phase(
            config.stage, [self.net], self._first_terms if first else self._task_terms,
            self.accelerator.prepare(optimizer), schedule, frozen=list(networks), modes=detectors,
            max_norm=config.max_norm,
        )  # fmt: skip
        return Alternation([phase], accelerator=self.accelerator)

    def _first_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Eqs. (2) and (3)."""
        (part,) = batch.parts
        last = self.model.schedule.num_timesteps
        drawn = [int(torch.randint(len(TIMESTEPS), (), generator=generator)) for generator in batch.chance]
        t = torch.tensor([(TIMESTEPS[number] + 1) * last // 1000 - 1 for number in drawn], device=self.device)
        terms: dict[str, Tensor] = self.net(part.degraded, part.clean, t, batch.chance)
        return terms

    def _task_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. (6): each picture is restored for its task and read by that task's network."""
        restored = self._restored(batch, batch.tasks)
        weights = WEIGHTS | self.config.task_weights
        terms = {}
        for part, pictures in zip(batch.parts, restored, strict=True):
            reader = self.readers[part.task]
            if part.task == "restoration":
                loss = F.mse_loss(pictures, part.clean)
            else:
                assert reader.network is not None
                loss = reader.recognition.loss(reader.network, pictures, part.targets)
            terms[part.task] = weights[part.task] * loss
        if self.config.restored_too and any(part.task != "restoration" for part in batch.parts):
            others = [part for part in batch.parts if part.task != "restoration"]
            terms["restored_too"] = self.config.restored_too * self._restored_too(Batch(others))
        if self.accelerator.num_processes > 1:  # DDP waits for every prompt, also of a task that this process lacks
            terms["nothing"] = 0.0 * torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum()
        return terms

    def _restored_too(self, batch: Batch) -> Tensor:
        """L1 to the clean pictures, with the prompt of restoration."""
        restored = self._restored(batch, ["restoration"] * len(batch.tasks))
        pairs = [
            (one, other) for part, found in zip(batch.parts, restored, strict=True)
            for one, other in zip(found, part.clean, strict=True)
        ]  # fmt: skip
        return torch.stack([F.l1_loss(one, other) for one, other in pairs]).mean()

    def _restored(self, batch: Batch, tasks: list[str]) -> list[Any]:
        """All pictures of one size in one pass, then apart again by part."""
        degraded, chances = [picture for part in batch.parts for picture in part.degraded], batch.chance
        found: dict[int, Tensor] = {}
        for size in dict.fromkeys(picture.shape for picture in degraded):
            rows = [n for n, picture in enumerate(degraded) if picture.shape == size]
            restored = self.net(
                torch.stack([degraded[n] for n in rows]), [tasks[n] for n in rows],
                generator=[chances[n] for n in rows], smallest=self.config.smallest,
            )  # fmt: skip
            found |= dict(zip(rows, restored, strict=True))
        pieces, every = [], iter(found[n] for n in range(len(degraded)))
        for part in batch.parts:
            pictures = [next(every) for _ in part.clean]
            pieces.append(torch.stack(pictures) if isinstance(part.clean, Tensor) else pictures)
        return pieces

    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """The figures of each task, on corruptions like those of training and on others, and pictures of the first; a
        grid of each.
        """
        if self.config.stage == "add-task":
            self._check_the_others()
        self._save_prompts()  # before results.json, which says that all is there
        return self.figures(self.restores)

    def restores(self, task: str) -> Callable[[Any, Any], Any]:
        """(clean, degraded) -> what the model makes of it for a task."""
        generator = torch.Generator().manual_seed(chance(self.config.seed, 2))

        def restored(pictures: Tensor) -> Tensor:
            parts = pictures.split(self.config.batch)  # what fits in memory
            found = [self.model(part, task, generator=generator, smallest=self.config.smallest) for part in parts]
            return torch.cat(found).clamp(0, 1)

        return lambda _, degraded: each(restored, degraded)

    def try_evaluation(self) -> None:
        """Of each task, of the first test image with a label."""
        for task, reader in self.readers.items():
            found = first_usable(reader.test_data, reader.recognition.task, f"the test data of {task}")
            self._evaluate(task, found, self.restores(task), self.config.degradation)

    def figures(self, read: Callable[[str], Callable[[Any, Any], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        """What :func:`examples.common.engine.evaluation.evaluate` finds of each task.

        Args:
            read: task -> (clean, degraded) -> the pictures that are read.
        """
        every: dict[str, float] = {}
        sheets = []
        kinds = {"": self.config.degradation} | ({"unseen_": "unseen_corruptions"} if self.config.unseen else {})
        for task, reader in self.readers.items():
            for kind, name in kinds.items():
                found, sheet = self._evaluate(task, reader.test_data, read(task), name)
                every |= {f"{task}_{kind}{key}": value for key, value in found.items()}
                sheets.append(sheet)
                self.run_directory.grid(f"{kind}{task}", [sheet[name] for name in ("lr", "restored", "hr")])
        return every, sheets[0]

    def _evaluate(
        self, task: str, data: TaskData, read: Callable[[Any, Any], Any], name: str
    ) -> tuple[dict[str, float], dict[str, Any]]:
        kind: Any = name
        options, reader = replace(self.config, degradation=kind), self.readers[task]
        return evaluate(
            data, reader.recognition, read=read, trained=[unwrap(self.net)],
            degrade=degradation(options, self.config.seed, TEST_SEED, TASKS.index(task)),
            recogniser=reader.network, judges=Judges(None, reader.judge), workers=self.config.workers,
        )  # fmt: skip

    def _hashes(self) -> dict[str, str]:
        """Of all weights but prompts, and of each prompt."""
        if self.config.stage != "add-task":
            return {}
        prompts = self.model.tfa.prompts
        hashes = {name: hashlib.sha256(prompts[name].detach().cpu().numpy().tobytes()).hexdigest() for name in prompts}
        return {"all but prompts": self.model.fingerprint(), **hashes}

    def _check_the_others(self) -> None:
        """Say what the weights are, and that those of other tasks are what they were.

        Raises:
            RuntimeError: If they are not.
        """
        after = self._hashes()
        for name, digest in after.items():
            same = digest == self.before[name]
            logger.info("%s: %s, %s", name, digest[:16], "as before" if same else "changed")
            if not same and name != self.config.name:
                raise RuntimeError(f"The weights of {name} should be what they were before {self.config.name}.")

    def _save_prompts(self) -> None:
        config = self.config
        if config.stage != "stage1" and config.network is None and config.adapter == "prompts":
            names = None if config.name is None else [config.name]
            self.model.save_prompts(self.options.out / "prompts.safetensors", names)


class _FirstStage(nn.Module):
    """Both losses of stage 1 in one forward pass, as DDP wants it."""

    def __init__(self, model: UniRestore, config: Config) -> None:
        super().__init__()
        self.model = model
        levels = 0 if model.cfrm is None else len(model.cfrm)
        weights = config.cfrm_weights
        self.weights = [*[0.1] * (levels - 1), 0.01][:levels] if weights is None else weights
        if len(self.weights) != levels:
            raise ValueError(f"`cfrm_weights` should be {levels} numbers, found {self.weights}.")

    def forward(
        self, degraded: Tensor, clean: Tensor, t: Tensor, generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        model = self.model
        degraded, clean = (reflected(pictures, model.multiple) for pictures in (degraded, clean))
        with torch.no_grad():
            z_0, wanted = model.encode(clean, restored=False)
            z_t = model.schedule.add_noise(z_0, standard_normal(z_0, generators), t)
        condition, features = model.encode(degraded)
        terms = {"control": F.mse_loss(model.predict(z_t, condition, t), z_0)}
        if self.weights:
            levels = zip(self.weights, features, wanted, strict=True)
            terms["cfrm"] = torch.stack([weight * F.mse_loss(found, f) for weight, found, f in levels]).sum()
        return terms


class _Plain(nn.Module):
    """A restoration network that is told no task."""

    tasks = ()

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor, tasks: Any, *, generator: Any = None, smallest: int = 0) -> Tensor:
        size = pictures.shape[2:]
        restored: Tensor = self.network(enlarged(pictures, smallest))
        return reduced(restored, size)


def _check(config: Config) -> None:
    """Raise ``ValueError`` for options that do not go together."""
    check_numbers(config)
    if config.stage not in get_args(StageName):
        raise ValueError(f"`stage` should be one of {', '.join(get_args(StageName))}, found {config.stage!r}.")
    if (config.stage == "add-task") != (config.name is not None):
        raise ValueError(f"`name` should be given for 'add-task' and no other stage, found {config.name!r}.")
    for task in [config.name] if config.name is not None else config.tasks:
        if task not in TASKS:
            option = "tasks" if config.name is None else "name"
            raise ValueError(f"`{option}` should be one of {', '.join(TASKS)}, found {task!r}.")
    for name in ("train_tasks", "network", "restored_too"):
        if config.stage == "add-task" and getattr(config, name):
            raise ValueError(f"`{name}` should be left out of 'add-task', found {getattr(config, name)!r}.")
    if unknown := sorted(set(config.train_tasks or ()) - set(config.tasks)):
        raise ValueError(f"`train_tasks` should be of `tasks` {config.tasks}, found {unknown[0]!r}.")
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ValueError(f"`tasks` should be at least one, each once, found {config.tasks}.")
    if unknown := sorted(set(config.task_weights) - set(TASKS)):
        raise ValueError(f"`task_weights` should be for {', '.join(TASKS)}, found {unknown[0]!r}.")
    if config.scale != 1:
        raise ValueError(f"`scale` should be 1: pictures are restored at their own size, found {config.scale}.")
    if config.unseen and config.degradation == "unseen_corruptions":
        raise ValueError("`unseen` should be false where `degradation` is unseen_corruptions: these are seen then.")
    if config.stage == "stage1":
        if "restoration" not in config.tasks:
            raise ValueError(f"`tasks` should have 'restoration', which stage 1 trains on, found {config.tasks}.")
        if config.train_tasks is not None and len(config.train_tasks) != 1:
            raise ValueError(f"`train_tasks` should be one in stage 1, found {config.train_tasks}.")
        if config.train_tasks == ["detection"]:
            raise ValueError("`train_tasks` should not be detection in stage 1, whose pictures are of one size.")
        return
    tested = {config.name} if config.name is not None else set(config.tasks)
    if config.prepared is None and tested != {"restoration"}:
        raise ValueError("`prepared` should be a folder of examples.unirestore.prepare, found None.")
    if config.restored_too and "restoration" not in config.tasks:
        raise ValueError(f"`restored_too` needs the task 'restoration', found {config.tasks}.")
    if config.network is not None:
        if config.after is not None:
            raise ValueError(f"`after` should be left out for `network` {config.network}, found {config.after}.")
        return
    if config.adapter is None:
        raise ValueError("`adapter` should be there after stage 1, which has nothing else to train, found None.")
    if config.after is None:
        raise ValueError(f"`after` should be a run of the stage before {config.stage}, found None.")
    _check_before(config, config.after)


def _check_before(config: Config, before: Path) -> None:
    """Raise ``ValueError`` for a run that the stage cannot begin with; what its weights cannot tell."""
    wanted = ("stage1",) if config.stage == "stage2" else ("stage2", "add-task")
    file = before / "config.yaml"
    done = file.is_file() and (before / "results.json").is_file()
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) if done else {}
    if (found := settings.get("stage", "none")) not in wanted:
        raise ValueError(
            f"`after` should be a finished run of {' or '.join(wanted)}, found {before}, which is {found}."
        )
    if config.stage == "add-task":
        for name in ("adapter", "gate", "steps_of_diffusion", "smallest"):
            if settings[name] != getattr(config, name):
                raise ValueError(
                    f"`{name}` should be {settings[name]!r}, as in {before}, found {getattr(config, name)!r}."
                )


def main() -> None:
    command_line.run(
        Config, lambda config: Trainer(config).run(), __doc__,
        positional={"stage": {"choices": get_args(StageName)}, "name": {"nargs": "?", "help": "of the task to add"}},
    )  # fmt: skip


if __name__ == "__main__":
    main()
