"""Train a restoration network so that a recognizer reads its images: SR4IR, and what it is compared to.

    python -m examples.sr4ir.train --out runs/sr4ir                        # generated textures, two cores, a minute
    python -m examples.sr4ir.train --config examples/sr4ir/configs/cars_x8.yaml --root DATA --out runs/cars
    python -m examples.sr4ir.train --evaluate runs/sr4ir --data_seed 7 --out runs/on_others

The loop is ``Recipe.run`` of examples/common/engine/recipe.py; here are networks, losses and evaluation.

Every option of examples/sr4ir/config.py may stand in the YAML file or on the command line, which wins. The same command
resumes a killed run. Several processes: ``python -m torch.distributed.run --nproc_per_node 8 -m examples.sr4ir.train``.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.data.degrade import degradation
from examples.common.data.task_data import TEST_SEED, crop_to_multiple, dataset
from examples.common.data.tasks import TaskData, clean_of, map_images, to_device
from examples.common.engine import command_line
from examples.common.engine.controls import ImageGradients
from examples.common.engine.evaluation import ReaderName, evaluate, load_recognizer, usable
from examples.common.engine.recipe import Recipe, Stage
from examples.common.engine.recognition import Recognition, features_of
from examples.common.engine.run_directory import file_in
from examples.common.engine.schedules import StepSchedule, cosine, task_optimizer
from examples.common.networks.recognizers import recognizer
from examples.common.networks.restorers import restorer
from examples.common.networks.weights import load_weights
from examples.common.seeds import derive_seed, seeded
from examples.sr4ir.config import Config
from examples.sr4ir.images import bilinear, pixel_loss, restore
from examples.sr4ir.methods import METHODS, Image, Method, check_trained_restorer
from restoreloss import Alternation, CQMix, Phase, TDPLoss
from restoreloss.frozen import in_mode, unwrap
from restoreloss.objectives.base import total

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """HR images and what was made of them: (N, 3, H, W), or lists of (3, H, W) for detection."""

    hr: Any
    lr: Any
    targets: Any
    progress: float
    """The fraction of this stage that is done, from 0 to 1."""
    generators: list[torch.Generator]
    """One for each mixture that the recognizer reads."""


class Trainer(Recipe[Batch]):
    """One run: networks, stages, evaluation."""

    evaluation_options = ("fixed_hr", "judge", "lite0")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.title = config.method
        self.config = config
        self.method: Method = METHODS[config.method]
        self.test_data = dataset(config, "test", config.seed, whole=self.is_elsewhere(config.root))
        self.train_data = dataset(config, "train", config.seed) if self.evaluated is None else self.test_data
        self.recognition = Recognition(self.train_data.task, self.train_data.class_names, aux_weight=config.aux_weight)
        classes = len(self.train_data.class_names)
        self._check_roles()

        begins_with = config.s_weights if self.evaluated is None else config.evaluate
        s = restorer(config.restorer, config.scale, file_in(begins_with, "restorer.safetensors"))
        known, self.knows = self.classes_of_run(self.train_data)
        readers = (config.fixed_hr, config.judge)
        if self.method.recognizer_inputs and not self.knows and readers == (None, None):
            raise ValueError(f"`fixed_hr` or `judge` should read the {classes} classes of `data`, found neither.")
        begins_anew = config.start == "scratch" and self.evaluated is None
        h = recognizer(config.recognizer, config.task, known, pretrained=begins_anew, aux=config.aux_weight > 0)
        if config.start == "hr" and self.evaluated is None:
            if config.h_weights is None:
                raise ValueError("`h_weights` should be the run directory of an oracle for `start` 'hr', found None.")
            load_recognizer(config.h_weights, self.train_data)  # which says whether it fits
            load_weights(h, config.h_weights / "recognizer.safetensors")
        s, h = s.to(memory_format=torch.channels_last), h.to(memory_format=torch.channels_last)
        # a network that does not train has nothing for DDP to average
        trains_s, trains_h = bool(self.method.restorer_terms), bool(self.method.recognizer_inputs)
        self.s: nn.Module = self.accelerator.prepare(s) if trains_s else s.to(self.device)
        self.h: nn.Module = self.accelerator.prepare(h) if trains_h else h.to(self.device)
        self.networks = {"restorer": self.s, "recognizer": self.h}

        self.fixed_hr, self.judge = (
            None if run is None else load_recognizer(run, self.test_data).to(self.device)
            for run in (config.fixed_hr, config.judge)
        )
        cells = config.grid or (4 if config.task == "classification" else 8)
        self.cqmix = CQMix((cells, cells), p=config.mix)
        self._mixtures = self.method.recognizer_inputs.count("mix")
        if "tdp" in self.method.restorer_terms and self.evaluated is None:
            self.tdp = self._tdp()
        self.degrade = degradation(config, config.seed)
        self.begin(self._stages)

    def _check_roles(self) -> None:
        """Raise ``ValueError`` for runs that did not train what is taken of them, and those that nothing takes."""
        config = self.config
        check_trained_restorer(config.s_weights, "s_weights")
        if self.evaluated is not None:
            return
        for option, run, taken in (
            ("h_weights", config.h_weights, config.start == "hr"),
            ("foreign", config.foreign, self.method.features == "foreign"),
        ):
            if run is not None and not taken:
                wanted = "`start` 'hr'" if option == "h_weights" else "fixed_foreign"
                raise ValueError(f"`{option}` should be left out but for {wanted}, found {run}.")
        training = [config.h_weights, config.foreign, config.fixed_hr if self.method.features == "task" else None]
        if config.judge is not None and config.judge in training:
            logger.warning("The judge, %s, takes part in the training: it is no independent one.", config.judge)

    def saved(self) -> None:
        """What the classes are called, by the task."""
        self.run_directory.write("classes", {self.recognition.task: self.train_data.class_names})

    def batch(self, images: Any, targets: Any, step: int, steps: int) -> Batch:
        """HR and LR images on the device, and a generator for the step."""
        self.recognition.check(targets)
        config, rank = self.config, self.accelerator.process_index
        hr, targets = crop_to_multiple(images, targets, config.scale)
        torch.manual_seed(derive_seed(config.seed, step, rank))  # a detector draws from it
        seeds = [(config.seed, step), *((config.seed, step, k) for k in range(1, self._mixtures))]
        generators = [seeded(*seed) for seed in seeds]
        for generator in generators:  # every process draws its part of the whole batch
            torch.rand(rank * len(hr) * self.cqmix.grid[0] * self.cqmix.grid[1], generator=generator)
        hr, targets = to_device((hr, targets), self.device)
        if isinstance(hr, Tensor):
            hr = hr.to(memory_format=torch.channels_last)
        lr = self.degrade(hr, self.first_number(step))
        return Batch(clean_of(hr), lr, targets, step / steps, generators)

    def _stages(self) -> list[Stage[Batch]]:
        build: dict[str, Callable[[], Phase[Batch]]] = {
            "restorer": lambda: self._phase("restorer", [self.s], self._restorer_terms),
            "recognizer": lambda: self._phase("recognizer", [self.h], self._recognizer_terms),
            "both": lambda: self._phase("both", [self.s, self.h], self._joint_terms),
        }
        return [
            Stage(
                " + ".join(names),
                Alternation([build[name]() for name in names], accelerator=self.accelerator),
                self.config.steps * self.method.length,
            )
            for names in self.method.stages
        ]

    def _phase(
        self, name: str, trains: list[nn.Module], objective: Callable[[Batch], Mapping[str, Tensor]]
    ) -> Phase[Batch]:
        config = self.config
        optimizers, schedulers = [], []
        for network in trains:
            optimizer: torch.optim.Optimizer
            if network is self.s:
                lr, end = config.s_lr, config.s_lr_min
                optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0)
            else:
                lr, end = config.h_lr, config.h_lr_min
                groups = _with_faster_head(network, lr)
                optimizer = task_optimizer(config.h_optimizer, groups, lr, config.h_weight_decay)
            factor = partial(
                rate, steps=config.steps * self.method.length, restart=config.restart, warm_up=config.warm_up,
                lowest=end / lr if lr else 0.0,
            )  # fmt: skip
            schedulers.append(StepSchedule(optimizer, factor))
            optimizers.append(self.accelerator.prepare(optimizer))
        others = [network for network in (self.s, self.h) if network not in trains]
        # torchvision's detectors give their losses, which S may learn from, in train mode only
        reads_loss = config.task == "detection" and "task" in self.method.restorer_terms and self.h in others
        return Phase(
            name, trains, objective, optimizers, schedulers, frozen=others,
            modes={self.h: "train"} if reads_loss else {}, max_norm=config.max_norm,
        )  # fmt: skip

    def _restorer_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Phase 1 (Eq. 3): the pixels, and what the recognizer sees in them."""
        restored = restore(self.s, batch.lr)
        seen = map_images(Tensor.detach, restored) if self.method.features == "detached" else restored
        return self._weighted(
            batch,
            pixel=lambda: pixel_loss(restored, batch.hr),
            squared=lambda: pixel_loss(restored, batch.hr, F.mse_loss),
            gradients=lambda: pixel_loss(restored, batch.hr, ImageGradients()),
            tdp=lambda: self.config.tdp_weight * self.tdp(seen, batch.hr),
            task=lambda: self.recognition.loss(unwrap(self.h), restored, batch.targets),
        )

    def _recognizer_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Phase 2: the task on what S restores by now, on HR images, on mixtures of both."""
        kinds: list[Image] = ["restored" if name == "mix" else name for name in self.method.recognizer_inputs]
        with torch.no_grad():
            images = {kind: self._image(kind, batch.hr, batch.lr) for kind in dict.fromkeys(kinds)}
        return {"task": self._task_loss(images, batch)}

    def _joint_terms(self, batch: Batch) -> dict[str, Tensor]:
        """S and H by one loss."""
        restored = restore(self.s, batch.lr)

        def tdp() -> Tensor:
            # unlike TDPLoss, with gradient into H from both sides: the mistake that this ablation is about
            h = unwrap(self.h)
            with in_mode(h, "eval") if self.config.task == "detection" else nullcontext():  # or it asks for targets
                return total(self.tdp.compare(self.tdp.features(restored), self.tdp.features(batch.hr)))

        return self._weighted(
            batch,
            pixel=lambda: pixel_loss(restored, batch.hr),
            tdp=lambda: self.config.tdp_weight * tdp(),
            task=lambda: self._task_loss({"hr": batch.hr, "restored": restored}, batch),
        )

    def _weighted(self, batch: Batch, **losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The losses that this method has and that have begun, times their weights."""
        weights, begins = self.method.restorer_terms, self.method.begins
        begun = (name for name in weights if batch.progress >= begins.get(name, 0.0))
        return {name: weights[name] * losses[name]() for name in begun}

    def _task_loss(self, images: Mapping[Image, Any], batch: Batch) -> Tensor:
        """The mean task loss over this method's inputs."""
        generators = iter(batch.generators)
        parts = [
            self.cqmix(images["restored"], batch.hr, generator=next(generators)) if name == "mix" else images[name]
            for name in self.method.recognizer_inputs
        ]
        if self.config.separate:
            return torch.stack([self.recognition.loss(self.h, part, batch.targets) for part in parts]).mean()
        if isinstance(batch.hr, Tensor):
            return self.recognition.loss(self.h, torch.cat(parts), torch.cat([batch.targets] * len(parts)))
        return self.recognition.loss(self.h, [p for part in parts for p in part], list(batch.targets) * len(parts))

    def _tdp(self) -> TDPLoss:
        config, features = self.config, self.method.features
        if features == "foreign":
            if config.foreign is None:
                raise ValueError(
                    "`foreign` should be the run directory of an oracle on other data, 'imagenet' or 'vgg', for "
                    "'fixed_foreign', found None."
                )
            if str(config.foreign) == "imagenet":
                from torchvision.models import ResNet18_Weights, resnet18

                return TDPLoss(resnet18(weights=ResNet18_Weights.DEFAULT).to(self.device))
            if str(config.foreign) == "vgg":
                from torchvision.models import VGG19_Weights, vgg19

                return TDPLoss(vgg19(weights=VGG19_Weights.DEFAULT).to(self.device), ["features.34"])
            return TDPLoss(features_of(load_recognizer(config.foreign).to(self.device)))
        if features == "task":
            if self.fixed_hr is None:
                raise ValueError(
                    f"`fixed_hr` should be the run directory of an oracle for {config.method!r}, found None."
                )
            return TDPLoss(features_of(self.fixed_hr, config.layers))
        return TDPLoss(features_of(self.h, config.layers))

    def _image(self, kind: Image, hr: Any, lr: Any) -> Any:
        """What H reads: HR images, LR ones enlarged, or what S restores, in [0, 1]."""
        if kind == "hr":
            return hr
        if kind == "bilinear":
            return bilinear(lr, self.config.scale, align_corners=self.config.align_corners)
        return map_images(lambda image: image.clamp(0, 1), restore(unwrap(self.s), lr))

    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """All figures on the test images, and some of these."""
        return self._evaluate(self.test_data)

    def try_evaluation(self) -> None:
        """Evaluate a few test images with a label."""
        readers = [network for network in self._readers().values() if network is not None]
        self._evaluate(usable(self.test_data, self.config.task, labels=bool(readers)))

    def _readers(self) -> dict[ReaderName, nn.Module | None]:
        own = unwrap(self.h) if self.method.recognizer_inputs and self.knows else None
        return {"score": own, "fixed_hr": self.fixed_hr, "judge": self.judge}

    def _evaluate(self, data: TaskData) -> tuple[dict[str, float], dict[str, Any]]:
        config = self.config
        figures, samples = evaluate(
            data, self.recognition, degrade=degradation(config, config.seed, TEST_SEED),
            restore=partial(self._image, self.method.reads), trained=[unwrap(self.s), unwrap(self.h)],
            readers=self._readers(), multiple=config.scale, pad=config.pad_tests, lite0=config.lite0,
            workers=config.workers,
        )  # fmt: skip
        return {**figures, "num_classes": len(self.recognition.class_names)}, samples


def _with_faster_head(network: nn.Module, lr: float) -> list[dict[str, Any]]:
    """The weights, those of an auxiliary head with ten times the learning rate."""
    named = list(network.named_parameters())
    head = [weight for name, weight in named if "aux_classifier" in name]
    rest = [weight for name, weight in named if "aux_classifier" not in name]
    return [{"params": rest}, *([{"params": head, "lr": 10 * lr}] if head else [])]


def rate(step: int, steps: int, restart: float, warm_up: int, lowest: float = 0.0) -> float:
    """Factor of the learning rate: a cosine to ``lowest``, begun anew after the fraction ``restart``; a linear rise
    first.
    """
    first = round(restart * steps)
    begun, length = (0, first) if step < first else (first, steps - first)
    return cosine(step - begun, length, lowest=lowest) * min(1.0, (step + 1) / warm_up if warm_up else 1.0)


def main() -> None:
    command_line.run(Config, lambda config: Trainer(config).run(), __doc__)


if __name__ == "__main__":
    main()
