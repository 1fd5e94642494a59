"""TMGP (Algorithm 1 of DTP): the restoration network learns to generate before it learns to restore."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from examples.common.engine.recipe import Stage
from examples.dtp.config import Config
from examples.dtp.data import held_out_images
from examples.dtp.generation import GenerativeRecipe, Noisy, Steps
from examples.dtp.networks import timed_network
from restoreloss.frozen import unwrap


class Pretraining(GenerativeRecipe[Noisy]):
    """One run of pre-training: take the noise out of clean images."""

    evaluation_options = ("clean",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        network = timed_network(config.network, num_timesteps=config.num_timesteps, time_layers=config.time_layers)
        self.net = self.accelerator.prepare(network)
        self.networks = {"network": self.net}
        if self.clean is not None:
            self.train_data = self.clean
        self.begin(lambda: [Stage("generation", Generation(self, config.steps), config.steps)])

    def batch(self, images: Any, targets: Any, step: int, steps: int) -> Noisy:
        """Clean images with noise of their own."""
        return self.noisy(images, [(step, self.first_number(step) + place) for place in range(len(images))])

    def try_evaluation(self) -> None:
        """Evaluate one test image."""
        unwrap(self.net).eval()
        self.try_generation()
        unwrap(self.net).train()

    def evaluate(self) -> tuple[dict[str, float], dict[str, Any]]:
        """The generative loss on held-out images; some of them noisy, denoised and clean, the noise rising."""
        unwrap(self.net).eval()
        figures = {"generative": self.generative_figure()}
        samples = self._samples()
        unwrap(self.net).train()
        return figures, samples

    @torch.no_grad()
    def _samples(self) -> dict[str, Tensor]:
        images = [*islice(held_out_images(self.config), 8)]
        side = min(256, *(min(image.shape[2:]) for image in images))
        clean = torch.cat([image[..., :side, :side] for image in images]).to(self.device)
        noisy = self.noisy(clean, [(2, key) for key in range(len(clean))])
        t = torch.linspace(1, self.config.num_timesteps, len(clean)).round().long().to(self.device)
        seen = self.levels.add_noise(clean, noisy.noise, t)
        restored = torch.cat([unwrap(self.net)(one, step) for one, step in zip(seen.split(1), t.split(1), strict=True)])
        return {"lr": seen.clamp(0, 1).cpu(), "restored": restored.clamp(0, 1).cpu(), "hr": clean.cpu()}


class Generation(Steps):
    """Steps on the generative loss."""

    recipe: Pretraining

    def step(self, batch: Noisy) -> dict[str, Tensor]:
        """Eq. (11)."""
        with self.recipe.accelerator.autocast():
            loss = self.recipe.generative_loss(self.recipe.net, batch)
        self.recipe.accelerator.backward(loss)
        self.update()
        return {"generative": loss.detach()}
