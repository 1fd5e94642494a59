"""Train one restorer for people and for several task networks, and add another task: UniRestore.

    python -m examples.unirestore.prepare --out runs/prepared
    python -m examples.unirestore.train stage1 --prepared runs/prepared --out runs/stage1
    python -m examples.unirestore.train stage2 --prepared runs/prepared --after runs/stage1 --out runs/stage2
    python -m examples.unirestore.train add-task detection --prepared runs/prepared --after runs/stage2 --out runs/det
    python -m examples.unirestore.train stage2 --evaluate runs/stage2 --severities '[5]' --out runs/stage2_severe

The loop is ``Recipe.run`` of examples/common/engine/recipe.py; here are networks, losses and evaluation.

Every option of examples/unirestore/config.py may stand in a YAML file (``--config``) or on the command line, which
wins. The same command resumes a killed run. Several processes:
``python -m torch.distributed.run --nproc_per_node 8 -m examples.unirestore.train ...``.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from examples.common.data.degrade import Degrade, degradation
from examples.common.data.pairs import FolderPairs, TestPairs, layout_and_root, pairs_to_try
from examples.common.data.task_data import TEST_SEED
from examples.common.data.tasks import TaskData, clean_of, map_images, to_device
from examples.common.engine import command_line
from examples.common.engine.evaluation import evaluate, load_recognizer, usable
from examples.common.engine.recipe import Recipe, Stage
from examples.common.engine.recognition import Recognition
from examples.common.engine.schedules import cosine_schedule
from examples.common.networks.restorers import restorer
from examples.common.seeds import derive_seed, seeded
from examples.unirestore.batch import Batch, Part
from examples.unirestore.checks import check, check_data
from examples.unirestore.config import FILE, TASKS, WEIGHTS, Config, StageName
from examples.unirestore.data import data_of, test_data_of
from examples.unirestore.networks import PlainNetwork
from examples.unirestore.restore import build_unirestore, load_run
from restoreloss import Alternation, Phase
from restoreloss.frozen import unwrap
from restoreloss.restorers import UniRestore
from restoreloss.restorers.first_stage import TIMESTEPS, UniRestoreFirstStage

logger = logging.getLogger(__name__)


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

    evaluation_options = (
        "unseen", "smallest", "tile", "steps_of_diffusion", "prepared", "prior", "images", "images_lq", "paired_tests",
        "every_prompt",
    )  # fmt: skip

    def __init__(self, config: Config) -> None:
        (check if config.evaluate is None else check_data)(config)
        super().__init__(config)
        self.config = config
        self.title = f"{config.stage}, {config.network or 'UniRestore'}"
        tasks = [config.name] if config.name is not None else config.tasks
        self.readers = {task: self._reader(task) for task in tasks}
        self.trained = config.train_tasks or (["restoration"] if config.stage == "stage1" else tasks)
        self.train_data = self.readers[self.trained[0]].train_data
        first = config.stage == "stage1" and config.network is None
        model = self._unirestore() if config.network is None else PlainNetwork(restorer(config.network, 1))
        self.model: Any = model.to(self.device)
        self.networks = {FILE: self.model}
        if config.evaluate is not None:
            self.net: nn.Module = self.model
            self.begin(list)
            return
        wrapped = UniRestoreFirstStage(model, config.cfrm_weights) if first and isinstance(model, UniRestore) else model
        self.net = self.accelerator.prepare(wrapped)
        self.before = self._hashes()
        self.begin(lambda: [Stage(" + ".join(self.trained), self._alternation(first), config.steps)])

    def sources(self) -> list[TaskData]:
        """The data of all tasks that are trained on."""
        return [self.readers[task].train_data for task in self.trained]

    def read(self, first: int, last: int, stage: int = 0) -> Iterator[Any]:
        """The batches of all tasks together; a task of whose batch nothing could be read is left out of that step."""
        loads = [self.load(self.readers[task].train_data, first, last) for task in self.trained]
        for reads in zip(*loads, strict=True):
            found = {task: read for task, read in zip(self.trained, reads, strict=True) if read is not None}
            yield (found, None) if found else None

    def batch(self, images: Any, targets: Any, step: int, steps: int) -> Batch:
        """Degraded here: what happens to an image is decided by its number."""
        parts = []
        seed = self.config.seed
        torch.manual_seed(derive_seed(seed, step, self.accelerator.process_index))  # a detector draws from it
        for task, (clean, labels) in images.items():
            reader, first = self.readers[task], self.first_number(step)
            reader.recognition.check(labels)
            clean, labels = to_device((clean, labels), self.device)
            numbers = range(first, first + len(clean))
            generators = [seeded(seed, 1, TASKS.index(task), n) for n in numbers]
            parts.append(Part(task, clean_of(clean), reader.degrade(clean, first), labels, generators))
        return Batch(parts)

    def _reader(self, task: str) -> Reader:
        config = self.config
        if self.evaluated is None:
            train, test = data_of(task, config)
        else:
            train = test = test_data_of(task, config, self.is_elsewhere)
        networks: dict[str, nn.Module | None] = {"hq": None, "judge": None}
        if task == "reading":  # whose networks are trained already
            networks = {"hq": load_recognizer(Path("english_g2")), "judge": load_recognizer(Path("pp_ocr"))}
        elif task != "restoration" and config.prepared is not None:
            networks = {name: load_recognizer(config.prepared / f"{task}_{name}", test) for name in networks}
        networks = {name: None if one is None else one.to(self.device) for name, one in networks.items()}
        return Reader(
            Recognition(train.task, train.class_names), networks["hq"], networks["judge"], train, test,
            degradation(config, config.seed, TASKS.index(task)),
        )  # fmt: skip

    def _unirestore(self) -> UniRestore:
        """The model with the weights of the stage before, and a gradient for what this one learns."""
        config = self.config
        if config.evaluate is not None:
            model, _ = load_run(config.evaluate, config.prior)
            model.steps = config.steps_of_diffusion
            return model
        prior = config.prior if config.prepared is None or config.prior is not None else config.prepared / "prior"
        if prior is None:
            raise ValueError("`prior` should be given, or `prepared`, a folder that holds one, found None.")
        second = config.stage != "stage1"
        model = build_unirestore(vars(config), prior, config.tasks if config.stage == "stage2" else ())
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
        schedule = cosine_schedule(optimizer, config.steps)
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
        drawn = [int(torch.randint(len(TIMESTEPS), (), generator=generator)) for generator in batch.generators]
        t = torch.tensor([(TIMESTEPS[number] + 1) * last // 1000 - 1 for number in drawn], device=self.device)
        terms: dict[str, Tensor] = self.net(part.degraded, part.clean, t, batch.generators)
        return terms

    def _task_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. (6): each image is restored for its task and read by that task's network."""
        restored = self._restored(batch, batch.tasks)
        weights = WEIGHTS | self.config.task_weights
        terms = {}
        for part, images in zip(batch.parts, restored, strict=True):
            reader = self.readers[part.task]
            if part.task == "restoration":
                loss = F.mse_loss(images, part.clean)
            else:
                assert reader.network is not None
                loss = reader.recognition.loss(reader.network, images, part.targets)
            terms[part.task] = weights[part.task] * loss
        if self.config.restored_too and any(part.task != "restoration" for part in batch.parts):
            others = [part for part in batch.parts if part.task != "restoration"]
            terms["restored_too"] = self.config.restored_too * self._restored_too(Batch(others))
        if self.accelerator.num_processes > 1:  # DDP waits for every prompt, also of a task that this process lacks
            first = next(iter(terms))
            terms[first] = terms[first] + 0.0 * sum(p.sum() for p in self.model.parameters() if p.requires_grad)
        return terms

    def _restored_too(self, batch: Batch) -> Tensor:
        """L1 to the clean images, with the prompt of restoration."""
        restored = self._restored(batch, ["restoration"] * len(batch.tasks))
        pairs = [
            (one, other) for part, found in zip(batch.parts, restored, strict=True)
            for one, other in zip(found, part.clean, strict=True)
        ]  # fmt: skip
        return torch.stack([F.l1_loss(one, other) for one, other in pairs]).mean()

    def _restored(self, batch: Batch, tasks: list[str]) -> list[Any]:
        """All images of one size in one pass, then apart again by part."""
        degraded, generators = [image for part in batch.parts for image in part.degraded], batch.generators
        found: dict[int, Tensor] = {}
        for size in dict.fromkeys(image.shape for image in degraded):
            rows = [n for n, image in enumerate(degraded) if image.shape == size]
            restored = self.net(
                torch.stack([degraded[n] for n in rows]), [tasks[n] for n in rows],
                generator=[generators[n] for n in rows], smallest=self.config.smallest,
            )  # fmt: skip
            found |= dict(zip(rows, restored, strict=True))
        pieces, every = [], iter(found[n] for n in range(len(degraded)))
        for part in batch.parts:
            images = [next(every) for _ in part.clean]
            pieces.append(torch.stack(images) if isinstance(part.clean, Tensor) else images)
        return pieces

    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """The figures of each task, on corruptions like those of training and on others, and images of the first; a
        grid of each.
        """
        if self.evaluated is None:
            if self.config.stage == "add-task":
                self._check_the_others()
            self._save_prompts()  # before results.json, which says that all is there
        return self.figures(self.restores)

    def restores(self, task: str) -> Callable[[Any, Any], Any]:
        """(clean, degraded) -> what the model makes of it for a task."""
        generator = seeded(self.config.seed, 2)

        def restored(images: Tensor) -> Tensor:
            options = {"generator": generator, "smallest": self.config.smallest, "tile": self.config.tile or None}
            parts = images.split(self.config.batch)  # what fits in memory
            with self.accelerator.autocast():
                return torch.cat([self.model.restore(part, task, **options) for part in parts]).float()

        return lambda _, degraded: map_images(restored, degraded)

    def try_evaluation(self) -> None:
        """Evaluate a few test images with a label, of each task, and of each set of pairs."""
        for task, reader in self.readers.items():
            found = usable(reader.test_data, reader.recognition.task, f"the test data of {task}")
            self._evaluate(task, found, self.restores(task), self.config.degradation)
        for name in self.config.paired_tests:
            self._figures_of_pairs(name, self.restores("restoration"), pairs_to_try(name, self._pairs(name)))

    def figures(self, read: Callable[[str], Callable[[Any, Any], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        """The figures of :func:`examples.common.engine.evaluation.evaluate` for each task.

        Args:
            read: task -> (clean, degraded) -> the images that are read.
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
            for prompt in self.model.tasks if self.config.every_prompt else ():
                found, sheet = self._evaluate(task, reader.test_data, read(prompt), kinds[""])
                every |= {f"{task}_by_{prompt}_{key}": value for key, value in found.items()}
        if "restoration" in self.readers:
            for pairs in self.config.paired_tests:
                every |= self._figures_of_pairs(pairs, read("restoration"), self._pairs(pairs))
        return every, sheets[0]

    def _pairs(self, name: str) -> TestPairs:
        root = layout_and_root(self.config.paired_tests, name, option="paired_tests")
        return TestPairs(FolderPairs({name: root}, "test", 1))

    def _figures_of_pairs(
        self, name: str, read: Callable[[Any, Any], Any], pairs: Iterable[tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        """PSNR and SSIM of pairs on disk, restored for people, and PSNR of the degraded images."""
        found: dict[str, list[float]] = {}
        with torch.no_grad():
            for degraded, clean in pairs:
                lq, hq = degraded.to(self.device), clean.to(self.device)
                restored = read(hq, lq)
                ssim: Any = structural_similarity_index_measure(restored, hq, data_range=1.0)
                for key, value in (
                    ("psnr", peak_signal_noise_ratio(restored, hq, data_range=1.0)), ("ssim", ssim),
                    ("lq_psnr", peak_signal_noise_ratio(lq, hq, data_range=1.0)),
                ):  # fmt: skip
                    found.setdefault(f"{name}_{key}", []).append(float(value))
        if not found:
            raise ValueError(f"`paired_tests` should hold images of {name!r} that can be read, found none.")
        return {key: sum(values) / len(values) for key, values in found.items()}

    def _evaluate(
        self, task: str, data: TaskData, read: Callable[[Any, Any], Any], name: str
    ) -> tuple[dict[str, float], dict[str, Any]]:
        kind: Any = name
        options, reader = replace(self.config, degradation=kind, clean_too=False), self.readers[task]
        return evaluate(
            data, reader.recognition, restore=read, trained=[unwrap(self.net)],
            degrade=degradation(options, self.config.seed, TEST_SEED, TASKS.index(task)),
            readers={"score": reader.network, "judge": reader.judge}, workers=self.config.workers,
        )  # fmt: skip

    def _hashes(self) -> dict[str, str]:
        """Hashes of all weights but prompts, and of each prompt."""
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


def main() -> None:
    command_line.run(
        Config, lambda config: Trainer(config).run(), __doc__,
        positional={"stage": {"choices": get_args(StageName)}, "name": {"nargs": "?", "help": "of the task to add"}},
    )  # fmt: skip


if __name__ == "__main__":
    main()
