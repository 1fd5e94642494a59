"""What DiffLoss is compared to: filters, a discriminator, ImageNet networks, denoisers of images (Table 4)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.engine.controls import FourierTransforms, ImageGradients
from examples.common.engine.perceptual import LAYERS, Lite0
from examples.common.networks.weights import load_weights
from examples.diffloss.config import Adversarial, Diff, Filter, Perceptual
from restoreloss import Denoiser, LatentPrior, NoiseSchedule, Phase, TDPLoss, as_denoiser
from restoreloss.frozen import frozen, unwrap


def filter_loss(options: Filter) -> nn.Module:
    """The loss without a network."""
    losses: dict[str, type[nn.Module]] = {
        "images": nn.MSELoss, "gradients": ImageGradients, "fourier": FourierTransforms,
    }  # fmt: skip
    return losses[options.kind]()


class Discriminator(nn.Sequential):
    """Patches (N, 3, H, W) to logits (N, 1, h, w), above 0 for what looks clean (Isola et al. 2017, spectral norms)."""

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


class AdversarialLoss:
    """The non-saturating loss of a discriminator, and the phase that trains it.

    Args:
        options: width and learning rate of the discriminator.
        accelerator: prepares the discriminator and its optimizer.
        device: of the discriminator.
    """

    def __init__(self, options: Adversarial, accelerator: Any, device: torch.device) -> None:
        self.options, self.accelerator = options, accelerator
        self.discriminator: nn.Module = accelerator.prepare(Discriminator(options.width).to(device))

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        """The loss of a restoration network, which does not ask what the clean image is."""
        discriminator = unwrap(self.discriminator)  # No gradient into it is reduced here.
        with frozen(discriminator):
            return F.softplus(-discriminator(restored)).mean()

    def of_discriminator(self, restored: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """The losses of the discriminator on clean and on restored images, which carry no gradient."""
        both = self.discriminator(torch.cat([clean, restored.detach()]))  # DDP takes one pass for each backward
        of_clean, of_restored = both.chunk(2)
        return {"clean": F.softplus(-of_clean).mean(), "restored": F.softplus(of_restored).mean()}

    def phase(self, restorer: nn.Module, objective: Callable[[Any], Mapping[str, Tensor]]) -> Phase[Any]:
        """The phase of the discriminator, in which the restoration network is frozen."""
        optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=self.options.lr, betas=(0.5, 0.99))
        return Phase(
            "discriminator", [self.discriminator], objective, self.accelerator.prepare(optimizer), frozen=[restorer]
        )  # fmt: skip


def perceptual_loss(options: Perceptual, device: torch.device) -> nn.Module:
    """The distance of features of an ImageNet network.

    Raises:
        ValueError: If its weights cannot be had, or ``weights`` is no file of them.
    """
    if options.network == "lite0":
        try:
            return Lite0(options.weights, options.layers or LAYERS).to(device)
        except (OSError, ValueError) as error:
            raise ValueError(f"`perceptual`: {error}") from error
    from torchvision.models import VGG16_Weights, vgg16

    if options.weights is None:
        try:
            network: nn.Module = vgg16(weights=VGG16_Weights.DEFAULT)
        except OSError as error:
            raise ValueError(
                "`perceptual.weights` should be a state dict of VGG16 where torchvision's cannot be downloaded, found "
                f"None ({error})."
            ) from error
    else:
        network = vgg16()
        load_weights(network, options.weights)
    return TDPLoss(network.eval().to(device), options.layers or ["features.15", "features.22"])


def constrained(prior: Any, options: Diff) -> Denoiser:
    """A prior that returns the clean image, or the image one step less noisy, in the place of the noise (Table 4).

    Raises:
        ValueError: For a latent prior, a flow, and beside the h-space.
    """
    if isinstance(prior, LatentPrior) or options.h_space_weight:
        raise ValueError("`diff.constrain` should be 'noise' for a latent prior and beside the h-space.")
    denoiser = as_denoiser(prior)
    if type(denoiser.schedule) is not NoiseSchedule:
        raise ValueError("`diff.constrain` should be 'noise' for a flow, whose images are mixed otherwise.")
    return Denoiser(
        Constrained(denoiser, options.constrain), NoiseSchedule(denoiser.schedule.alphas_cumprod),
        multiple=denoiser.multiple, square=denoiser.square, in_channels=denoiser.in_channels, has_bottleneck=False,
    )  # fmt: skip


class Constrained(nn.Module):
    """A denoiser that returns an image: the clean one, or the mean of the one a step less noisy."""

    def __init__(self, denoiser: Denoiser, kind: str) -> None:
        super().__init__()
        self.denoiser, self.kind = denoiser, kind

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        schedule = self.denoiser.schedule
        clean = schedule.predict_x0(x_t, self.denoiser(x_t, t), t)
        if self.kind == "image":
            return clean
        return schedule.posterior(x_t, clean, t, (t - 1).clamp(min=0))[0]
