r"""How is a restoration network trained with a diffusion prior beside its pixel loss?

    python -m examples.diffloss.train --out runs/pixel                                          # to compare with
    python -m examples.diffloss.train --out runs/diff --diff.share 0.5 --diff.timesteps '[100,600]'
    python -m examples.diffloss.train --config my.yaml --network file --weights swinir.pth --out runs/swinir

Every option of examples/diffloss/config.py may stand in a YAML file (--config) or on the command line, which wins. The
same command resumes a killed run. Several processes: ``python -m torch.distributed.run --nproc_per_node 8 -m ...``.

In the run directory ``best.safetensors`` and ``last.safetensors`` are plain state dicts, which spandrel reads.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from examples.common.data.degradations import DEGRADATIONS
from examples.common.data.pairs import test_pairs, training_pairs
from examples.common.engine import command_line
from examples.common.engine.batches import chance
from examples.common.engine.recipe import Recipe, Stage, naming
from examples.common.networks.restorers import load_weights, restorer
from examples.diffloss.config import Config, Diff, Perceptual
from restoreloss import (
    Alternation,
    Denoiser,
    DiffLoss,
    LatentPrior,
    NoiseSchedule,
    Phase,
    Subsampled,
    TDPLoss,
    WeightedSum,
    as_denoiser,
    audit,
    calibrate,
    load_prior,
    small_prior,
)
from restoreloss.frozen import unwrap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Pairs, and the chance of each: what the prior is shown of a pair depends on no other, nor on the process."""

    degraded: Tensor
    clean: Tensor
    step: int
    chance: list[torch.Generator]

    def split(self, parts: int) -> list["Batch"]:
        """As so many batches of one size."""
        chances = iter(self.chance)
        pairs = zip(self.degraded.chunk(parts), self.clean.chunk(parts), strict=True)
        return [
            replace(self, degraded=degraded, clean=clean, chance=[next(chances) for _ in degraded])
            for degraded, clean in pairs
        ]


class Trainer(Recipe[Batch]):
    """One run."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config, self.title = config, f"{config.network}, {', '.join(terms_of(config))}"
        unknown = [name for name in config.degradations if name not in DEGRADATIONS]
        if unknown or not config.degradations:
            raise ValueError(f"`degradations` should be of {', '.join(DEGRADATIONS)}, found {config.degradations}.")
        processes = self.accelerator.num_processes
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
        self.train_data = training_pairs(config, config.degradations)
        self.tests = {name: test_pairs(config, name, shifted=False) for name in config.degradations}
        if empty := [name for name, found in self.tests.items() if not found]:
            raise ValueError(f"`places` should have test pictures of {empty[0]!r} that can be read, found none.")
        network = restorer(config.network, 1, config.weights, option="network")
        _check_size(network, config.patch, config.network)
        self.objectives, self.diff = self._objectives()
        self.net: nn.Module = self.accelerator.prepare(network.to(self.device))
        self.networks = {"restorer": self.net}
        self.average: AveragedModel | None = None
        if config.ema > 0:
            average = get_ema_multi_avg_fn(config.ema)
            # buffers are copied: averages of indices and of counts are rounded
            self.average = AveragedModel(unwrap(self.net), multi_avg_fn=average, use_buffers=False)
            self.networks["average"] = self.average
        self.judge: nn.Module | None = None
        if config.adversarial.weight > 0:
            self.judge = self.accelerator.prepare(Discriminator(config.adversarial.width).to(self.device))
            self.networks["discriminator"] = self.judge
        self.begin([Stage("restore", _Steps(self), config.steps)])
        logged = [row["test/psnr"] for row in self.run_directory.metrics() if "test/psnr" in row]
        self.best = max((psnr for psnr in logged if not math.isnan(psnr)), default=-math.inf)

    def batch(self, pictures: Any, targets: Any, step: int, steps: int) -> Batch:
        """Pairs of the training data, which were degraded when they were read."""
        degraded, clean = pictures.to(self.device).unbind(1)
        numbers = range(first := self.first_number(step), first + len(degraded))
        chances = [torch.Generator().manual_seed(chance(self.config.seed, 1, number)) for number in numbers]
        return Batch(degraded, clean, step, chances)

    def phases(self) -> Alternation[Batch]:
        """The discriminator, where there is one, and the restoration network."""
        config, phases = self.config, []
        judge: list[nn.Module] = []
        if self.judge is not None:
            judge = [self.judge]
            optimizer = torch.optim.Adam(self.judge.parameters(), lr=config.adversarial.lr, betas=(0.5, 0.99))
            phases.append(
                Phase("judge", judge, self._judge_terms, self.accelerator.prepare(optimizer), frozen=[self.net])
            )
        optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr)
        low = config.lr_min / config.lr
        schedule = LambdaLR(
            optimizer, lambda k: low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, k / config.steps)))
        )
        phases.append(
            Phase(
                "restore", [self.net], self._terms, self.accelerator.prepare(optimizer), schedule, frozen=judge,
                max_norm=config.max_norm,
            )
        )  # fmt: skip
        return Alternation(phases, accelerator=self.accelerator)

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        if self.diff is not None:
            self.diff.calls = batch.step  # so that every k-th step is the same step after a stop
        restored = self.net(batch.degraded)
        terms = self.objectives.terms(restored, batch.clean, generator=batch.chance)
        if self.judge is not None:
            terms["adversarial"] = self.config.adversarial.weight * F.softplus(-self.judge(restored)).mean()
        return terms

    def _judge_terms(self, batch: Batch) -> dict[str, Tensor]:
        assert self.judge is not None
        with torch.no_grad():
            restored = self.net(batch.degraded)
        both = self.judge(torch.cat([batch.clean, restored]))  # one pass: DDP likes no more
        clean, restored = both.chunk(2)
        return {"clean": F.softplus(-clean).mean(), "restored": F.softplus(restored).mean()}

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
        every = {key: [figures[f"{name}_{key}"] for name in self.tests] for key in sorted(keys)}
        means = {key: sum(each) / len(each) for key, each in every.items()}
        shown = slice(None, None, max(1, len(rows["hr"]) // 8))
        samples: dict[str, Any] = {kind: torch.cat(pictures[shown]) for kind, pictures in rows.items()}
        first = (samples[kind][:4, :, : self.config.patch, : self.config.patch] for kind in ("restored", "hr"))
        report = audit(self.objectives, *(pictures.to(self.device) for pictures in first))
        return {**means, **figures, **{f"share/{row.name}": row.share for row in report}}, samples

    def try_evaluation(self) -> None:
        """Of one test image of each size."""
        sizes = {clean.shape: name for name, found in self.tests.items() for _, clean in found}
        one = {size: next(pair for pair in self.tests[name] if pair[1].shape == size) for size, name in sizes.items()}
        for size, pair in one.items():
            with naming(f"`network` {self.config.network} should take test images of {tuple(size[2:])}"):
                self._test_figures({sizes[size]: [pair]})

    def _test_figures(
        self, tests: Mapping[str, list[tuple[Tensor, Tensor]]]
    ) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        """Figures by "degradation_figure", and pictures of one size."""
        network = self.tested
        training = network.training
        network.eval()
        perceptual = _lpips(self.device) if self.config.lpips else None
        figures: dict[str, float] = {}
        rows: dict[str, list[Tensor]] = {"lr": [], "restored": [], "hr": []}
        try:
            for name, found in tests.items():
                values: dict[str, list[float]] = {}
                for degraded, clean in found:
                    degraded, clean = degraded.to(self.device), clean.to(self.device)
                    restored = network(degraded).clamp(0, 1)
                    for prefix, picture in (("", restored), ("degraded_", degraded)):
                        psnr = peak_signal_noise_ratio(picture, clean, data_range=1.0)
                        ssim: Any = structural_similarity_index_measure(picture, clean, data_range=1.0)
                        values.setdefault(f"{prefix}psnr", []).append(float(psnr))
                        values.setdefault(f"{prefix}ssim", []).append(float(ssim))
                    if perceptual is not None:
                        values.setdefault("lpips", []).append(float(perceptual(restored, clean)))
                    if all(picture.shape[2:] == clean.shape[2:] for picture in rows["hr"]):
                        for kind, picture in zip(rows, (degraded, restored, clean), strict=True):
                            rows[kind].append(picture.cpu())
                figures |= {f"{name}_{key}": sum(each) / len(each) for key, each in values.items()}
        finally:
            network.train(training)
        return figures, rows

    def saved(self) -> None:
        """The weights of the checkpoint, as a plain state dict."""
        self.run_directory.save_weights("last", self.tested)

    def keep(self, step: int, figures: Mapping[str, float], samples: Mapping[str, Any]) -> None:
        """The network of the best PSNR, and how its pictures look."""
        self.run_directory.grid("test", [samples[name] for name in ("lr", "restored", "hr")], step=step)
        if figures["psnr"] > self.best:
            self.best = figures["psnr"]
            self.run_directory.save_weights("best", self.tested)

    def _objectives(self) -> tuple[WeightedSum, Subsampled | None]:
        config = self.config
        pixel: nn.Module = nn.L1Loss() if config.pixel.distance == "l1" else nn.MSELoss()
        objectives: dict[str, Any] = {"pixel": pixel} if config.pixel.weight else {}
        weights = {"pixel": config.pixel.weight} if config.pixel.weight else {}
        diff = None
        if config.perceptual.weight > 0:
            objectives["perceptual"], weights["perceptual"] = _perceptual(config.perceptual), config.perceptual.weight
        if "diff" in terms_of(config):
            try:
                diff = _diff_loss(config.diff)
            except ValueError as error:  # which names the argument without its group
                raise ValueError(str(error) if "`diff." in str(error) else f"`diff`: {error}") from error
            objectives["diff"], weights["diff"] = diff, config.diff.weight
        if not objectives:
            raise ValueError("`pixel`, `diff` or `perceptual` should have a weight above 0, found none.")
        for objective in objectives.values():
            objective.to(self.device)
        if config.diff.share is not None:
            if list(objectives) != ["pixel", "diff"]:
                others = [name for name in objectives if name != "diff"]
                raise ValueError(f"`diff.share` should stand beside the pixel loss and no other, found {others}.")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(chance(config.seed, 2))
                read = [self.train_data[number] for number in range(min(8, len(self.train_data)))]
            pairs = [sample[0] for sample in read if sample is not None]
            if not pairs:
                raise ValueError("`diff.share` needs training pictures, of the first ones none could be read.")
            degraded, clean = torch.stack(pairs).to(self.device).unbind(1)
            shares = {"diff": config.diff.share}
            weights = {
                name: config.pixel.weight * weight
                for name, weight in calibrate(objectives, degraded, clean, shares=shares).items()
            }
            logger.info("a share of %g is a weight of %.3g", config.diff.share, weights["diff"])
        return WeightedSum(objectives, weights), diff


class _Steps:
    """Steps of all phases in parts of a batch, and of the average."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.alternation = trainer, trainer.phases()

    def step(self, batch: Batch) -> dict[str, Tensor]:
        logs = self.alternation.step(*batch.split(self.trainer.config.accumulate))
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(unwrap(self.trainer.net))
        return logs

    def state_dict(self) -> dict[str, Any]:
        return self.alternation.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.alternation.load_state_dict(state)


class Discriminator(nn.Sequential):
    """Of patches: (N, 3, H, W) to logits (N, 1, h, w), above 0 for what looks clean (Isola et al. 2017, with spectral
    norms).
    """

    def __init__(self, width: int = 32) -> None:
        layers: list[nn.Module] = []
        before = 3
        for level in range(3):
            after = width * 2**level
            layers += [_normed(before, after, 4, 2), nn.LeakyReLU(0.2)]
            before = after
        super().__init__(*layers, _normed(before, 1, 3, 1))


def _normed(before: int, after: int, size: int, stride: int) -> nn.Module:
    module: nn.Module = nn.utils.parametrizations.spectral_norm(nn.Conv2d(before, after, size, stride, padding=1))
    return module


@torch.no_grad()
def _check_size(network: nn.Module, patch: int, name: str) -> None:
    """Raise ``ValueError`` unless a network maps colour pictures to colour pictures of the same size."""
    training = network.training
    network.eval()
    try:
        found: Any = tuple(network(torch.zeros(2, 3, patch, patch)).shape)
    except Exception as error:  # of channels or sizes that it cannot read
        found = error
    network.train(training)
    if found != (2, 3, patch, patch):
        raise ValueError(f"`network` {name} should map (2, 3, {patch}, {patch}) to the same shape, found {found}.")


def terms_of(config: Config) -> list[str]:
    """The terms that a run has."""
    if config.diff.share is not None and (config.diff.weight or not 0 < config.diff.share < 1):
        raise ValueError(
            f"`diff.share` should be above 0 and below 1, without `diff.weight`, found {config.diff.share} and "
            f"{config.diff.weight}."
        )
    weights = {
        "pixel": config.pixel.weight, "diff": config.diff.share or config.diff.weight,
        "perceptual": config.perceptual.weight, "adversarial": config.adversarial.weight,
    }  # fmt: skip
    if wrong := [name for name, weight in weights.items() if not 0 <= weight < math.inf]:
        raise ValueError(f"`{wrong[0]}` should have a weight of at least 0, found {weights[wrong[0]]}.")
    return [name for name, weight in weights.items() if weight]


def _diff_loss(options: Diff) -> Subsampled:
    prior: Any
    if options.prior == "small":
        prior = small_prior()
    else:
        try:
            prior = load_prior(options.prior, head_channels=options.head_channels, grouped_heads=options.grouped_heads)
        except (OSError, ValueError) as error:
            raise ValueError(f"`diff.prior`: {error}") from error
    if options.constrain != "noise":
        prior = _constrained(prior, options)
    if options.bf16:
        prior.to(torch.bfloat16)
    loss = DiffLoss(
        prior, noise_weight=options.noise_weight, h_space_weight=options.h_space_weight, timesteps=options.timesteps,
        distance=options.distance, compare=options.compare, snr_power=options.snr_power, crop=options.crop,
        checkpointing=options.checkpointing,
    )  # fmt: skip
    return Subsampled(loss, every=options.every, subset=options.subset)


class Constrained(nn.Module):
    """What a denoiser makes of a noisy picture: the clean one, or the mean of the one a step less noisy (Table 4)."""

    def __init__(self, denoiser: Denoiser, kind: str) -> None:
        super().__init__()
        self.denoiser, self.kind = denoiser, kind

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        schedule = self.denoiser.schedule
        clean = schedule.predict_x0(x_t, self.denoiser(x_t, t), t)
        if self.kind == "image":
            return clean
        return schedule.posterior(x_t, clean, t, (t - 1).clamp(min=0))[0]


def _constrained(prior: Any, options: Diff) -> Denoiser:
    if isinstance(prior, LatentPrior) or options.h_space_weight:
        raise ValueError("`diff.constrain` should be 'noise' for a latent prior and beside the h-space.")
    denoiser = as_denoiser(prior)
    if type(denoiser.schedule) is not NoiseSchedule:
        raise ValueError("`diff.constrain` should be 'noise' for a flow, whose pictures are mixed otherwise.")
    return Denoiser(
        Constrained(denoiser, options.constrain), NoiseSchedule(denoiser.schedule.alphas_cumprod),
        multiple=denoiser.multiple, square=denoiser.square, in_channels=denoiser.in_channels, has_bottleneck=False,
    )  # fmt: skip


def _perceptual(options: Perceptual) -> TDPLoss:
    from torchvision.models import VGG16_Weights, vgg16

    if options.weights is None:
        try:
            network: nn.Module = vgg16(weights=VGG16_Weights.DEFAULT)
        except OSError as error:
            raise ValueError(
                f"`perceptual.weights` should be a state dict of VGG16: torchvision's cannot be had ({error})."
            ) from error
    else:
        network = vgg16()
        load_weights(network, options.weights)
    return TDPLoss(network.eval(), options.layers)


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
