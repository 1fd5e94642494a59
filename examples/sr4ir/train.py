"""How is a restoration network trained so that a recogniser reads its pictures well? SR4IR and what it is compared to.

    python -m examples.sr4ir.train --out runs/sr4ir                        # generated textures, two cores, a minute
    python -m examples.sr4ir.train --config examples/sr4ir/configs/cars_x8.yaml --root DATA --out runs/cars

Every option of examples/sr4ir/config.py may stand in the YAML file or on the command line, which wins. The same command
resumes a killed run. Several processes: ``python -m torch.distributed.run --nproc_per_node 8 -m examples.sr4ir.train``.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from examples.common.batches import Batches, chance, loader
from examples.common.degrade import low_resolution
from examples.common.networks import recogniser, restorer
from examples.common.recognition import Recognition
from examples.common.run_directory import RunDirectory
from examples.common.tasks import each, to_device
from examples.sr4ir.config import Config
from examples.sr4ir.data import datasets, on_grid
from examples.sr4ir.evaluate import Judges, evaluate
from examples.sr4ir.methods import METHODS, Method
from restoreloss import Alternation, CQMix, FeatureExtractor, Phase, TDPLoss
from restoreloss.frozen import bare

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """HR pictures and what was made of them: (N, 3, H, W), or lists of (3, H, W) for detection."""

    hr: Any
    lr: Any
    targets: Any
    progress: float
    """Of this stage, from 0 to 1."""
    chance: torch.Generator


@dataclass(frozen=True)
class Stage:
    """Steps with one :class:`~restoreloss.Alternation`."""

    name: str
    alternation: Alternation[Batch]
    steps: int


class Trainer:
    """One run: networks, stages, checkpoints, evaluation."""

    def __init__(self, config: Config) -> None:
        if config.method == "tdp_joint" and config.task == "detection":
            raise ValueError("`task` should not be 'detection' for tdp_joint: a detector in training asks for targets.")
        self.config = config
        self.method: Method = METHODS[config.method]
        self.accelerator = Accelerator(mixed_precision=config.precision, cpu=config.cpu)
        self.device = self.accelerator.device
        main = self.accelerator.is_main_process
        if main:
            logger.info("%s on %s, %d processes", config.method, self.device, self.accelerator.num_processes)
        torch.manual_seed(chance(config.seed))
        self.train_data, self.test_data = datasets(config)
        self.recognition = Recognition(self.train_data.task, self.train_data.class_names)
        classes = len(self.train_data.class_names)

        s = restorer(config.restorer, config.scale, _file(config.s_weights, "restorer.safetensors"))
        h = recogniser(config.recogniser, config.task, classes)
        if config.start == "hr":
            if config.h_weights is None:
                raise ValueError("`h_weights` should be the run directory of an oracle for `start` 'hr', found None.")
            load_model(h, config.h_weights / "recogniser.safetensors")
        s, h = s.to(memory_format=torch.channels_last), h.to(memory_format=torch.channels_last)
        # a network that does not train has nothing for DDP to average
        trains_s, trains_h = bool(self.method.restorer_terms), bool(self.method.recogniser_inputs)
        self.s: nn.Module = self.accelerator.prepare(s) if trains_s else s.to(self.device)
        self.h: nn.Module = self.accelerator.prepare(h) if trains_h else h.to(self.device)

        self.judges = Judges.load(config, self.device)
        cells = config.grid or (4 if config.task == "classification" else 8)
        self.cqmix = CQMix((cells, cells), p=config.mix)
        self.tdp = self._tdp() if "tdp" in self.method.restorer_terms else None
        self.stages = self._stages()
        # last, so that what is refused leaves no folder
        self.run_directory = RunDirectory(config.out, _plain(config), main=main, ignore=("save_every", "workers"))

    def run(self) -> dict[str, Any]:
        """Train what is left, evaluate, write the results; nothing of a finished run is done again."""
        if (done := self.run_directory.results) is not None:
            return done
        state = self.run_directory.load()
        first_stage, first_step, seconds = 0, 0, 0.0
        if state is not None:
            bare(self.s).load_state_dict(state["restorer"])
            bare(self.h).load_state_dict(state["recogniser"])
            first_stage, first_step, seconds = state["stage"], state["stage_step"], state["seconds"]
            self.stages[first_stage].alternation.load_state_dict(state["alternation"])
            logger.info("goes on after step %d", state["step"])
        for number in range(first_stage, len(self.stages)):
            seconds = self._train(number, first_step if number == first_stage else 0, seconds)
        return self._finish(seconds)

    def _train(self, number: int, first_step: int, seconds: float) -> float:
        """One stage, from ``first_step``; returns the seconds spent in steps so far."""
        config, stage = self.config, self.stages[number]
        before = sum(earlier.steps for earlier in self.stages[:number])
        batches = Batches(
            len(self.train_data), config.batch, seed=config.seed, first=first_step, last=stage.steps,
            rank=self.accelerator.process_index, processes=self.accelerator.num_processes,
        )  # fmt: skip
        hide = not self.accelerator.is_main_process
        with tqdm(total=stage.steps, initial=first_step, desc=stage.name, unit="step", disable=hide) as progress:
            read = loader(self.train_data, batches, workers=config.workers)
            for step, pictures_and_targets in enumerate(read, start=first_step + 1):
                if pictures_and_targets is None:
                    raise ValueError(f"Of the batch of step {step} no picture could be read.")
                hr, targets = pictures_and_targets
                batch = self._batch(hr, targets, step - 1, stage.steps)
                started = time.perf_counter()
                logs = stage.alternation.step(batch)
                seconds += time.perf_counter() - started
                progress.update()
                last = step == stage.steps
                if step % 50 == 0 or last:
                    values = {name: float(value) for name, value in logs.items()}
                    self.run_directory.log(before + step, values)
                    progress.set_postfix({name.rpartition("/")[2]: f"{value:.3f}" for name, value in values.items()})
                if config.eval_every and (before + step) % config.eval_every == 0 and not hide:
                    results, _ = self._evaluate()
                    self.run_directory.log(before + step, {f"test/{name}": value for name, value in results.items()})
                if step % config.save_every == 0 or (last and number + 1 < len(self.stages)):
                    self._save(number, step, before + step, seconds)
        return seconds

    def _batch(self, hr: Any, targets: Any, step: int, steps: int) -> Batch:
        """What the phases see. All chance in a step comes from the seed and the step."""
        self.recognition.check(targets)
        config, rank = self.config, self.accelerator.process_index
        hr, targets = on_grid(hr, targets, config.scale)
        torch.manual_seed(chance(config.seed, step, rank))  # a detector draws its samples from the global generator
        generator = torch.Generator().manual_seed(chance(config.seed, step))
        # every process draws its part of the coins of the whole batch
        torch.rand(rank * len(hr) * self.cqmix.grid[0] * self.cqmix.grid[1], generator=generator)
        hr, targets = to_device((hr, targets), self.device)
        if isinstance(hr, Tensor):
            hr = hr.to(memory_format=torch.channels_last)
        lr = each(lambda picture: low_resolution(picture, config.scale, blur=config.blur), hr)
        return Batch(hr, lr, targets, step / steps, generator)

    def _stages(self) -> list[Stage]:
        build: dict[str, Callable[[], Phase[Batch]]] = {
            "restorer": lambda: self._phase("restorer", [self.s], self._restorer_terms),
            "recogniser": lambda: self._phase("recogniser", [self.h], self._recogniser_loss),
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
        config, steps = self.config, self.config.steps * self.method.length
        optimizers, schedulers = [], []
        for network in trains:
            optimizer: torch.optim.Optimizer
            if network is self.s:
                warm_up, optimizer = 0, torch.optim.AdamW(network.parameters(), lr=config.s_lr, weight_decay=0)
            elif config.h_optimizer == "adamw":
                warm_up, optimizer = config.h_warm_up, torch.optim.AdamW(network.parameters(), lr=config.h_lr)
            else:
                warm_up = config.h_warm_up
                optimizer = torch.optim.SGD(network.parameters(), lr=config.h_lr, momentum=0.9, weight_decay=1e-4)
            schedulers.append(LambdaLR(optimizer, lambda k, w=warm_up: rate(k, steps, config.restart, w)))  # type: ignore[misc]
            optimizers.append(self.accelerator.prepare(optimizer))
        others = [network for network in (self.s, self.h) if network not in trains]
        # torchvision's detectors give their losses, which S may learn from, in train mode only
        reads_loss = config.task == "detection" and "task" in self.method.restorer_terms and self.h in others
        return Phase(
            name, trains, objective, optimizers, schedulers, frozen=others,
            modes={self.h: "train"} if reads_loss else {}, max_norm=config.max_norm,
        )  # fmt: skip

    def _restorer_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Phase 1 (Eq. 3): the pixels, and what the recogniser sees in them."""
        restored = restore(self.s, batch.lr)
        terms = {"pixel": _pixel(restored, batch.hr)}
        if self._active("tdp", batch) and self.tdp is not None:
            seen = each(Tensor.detach, restored) if self.method.features == "detached" else restored
            terms["tdp"] = self.method.restorer_terms["tdp"] * self.config.tdp_weight * self.tdp(seen, batch.hr)
        if self._active("task", batch):
            loss = self.recognition.loss(bare(self.h), restored, batch.targets)
            terms["task"] = self.method.restorer_terms["task"] * loss
        return terms

    def _recogniser_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Phase 2: the task on what S restores by now, on HR pictures, on mixtures of both."""
        inputs = self.method.recogniser_inputs
        made = {"hr": batch.hr}
        if "bilinear" in inputs:
            made["bilinear"] = bilinear(batch.lr, self.config.scale)
        if "sr" in inputs or "mix" in inputs:
            with torch.no_grad():
                made["sr"] = each(_unit, restore(bare(self.s), batch.lr))
        return {"task": self._task_loss(made, batch)}

    def _joint_terms(self, batch: Batch) -> dict[str, Tensor]:
        """S and H by one loss."""
        restored = restore(self.s, batch.lr)
        terms = {"pixel": _pixel(restored, batch.hr)}
        if self._active("tdp", batch) and self.tdp is not None:
            # unlike TDPLoss, with gradient into H from both sides: the mistake that this ablation is about
            seen, wanted = self.tdp.features(restored), self.tdp.features(batch.hr)
            weights = self.tdp.layer_weights
            distances = [weights.get(name, 1 / len(seen)) * F.l1_loss(seen[name], wanted[name]) for name in seen]
            terms["tdp"] = self.config.tdp_weight * torch.stack(distances).sum()
        terms["task"] = self._task_loss({"hr": batch.hr, "sr": restored}, batch)
        return terms

    def _task_loss(self, made: dict[str, Any], batch: Batch) -> Tensor:
        """The mean task loss over this method's inputs."""
        parts = [
            self.cqmix(made["sr"], batch.hr, generator=batch.chance) if name == "mix" else made[name]
            for name in self.method.recogniser_inputs
        ]
        if self.config.separate:
            return torch.stack([self.recognition.loss(self.h, part, batch.targets) for part in parts]).mean()
        if isinstance(batch.hr, Tensor):
            return self.recognition.loss(self.h, torch.cat(parts), torch.cat([batch.targets] * len(parts)))
        return self.recognition.loss(self.h, [p for part in parts for p in part], list(batch.targets) * len(parts))

    def _active(self, term: str, batch: Batch) -> bool:
        return term in self.method.restorer_terms and batch.progress >= self.method.begins.get(term, 0.0)

    def _tdp(self) -> TDPLoss:
        config = self.config
        if self.method.features == "task":
            if self.judges.fixed_hr is None:
                raise ValueError("`fixed_hr` should be the run directory of an oracle for 'fixed_task', found None.")
            return TDPLoss(self.judges.fixed_hr, config.layers)
        if self.method.features == "foreign":
            if self.judges.foreign is None:
                raise ValueError(
                    "`foreign` should be the run directory of an oracle on other data for 'fixed_foreign', found None."
                )
            return TDPLoss(self.judges.foreign)
        return TDPLoss(FeatureExtractor(self.h, config.layers))

    def _save(self, stage: int, stage_step: int, step: int, seconds: float) -> None:
        alternation, number, done = self.stages[stage].alternation, stage, stage_step
        if stage_step == self.stages[stage].steps and stage + 1 < len(self.stages):
            alternation, number, done = self.stages[stage + 1].alternation, stage + 1, 0
        self.run_directory.save(
            {
                "step": step, "stage": number, "stage_step": done, "seconds": seconds,
                "restorer": bare(self.s).state_dict(), "recogniser": bare(self.h).state_dict(),
                "alternation": alternation.state_dict(),
            }
        )  # fmt: skip

    def _read(self, hr: Any, lr: Any) -> Any:
        """What H reads in the end, as a file would hold it."""
        if self.method.reads == "hr":
            return hr
        if self.method.reads == "bilinear":
            return bilinear(lr, self.config.scale)
        return each(_unit, restore(bare(self.s), lr))

    def _evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        networks = [bare(self.s), bare(self.h)]
        reader = networks[1] if self.method.recogniser_inputs else None
        return evaluate(self.test_data, self.recognition, self.config, self._read, networks, reader, self.judges)

    def _finish(self, seconds: float) -> dict[str, Any]:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return {}
        for name, network in (("restorer", self.s), ("recogniser", self.h)):
            save_model(bare(network), str(self.config.out / f"{name}.safetensors"))
        results, samples = self._evaluate()
        torch.save(samples, self.config.out / "samples.pt")
        rows = [samples["lr"], samples["restored"], samples["hr"]]
        self.run_directory.grid("test", [row[:8] for row in rows])
        done = {**results, "seconds": seconds, "num_classes": len(self.recognition.class_names)}
        self.run_directory.finish(done)
        return done


def restore(network: nn.Module, lr: Any) -> Any:
    """S on a batch, or on a list of pictures, at once where they are of one size."""
    if isinstance(lr, Tensor):
        return network(lr)
    if len({picture.shape for picture in lr}) == 1:
        return list(network(torch.stack(list(lr))))
    return [network(picture[None])[0] for picture in lr]


def bilinear(lr: Any, scale: int) -> Any:
    """LR pictures enlarged without a network."""
    return each(lambda picture: F.interpolate(picture, scale_factor=float(scale), mode="bilinear"), lr)


def rate(step: int, steps: int, restart: float, warm_up: int) -> float:
    """Factor of the learning rate: a cosine to 0, begun anew after the fraction ``restart``; a linear rise first."""
    first = round(restart * steps)
    begun, length = (0, first) if step < first else (first, steps - first)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - begun) / max(1, length)))
    return cosine * min(1.0, (step + 1) / warm_up if warm_up else 1.0)


def _pixel(restored: Any, hr: Any) -> Tensor:
    """L1, each picture of a list counting alike."""
    if isinstance(restored, Tensor):
        return F.l1_loss(restored, hr)
    return torch.stack([F.l1_loss(z, x) for z, x in zip(restored, hr, strict=True)]).mean()


def _unit(picture: Tensor) -> Tensor:
    return picture.clamp(0, 1)


def _file(path: Path | None, name: str) -> Path | None:
    """The file of a run directory, or the file that was named."""
    return path / name if path is not None and path.is_dir() else path


def _plain(config: Config) -> dict[str, Any]:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return {**plain, "contrast": list(config.contrast), "out": config.out.name}


def main() -> None:
    from jsonargparse import ArgumentParser

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file of these options")
    parser.add_class_arguments(Config)
    arguments = parser.parse_args()
    arguments.pop("config", None)
    config = Config(**arguments.as_dict())
    try:
        results = Trainer(config).run()
    except ValueError as error:
        parser.error(str(error))
    for name, value in results.items():
        print(f"{name:15} {value:.3f}")
    print(f"in {config.out}")


if __name__ == "__main__":
    main()
