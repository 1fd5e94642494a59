"""Fine-tuning of DTP: the pre-trained network learns to restore, in one stage or one for each degradation (TIT)."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from examples.common.data.pairs import pairs_to_test, pairs_to_try, training_pairs
from examples.common.engine.perceptual import lite0_distance
from examples.common.engine.recipe import Stage, as_value_error
from examples.common.engine.run_directory import finished_run
from examples.common.networks.weights import load_weights
from examples.common.seeds import derive_seed, seeded
from examples.dtp.config import PAPER, Config
from examples.dtp.gef import GEF, Batch
from examples.dtp.generation import GenerativeRecipe, Key, Noisy
from examples.dtp.methods import METHODS
from examples.dtp.networks import add_experts, timed_network
from examples.dtp.testing import figures as figures_of
from examples.dtp.testing import over_flips
from restoreloss import TimestepMatch, match_timestep, order_by_timestep
from restoreloss.frozen import unwrap
from restoreloss.restorers.tiling import tiled
from restoreloss.training.matching import plot_matches

logger = logging.getLogger(__name__)

_LAST = math.sqrt(1 - 0.005**2)
"""sigma_T / sigma_max of :meth:`~restoreloss.NoiseLevels.ir_sde`."""


class FineTuning(GenerativeRecipe[Batch]):
    """One run of fine-tuning."""

    evaluation_options = ("clean", "flips", "lite0")

    def __init__(self, config: Config) -> None:
        self.method = METHODS[config.method]
        if config.precision == "fp16" and (self.method.replay or self.method.penalty):
            raise ValueError("`precision` should be 'no' or 'bf16' where gradients are added to, found 'fp16'.")
        if config.aggregator and config.method != "project":
            raise ValueError(f"`aggregator` should be left out for {config.method!r}: it is for 'project'.")
        super().__init__(config)
        config, processes = self.config, self.accelerator.num_processes
        if self.method.conflict == "orthogonality" and config.batch < 2 * processes:
            raise ValueError(
                f"`batch` should be at least 2 for each process for {config.method}, found {config.batch}."
            )
        if self.method.penalty and config.importance_samples < processes:
            raise ValueError(f"`importance_samples` should be at least {processes}, found {config.importance_samples}.")
        timed = timed_network(config.network, num_timesteps=config.num_timesteps, time_layers=config.time_layers).to(
            self.device
        )
        if self.method.pretrained and self.evaluated is None:
            self._load_pretrained(timed)
        self.matches: dict[str, TimestepMatch] = {}
        self.t_star = self._timesteps(timed)
        known = {id(parameter) for parameter in timed.parameters()}
        if config.moe:
            routed = sorted(set(self._all_timesteps().values()))
            add_experts(timed, config.experts, form=config.experts_form, timesteps=routed)
        self.new = [name for name, parameter in timed.named_parameters() if id(parameter) not in known]
        self.net = self.accelerator.prepare(timed)
        self.networks = {"network": self.net}
        self.turns = turns(self.t_star, config.order, config.seed)
        self.begin(self._stages)
        if self.main:
            self._say_timesteps()

    def _say_timesteps(self) -> None:
        """The t* that are used, and where they come from: timesteps.json, the log, and the curves of those matched."""
        text: dict[str, dict[str, Any]] = {}
        for name, t in self.t_star.items():
            match = self.matches.get(name)
            found = {} if match is None else {"best": match.best, "gain": match.gain, "degenerate": match.degenerate}
            of = self._source(name)
            text[name] = {"used": t, "from": of, **found}
            logger.info("%s: t* = %d of %d (%s)", name, t, self.config.num_timesteps, of)
        if self.evaluated is None and not (self.config.out / "timesteps.json").exists():
            (self.config.out / "timesteps.json").write_text(json.dumps(text, indent=1), encoding="utf-8")
        if self.matches:
            plot_matches(self.matches, self.config.out / "timesteps.png")

    def _source(self, name: str) -> str:
        """Where the t* of a degradation comes from."""
        if self.evaluated is not None:
            return "of the run"
        match, wanted = self.matches.get(name), self.config.timesteps
        if wanted == "matched" and (match is None or match.degenerate):
            return "paper" if name in PAPER else "first" if match is None else wanted
        return wanted

    def _all_timesteps(self) -> dict[str, int]:
        """The t* that the run was trained with; of an evaluation those of the run that is evaluated."""
        if self.evaluated is None:
            return self.t_star
        return {key: int(t) for key, t in self.evaluated[1].items() if key.startswith("t_")}

    def _stages(self) -> list[Stage[Batch]]:
        """A stage for each turn, and as many steps for each order."""
        config = self.config
        self.data: list[Any] = [training_pairs(config, names) for names in self.turns]
        self.train_data = self.data[0]
        steps = config.steps * (len(config.degradations) if config.order == "joint" else 1)
        return [
            Stage(" + ".join(names), GEF(self, names, steps, last=names is self.turns[-1]), steps)
            for names in self.turns
        ]

    def sources(self) -> list[Any]:
        """The data of all stages."""
        return self.data

    def read(self, first: int, last: int, stage: int = 0) -> Iterator[Any]:
        """The pairs of a stage's degradations."""
        return self.load(self.data[stage], first, last)

    def batch(self, images: Any, targets: Any, step: int, steps: int) -> Batch:
        """Pairs, their timesteps, and the images of the step that generation is trained on."""
        numbers = torch.tensor([self.t_star[name] for name in self.data[self.stage].class_names])
        degraded, clean = images.unbind(dim=1)
        keys = self._replayed(step)
        replay = None if not keys else self._replay(keys, degraded, clean)
        return Batch(degraded.to(self.device), clean.to(self.device), numbers[targets].to(self.device), replay)

    def _replayed(self, step: int) -> list[Key]:
        """The keys of the generative images of a step: few, and in so many steps none that their share is right."""
        if not self.method.replay:
            return []
        config, processes = self.config, self.accelerator.num_processes
        wanted = config.replay_share * config.batch / processes
        count = max(2 if self.method.conflict == "orthogonality" else 1, math.ceil(wanted))
        chosen = torch.rand((), generator=seeded(config.seed, 9, step))
        if float(chosen) >= wanted / count:
            return []
        return [(1, step, self.accelerator.process_index * count + k) for k in range(count)]

    def _replay(self, keys: list[Key], degraded: Tensor, clean: Tensor) -> Noisy:
        """Noisy images of the pre-training pool; or, with the degraded image y as the mean, of the pairs of the batch.

        There x_t = y + (x - y) exp(-Theta_t Delta) + sigma_t epsilon: the noise holds a part of y - x as well.
        """
        if not self.method.degraded_mean:
            return self.noisy(self.pool(keys), keys)
        noisy = self.noisy(clean[: len(keys)], keys[: len(clean)])
        sigma = self.levels.sigma.double()
        left = (1 - (sigma / sigma[-1] * _LAST).square()).sqrt()[noisy.t].view(-1, 1, 1, 1)
        away = (degraded[: len(noisy.t)].to(noisy.clean) - noisy.clean) / sigma[noisy.t].view(-1, 1, 1, 1)
        return Noisy(noisy.clean, (noisy.noise + (1 - left) * away).float(), noisy.t)

    def replay_weight(self, replay: Noisy) -> float:
        """The weight of the mean over these images: each counts as one of the batch."""
        count = len(replay.clean) * self.accelerator.num_processes
        return float(self.config.replay_weight * count / self.config.batch)

    def pool(self, keys: Sequence[Key]) -> Tensor:
        """Clean images of the pre-training pool, which the keys decide."""
        found: list[Tensor] = []
        assert self.clean is not None
        for key in keys:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.config.seed, 5, *key))
                tries = (self.clean[int(torch.randint(len(self.clean), ()))] for _ in range(20))
                sample = next((sample for sample in tries if sample is not None), None)
            if sample is None:
                raise ValueError("Of the clean images none could be read.")
            found.append(sample[0])
        return torch.stack(found)

    def _load_pretrained(self, timed: nn.Module) -> None:
        """The pre-trained weights."""
        config, run = self.config, self.config.pretrained
        if run is None:
            raise ValueError("`pretrained` should be a finished run of --method pretrain, found None.")
        before, _ = finished_run(run, "examples.dtp.train", "network.safetensors", option="pretrained")
        for name, wanted in (
            ("method", "pretrain"), ("network", config.network), ("num_timesteps", config.num_timesteps),
        ):  # fmt: skip
            if before[name] != wanted:
                raise ValueError(f"`pretrained` should be a run of {name} {wanted!r}, found {before[name]!r} in {run}.")
        load_weights(timed, run / "network.safetensors")

    def _timesteps(self, network: nn.Module) -> dict[str, int]:
        """t* of every degradation, with the pre-trained network where they are matched."""
        config = self.config
        if self.evaluated is not None:
            known = {key.removeprefix("t_"): t for key, t in self._all_timesteps().items()}
            if unknown := [name for name in config.degradations if name not in known]:
                raise ValueError(f"`degradations` should be of {', '.join(known)}, found {unknown[0]!r}.")
            return {name: known[name] for name in config.degradations}
        if config.timesteps == "first":
            return dict.fromkeys(config.degradations, 1)
        if config.timesteps == "paper":
            return {name: self._of_the_table(name) for name in config.degradations}
        if not self.method.pretrained:  # a network that has learned nothing matches nothing
            return {name: self._of_the_table(name) if name in PAPER else 1 for name in config.degradations}
        for name in config.degradations:
            data, found = training_pairs(config, [name]), []
            for index in range(min(32, len(data))):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(derive_seed(config.seed, 6, index))
                    sample = data[index]
                if sample is not None:
                    found.append(sample[0])
            if not found:
                raise ValueError(f"Of the first images of {name!r} none could be read.")
            degraded, clean = torch.stack(found).to(self.device).unbind(dim=1)
            self.matches[name] = match_timestep(network, self.levels, degraded, clean)
        return {
            name: self._of_the_table(name) if match.degenerate and name in PAPER else match.best
            for name, match in self.matches.items()
        }

    def _of_the_table(self, name: str) -> int:
        """t* of the authors' table."""
        if name not in PAPER:
            raise ValueError(f"`timesteps` should be 'matched' or 'first' for {name!r}, which is not in the table.")
        return max(1, round(PAPER[name] * self.config.num_timesteps))

    def restore(self, degraded: Tensor, name: str) -> Tensor:
        """Restored images in [0, 1]."""
        network, t = unwrap(self.net), self.t_star[name]

        def whole(image: Tensor) -> Tensor:
            found: Tensor = over_flips(lambda x: network(x, t), image) if self.config.flips else network(image, t)
            return found

        return tiled(whole, degraded, tile=self.config.tile or None).clamp(0, 1)

    def _tests(self) -> Iterator[tuple[str, bool, Tensor, Tensor]]:
        """Degradation, whether the data are others than in training, degraded and clean test images."""
        for name in self.config.degradations:
            for shifted in (False, True):
                for degraded, clean in pairs_to_test(self.config, name, shifted=shifted):
                    yield name, shifted, degraded.to(self.device), clean.to(self.device)

    def try_evaluation(self) -> None:
        """Evaluate one test image of each size."""
        config, network, sizes = self.config, unwrap(self.net).eval(), set()
        for name in config.degradations:
            for option, shifted in (("pairs", False), ("shifted_pairs", True)):
                found = pairs_to_try(name, pairs_to_test(config, name, shifted=shifted))
                if not found and not (shifted and name not in config.shifted_pairs):
                    raise ValueError(f"`{option}` should hold test images of {name!r} that can be read, found none.")
                for degraded, clean in found:
                    if clean.shape not in sizes:
                        sizes.add(clean.shape)
                        with as_value_error(
                            f"`network` {config.network} should take test images of {tuple(clean.shape[2:])}"
                        ):
                            figures_of(self.restore(degraded.to(self.device), name), clean.to(self.device))
        self.try_generation()
        network.train()

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """PSNR and SSIM of each degradation, as in training and shifted; the generative loss on held-out images."""
        config, network = self.config, unwrap(self.net).eval()
        distance = lite0_distance(self.device) if config.lite0 else None
        figures: dict[str, list[float]] = {}
        rows: dict[str, list[Tensor]] = {"lr": [], "restored": [], "hr": []}
        for name, shifted, degraded, clean in self._tests():
            restored, start = self.restore(degraded, name), "shifted_" if shifted else ""
            psnr, ssim = figures_of(restored, clean)
            before = float(peak_signal_noise_ratio(degraded, clean, data_range=1.0))
            found = {"psnr": psnr, "ssim": ssim, "degraded_psnr": before}
            if distance is not None:
                found["lite0"] = float(distance(restored, clean))
            for key, value in found.items():
                figures.setdefault(start + key, []).append(value)
            if len(config.degradations) > 1 and not shifted:
                figures.setdefault(f"psnr_{name}", []).append(psnr)
            if len(rows["lr"]) < 8 and degraded.shape[2] <= 256:
                for key, image in (("lr", degraded), ("restored", restored), ("hr", clean)):
                    rows[key].append(image.cpu())
        means = {key: math.fsum(values) / len(values) for key, values in figures.items()}
        means |= {"generative": self.generative_figure()}
        means |= {f"t_{name}": float(t) for name, t in self.t_star.items()}
        network.train()
        same = [k for k, image in enumerate(rows["hr"]) if image.shape == rows["hr"][0].shape]
        return means, {key: torch.cat([row[k] for k in same]) for key, row in rows.items() if same}


def turns(t_star: Mapping[str, int], order: str, seed: int) -> list[list[str]]:
    """The degradations of each stage: all at once, or the first, the first two, ... (TIT)."""
    names = order_by_timestep(t_star)
    if order == "joint":
        return [names]
    if order == "descending":
        names.reverse()
    if order == "random":
        generator = seeded(seed, 8)
        names = [names[k] for k in torch.randperm(len(names), generator=generator)]
    return [names[: k + 1] for k in range(len(names))]
