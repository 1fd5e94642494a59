r"""Train a restoration network with a diffusion prior beside its pixel loss: DiffLoss.

    python -m examples.diffloss.train --out runs/pixel                                          # to compare with
    python -m examples.diffloss.train --out runs/diff --diff.share 0.5 --diff.timesteps '[100,600]'
    python -m examples.diffloss.train --config my.yaml --network file --weights swinir.pth --out runs/swinir
    python -m examples.diffloss.train --evaluate runs/diff --test_size 150 --out runs/diff_large

The loop is ``Recipe.run`` of examples/common/engine/recipe.py; here are networks, losses and evaluation.

Every option of examples/diffloss/config.py may stand in a YAML file (--config) or on the command line, which wins. The
same command resumes a killed run. Several processes: ``python -m torch.distributed.run --nproc_per_node 8 -m ...``.

In the run directory ``best.safetensors`` and ``last.safetensors`` are plain state dicts, which spandrel reads.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from examples.common.data.pairs import check_pair_options, evaluated_whole, pairs_to_test, pairs_to_try, training_pairs
from examples.common.engine import command_line
from examples.common.engine.perceptual import Perception
from examples.common.engine.recipe import Recipe, Stage, as_value_error
from examples.common.engine.schedules import cosine_schedule
from examples.common.networks.restorers import restorer
from examples.common.seeds import seeded
from examples.diffloss.comparisons import AdversarialLoss
from examples.diffloss.config import Config
from examples.diffloss.objectives import objectives_of, terms_of
from restoreloss import Alternation, Phase, Subsampled, WeightedSum, audit
from restoreloss.frozen import unwrap
from restoreloss.restorers.tiling import tiled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Pairs, and a generator for each: what the prior is shown of a pair depends on no other, nor on the process."""

    degraded: Tensor
    clean: Tensor
    step: int
    generators: list[torch.Generator]

    def split(self, parts: int) -> list["Batch"]:
        """The batch as so many parts of one size."""
        generators = iter(self.generators)
        pairs = zip(self.degraded.chunk(parts), self.clean.chunk(parts), strict=True)
        return [
            replace(self, degraded=degraded, clean=clean, generators=[next(generators) for _ in degraded])
            for degraded, clean in pairs
        ]


class Trainer(Recipe[Batch]):
    """One run: networks, phases, evaluation."""

    objectives: WeightedSum
    evaluation_options = ("lpips", "perception")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check(config, self.accelerator.num_processes)
        if self.evaluated is not None:
            config = evaluated_whole(config, self.evaluated[0])
        self.config, self.title = config, f"{config.network}, {', '.join(terms_of(config))}"
        self.diff: Subsampled | None = None
        if self.evaluated is None:
            self.train_data = training_pairs(config, config.degradations)
        self.tests = {name: pairs_to_test(config, name, shifted=False) for name in config.degradations}
        if empty := [name for name, found in self.tests.items() if not found]:
            raise ValueError(f"`pairs` should have test images of {empty[0]!r} that can be read, found none.")
        begins_with = config.weights if config.evaluate is None else config.evaluate / "restorer.safetensors"
        network = restorer(config.network, 1, begins_with, option="network")
        _check_size(network, config.patch, config.network)
        self.adversarial: AdversarialLoss | None = None
        if "adversarial" in terms_of(config):
            self.adversarial = AdversarialLoss(config.adversarial, self.accelerator, self.device)
        if self.evaluated is None:
            self.objectives = objectives_of(config, self.device, self.adversarial)
            self.diff = self.objectives.objectives.get("diff")  # type: ignore[assignment]
        self.net: nn.Module = self.accelerator.prepare(network.to(self.device))
        self.networks = {"restorer": self.net}
        self.average: AveragedModel | None = None
        if config.ema > 0:
            average = get_ema_multi_avg_fn(config.ema)
            # buffers are copied: averages of indices and of counts are rounded
            self.average = AveragedModel(unwrap(self.net), multi_avg_fn=average, use_buffers=False)
            self.networks["average"] = self.average
        if self.adversarial is not None:
            self.networks["discriminator"] = self.adversarial.discriminator
        self.begin(lambda: [Stage("restore", _Steps(self), config.steps)])
        logged = [row["test/psnr"] for row in self.run_directory.metrics() if "test/psnr" in row]
        self.best = max((psnr for psnr in logged if not math.isnan(psnr)), default=-math.inf)

    def batch(self, images: Any, targets: Any, step: int, steps: int) -> Batch:
        """Pairs of the training data, which were degraded when they were read."""
        degraded, clean = images.to(self.device).unbind(1)
        numbers = range(first := self.first_number(step), first + len(degraded))
        generators = [seeded(self.config.seed, 1, number) for number in numbers]
        return Batch(degraded, clean, step, generators)

    def phases(self) -> Alternation[Batch]:
        """The discriminator, where there is one, and the restoration network."""
        config, phases, frozen = self.config, [], []
        if self.adversarial is not None:
            phases.append(self.adversarial.phase(self.net, self._discriminator_terms))
            frozen = [self.adversarial.discriminator]
        optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr)
        schedule = cosine_schedule(optimizer, config.steps, lowest=config.lr_min / config.lr)
        phases.append(
            Phase(
                "restore", [self.net], self._terms, self.accelerator.prepare(optimizer), schedule, frozen=frozen,
                max_norm=config.max_norm,
            )
        )  # fmt: skip
        return Alternation(phases, accelerator=self.accelerator)

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        if self.diff is not None:
            self.diff.calls = batch.step  # so that every k-th step is the same step after a stop
        generator = batch.generators if self.config.diff.randomness == "image" else batch.generators[0]
        return self.objectives.terms(self.net(batch.degraded), batch.clean, generator=generator)

    def _discriminator_terms(self, batch: Batch) -> dict[str, Tensor]:
        assert self.adversarial is not None
        with torch.no_grad():
            restored = self.net(batch.degraded)
        return self.adversarial.of_discriminator(restored, batch.clean)

    @property
    def tested(self) -> nn.Module:
        """The network, or the average of its weights."""
        network: nn.Module = unwrap(self.net) if self.average is None else self.average.module
        return network

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """PSNR and SSIM of each degradation and of all, and what share of the gradient each term has."""
        figures, rows = self._test_figures(self.tests)
        keys = {key.removeprefix(f"{name}_") for name in self.tests for key in figures if key.startswith(f"{name}_")}
        own = {key: [f"{name}_{key}" for name in self.tests] for key in sorted(keys)}
        every = {key: [figures[name] for name in names if name in figures] for key, names in own.items()}
        means = {key: sum(each) / len(each) for key, each in every.items()}
        shown = slice(None, None, max(1, len(rows["hr"]) // 8))
        samples: dict[str, Any] = {kind: torch.cat(images[shown]) for kind, images in rows.items()}
        if self.evaluated is not None:
            return {**means, **figures}, samples
        first = (samples[kind][:4, :, : self.config.patch, : self.config.patch] for kind in ("restored", "hr"))
        report = audit(self.objectives, *(images.to(self.device) for images in first))
        figures |= {f"share/{row.name}": row.share for row in report}
        weights = self.objectives.current_weights()
        figures |= {f"weight/{name}": weights[name] for name in self.objectives.shares}
        return {**means, **figures}, samples

    def try_evaluation(self) -> None:
        """Evaluate one test image of each size."""
        tried: set[Any] = set()
        for name, found in self.tests.items():
            pairs = pairs_to_try(name, found)
            if not pairs:
                raise ValueError(f"`pairs` should have test images of {name!r} that can be read, found none.")
            for pair in pairs:
                if (size := pair[1].shape) in tried:
                    continue
                tried.add(size)
                with as_value_error(f"`network` {self.config.network} should take test images of {tuple(size[2:])}"):
                    self._test_figures({name: [pair]})

    def _test_figures(
        self, tests: Mapping[str, Sequence[tuple[Tensor, Tensor]]]
    ) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        """Figures by "degradation_figure", and images of one size."""
        network = self.tested
        training = network.training
        network.eval()
        perceptual = _lpips(self.device) if self.config.lpips else None
        perception = Perception(self.device) if self.config.perception else None
        figures: dict[str, float] = {}
        rows: dict[str, list[Tensor]] = {"lr": [], "restored": [], "hr": []}
        try:
            for name, found in tests.items():
                values: dict[str, list[float]] = {}
                for degraded, clean in found:
                    degraded, clean = degraded.to(self.device), clean.to(self.device)
                    restored = tiled(network, degraded, tile=self.config.tile or None).clamp(0, 1)
                    for prefix, image in (("", restored), ("degraded_", degraded)):
                        psnr = peak_signal_noise_ratio(image, clean, data_range=1.0)
                        ssim: Any = structural_similarity_index_measure(image, clean, data_range=1.0)
                        values.setdefault(f"{prefix}psnr", []).append(float(psnr))
                        values.setdefault(f"{prefix}ssim", []).append(float(ssim))
                    for key, value in {} if perception is None else perception(restored, clean).items():
                        values.setdefault(key, []).append(value)
                    if perceptual is not None:
                        values.setdefault("lpips", []).append(float(perceptual(restored, clean)))
                    if len(rows["hr"]) < 64 and all(image.shape[2:] == clean.shape[2:] for image in rows["hr"]):
                        for kind, image in zip(rows, (degraded, restored, clean), strict=True):
                            rows[kind].append(image.cpu())
                figures |= {f"{name}_{key}": sum(each) / len(each) for key, each in values.items()}
        finally:
            network.train(training)
        return figures, rows

    def saved(self) -> None:
        """The weights of the checkpoint, as a plain state dict."""
        self.run_directory.save_weights("last", self.tested)

    def keep(self, step: int, figures: Mapping[str, float], samples: Mapping[str, Any]) -> None:
        """The network of the best PSNR, and how its images look."""
        self.run_directory.grid("test", [samples[name] for name in ("lr", "restored", "hr")], step=step)
        if figures["psnr"] > self.best:
            self.best = figures["psnr"]
            self.run_directory.save_weights("best", self.tested)


class _Steps:
    """Steps of all phases in parts of a batch, and of the average; their state has the norms behind the shares."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.alternation = trainer, trainer.phases()

    def step(self, batch: Batch) -> dict[str, Tensor]:
        logs = self.alternation.step(*batch.split(self.trainer.config.accumulate))
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(unwrap(self.trainer.net))
        return logs

    def state_dict(self) -> dict[str, Any]:
        norms = self.trainer.objectives.norms
        if norms is None:
            return self.alternation.state_dict()
        norms.take_in()
        return {**self.alternation.state_dict(), "norms": norms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        norms = self.trainer.objectives.norms
        if norms is not None:
            if "norms" not in state:
                raise ValueError("The checkpoint of a run with shares should hold their norms, found none: begin anew.")
            norms.load_state_dict(state["norms"])
        self.alternation.load_state_dict({name: value for name, value in state.items() if name != "norms"})


def _check(config: Config, processes: int) -> None:
    """Raise ``ValueError`` for options that are out of range, or do not go together."""
    check_pair_options(config, own_names=config.evaluate is not None)
    if config.shifted_pairs:
        raise ValueError(f"`shifted_pairs` should be left out: it is for DTP, found {config.shifted_pairs}.")
    if config.accumulate < 1 or config.batch % (config.accumulate * processes):
        raise ValueError(
            f"`batch` should be a multiple of `accumulate` {config.accumulate} on each of {processes} processes, "
            f"found {config.batch}."
        )
    if config.lr <= 0:
        raise ValueError(f"`lr` should be above 0, found {config.lr}.")
    if isinstance(config.diff.crop, int) and config.diff.crop > config.patch:
        raise ValueError(f"`diff.crop` should be at most `patch` {config.patch}, found {config.diff.crop}.")
    if not 0 <= config.ema < 1:
        raise ValueError(f"`ema` should be a decay from 0 to below 1, found {config.ema}.")


@torch.no_grad()
def _check_size(network: nn.Module, patch: int, name: str) -> None:
    """Raise ``ValueError`` unless a network maps color images to color images of the same size."""
    training = network.training
    network.eval()
    try:
        found: Any = tuple(network(torch.zeros(2, 3, patch, patch)).shape)
    except Exception as error:  # of channels or sizes that it cannot read
        found = error
    network.train(training)
    if found != (2, 3, patch, patch):
        raise ValueError(f"`network` {name} should map (2, 3, {patch}, {patch}) to the same shape, found {found}.")


def _lpips(device: torch.device) -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
    except OSError as error:  # no network to download AlexNet from
        logger.warning("LPIPS is left out: its weights cannot be had (%s)", error)
        return None


def main() -> None:
    command_line.run(Config, lambda config: Trainer(config).run(), __doc__)


if __name__ == "__main__":
    main()
