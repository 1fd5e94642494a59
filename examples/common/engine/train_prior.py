"""The training of a small latent diffusion model, for recipes that want Stable Diffusion, on two cores."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from examples.common.data.options import DataOptions, Degradation
from examples.common.data.task_data import datasets
from examples.common.data.tasks import TaskData, clean_of, to_device
from examples.common.engine.options import RunOptions
from examples.common.engine.recipe import Recipe, Stage
from examples.common.engine.schedules import cosine_schedule
from examples.common.networks.latent_diffusion import Prediction, scheduler
from examples.common.networks.weights import load_saved
from examples.common.seeds import seeded
from restoreloss import Alternation, DenoisingLoss, NoiseSchedule, Phase
from restoreloss.frozen import unwrap
from restoreloss.restorers.shapes import small_autoencoder, small_prompt, small_unet
from restoreloss.restorers.tiling import pad_to_batch


@dataclass(frozen=True, kw_only=True)
class PriorConfig(DataOptions, RunOptions):
    """A small latent diffusion model, trained on HQ images.

    Attributes:
        steps: of the autoencoder; the diffusion model takes twice as many.
        width: of the narrowest layers of the diffusion model; those of the autoencoder are half as wide.
        levels: of the autoencoder; each but the first halves the resolution.
        lr: of both (AdamW).
        prediction: what the diffusion model predicts: "epsilon", the noise, as Stable Diffusion 2.1-base;
            "v_prediction", whose error in one step from t = 999 is not multiplied by 15; or "sample".
        autoencoder: finished run of another prior, whose autoencoder is taken; by default one is trained.
        of: what the images are, where they are given, so that a folder says what its model was trained on.
    """

    steps: int = 1000
    width: int = 24
    levels: int = 2
    lr: float = 1e-3
    prediction: Prediction = "epsilon"
    autoencoder: Path | None = None
    degradation: Degradation = "mixture_b"
    scale: int = 1
    of: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """HQ images and the randomness of the step."""

    hq: Tensor
    generator: torch.Generator


class PriorTrainer(Recipe[Batch]):
    """An autoencoder by its pixels, then a diffusion model by :class:`~restoreloss.DenoisingLoss` in its latents.

    Args:
        config: its options.
        data: training and test images; the default is what the options say.
    """

    def __init__(self, config: PriorConfig, data: tuple[TaskData, TaskData] | None = None) -> None:
        super().__init__(config)
        self.title = "a latent diffusion model"
        self.train_data, self.test_data = datasets(config, config.seed) if data is None else data
        self.multiple = 2**config.levels
        self.vae: nn.Module = self.accelerator.prepare(autoencoder_of(config))
        self.unet: nn.Module = self.accelerator.prepare(small_unet(config.width))
        self.networks = {"autoencoder": self.vae, "unet": self.unet}
        self.scheduler = scheduler(config.prediction)
        self.prompt = small_prompt().to(self.device)
        self.denoising = DenoisingLoss(
            self._predict, NoiseSchedule.from_diffusers(self.scheduler), distance="mse", input_range=None
        )
        stages = [self._stage("diffusion", self.unet, self.vae, self._denoising, 2 * config.steps)]
        if config.autoencoder is None:
            stages.insert(0, self._stage("autoencoder", self.vae, self.unet, self._reconstruction, config.steps))
        self.begin(lambda: stages)

    def batch(self, images: Any, targets: Any, step: int, steps: int) -> Batch:
        """HQ images of one size."""
        generator = seeded(self.options.seed, step, self.accelerator.process_index)
        return Batch(to_device(pad_to_batch(clean_of(images), self.multiple), self.device), generator)

    def _stage(self, name: str, trains: nn.Module, rests: nn.Module, objective: Any, steps: int) -> Stage[Batch]:
        optimizer = torch.optim.AdamW(trains.parameters(), lr=self.options.lr)  # type: ignore[attr-defined]
        phase = Phase(
            name, [trains], objective, self.accelerator.prepare(optimizer), cosine_schedule(optimizer, steps),
            frozen=[rests], max_norm=1.0,
        )  # fmt: skip
        return Stage(name, Alternation([phase], accelerator=self.accelerator), steps)

    def _reconstruction(self, batch: Batch) -> dict[str, Tensor]:
        found, divergence = self.vae(2 * batch.hq - 1, batch.generator)
        return {"pixel": F.l1_loss(found, 2 * batch.hq - 1), "kl": 1e-6 * divergence}

    def _predict(self, noisy: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.unet(noisy, t, self.prompt.expand(len(noisy), -1, -1)).sample
        return found

    def _denoising(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            autoencoder: Any = unwrap(self.vae)
            latents = autoencoder.scaled(2 * batch.hq - 1)
        return self.denoising.terms(latents, generator=batch.generator)

    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """PSNR of test images through the autoencoder, and the loss of the diffusion model."""
        return self._evaluate([self.test_data[number] for number in range(min(50, len(self.test_data)))])

    def try_evaluation(self) -> None:
        """Evaluate the first test image."""
        samples = (self.test_data[number] for number in range(min(50, len(self.test_data))))
        self._evaluate([next((sample for sample in samples if sample is not None), None)])

    @torch.no_grad()
    def _evaluate(self, samples: list[Any]) -> tuple[dict[str, float], dict[str, Any]]:
        images = [sample[0] for sample in samples if sample is not None]  # of several sizes, where they are not cropped
        if not images:
            raise ValueError("The test data should hold an image that can be read, found none of the first 50.")
        hq = to_device(pad_to_batch(clean_of(images), self.multiple), self.device)
        autoencoder: Any = unwrap(self.vae).eval()
        unwrap(self.unet).eval()
        decoded = (autoencoder.vae(2 * hq - 1, sample_posterior=False).sample / 2 + 0.5).clamp(0, 1)
        terms = self._denoising(Batch(hq, torch.Generator().manual_seed(0)))
        figures = {"psnr": float(peak_signal_noise_ratio(decoded, hq, data_range=1.0))}
        figures |= {name: float(value) for name, value in terms.items()}
        return figures, {"hr": hq[:8].cpu(), "restored": decoded[:8].cpu()}

    def save_pretrained(self) -> None:
        """vae/, unet/, scheduler/ and prompt.safetensors in the run directory."""
        out = self.options.out
        for name, network in self.networks.items():
            load_model(unwrap(network), out / f"{name}.safetensors")
        autoencoder: Any = unwrap(self.vae)
        parts: list[tuple[str, Any]] = [
            ("vae", autoencoder.finished()), ("unet", unwrap(self.unet)), ("scheduler", self.scheduler)
        ]  # fmt: skip
        for name, part in parts:
            part.save_pretrained(out / name)
        save_file({"prompt": small_prompt()}, out / "prompt.safetensors")


def train_prior(config: PriorConfig, data: tuple[TaskData, TaskData] | None = None) -> None:
    """Train a small latent diffusion model, as far as that is not done, and save it in the layout of Stable Diffusion.

    Args:
        config: its options.
        data: as of :class:`PriorTrainer`.
    """
    trainer = PriorTrainer(config, data)
    trainer.run()
    if trainer.main:
        trainer.save_pretrained()


def autoencoder_of(config: PriorConfig) -> "Autoencoder":
    """An autoencoder as the options want it: new, or that of another prior.

    Raises:
        ValueError: If that is not there, or is another network.
    """
    network = Autoencoder(small_autoencoder(config.width // 2, config.levels))
    if config.autoencoder is not None:
        load_saved(network, config.autoencoder / "autoencoder.safetensors")
    return network


class Autoencoder(nn.Module):
    """An autoencoder that keeps the standard deviation of its latents, as DDP wants it: in a forward pass."""

    deviation: Tensor

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.register_buffer("deviation", torch.ones(()))

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images through a sample of the latents, and the divergence of these from a standard normal."""
        posterior = self.vae.encode(images).latent_dist
        if self.training:
            self.deviation.lerp_(posterior.mean.detach().float().std(), 0.1)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images)
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl().mean()

    def scaled(self, images: Tensor) -> Tensor:
        """Latents of unit variance."""
        latents: Tensor = self.vae.encode(images).latent_dist.mode() / self.deviation
        return latents

    def finished(self) -> AutoencoderKL:
        """The autoencoder, with the factor that scales its latents in its config."""
        self.vae.register_to_config(scaling_factor=1 / float(self.deviation))
        return self.vae
