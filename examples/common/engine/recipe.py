"""The loop of all recipes: steps with checkpoints, resumption, logs, and an evaluation at the end.

A recipe builds its networks and stages, says what a batch is and how to evaluate; this base runs them on accelerate.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability
from tqdm import tqdm

from examples.common.data.folder import check_folder
from examples.common.data.options import DataOptions, PairOptions
from examples.common.data.tasks import TaskData
from examples.common.engine.batches import Batches, loader
from examples.common.engine.learned import began_with, has_learned_from
from examples.common.engine.options import RunOptions, TrainerOptions, check_numbers, unused
from examples.common.engine.run_directory import RunDirectory, class_names_of, finished_run
from examples.common.engine.terms import LOWER, TermLog
from examples.common.networks.weights import load_saved
from examples.common.seeds import derive_seed
from restoreloss.frozen import unwrap

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
AnyBatch = TypeVar("AnyBatch", contravariant=True)


class Steps(Protocol[AnyBatch]):
    """Something that trains: an :class:`~restoreloss.Alternation`, or several."""

    def step(self, batch: AnyBatch, /) -> dict[str, Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


@dataclass(frozen=True)
class Stage(Generic[Batch]):
    """A number of steps of the same kind."""

    name: str
    alternation: Steps[Batch]
    steps: int


class Recipe(ABC, Generic[Batch]):
    """One run. A subclass calls :meth:`begin` at the end of its ``__init__``.

    Attributes:
        title: what the run is called in the log.
        networks: what is saved, by the name of its file.
        train_data: what is read.
        evaluation_options: options, beside those of the data, that a finished run may be evaluated with.
        run_to_evaluate: the directory of a finished run that is evaluated; None where this run trains.
        evaluated: its settings and results.
    """

    title: str
    networks: Mapping[str, nn.Module]
    train_data: TaskData
    evaluation_options: Collection[str] = ()

    def __init__(self, config: RunOptions) -> None:
        self.options = config
        if config.max_norm is not None and not config.max_norm > 0:
            raise ValueError(f"`max_norm` should be above 0, or left out, found {config.max_norm}.")
        check_numbers(config)
        check_folder(config.out)
        self.run_to_evaluate = config.evaluate if isinstance(config, TrainerOptions) else None
        self.evaluated = None if self.run_to_evaluate is None else self._of_evaluated(config, self.run_to_evaluate)
        # the other processes wait while one evaluates
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
        self.accelerator = Accelerator(mixed_precision=config.precision, cpu=config.cpu, kwargs_handlers=[patience])
        self.device = self.accelerator.device
        if config.precision == "bf16" and self.device.type == "cpu" and get_cpu_capability() in ("NO AVX", "AVX2"):
            logger.warning("This CPU has no instructions for bfloat16: a step takes ten times as long as in float32.")
        self.main = self.accelerator.is_main_process
        idle = [name for name in unused(config) if self.evaluated is None or name in self.evaluation_options]
        if idle and self.main:
            logger.warning("Of no effect on this run: %s", ", ".join(f"`{name}`" for name in idle))
        torch.manual_seed(derive_seed(config.seed))

    def begin(self, stages: Callable[[], list[Stage[Batch]]]) -> None:
        """Open the run directory; last, so that what is refused leaves no folder.

        Args:
            stages: what the training consists of; not called where a finished run is evaluated.

        Raises:
            ValueError: If the test images cannot be evaluated, or the run directory cannot be that of this run.
        """
        self.stages, self.stage = [] if self.evaluated is not None else stages(), 0
        self.terms = TermLog()
        if self.run_to_evaluate is not None:
            self._load(self.run_to_evaluate)
        else:
            for data in self.sources():
                self._batches(data, 0, 1)
        if self.main:
            logger.info("%s on %s, %d processes", self.title, self.device, self.accelerator.num_processes)
            if not (self.options.out / "results.json").exists():
                self._try_evaluation()
        weights, buffers = (
            {name: dict(getattr(unwrap(network), kind)()) for name, network in self.networks.items()}
            for kind in ("named_parameters", "named_buffers")
        )
        for name, value in _not_finite(weights):
            raise ValueError(f"The weights should be finite before the first step, found {value} in {name}.")
        self._infinite = {name for name, _ in _not_finite(buffers)}  # a mask may hold infinity
        self.run_directory = RunDirectory(
            self.options.out, self.options.plain(), main=self.main, ignore=("save_every", "workers"),
            grow=("steps",) if len(self.stages) == 1 else (),
        )  # fmt: skip
        self.accelerator.wait_for_everyone()  # results of fewer steps are no longer there for any process

    def _try_evaluation(self) -> None:
        """Check before the first step that the final evaluation can run, and leave no trace."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            self.try_evaluation()

    @abstractmethod
    def batch(self, images: Any, targets: Any, step: int, steps: int) -> Batch:
        """The batch that the phases see. All randomness of a step comes from the seed and the step."""

    @abstractmethod
    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Figures, and tensors for samples.pt: rows of images for a grid under "lr", "restored", "hr"."""

    @abstractmethod
    def try_evaluation(self) -> None:
        """Evaluate as few test images as show that :meth:`evaluate` can be done: called before the first step.

        Raises:
            ValueError: If no test image can be read, the networks do not take their sizes, or there is nothing in them
                that the figures could be computed from.
        """

    def saved(self) -> None:
        """Write files beside a checkpoint, also before the first step. By default there are none."""

    def keep(self, step: int, figures: Mapping[str, float], samples: Mapping[str, Any]) -> None:
        """Keep the results of an evaluation, on the way and at the end. By default nothing is kept."""

    def first_number(self, step: int) -> int:
        """The number of the first image of a step in this process; an image's own randomness comes from its number."""
        rank, processes = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        return step * self.options.batch + rank * self.options.batch // processes

    def read(self, first: int, last: int, stage: int = 0) -> Iterator[Any]:
        """(images, targets) of steps ``first`` to ``last`` of a stage; None where none could be read."""
        return self.load(self.train_data, first, last)

    def load(self, data: TaskData, first: int, last: int) -> Iterator[Any]:
        """The part of this process of the batches ``first`` to ``last`` of a data set."""
        return iter(loader(data, self._batches(data, first, last), workers=self.options.workers))

    def sources(self) -> Sequence[TaskData]:
        """All data that batches are drawn from."""
        return [self.train_data]

    def _batches(self, data: TaskData, first: int, last: int) -> Batches:
        config = self.options
        return Batches(
            len(data), config.batch, seed=config.seed, first=first, last=last,
            rank=self.accelerator.process_index, processes=self.accelerator.num_processes,
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Train what is left, evaluate, write the results; nothing of a finished run is done again.

        Raises:
            FloatingPointError: If a term of the loss or a weight becomes NaN or infinite. What was saved before it
                stays, and the same command goes on from there.
        """
        if (done := self.run_directory.results) is not None:
            return done
        if self.evaluated is not None:
            return self._finish({})
        state = self.run_directory.load()
        first_stage, first_step, seconds = 0, 0, 0.0
        if state is None:
            self._save(0, 0, 0, 0.0)  # what cannot be written is known before the first step
        else:
            for name, network in self.networks.items():
                unwrap(network).load_state_dict(state["networks"][name])
            first_stage, first_step, seconds = state["stage"], state["stage_step"], state["seconds"]
            self.stages[first_stage].alternation.load_state_dict(state["alternation"])
            self.terms.load_state_dict(state["terms"])
            logger.info("goes on after step %d", state["step"])
            self._test(state["step"])
        for number in range(first_stage, len(self.stages)):
            seconds = self._train(number, first_step if number == first_stage else 0, seconds)
        if self.main:
            for name, network in self.networks.items():
                self.run_directory.save_weights(name, unwrap(network))
        return self._finish({"seconds": seconds})

    def load_finished(self) -> None:
        """The networks of the finished run in this directory.

        Raises:
            ValueError: If there is none.
        """
        if self.run_directory.results is None:
            raise ValueError(f"{self.options.out} should hold a finished run, found no results.json in it.")
        self._load(self.options.out)

    def _load(self, run: Path) -> None:
        """The weights of a finished run."""
        for name, network in self.networks.items():
            load_saved(unwrap(network), run / f"{name}.safetensors")

    def classes_of_run(self, data: TaskData, figure: str = "num_classes") -> tuple[int, bool]:
        """How many classes the recognizer of the run knows, and whether they are those of the data: not where a run is
        evaluated on data of other classes, which other networks read.
        """
        count = len(data.class_names)
        if self.evaluated is None or self.run_to_evaluate is None:
            return count, True
        known, names = int(self.evaluated[1][figure]), class_names_of(self.run_to_evaluate, data.task)
        same = known == count and names in (None, [*data.class_names])
        if not same:
            logger.warning(
                "The %d classes of the data are not the %d of %s: its own recognizer does not read them.", count, known,
                self.run_to_evaluate,
            )  # fmt: skip
        return known, same

    def is_elsewhere(self, folder: Path | None) -> bool:
        """Whether a finished run is evaluated on a folder that it has not learned from, nor any that reads for it."""
        if self.evaluated is None or folder is None:
            return False
        if has_learned_from(folder, self.evaluated[0], *began_with(self.options.plain())):
            return False
        if self.main:
            logger.info("Nothing is known to have learned from %s: where it is not divided, all of it tests", folder)
        return True

    def _of_evaluated(self, config: RunOptions, run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings and results of a finished run of this recipe.

        Raises:
            ValueError: If it is none, or of other options than those that an evaluation may change.
        """
        settings, results = finished_run(run, "this recipe", option="evaluate")
        of_data = {option.name for kind in (DataOptions, PairOptions) for option in fields(kind)} - {"task", "scale"}
        free = {
            "out",
            "evaluate",
            "batch",
            "seed",
            "precision",
            "cpu",
            "workers",
            "save_every",
            *self.evaluation_options,
        }
        for name, value in config.plain().items():
            if name not in of_data | free and settings.get(name) != value:
                raise ValueError(f"`{name}` should be {settings.get(name)!r}, as in {run}, found {value!r}.")
        return settings, results

    def _train(self, number: int, first_step: int, seconds: float) -> float:
        """One stage, from ``first_step``; returns the seconds spent in steps so far."""
        config, stage = self.options, self.stages[number]
        self.stage = number
        before = sum(earlier.steps for earlier in self.stages[:number])
        with tqdm(
            total=stage.steps, initial=first_step, desc=stage.name, unit="step", disable=not self.main
        ) as progress:
            for step, read in enumerate(self.read(first_step, stage.steps, number), start=first_step + 1):
                if read is None:
                    raise ValueError(
                        f"Of the batch of step {step} no image could be used: each warning above says why."
                    )
                images, targets = read
                batch = self.batch(images, targets, step - 1, stage.steps)
                started = time.perf_counter()
                try:
                    self.terms.add(before + step, stage.alternation.step(batch))
                except FloatingPointError as error:
                    raise FloatingPointError(f"Step {before + step}: {error}") from error
                seconds += time.perf_counter() - started
                progress.update()
                last = step == stage.steps
                logs, saves = step % 50 == 0 or last, step % config.save_every == 0 or last
                if logs or saves or self._is_tested(before + step):
                    self.terms.check(norms=getattr(self.accelerator, "scaler", None) is None)
                if logs:
                    values = self.terms.means()
                    self.run_directory.log(before + step, values)
                    progress.set_postfix({name.rpartition("/")[2]: f"{value:.3f}" for name, value in values.items()})
                if saves:
                    self._save(number, step, before + step, seconds)
                self._test(before + step)
        return seconds

    def _is_tested(self, step: int) -> bool:
        return self.options.eval_every > 0 and step > 0 and step % self.options.eval_every == 0

    def _test(self, step: int) -> None:
        """Evaluate on the way, where that is due and not done."""
        if not self._is_tested(step) or not self.main:
            return
        logged = self.run_directory.metrics()[-2:]
        if any(row["step"] == step and any(name.startswith("test/") for name in row) for row in logged):
            return
        figures, samples = self.evaluate()
        self.keep(step, figures, samples)
        self.run_directory.log(step, {f"test/{name}": value for name, value in figures.items()})

    def _save(self, stage: int, stage_step: int, step: int, seconds: float) -> None:
        number, done = (stage + 1, 0) if stage_step == self.stages[stage].steps else (stage, stage_step)
        if number == len(self.stages):  # the next thing is to finish
            number, done = stage, stage_step
        state = {
            "step": step, "stage": number, "stage_step": done, "seconds": seconds,
            "networks": {name: unwrap(network).state_dict() for name, network in self.networks.items()},
            "terms": self.terms.state_dict(),
            "alternation": self.stages[number].alternation.state_dict(),
        }  # fmt: skip
        for name, value in _not_finite({"networks": state["networks"], "alternation": state["alternation"]}):
            if name.removeprefix("networks/") not in self._infinite:
                raise FloatingPointError(f"Step {step}: {name} holds {value}. Nothing was saved of this step. {LOWER}")
        self.run_directory.save(state)
        self.saved()

    def _finish(self, more: dict[str, float]) -> dict[str, Any]:
        self.accelerator.wait_for_everyone()
        if not self.main:
            return {}
        figures, samples = self.evaluate()
        if self.evaluated is None:
            self.keep(sum(stage.steps for stage in self.stages), figures, samples)
        torch.save(samples, self.options.out / "samples.pt")
        rows = [value for value in samples.values() if isinstance(value, Tensor) and value.ndim == 4]
        if rows:
            self.run_directory.grid("test", [row[:8] for row in rows])
        done = {**figures, **more}
        self.run_directory.finish(done)
        return done


def _not_finite(state: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Name and value of what is NaN or infinite in nested mappings and lists of tensors, one of each tensor."""
    tensors = list(_tensors(state, name))
    if not tensors:
        return
    finite = torch.stack([value.isfinite().all().cpu() for _, value in tensors])
    for number in (~finite).nonzero().flatten().tolist():
        place, value = tensors[number]
        yield place, float(value[~value.isfinite()][0])


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor) and state.is_floating_point():
        yield name, state.detach()
    elif isinstance(state, Mapping | list | tuple):
        items = state.items() if isinstance(state, Mapping) else enumerate(state)
        for key, value in items:
            yield from _tensors(value, f"{name}/{key}" if name else str(key))


@contextmanager
def as_value_error(what: str) -> Iterator[None]:
    """While it lasts, what fails is a ``ValueError`` that names what was tried, unless memory ran out."""
    try:
        yield
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each network has errors of its own
        if "DefaultCPUAllocator" in str(error):  # torch has no exception of its own for the memory of the CPU
            raise
        cause = " ".join(str(error).split())[:300]
        raise ValueError(f"{what}, found {type(error).__name__}: {cause}") from error
