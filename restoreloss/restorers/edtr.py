"""How does a latent diffusion model restore a picture for another network to read, in one step or a few?"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.common.networks.latent_diffusion import load_latent_diffusion
from restoreloss import NoiseSchedule, WaveletColorFix, denoise, partial_diffusion, short_steps
from restoreloss.diffusion.latents import denormalize_latents, normalize_latents
from restoreloss.diffusion.sampling import PredictsNoise
from restoreloss.frozen import FrozenNetwork
from restoreloss.generators import Generators, standard_normal
from restoreloss.restorers.tiling import tiled, together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hint:
    """A degraded picture, restored for the pixels: what the diffusion begins from and is told."""

    picture: Tensor
    """(N, 3, H, W) in [0, 1]."""
    latents: Tensor
    """(N, c, h, w)."""


class EDTR(nn.Module):
    """A pre-restoration network, an autoencoder, a diffusion model in its latents and a ControlNet that is told what
    the pre-restoration found.

    The ControlNet and the decoder train. All else is frozen and in no ``parameters()`` or ``state_dict()``.

    Args:
        pre: any network (N, 3, H, W) -> (N, 3, H, W) in [0, 1], trained on pixels; ``nn.Identity()`` to do without.
        vae: its mode is what pictures in [-1, 1] are encoded to.
        unet: the diffusion model. None removes it (Table 2, 7): the latents are then the hint plus a projection of what
            the ControlNet returns.
        controlnet: :func:`latent_controlnet` of ``unet``; its hint is latents, of the size of the noisy ones.
        prompt: the embedded empty prompt (1, L, D).
        schedule: of the diffusion model.
        t_p: timestep up to which the pre-restored latents are made noisy; None begins from pure noise instead.
        n: denoising steps of :meth:`restore`.
        color_fix: take the low frequencies from the pre-restored picture (Eq. 6).
    """

    prompt: Tensor

    def __init__(
        self,
        pre: nn.Module,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel | None,
        controlnet: ControlNetModel,
        prompt: Tensor,
        schedule: NoiseSchedule,
        *,
        t_p: int | None = 200,
        n: int = 1,
        color_fix: bool = True,
    ) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.decoder = nn.ModuleList(part for part in (vae.post_quant_conv, vae.decoder) if part is not None)
        encoder = nn.ModuleList(part for part in (vae.encoder, vae.quant_conv) if part is not None)
        self._pre, self._encoder = FrozenNetwork(pre), FrozenNetwork(encoder)
        self._unet = None if unet is None else FrozenNetwork(unet)
        self._vae = (vae,)  # its parts are registered above
        self.projection = nn.ModuleList(_projections(controlnet, vae.config.latent_channels) if unet is None else ())
        self.register_buffer("prompt", prompt, persistent=False)
        self.schedule = schedule
        self.from_noise = t_p is None
        self.t_p = schedule.num_timesteps - 1 if t_p is None else t_p
        self.schedule.check_timestep(self.t_p)
        self.n = n
        self.color_fix = WaveletColorFix() if color_fix else None
        levels = len(controlnet.config.block_out_channels) - 1
        self.latent_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple: int = self.latent_factor * 2**levels
        self.timesteps(n)

    def timesteps(self, n: int | None = None) -> list[int]:
        """The n timesteps of a restoration, the noisiest first."""
        return short_steps(self.t_p, self.n if n is None else n)

    @torch.no_grad()
    def hint(self, degraded: Tensor) -> Hint:
        """Pre-restoration and encoding (Eq. 3), without graph.

        Raises:
            ValueError: For sides that the networks cannot halve often enough; :meth:`restore` pads.
        """
        if degraded.shape[2] % self.multiple or degraded.shape[3] % self.multiple:
            raise ValueError(
                f"Pictures should have sides that are multiples of {self.multiple}, found {tuple(degraded.shape)}; "
                "`restore` pads them."
            )
        picture = self._pre.network(degraded).float()
        return Hint(picture, self.encode(picture))

    @torch.no_grad()
    def encode(self, picture: Tensor) -> Tensor:
        """Latents of pictures in [0, 1], the mode of the posterior."""
        _ = self._encoder.network
        vae = self._vae[0]
        latents: Tensor = vae.encode(2 * picture - 1).latent_dist.mode()
        return normalize_latents(latents.float(), vae.config)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1], more or less."""
        vae = self._vae[0]
        picture: Tensor = vae.decode(denormalize_latents(latents, vae.config)).sample
        return (picture.float() + 1) / 2  # bfloat16 has not the 256 levels that a picture needs

    def forward(
        self,
        hint: Hint,
        steps: int | Tensor | Sequence[int],
        *,
        noise: Tensor,
        latents: Tensor | None = None,
        generator: Generators = None,
        noise_only: bool = False,
    ) -> Tensor:
        """The picture that ``steps`` lead to, (N, 3, H, W), in [0, 1] more or less.

        Args:
            hint: from :meth:`hint`.
            steps: :meth:`timesteps`, or one for each sample (N,), as in training.
            noise: standard normal, shape of the latents.
            latents: what is made noisy first; by default the hint's (partial diffusion, Eq. 4), or nothing if this
                restorer begins from pure noise.
            generator: for the noise between the steps.
            noise_only: return the predicted noise of one step instead (Eq. 2).
        """
        if self._unet is None:
            return self._finish(hint.latents + self._projected(hint), hint)
        predicts = self._denoiser(hint)
        if latents is None and not self.from_noise:
            latents = hint.latents
        if noise_only:
            assert latents is not None
            assert isinstance(steps, Tensor)
            return predicts(self.schedule.add_noise(latents, noise, steps), steps)
        if latents is None:
            return self._finish(denoise(predicts, noise, steps, self.schedule, generator=generator), hint)
        found = partial_diffusion(predicts, latents, steps, self.schedule, noise=noise, generator=generator)
        return self._finish(found, hint)

    def _denoiser(self, hint: Hint) -> PredictsNoise:
        """``(z_t, t) -> noise``, told the hint."""
        assert self._unet is not None
        unet = self._unet.network

        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            prompt = self.prompt.expand(len(z_t), -1, -1)
            residuals, middle = self.controlnet(z_t, t, prompt, controlnet_cond=hint.latents, return_dict=False)
            output = unet(
                z_t, t, prompt, down_block_additional_residuals=residuals, mid_block_additional_residual=middle
            ).sample
            return self.schedule.to_noise(output, z_t, t)

        return predict

    def noise(self, hint: Hint, generator: Generators = None) -> Tensor:
        """Standard normal, shape of the hint's latents."""
        return standard_normal(hint.latents, generator)

    def enable_checkpointing(self) -> None:
        """Compute activations again in the backward pass, to save memory."""
        self.controlnet.enable_gradient_checkpointing()
        self._vae[0].enable_gradient_checkpointing()
        if self._unet is not None:
            self._unet.network.enable_gradient_checkpointing()

    @torch.no_grad()
    def restore(
        self,
        degraded: Tensor,
        *,
        n: int | None = None,
        generator: Generators = None,
        smallest: int = 0,
        tile: int | None = None,
    ) -> Tensor:
        """Restored pictures in [0, 1] of any size.

        Args:
            degraded: (N, 3, H, W) in [0, 1].
            n: denoising steps.
            generator: for the noise, on any device.
            smallest: pad smaller sides to this, and cut the result back. The paper pads to 512.
            tile: restore larger pictures in overlapping tiles of this size.
        """
        if tile is not None and max(degraded.shape[2:]) > tile:

            def whole(part: Tensor) -> Tensor:
                return self.restore(part, n=n, generator=generator, smallest=smallest)

            return tiled(whole, degraded, tile=tile, overlap=tile // 4)
        hint = self.hint(together(degraded, self.multiple, smallest))
        restored: Tensor = self(hint, self.timesteps(n), noise=self.noise(hint, generator), generator=generator)
        return restored[..., : degraded.shape[2], : degraded.shape[3]].clamp(0, 1)

    def _projected(self, hint: Hint) -> Tensor:
        prompt = self.prompt.expand(len(hint.latents), -1, -1)
        residuals, middle = self.controlnet(
            hint.latents, self.t_p, prompt, controlnet_cond=hint.latents, return_dict=False
        )
        size = hint.latents.shape[2:]
        parts = [
            F.interpolate(project(part), size=size, mode="nearest")
            for project, part in zip(self.projection, (*residuals, middle), strict=True)
        ]
        return torch.stack(parts).sum(0)

    def _finish(self, latents: Tensor, hint: Hint) -> Tensor:
        picture = self.decode(latents)
        if self.color_fix is not None:
            picture = self.color_fix(picture, hint.picture)
        return picture

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        pre: nn.Module,
        *,
        trained: Path | None = None,
        t_p: int | None = 200,
        n: int = 1,
        color_fix: bool = True,
        prior: bool = True,
    ) -> "EDTR":
        """Of a folder in the layout of Stable Diffusion: vae/, unet/, scheduler/, and text_encoder/ with tokenizer/ or
        prompt.safetensors.

        Args:
            path: the folder, or a name on the hub that diffusers downloads.
            pre: the pre-restoration network.
            trained: what :meth:`save_trained` wrote; else the ControlNet is a copy of the diffusion model.
            t_p: as above.
            n: as above.
            color_fix: as above.
            prior: False leaves the diffusion model out.

        Raises:
            ValueError: If a part of it is missing.
        """
        parts = load_latent_diffusion(path)
        model = cls(
            pre, parts.vae, parts.unet if prior else None, latent_controlnet(parts.unet), parts.prompt, parts.schedule,
            t_p=t_p, n=n, color_fix=color_fix,
        )  # fmt: skip
        if trained is not None:
            if not trained.is_file():
                raise ValueError(f"`trained` should be the weights of an EDTR, found no file {trained}.")
            model.load_state_dict(load_file(trained))
        return model

    def save_trained(self, file: Path) -> None:
        """The ControlNet and the decoder, as safetensors."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, file)


def latent_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A copy of the diffusion model's encoder that reads latents as its hint, silent at first.

    The paper's code joins the hint to the noisy latents before the first convolution, by weights that begin at zero;
    here diffusers embeds it with two convolutions and adds it after the first one.
    """
    channels = unet.config.in_channels
    return ControlNetModel.from_unet(
        unet, conditioning_channels=channels, conditioning_embedding_out_channels=(unet.config.block_out_channels[0],)
    )


def _projections(controlnet: ControlNetModel, channels: int) -> list[nn.Module]:
    """To latents, from each residual that the ControlNet returns."""
    inputs = [block.out_channels for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block)]
    return [nn.Conv2d(width, channels, 1) for width in inputs]
