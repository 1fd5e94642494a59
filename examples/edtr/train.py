"""Train a diffusion model so that a task network reads what it restores: EDTR, Algorithm S1 of its paper.

    python -m examples.edtr.prepare --out runs/prepared     # task network on HQ, pre-restoration, latent diffusion
    python -m examples.edtr.train --prepared runs/prepared --out runs/edtr
    python -m examples.edtr.train --config examples/edtr/configs/cub_b.yaml --root DATA --prior SD --out runs/cub
    python -m examples.edtr.train --evaluate runs/edtr --n 4 --out runs/edtr_4_steps

The loop is ``Recipe.run`` of examples/common/engine/recipe.py; here are networks, losses and evaluation.

Every option of examples/edtr/config.py may stand in the YAML file or on the command line, which wins. The same command
resumes a killed run. Several processes: ``python -m torch.distributed.run --nproc_per_node 8 -m examples.edtr.train``.
"""

import copy
import logging
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from examples.common.data.degrade import degradation
from examples.common.data.task_data import TEST_SEED, check_data_sets, dataset, image_side, of_task
from examples.common.data.tasks import Task, TaskData, clean_of, to_device
from examples.common.engine import command_line
from examples.common.engine.evaluation import evaluate, load_recognizer, usable
from examples.common.engine.recipe import Recipe, Stage
from examples.common.engine.recognition import Recognition, features_of
from examples.common.engine.schedules import cosine_schedule, task_optimizer
from examples.common.seeds import derive_seed, seeded
from examples.edtr.config import Config
from examples.edtr.methods import METHODS, Method
from examples.edtr.model import build_edtr
from examples.edtr.prepared import with_prepared
from examples.edtr.readers import ALPHA, TASKS, Batch, InTurn, Reader
from examples.sr4ir.methods import check_trained_restorer
from restoreloss import Alternation, FeatureMatchingLoss, HLFLoss, Objective, Phase, TDPLoss
from restoreloss.frozen import unwrap
from restoreloss.restorers.edtr import EDTR, Hint, color_levels_of
from restoreloss.restorers.tiling import crop_to, pad_to_batch

logger = logging.getLogger(__name__)


class Trainer(Recipe[Batch]):
    """One run: networks, phases, evaluation."""

    evaluation_options = ("n", "long_steps", "smallest", "references", "judges", "draws")

    def __init__(self, config: Config) -> None:
        tasks = TASKS if config.all_in_one else (config.task,)
        if config.scale != 1:
            raise ValueError(f"`scale` should be 1, as EDTR keeps the size, found {config.scale}.")
        check_data_sets(config, tasks)
        config = with_prepared(config, tasks)
        side = max(image_side(of_task(config, task)) for task in tasks)
        levels = config.color_levels or color_levels_of(max(config.smallest, side))
        config = replace(config, color_levels=levels)  # which no weights tell to what restores with the run
        super().__init__(config)
        self.config, self.title = config, config.method
        self.method: Method = METHODS[config.method]
        for name, given in {"references": config.references, "judges": config.judges}.items():
            if len(given) != len(tasks) and (given or name == "references"):
                raise ValueError(
                    f"`{name}` should be the run directories of oracles for {', '.join(tasks)}, or `prepared` a folder "
                    f"that holds them, found {len(given)}."
                )
        if self.evaluated is None and config.batch < 2 * self.accelerator.num_processes:
            raise ValueError(f"`batch` should be at least 2 for each process, found {config.batch}.")
        if self.method.pre:
            check_trained_restorer(config.pre, "pre")
        for run in config.judges:
            if run in config.references:
                logger.warning("The judge, %s, takes part in the training: it is no independent one.", run)
        self.degrade = degradation(config, config.seed)
        self.restorer = self._edtr()
        self.edtr: nn.Module = self.accelerator.prepare(self.restorer)
        judges: list[Any] = config.judges or [None] * len(tasks)
        self.readers = {
            task: self._reader(task, *of) for task, *of in zip(tasks, config.references, judges, strict=True)
        }
        recognizers = {f"recognizer_{task}": reader.network for task, reader in self.readers.items() if reader.knows}
        self.networks = {"edtr": self.edtr, **recognizers}
        self.begin(self._stages)

    def saved(self) -> None:
        """What the classes are called, by the task."""
        names = {task: reader.train_data.class_names for task, reader in self.readers.items()}
        self.run_directory.write("classes", names)

    def sources(self) -> list[TaskData]:
        """The training data of all tasks."""
        return [reader.train_data for reader in self.readers.values()]

    def read(self, first: int, last: int, stage: int = 0) -> Iterator[Any]:
        """The batches of several tasks take turns."""
        count = len(self.readers)
        every = [
            self.load(reader.train_data, *(-(-(step - turn) // count) for step in (first, last)))
            for turn, reader in enumerate(self.readers.values())
        ]
        for step in range(first, last):
            yield next(every[step % count])

    def batch(self, images: Any, targets: Any, step: int, steps: int) -> Batch:
        """The first half is degraded, pre-restored and encoded here, once for both phases (line 5)."""
        config, rank = self.config, self.accelerator.process_index
        task = list(self.readers)[step % len(self.readers)]
        self.readers[task].recognition.check(targets)
        if len(images) < 2:
            raise ValueError(f"`batch` should be at least 2 images for each process, found {len(images)}.")
        torch.manual_seed(derive_seed(config.seed, step, rank))  # a detector draws from it
        # every second image, so that several processes restore what one would
        first, second = images[0::2], images[1::2]
        targets = (
            torch.cat([targets[0::2], targets[1::2]]) if isinstance(targets, Tensor) else targets[0::2] + targets[1::2]
        )
        first, second, targets = to_device((first, second, targets), self.device)
        begin = self.first_number(step)
        numbers = [begin + 2 * place for place in range(len(first))]
        restored = [*first]
        if config.whole_batch:
            numbers += [begin + 2 * place + 1 for place in range(len(second))]
            restored += [*second]
        degraded = [self.degrade(image[None], number)[0] for image, number in zip(restored, numbers, strict=True)]
        first, second = clean_of(first), clean_of(second)
        with self.accelerator.autocast():
            hint = self.restorer.hint(pad_to_batch(degraded, self.restorer.multiple, config.smallest))
        generators = [seeded(config.seed, 1, number) for number in numbers]
        return Batch(task, first, second, targets, hint, generators)

    def _edtr(self) -> EDTR:
        config, method = self.config, self.method
        if config.prior is None or config.pre is None:
            raise ValueError("`prior` and `pre` should be given, or `prepared`, a folder that holds both, found None.")
        edtr = build_edtr(vars(config))
        if config.checkpointing:
            edtr.enable_checkpointing()
        if not method.decoder or method.hlf is None:  # predicting noise does not reach the decoder
            edtr.decoder.requires_grad_(False)
        return edtr

    def _reader(self, task: Task, path: Path, judge: Path | None) -> Reader:
        config = self.config
        data = of_task(config, task)
        test_data = dataset(data, "test", config.seed, whole=self.is_elsewhere(data.root))
        train_data = dataset(data, "train", config.seed) if self.evaluated is None else test_data
        _, knows = self.classes_of_run(test_data, f"{task}_num_classes" if config.all_in_one else "num_classes")
        reference = load_recognizer(path, test_data).to(self.device)
        network: nn.Module = self.accelerator.prepare(copy.deepcopy(reference).requires_grad_(True))
        student, teacher = features_of(network, config.layers), features_of(reference, config.layers)
        looks: dict[Any, Objective] = {
            "both": HLFLoss(student, teacher), "task": TDPLoss(student), "reference": TDPLoss(teacher),
        }  # fmt: skip
        return Reader(
            Recognition(task, train_data.class_names), network, teacher,
            None if judge is None else load_recognizer(judge, test_data).to(self.device), looks.get(self.method.hlf),
            FeatureMatchingLoss(student, teacher), ALPHA[task] if config.alpha is None else config.alpha,
            train_data, test_data, knows,
        )  # fmt: skip

    def _stages(self) -> list[Stage[Batch]]:
        steps = InTurn(self._alternations(), self.readers)
        return [Stage(" + ".join(("edtr", *self.readers)), steps, self.config.steps)]

    def _alternations(self) -> dict[Task, Alternation[Batch]]:
        config, count = self.config, len(self.readers)
        trained = [parameter for parameter in self.edtr.parameters() if parameter.requires_grad]
        edtr = self._schedule(torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay), config.steps)
        alternations = {}
        for turn, (task, reader) in enumerate(self.readers.items()):
            optimizer = task_optimizer(config.h_optimizer, reader.network.parameters(), config.h_lr)
            recognizer = self._schedule(optimizer, -(-(config.steps - turn) // count))
            alternations[task] = Alternation(
                [
                    Phase("edtr", [self.edtr], self._restorer_terms, *edtr, max_norm=config.max_norm),
                    Phase(task, [reader.network], self._recognizer_terms, *recognizer, max_norm=config.max_norm),
                ],
                accelerator=self.accelerator,
            )
        return alternations

    def _schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """The optimizer as accelerate wants it, and a cosine to ``lr_min``."""
        schedule = cosine_schedule(optimizer, steps, lowest=self.config.lr_min / max(optimizer.defaults["lr"], 1e-30))
        return self.accelerator.prepare(optimizer), schedule

    def _restorer_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Lines 6-11: the one-step result of a random timestep (Eq. 7), or the noise in HQ latents (Eq. 2)."""
        edtr, hlf, clear = self.restorer, self.readers[batch.task].hlf, batch.first
        if self.config.whole_batch:
            clear = torch.cat([clear, batch.second]) if isinstance(clear, Tensor) else [*clear, *batch.second]
        timesteps = range(edtr.schedule.num_timesteps) if hlf is None else edtr.timesteps()
        drawn = [int(torch.randint(len(timesteps), (), generator=generator)) for generator in batch.generators]
        t = torch.tensor([timesteps[number] for number in drawn], device=self.device)
        noise = edtr.noise(batch.hint, batch.generators)
        clean = None
        if hlf is None or not self.method.partial:
            clean = edtr.encode(pad_to_batch(clear, edtr.multiple, self.config.smallest))
        found = self.edtr(batch.hint, t, noise=noise, latents=clean, noise_only=hlf is None)
        if hlf is None:
            return {"noise": F.mse_loss(found, noise)}
        return hlf.terms(crop_to(found, clear), clear)

    def _recognizer_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Lines 12-22: the task on n-step results and HQ images (Eq. 8), seen as the teacher sees HQ (Eq. 9)."""
        edtr, reader, count = self.restorer, self.readers[batch.task], len(batch.first)
        hint, generators = Hint(batch.hint.image[:count], batch.hint.latents[:count]), batch.generators[:count]
        with torch.no_grad():
            noise = edtr.noise(hint, generators)
            restored = edtr(hint, edtr.timesteps(), noise=noise, generator=generators)
            if self.config.clamp:
                restored = restored.clamp(0, 1)
        restored = crop_to(restored, batch.first)
        images = torch.cat([restored, batch.second]) if isinstance(restored, Tensor) else restored + batch.second
        with reader.matching.student.recording() as seen:
            terms = {"task": reader.recognition.loss(reader.network, images, batch.targets)}
        if self.method.matching:
            terms["matching"] = reader.alpha * self._matching(reader, seen, batch)
        return terms

    @staticmethod
    def _matching(reader: Reader, seen: dict[str, Tensor], batch: Batch) -> Tensor:
        """The FM loss, half by half: the teacher has seen the first for the HLF loss."""
        if not isinstance(batch.first, Tensor):
            whole: Tensor = reader.matching(seen, [*batch.first, *batch.second])
            return whole
        half, count = len(batch.first), len(batch.targets)
        first: Tensor = reader.matching({name: value[:half] for name, value in seen.items()}, batch.first)
        second: Tensor = reader.matching({name: value[half:] for name, value in seen.items()}, batch.second)
        return (half * first + (count - half) * second) / count

    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """All figures on the test images, and some of these; of several tasks, images of the first."""
        every: dict[str, float] = {}
        sheets = []
        for task in self.readers:
            figures, sheet = self._over_draws(task)
            every.update(figures if len(self.readers) == 1 else {f"{task}_{key}": v for key, v in figures.items()})
            sheets.append(sheet)
        return every, sheets[0]

    def _over_draws(self, task: Task) -> tuple[dict[str, float], dict[str, Any]]:
        """Means over the draws of the noise, and of the score the deviation over them; images of the first draw."""
        random = self.method.prior or self.method.noise
        found = [self.evaluate_task(task, seed=number) for number in range(self.config.draws if random else 1)]
        every = [figures for figures, _ in found]
        means = {key: statistics.fmean(figures[key] for figures in every) for key in every[0]}
        if len(every) > 1 and "score" in means:
            means["score_over_draws"] = statistics.stdev(figures["score"] for figures in every)
        return means, found[0][1]

    def try_evaluation(self) -> None:
        """Evaluate a few test images with a label, of each task."""
        for task, reader in self.readers.items():
            self.evaluate_task(task, data=usable(reader.test_data, task, f"the test data of {task}"))

    def evaluate_task(
        self, task: Task, *, n: int | None = None, seed: int = 0, data: TaskData | None = None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The figures of one task, with n denoising steps and the noise of a seed; of all test images, or of others."""
        config, reader, edtr = self.config, self.readers[task], self.restorer
        generator = seeded(config.seed, 2, seed)

        def restore(_: Any, lq: Any) -> Any:
            if isinstance(lq, Tensor):
                return edtr.restore(lq, n=n, generator=generator, smallest=config.smallest)
            return [edtr.restore(x[None], n=n, generator=generator, smallest=config.smallest)[0] for x in lq]

        figures, samples = evaluate(
            reader.test_data if data is None else data, reader.recognition, restore=restore,
            degrade=degradation(config, config.seed, TEST_SEED), trained=[edtr, unwrap(reader.network)],
            readers={
                "score": unwrap(reader.network) if reader.knows else None,
                "fixed_hr": unwrap(reader.reference.network), "judge": reader.judge,
            },
            workers=config.workers,
        )  # fmt: skip
        return {**figures, "num_classes": len(reader.recognition.class_names)}, samples


def main() -> None:
    command_line.run(Config, lambda config: Trainer(config).run(), __doc__)


if __name__ == "__main__":
    main()
