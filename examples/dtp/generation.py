"""Generation as DTP trains it: noisy clean images, the loss of Eq. (11), and how well a network generates."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from examples.common.data.pairs import evaluated_whole
from examples.common.engine.recipe import Recipe, as_value_error
from examples.common.engine.schedules import cosine_schedule
from examples.common.seeds import seeded
from examples.dtp.config import Config
from examples.dtp.data import clean_images, held_out_images
from restoreloss import DenoisingLoss, NoiseLevels
from restoreloss.frozen import unwrap

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Key = tuple[int, ...]
"""Numbers that decide the randomness of an image, together with the seed."""


@dataclass(frozen=True)
class Noisy:
    """Clean images and the noise to be added to them, all decided by the seed."""

    clean: Tensor
    noise: Tensor
    t: Tensor


class GenerativeRecipe(Recipe[Batch]):
    """A run whose network takes the noise out of clean images: as its training, or beside it."""

    net: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.lr == 0:
            raise ValueError("`lr` should be above 0, found 0.")
        if self.evaluated is not None:
            config = evaluated_whole(config, self.evaluated[0])
        self.config = config
        self.title = "generative pre-training" if config.method == "pretrain" else config.method
        # the network returns the image, and its residual is what is left
        self.levels = NoiseLevels.ir_sde(config.num_timesteps, prediction_type="sample").to(self.device)
        self.clean = clean_images(config) if self.evaluated is None else None

    def noisy(self, clean: Tensor, keys: Sequence[Key]) -> Noisy:
        """Images with noise and timesteps of their own, which the keys decide."""
        noise, t = [], []
        for key in keys:
            generator = seeded(self.config.seed, 4, *key)
            t.append(int(torch.randint(1, self.levels.num_timesteps, (), generator=generator)))
            noise.append(torch.randn(clean.shape[1:], generator=generator))
        return Noisy(clean.to(self.device), torch.stack(noise).to(self.device), torch.tensor(t, device=self.device))

    def generative_loss(self, network: nn.Module, noisy: Noisy) -> Tensor:
        """Eq. (11) on given noise."""
        loss: Tensor = DenoisingLoss(network, self.levels)(noisy.clean, timestep=noisy.t, noise=noisy.noise)
        return loss

    def try_generation(self) -> None:
        """The generative loss of one test image, before the first step."""
        image = next(held_out_images(self.config), None)
        if image is None:
            raise ValueError("`clean` should hold test images that can be read, found none.")
        with as_value_error(f"`network` {self.config.network} should take test images of {tuple(image.shape[2:])}"):
            self.generative_loss(unwrap(self.net), self.noisy(image, [(2, 0)]))

    @torch.no_grad()
    def generative_figure(self) -> float:
        """The mean generative loss on held-out images, in 8-bit gray levels."""
        images = enumerate(held_out_images(self.config))
        losses = [float(self.generative_loss(unwrap(self.net), self.noisy(clean, [(2, key)]))) for key, clean in images]
        return 255 * math.fsum(losses) / len(losses)


class Steps(ABC):
    """Steps of one stage: Adam, whose learning rate falls by a cosine."""

    def __init__(self, recipe: GenerativeRecipe[Any], steps: int) -> None:
        self.recipe, config = recipe, recipe.config
        adam = torch.optim.Adam(recipe.net.parameters(), lr=config.lr, betas=config.betas)
        self.scheduler = cosine_schedule(adam, steps, lowest=config.lr_min / config.lr)
        self.optimizer = recipe.accelerator.prepare(adam)

    @abstractmethod
    def step(self, batch: Any) -> dict[str, Tensor]:
        """One update; returns the losses, as scalars."""

    def update(self) -> None:
        """Step by the gradients that are there, and forget them."""
        recipe = self.recipe
        if recipe.config.max_norm is not None:
            recipe.accelerator.clip_grad_norm_(recipe.net.parameters(), recipe.config.max_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state of optimizer and schedule."""
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
