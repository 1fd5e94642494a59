"""EDTR: a latent diffusion model restores an image for another network to read, in one step or a few.

prior = load_prior("stabilityai/stable-diffusion-2-1-base")
edtr = EDTR(pre_restoration, prior)
restored = edtr.restore(degraded, generator=torch.Generator().manual_seed(0))
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from restoreloss._optional import require
from restoreloss.blocks.wavelet import WaveletColorFix
from restoreloss.checks import check_integer, check_map, describe
from restoreloss.diffusion.latents import LatentPrior, denormalize_latents
from restoreloss.diffusion.sampling import PredictsNoise, denoise, partial_diffusion, short_steps
from restoreloss.frozen import FrozenNetwork, warn_before_freezing, warn_if_untrained
from restoreloss.generators import Generators, standard_normal
from restoreloss.images import RangeWatch
from restoreloss.precision import reference_weight
from restoreloss.restorers.shapes import Parts
from restoreloss.restorers.tiling import pad_to_batch, tiled

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel


@dataclass(frozen=True)
class Hint:
    """A degraded image, restored for the pixels: what the diffusion begins from and is conditioned on.

    Attributes:
        image: (N, 3, H, W) in [0, 1].
        latents: (N, c, h, w).
    """

    image: Tensor
    latents: Tensor


class EDTR(nn.Module):
    r"""A pre-restoration network, a latent diffusion model, and a ControlNet conditioned on what the former found.

    .. math::
        z_{pre} &= E(R_{pix}(I_{LQ})) && \text{(Eq. 3)} \\
        z_t &= \sqrt{\bar\alpha_t}\, z_{pre} + \sqrt{1 - \bar\alpha_t}\, \epsilon, \quad t \le t_p && \text{(Eq. 4)} \\
        \hat z_0 &= \bigl(z_t - \sqrt{1 - \bar\alpha_t}\, \epsilon_\theta(z_t, t, z_{pre})\bigr) / \sqrt{\bar\alpha_t}
            && \text{(Eq. 5)} \\
        I &= \text{High}(D(\hat z_0)) + \text{Low}(R_{pix}(I_{LQ})) && \text{(Eq. 6)}

    The ControlNet and the decoder D train. All else is frozen and in no ``parameters()`` or ``state_dict()``. The
    losses are :class:`HLFLoss` for this module, and a task loss and :class:`FeatureMatchingLoss` for the task network.

    Args:
        pre: :math:`R_{pix}`, any network (N, 3, H, W) -> (N, 3, H, W) in [0, 1] that was trained on pixels, or
            ``nn.Identity()``.
        prior: an ``AutoencoderKL`` and a ``UNet2DConditionModel`` with the empty prompt, as :func:`load_prior` reads
            them. They are taken over, not copied.
        controlnet: that of diffusers, with latents as its hint; what of it requires a gradient trains. The default is
            :func:`latent_controlnet` of the U-Net.
        t_p: the timestep up to which the pre-restored latents are made noisy; None begins from pure noise instead.
        n: the denoising steps of :meth:`restore`.
        color_fix: take the low frequencies from the pre-restored image (Eq. 6).
        color_levels: levels of that :class:`WaveletColorFix`: 5 for the 512 pixels of the paper;
            :func:`color_levels_of` gives those of other sizes.

    Raises:
        ValueError: For another kind of prior or network, and steps that the schedule does not have.

    Example:
        >>> from restoreloss.restorers import EDTR, small_latent_prior
        >>> edtr = EDTR(nn.Conv2d(3, 3, 3, padding=1), small_latent_prior(4), n=4)
        >>> hint = edtr.hint(torch.rand(2, 3, 32, 32))
        >>> t = torch.tensor(edtr.timesteps())[torch.randint(4, (2,))]  # in training one step, from any of the four
        >>> restored = edtr(hint, t, noise=edtr.noise(hint))
        >>> nn.functional.l1_loss(restored, torch.rand(2, 3, 32, 32)).backward()
        >>> edtr.restore(torch.rand(1, 3, 50, 70)).shape
        torch.Size([1, 3, 50, 70])

    Source: Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", Section 3 and Algorithm S1. The
    paper's code joins the hint to the noisy latents before the first convolution; see :func:`latent_controlnet`.
    """

    prompt: Tensor

    def __init__(
        self,
        pre: nn.Module,
        prior: LatentPrior,
        *,
        controlnet: "ControlNetModel | None" = None,
        t_p: int | None = 200,
        n: int = 1,
        color_fix: bool = True,
        color_levels: int = 5,
    ) -> None:
        super().__init__()
        if not isinstance(pre, nn.Module):
            raise ValueError(f"`pre` should be a network, or nn.Identity(), found {describe(pre)}.")
        vae, unet, schedule, prompt = Parts.of(prior)
        warn_before_freezing(pre, "pre")
        warn_before_freezing(unet, "prior")
        warn_if_untrained(vae, "prior")
        self.controlnet = latent_controlnet(unet) if controlnet is None else controlnet
        self.decoder = nn.ModuleList(part for part in (vae.post_quant_conv, vae.decoder) if part is not None)
        self.decoder.requires_grad_(True)  # whatever the prior was read with
        encoder = nn.ModuleList(part for part in (vae.encoder, vae.quant_conv) if part is not None)
        self._pre, self._encoder, self._unet = FrozenNetwork(pre), FrozenNetwork(encoder), FrozenNetwork(unet)
        self._latents = (prior.encoder,)  # A tuple, because its parts are registered above.
        self.register_buffer("prompt", prompt, persistent=False)
        self.schedule = schedule
        self.from_noise = t_p is None
        self.t_p = schedule.last_timestep if t_p is None else check_integer("t_p", t_p)
        schedule.check_timestep(self.t_p, "t_p")
        self.n = n
        self.color_fix = WaveletColorFix(color_levels) if color_fix else None
        self.latent_factor: int = prior.encoder.multiple
        self.multiple: int = self.latent_factor * 2 ** (len(unet.config.block_out_channels) - 1)
        self.timesteps(n)
        self._range = RangeWatch((0.0, 1.0), fixed=True)

    def timesteps(self, n: int | None = None) -> list[int]:
        """The n timesteps of a restoration, the noisiest first."""
        return short_steps(self.t_p, self.n if n is None else n)

    @torch.no_grad()
    def hint(self, degraded: Tensor) -> Hint:
        """Pre-restoration and encoding (Eq. 3), without a graph.

        Raises:
            ValueError: For sides that the networks cannot halve often enough; :meth:`restore` pads.
        """
        check_map("degraded", degraded, 3)
        if degraded.shape[2] % self.multiple or degraded.shape[3] % self.multiple:
            raise ValueError(
                f"`degraded` should have sides that are multiples of {self.multiple}, found {tuple(degraded.shape)}; "
                "`restore` pads them."
            )
        self._range.look({"degraded": degraded})
        pre = self._pre.network
        image = pre(degraded if (weight := reference_weight(pre)) is None else degraded.to(weight.dtype)).float()
        return Hint(image, self.encode(image))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """The latents of images in [0, 1], the mode of the posterior."""
        _ = self._encoder.network  # This puts it at rest.
        latents: Tensor = self._latents[0](2 * image - 1)
        return latents.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], up to overshoot."""
        vae: Any = self._latents[0].encoder
        image: Tensor = vae.decode(denormalize_latents(latents, vae.config).to(vae.dtype)).sample
        return (image.float() + 1) / 2  # bfloat16 does not have the 256 levels of an image.

    def denoiser(self, hint: Hint) -> PredictsNoise:
        """``(z_t, t) -> noise``: the diffusion model, told the hint."""
        unet: Any = self._unet.network
        dtype = self.controlnet.dtype  # the latents stay in float32 between the steps

        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            prompt, noisy = self.prompt.expand(len(z_t), -1, -1).to(dtype), z_t.to(dtype)
            time = self.schedule.model_time(t)
            residuals, middle = self.controlnet(
                noisy, time, prompt, controlnet_cond=hint.latents.to(dtype), return_dict=False
            )
            output = unet(
                noisy, time, prompt, down_block_additional_residuals=residuals, mid_block_additional_residual=middle
            ).sample
            return self.schedule.to_noise(output.float(), z_t, t)

        return predict

    def forward(
        self,
        hint: Hint,
        steps: int | Tensor | Sequence[int],
        *,
        noise: Tensor | Sequence[Tensor],
        latents: Tensor | None = None,
        generator: Generators = None,
        noise_only: bool = False,
    ) -> Tensor:
        """The image that ``steps`` lead to, (N, 3, H, W), in [0, 1] up to overshoot.

        Args:
            hint: from :meth:`hint`.
            steps: :meth:`timesteps`, or one for each sample (N,), as in training.
            noise: standard normal, shape of the latents; or as many as there are steps.
            latents: what is made noisy first. The default is the hint's (partial diffusion, Eq. 4), or none where this
                restorer begins from pure noise.
            generator: for noise between the steps that is not given; one, or one for each sample.
            noise_only: return the noise that is found in the noisy latents of one step instead (Eq. 2). This is what
                the baseline of conventional training compares with ``noise``.
        """
        predicts, schedule = self.denoiser(hint), self.schedule
        if latents is None and not self.from_noise:
            latents = hint.latents
        if noise_only:
            if latents is None or not isinstance(noise, Tensor) or not isinstance(steps, int | Tensor):
                raise ValueError("`noise_only` needs `latents`, and one timestep and one noise for each sample.")
            t = schedule.expand_timestep(steps, latents)
            return predicts(schedule.add_noise(latents, noise, t), t)
        if latents is None:
            first, others = (noise, None) if isinstance(noise, Tensor) else (noise[0], noise[1:])
            return self.finish(denoise(predicts, first, steps, schedule, noise=others, generator=generator), hint)
        found = partial_diffusion(predicts, latents, steps, schedule, noise=noise, generator=generator)
        return self.finish(found, hint)

    def finish(self, latents: Tensor, hint: Hint) -> Tensor:
        """Restored latents as images, with the colors of the pre-restored ones (Eq. 6)."""
        image = self.decode(latents)
        return image if self.color_fix is None else self.color_fix(image, hint.image)

    def noise(self, hint: Hint, generator: Generators = None) -> Tensor:
        """Standard normal noise in the shape of the hint's latents."""
        return standard_normal(hint.latents, generator)

    @torch.no_grad()
    def restore(
        self,
        degraded: Tensor,
        *,
        n: int | None = None,
        generator: Generators = None,
        smallest: int = 0,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """Restored images in [0, 1], of any size.

        Args:
            degraded: (N, 3, H, W) in [0, 1].
            n: denoising steps. The default is this restorer's.
            generator: for the noise, on any device; one, or one for each image.
            smallest: pad smaller sides to this, and cut the result back. The paper pads to 512.
            tile: restore larger images in overlapping tiles of this size, brought to a multiple; the noise is drawn
                once for the whole image.
            overlap: pixels that tiles share, at most half of ``tile``; a quarter by default.
        """
        check_map("degraded", degraded, 3)
        image, steps = pad_to_batch(degraded, self.multiple, smallest), self.timesteps(n)
        height, width = (side // self.latent_factor for side in image.shape[2:])
        channels = self._latents[0].encoder.config.latent_channels
        like = torch.empty(len(image), channels, height, width, device=image.device)
        noise = [standard_normal(like, generator) for _ in steps]

        def restored(part: Tensor, *noise: Tensor) -> Tensor:
            image: Tensor = self(self.hint(part), steps, noise=noise)
            return image

        found = tiled(
            restored, image, tile=tile, overlap=overlap, multiple=self.multiple, fields=noise, step=self.latent_factor
        )
        return found[..., : degraded.shape[2], : degraded.shape[3]].clamp(0, 1)

    def enable_checkpointing(self) -> None:
        """Compute activations again in the backward pass, to save memory."""
        for network in (self.controlnet, self._latents[0].encoder, self._unet.network):
            network.enable_gradient_checkpointing()


def color_levels_of(side: int) -> int:
    """The levels of the color fix for images of a size: 5 for 512 pixels, one less for each halving, at least 1.

    At 48 pixels five levels keep 15 % of an image's variance, where they keep 70 % at 512; two keep as much.
    """
    return max(1, round(5 + math.log2(check_integer("side", side) / 512)))


def latent_controlnet(unet: "UNet2DConditionModel") -> "ControlNetModel":
    """A copy of the diffusion model's encoder that reads latents as its hint, and is silent at first.

    The paper's code joins the hint to the noisy latents before the first convolution, by weights that begin at zero;
    here diffusers embeds it with two convolutions and adds it after the first one.
    """
    diffusers = require("diffusers", purpose="EDTR", install="diffusers")
    controlnet: ControlNetModel = diffusers.ControlNetModel.from_unet(
        unet,
        conditioning_channels=unet.config.in_channels,
        conditioning_embedding_out_channels=(unet.config.block_out_channels[0],),
    )
    return controlnet
