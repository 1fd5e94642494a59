r"""How does a restoration network learn to generate, then to restore, and keep what it learned first? DTP.

    python -m examples.dtp.train --method pretrain --out runs/pretrained                        # TMGP
    python -m examples.dtp.train --method gef --pretrained runs/pretrained --out runs/gef       # GEF, setting A
    python -m examples.dtp.train --method gef --pretrained runs/pretrained --out runs/all \
        --degradations '[noisy,rainy,snowy,hazy]' --moe true                                    # TIT + MoE, setting B

Every option of examples/dtp/config.py may stand in a YAML file (--config) or on the command line, which wins. The same
command resumes a killed run. Several processes: ``python -m torch.distributed.run --nproc_per_node 8 -m ...``.
"""

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped, unused-ignore]
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from examples.common.data.degradations import DEGRADATIONS
from examples.common.data.pairs import test_pairs, training_pairs
from examples.common.engine import command_line
from examples.common.engine.batches import chance
from examples.common.engine.recipe import Recipe, Stage, naming
from examples.dtp.config import PAPER, Config
from examples.dtp.data import clean_pictures, held_out_pictures
from examples.dtp.methods import METHODS, Method, aggregator
from examples.dtp.networks import timed_network
from restoreloss import (
    DenoisingLoss,
    GradientOrthogonality,
    NoiseLevels,
    ParameterImportance,
    TimestepMatch,
    match_timestep,
    order_by_timestep,
)  # fmt: skip
from restoreloss.blocks.time_moe import TimeMoE
from restoreloss.frozen import unwrap
from restoreloss.integrations.torchjd import aggregate
from restoreloss.regularizers.layer_decay import add_gradients, execution_order, layer_of, layer_weights, shallow
from restoreloss.training.matching import plot_matches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Noisy:
    """Clean pictures and the noise to be added to them, all decided by the seed."""

    clean: Tensor
    noise: Tensor
    t: Tensor


@dataclass(frozen=True)
class Batch:
    """Pairs to restore, and pictures to generate from."""

    degraded: Tensor
    clean: Tensor
    t: Tensor
    """t* of each pair."""
    replay: Noisy | None


class Trainer(Recipe[Batch]):
    """One run: pre-training, or fine-tuning in one stage or several."""

    def __init__(self, config: Config) -> None:
        self.method = METHODS.get(config.method, Method(pretrained=False))
        if config.precision == "fp16" and (self.method.replay or self.method.penalty):
            raise ValueError("`precision` should be 'no' or 'bf16' where gradients are added to, found 'fp16'.")
        if config.aggregator and config.method != "project":
            raise ValueError(f"`aggregator` should be left out for {config.method!r}: it is for 'project'.")
        super().__init__(config)
        if config.lr == 0:
            raise ValueError("`lr` should be above 0, found 0.")
        self.config, self.title = config, config.method
        unknown = [name for name in config.degradations if name not in DEGRADATIONS]
        if unknown or not config.degradations:
            raise ValueError(f"`degradations` should be of {', '.join(DEGRADATIONS)}, found {config.degradations}.")
        self.generates = config.method == "pretrain"
        processes = self.accelerator.num_processes
        if self.method.conflict == "orthogonality" and config.batch < 2 * processes:
            raise ValueError(
                f"`batch` should be at least 2 for each process for {config.method}, found {config.batch}."
            )
        if self.method.penalty and config.importance_samples < processes:
            raise ValueError(f"`importance_samples` should be at least {processes}, found {config.importance_samples}.")
        # the network returns the picture, and its residual is what is left
        self.levels = NoiseLevels.ir_sde(config.num_timesteps, prediction_type="sample").to(self.device)
        timed = timed_network(
            config.network, num_timesteps=config.num_timesteps, moe=config.moe and not self.generates,
            experts=config.experts,
        )  # fmt: skip
        self.new: list[str] = self._load(timed) if self.method.pretrained else []
        self.net: nn.Module = self.accelerator.prepare(timed)
        self.networks = {"network": self.net}
        self.matches: dict[str, TimestepMatch] = {}
        self.t_star = self._timesteps()
        if self.generates:
            self.turns = [list(config.degradations)]
        else:
            self.turns = turns(self.t_star, config.order, config.seed)
        self.clean = clean_pictures(config)
        self.data: list[Any] = (
            [self.clean] if self.generates else [training_pairs(config, names) for names in self.turns]
        )
        self.train_data = self.data[0]
        # as many steps for each order
        steps = config.steps * (len(config.degradations) if config.order == "joint" and not self.generates else 1)
        kind = Pretraining if self.generates else FineTuning
        self.begin([Stage(" + ".join(names), kind(self, names, steps), steps) for names in self.turns])
        if self.main and self.matches:
            text = {
                name: {"best": m.best, "gain": m.gain, "degenerate": m.degenerate} for name, m in self.matches.items()
            }
            (config.out / "timesteps.json").write_text(json.dumps(text, indent=1), encoding="utf-8")
            plot_matches(self.matches, config.out / "timesteps.png")

    def restore(self, degraded: Tensor, name: str) -> Tensor:
        """Restored pictures in [0, 1]."""
        restored: Tensor = unwrap(self.net)(degraded, self.t_star[name])
        return restored.clamp(0, 1)

    def sources(self) -> list[Any]:
        """Of all stages."""
        return self.data

    def read(self, first: int, last: int, stage: int = 0) -> Iterator[Any]:
        """The pairs of a stage's degradations."""
        return self.load(self.data[stage], first, last)

    def batch(self, pictures: Any, targets: Any, step: int, steps: int) -> Batch:
        """Pairs, their timesteps, and the pictures of the step that generation is trained on."""
        if self.generates:
            places = [(step, self.first_number(step) + place) for place in range(len(pictures))]
            noisy = self.noisy(pictures, places)
            return Batch(noisy.clean, noisy.clean, noisy.t, noisy)
        numbers = torch.tensor([self.t_star[name] for name in self.data[self.stage].class_names])
        degraded, clean = pictures.unbind(dim=1)
        places = self._replayed(step)
        replay = self.noisy(self._pool(places), places) if places else None
        return Batch(degraded.to(self.device), clean.to(self.device), numbers[targets].to(self.device), replay)

    def _replayed(self, step: int) -> list[Any]:
        """Which generative pictures a step has: few, and in so many steps none that their share is right."""
        if not self.method.replay:
            return []
        config, processes = self.config, self.accelerator.num_processes
        wanted = config.replay_share * config.batch / processes
        count = max(2 if self.method.conflict == "orthogonality" else 1, math.ceil(wanted))
        chosen = torch.rand((), generator=torch.Generator().manual_seed(chance(config.seed, 9, step)))
        if float(chosen) >= wanted / count:
            return []
        return [(1, step, self.accelerator.process_index * count + k) for k in range(count)]

    def replay_weight(self, replay: Noisy) -> float:
        """Of the mean over these pictures: each counts as one of the batch."""
        count = len(replay.clean) * self.accelerator.num_processes
        return float(self.config.replay_weight * count / self.config.batch)

    def noisy(self, clean: Tensor, places: list[Any]) -> Noisy:
        """Pictures with noise of their own, which the places decide."""
        noise, t = [], []
        for place in places:
            generator = torch.Generator().manual_seed(chance(self.config.seed, 4, *place))
            t.append(int(torch.randint(1, self.levels.num_timesteps, (), generator=generator)))
            noise.append(torch.randn(clean.shape[1:], generator=generator))
        return Noisy(clean.to(self.device), torch.stack(noise).to(self.device), torch.tensor(t, device=self.device))

    def _pool(self, places: list[Any]) -> Tensor:
        """Clean pictures of the pre-training pool."""
        found: list[Tensor] = []
        for place in places:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(chance(self.config.seed, 5, *place))
                tries = (self.clean[int(torch.randint(len(self.clean), ()))] for _ in range(20))
                sample = next((sample for sample in tries if sample is not None), None)
            if sample is None:
                raise ValueError("Of the clean pictures none could be read.")
            found.append(sample[0])
        return torch.stack(found)

    def generative_loss(self, network: nn.Module, noisy: Noisy) -> Tensor:
        """Eq. (11) on given noise."""
        loss: Tensor = DenoisingLoss(network, self.levels)(noisy.clean, timestep=noisy.t, noise=noisy.noise)
        return loss

    def _load(self, timed: nn.Module) -> list[str]:
        """The pre-trained weights. Adapters, which it lacks, keep their own: the names of these are returned."""
        config, run = self.config, self.config.pretrained
        if run is None or not (run / "network.safetensors").is_file():
            raise ValueError(f"`pretrained` should be a finished run of --method pretrain, found {run}.")
        before = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        for name, wanted in (
            ("method", "pretrain"), ("network", config.network), ("num_timesteps", config.num_timesteps),
        ):  # fmt: skip
            if before[name] != wanted:
                raise ValueError(f"`pretrained` should be a run of {name} {wanted!r}, found {before[name]!r} in {run}.")
        found = timed.load_state_dict(_renamed(load_file(run / "network.safetensors"), timed), strict=False)
        return list(found.missing_keys)

    def _timesteps(self) -> dict[str, int]:
        """t* of every degradation."""
        config, last = self.config, self.config.num_timesteps
        if self.generates or config.timesteps == "first":
            return dict.fromkeys(config.degradations, 1)
        if config.timesteps == "paper" or not self.method.pretrained:
            return {name: max(1, round(PAPER[name] * last)) for name in config.degradations}
        for name in config.degradations:
            data, found = training_pairs(config, [name]), []
            for index in range(min(32, len(data))):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(chance(config.seed, 6, index))
                    sample = data[index]
                if sample is not None:
                    found.append(sample[0])
            if not found:
                raise ValueError(f"Of the first pictures of {name!r} none could be read.")
            degraded, clean = torch.stack(found).to(self.device).unbind(dim=1)
            self.matches[name] = match_timestep(unwrap(self.net), self.levels, degraded, clean)
        return {
            name: max(1, round(PAPER[name] * last)) if match.degenerate else match.best
            for name, match in self.matches.items()
        }

    def _tests(self) -> Iterator[tuple[str, bool, Tensor, Tensor]]:
        """Degradation, whether the data are others than in training, degraded and clean test images."""
        for name in () if self.generates else self.config.degradations:
            for shifted in (False, True):
                for degraded, clean in test_pairs(self.config, name, shifted=shifted):
                    yield name, shifted, degraded, clean

    def try_evaluation(self) -> None:
        """Of one test image of each size."""
        config, network, sizes = self.config, unwrap(self.net).eval(), set()
        read: set[tuple[str, bool]] = set()
        for name, shifted, degraded, clean in self._tests():
            read.add((name, shifted))
            if clean.shape not in sizes:
                sizes.add(clean.shape)
                with naming(f"`network` {config.network} should take test images of {tuple(clean.shape[2:])}"):
                    _figures(self.restore(degraded.to(self.device), name), clean.to(self.device))
        for name in () if self.generates else config.degradations:
            for option, shifted in (("places", False), ("shifted_places", True)):
                if (name, shifted) not in read and not (shifted and name not in config.shifted_places):
                    raise ValueError(f"`{option}` should hold test images of {name!r} that can be read, found none.")
        clean_images = held_out_pictures(config)
        if not clean_images:
            raise ValueError("`clean` should hold test images that can be read, found none.")
        with naming(f"`network` {config.network} should take test images of {tuple(clean_images[0].shape[2:])}"):
            self.generative_loss(network, self.noisy(clean_images[0], [(2, 0)]))
        network.train()

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """PSNR and SSIM of each degradation, as in training and shifted; the generative loss on held-out pictures."""
        config, network = self.config, unwrap(self.net).eval()
        figures: dict[str, list[float]] = {}
        rows: dict[str, list[Tensor]] = {"lr": [], "restored": [], "hr": []}
        for name, shifted, degraded, clean in self._tests():
            y, x = degraded.to(self.device), clean.to(self.device)
            restored, start = self.restore(y, name), "shifted_" if shifted else ""
            psnr, ssim = _figures(restored, x)
            before = float(peak_signal_noise_ratio(y, x, data_range=1.0))
            for key, value in (("psnr", psnr), ("ssim", ssim), ("degraded_psnr", before)):
                figures.setdefault(start + key, []).append(value)
            if len(config.degradations) > 1 and not shifted:
                figures.setdefault(f"psnr_{name}", []).append(psnr)
            if len(rows["lr"]) < 8 and degraded.shape[2] <= 256:
                for key, picture in (("lr", y), ("restored", restored), ("hr", x)):
                    rows[key].append(picture.cpu())
        losses = []
        for place, clean in enumerate(held_out_pictures(config)):
            losses.append(float(self.generative_loss(network, self.noisy(clean, [(2, place)]))))
        network.train()
        means = {key: math.fsum(values) / len(values) for key, values in figures.items()}
        means |= {"generative": 255 * math.fsum(losses) / len(losses)}
        means |= {f"t_{name}": float(t) for name, t in self.t_star.items() if not self.generates}
        same = [k for k, picture in enumerate(rows["hr"]) if picture.shape == rows["hr"][0].shape]
        return means, {key: torch.cat([row[k] for k in same]) for key, row in rows.items() if same}


def _figures(restored: Tensor, clean: Tensor) -> tuple[float, float]:
    """PSNR and SSIM."""
    ssim: Any = structural_similarity_index_measure(restored, clean, data_range=1.0)
    return float(peak_signal_noise_ratio(restored, clean, data_range=1.0)), float(ssim)


class _Steps(ABC):
    """Steps of one stage with an optimiser of their own."""

    def __init__(self, trainer: Trainer, names: list[str], steps: int) -> None:
        self.trainer, self.names, config = trainer, names, trainer.config
        self.optimizer = trainer.accelerator.prepare(torch.optim.Adam(trainer.net.parameters(), lr=config.lr))
        low = config.lr_min / config.lr
        self.scheduler = LambdaLR(
            getattr(self.optimizer, "optimizer", self.optimizer),
            lambda k: low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, k / steps))),
        )

    @abstractmethod
    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update; what was learned from, as scalars."""

    def _update(self) -> None:
        trainer = self.trainer
        if trainer.config.max_norm is not None:
            trainer.accelerator.clip_grad_norm_(trainer.net.parameters(), trainer.config.max_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Of optimiser and schedule."""
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


class Pretraining(_Steps):
    """TMGP (Algorithm 1): take the noise out of clean pictures."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. (11)."""
        assert batch.replay is not None
        trainer = self.trainer
        with trainer.accelerator.autocast():
            loss = trainer.generative_loss(trainer.net, batch.replay)
        trainer.accelerator.backward(loss)
        self._update()
        return {"generative": loss.detach()}


class FineTuning(_Steps):
    """GEF (Algorithm 3): restore, and do not forget. Of several stages each holds on to where it began."""

    def __init__(self, trainer: Trainer, names: list[str], steps: int) -> None:
        super().__init__(trainer, names, steps)
        self.importance: ParameterImportance | None = None
        self.begun = False
        self.count, self.steps = 0, steps
        config, method, network = trainer.config, trainer.method, unwrap(trainer.net)
        image = torch.zeros(1, 3, config.patch, config.patch, device=trainer.device)
        order = execution_order(network, image, 1)
        t = sum(trainer.t_star[name] for name in names) / len(names) * 50 / config.num_timesteps  # a is for T = 50
        rate = config.decay if method.decay else 0.0
        self.weights = layer_weights(order, t, rate=rate)
        self.shallow_weights = layer_weights(order, t, rate=rate, share=config.shallow)
        self.shallow = shallow(network, order, config.shallow)
        known = {id(p) for p in self.shallow}
        self.deep = [p for p in network.parameters() if id(p) not in known]
        self.orthogonality = GradientOrthogonality(self.shallow)
        self.aggregator = aggregator(config.aggregator).to(trainer.device) if config.aggregator else None
        names_of = {id(p): name for name, p in network.named_parameters()}
        self.factors = [self.weights[layer_of(names_of[id(p)], order) or ""] for p in self.shallow]  # w_l

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Eqs. (12), (22)."""
        if not self.begun:
            self._begin()
        trainer, method, config = self.trainer, self.trainer.method, self.trainer.config
        accelerator = trainer.accelerator
        terms: dict[str, Tensor] = {}
        if method.conflict in ("project", "full") and batch.replay is not None:
            # gradients are averaged by the projection, and the network is the one inside DDP
            network = unwrap(trainer.net)
            with accelerator.autocast():
                terms["restoration"] = self._restoration(network, batch) + self._balance()
                weight = trainer.replay_weight(batch.replay)
                terms["generative"] = weight * trainer.generative_loss(network, batch.replay)
            if self.aggregator is None:
                terms["cosine"] = self.orthogonality.project(
                    terms["generative"], terms["restoration"], others=self.deep, weight=self.factors,
                    policy="full" if method.conflict == "full" else "conflict",
                )  # fmt: skip
            else:
                both = {name: terms[name] for name in ("generative", "restoration")}
                weights = aggregate(both, self.shallow, self.aggregator, own={"restoration": self.deep})
                terms |= {f"weight_{name}": weight for name, weight in weights.items()}
        else:
            with accelerator.autocast():
                terms["restoration"] = loss = self._restoration(trainer.net, batch) + self._balance()
            if batch.replay is not None and self._orthogonal():
                with accelerator.autocast():
                    terms["orthogonality"] = config.orthogonality_weight * self._penalty(batch, batch.replay)
                loss = loss + terms["orthogonality"]
            accelerator.backward(loss)
            if batch.replay is not None:
                with accelerator.autocast():
                    weight = trainer.replay_weight(batch.replay)
                    terms["generative"] = weight * trainer.generative_loss(unwrap(trainer.net), batch.replay)
                self._add_shallow(terms["generative"])
        if self.importance is not None:
            with torch.no_grad():
                terms["penalty"] = self.importance()
            self.importance.apply_()
        self._update()
        self.count += 1
        if self.count == self.steps:  # the memory is for the next stage
            self.importance = None
            self.optimizer.state.clear()
        return {name: value.detach() for name, value in terms.items()}

    def _restoration(self, network: nn.Module, batch: Batch) -> Tensor:
        return F.l1_loss(network(batch.degraded, batch.t), batch.clean)

    def _balance(self) -> Tensor | float:
        network: Any = unwrap(self.trainer.net)
        sparse = any(isinstance(module, TimeMoE) and module.top_k is not None for module in network.modules())
        return 0.01 * network.balance_loss() if sparse else 0.0

    def _orthogonal(self) -> bool:
        config = self.trainer.config
        return self.trainer.method.conflict == "orthogonality" and self.count % config.orthogonality_every == 0

    def _penalty(self, batch: Batch, noisy: Noisy) -> Tensor:
        """L_orth of two micro-batches of each objective."""
        network, half = unwrap(self.trainer.net), max(1, len(noisy.clean) // 2)
        parts = [slice(0, half), slice(half, 2 * half)]
        pictures = [Noisy(noisy.clean[p], noisy.noise[p], noisy.t[p]) for p in parts]
        generation = [self.trainer.generative_loss(network, part) for part in pictures]
        restoration = [F.l1_loss(network(batch.degraded[p], batch.t[p]), batch.clean[p]) for p in parts]
        penalty: Tensor = self.orthogonality(generation, restoration)
        return penalty

    def _add_shallow(self, loss: Tensor) -> None:
        """The generative gradient, weighted by depth, averaged over the processes."""
        network = unwrap(self.trainer.net)
        before = {p: None if p.grad is None else p.grad.clone() for p in self.shallow}
        add_gradients(loss, network, self.shallow_weights)
        if self.trainer.accelerator.num_processes > 1:
            for parameter, old in before.items():
                if parameter.grad is not None:
                    added = parameter.grad if old is None else parameter.grad - old
                    added = self.trainer.accelerator.reduce(added, reduction="mean")
                    parameter.grad = added if old is None else old + added

    def _begin(self) -> None:
        """Measure the importance where the stage begins, on pre-training data (Algorithm 6)."""
        self.begun = True
        trainer = self.trainer
        penalty, network = trainer.method.penalty, unwrap(trainer.net)
        if penalty is None:
            return
        # adapters that have learned nothing yet have nothing to hold on to
        new = [network.get_parameter(name) for name in trainer.new] if len(self.names) == len(trainer.turns[0]) else []
        for parameter in new:
            parameter.requires_grad_(False)
        try:
            self.importance = self._unmeasured()
            if penalty != "l2sp":
                self._measure(self.importance)
        finally:
            for parameter in new:
                parameter.requires_grad_(True)

    def _measure(self, importance: ParameterImportance) -> None:
        trainer, config, penalty = self.trainer, self.trainer.config, self.trainer.method.penalty
        processes, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        first, last = (part * config.importance_samples // processes for part in (rank, rank + 1))
        places = [(3, k) for k in range(first, last)]
        noisy = trainer.noisy(trainer._pool(places), places)
        x_t = trainer.levels.add_noise(noisy.clean, noisy.noise, noisy.t)

        def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            seen, t, clean = batch
            output: Tensor = model(seen, t)
            return seen - output if penalty in ("mas", "gn") else F.l1_loss(output, clean)

        generator = torch.Generator().manual_seed(chance(config.seed, 7))
        # the signs of "gn": every process draws its part of those of all pictures
        torch.randint(0, 2, (first, *noisy.clean.shape[1:]), generator=generator)
        importance.accumulate(loss_fn, [(x_t, noisy.t, noisy.clean)], generator=generator)

    def _unmeasured(self) -> ParameterImportance:
        config, penalty = self.trainer.config, self.trainer.method.penalty
        assert penalty is not None
        return ParameterImportance(
            unwrap(self.trainer.net), estimator=penalty, strength=config.penalty_weight, normalize=config.normalize,
            layer_weights=self.weights,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Of optimiser, schedule and importance."""
        measured = None if self.importance is None else self.importance.state_dict()
        return {**super().state_dict(), "importance": measured, "begun": self.begun, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.begun, self.count = state["begun"], state["count"]
        if state["importance"] is not None:
            self.importance = self._unmeasured()
            self.importance.load_state_dict(state["importance"])


def turns(t_star: Mapping[str, int], order: str, seed: int) -> list[list[str]]:
    """The degradations of each stage: all at once, or the first, the first two, ... (TIT)."""
    names = order_by_timestep(t_star)
    if order == "joint":
        return [names]
    if order == "descending":
        names.reverse()
    if order == "random":
        generator = torch.Generator().manual_seed(chance(seed, 8))
        names = [names[k] for k in torch.randperm(len(names), generator=generator)]
    return [names[: k + 1] for k in range(len(names))]


def _renamed(state: dict[str, Tensor], timed: nn.Module) -> dict[str, Tensor]:
    """Where an adapter follows it, the block of a layer is the first of a chain."""
    own = timed.state_dict()
    renamed = {}
    for name, value in state.items():
        if name not in own and name.startswith("blocks."):
            layer, _, rest = name.removeprefix("blocks.").partition(".")
            name = f"blocks.{layer}.steps.0.{rest}"
        renamed[name] = value
    return renamed


def main() -> None:
    command_line.run(Config, lambda config: Trainer(config).run(), __doc__)


if __name__ == "__main__":
    main()
