"""UniRestore: one latent diffusion model restores images for people and for several task networks at once.

::

    model = UniRestore(load_prior("stabilityai/sd-turbo"), tasks=["look", "classify"])
    restored = model.restore(images, ["look", "classify"])   # one task for each image

CFRM in the encoder, Controller and SC-Tuner at the diffusion model, and TFA in the decoder are trained. The autoencoder
and the diffusion model are frozen, and run block by block or with hooks for the length of a call: neither is edited.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from restoreloss._optional import require
from restoreloss.blocks.cfrm import CFRM
from restoreloss.blocks.controller import Controller, SCTuner
from restoreloss.blocks.tfa import TFA, Gate
from restoreloss.checks import check_integer, check_map, describe
from restoreloss.diffusion.latents import LatentPrior, denormalize_latents, normalize_latents
from restoreloss.diffusion.sampling import PredictsNoise, denoise, partial_diffusion
from restoreloss.frozen import FrozenNetwork, warn_before_freezing
from restoreloss.generators import Generators, standard_normal
from restoreloss.images import RangeWatch
from restoreloss.restorers.shapes import Parts
from restoreloss.restorers.tiling import resize_to, tile_if_larger, tiled, upscale_to_side
from restoreloss.sizes import fit_size
from restoreloss.weights import hash_of, read_weights

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

PROMPTS = "tfa.prompts."
"""How the names of prompts begin in a state dict."""


class UniRestore(nn.Module):
    r"""A latent diffusion model, frozen, and the modules that make it a restorer for several tasks.

    An image goes through the encoder, with a :class:`CFRM` behind each of its levels but the last. Its latents get
    noise and are denoised in one to four deterministic steps by the U-Net, which :class:`Controller` and
    :class:`SCTuner` steer. The decoder writes the image, and a :class:`TFA`, told the task, mixes the encoder's
    features into it.

    ===== ======================================= =========================================================
    stage trains                                  on
    ===== ======================================= =========================================================
    1     ``cfrm``, ``controller``, ``tuners``    :class:`UniRestoreFirstStage`: Eqs. 2 and 3
    2     ``tfa`` with its prompts                calling the module, one task for each image: Eq. 6
    3     the prompt that :meth:`add_task` makes  the same; all other tasks stay as they are to the bit
    ===== ======================================= =========================================================

    The autoencoder and the U-Net are in no ``parameters()`` or ``state_dict()``.

    Args:
        prior: an ``AutoencoderKL`` and a ``UNet2DConditionModel`` with the empty prompt, as :func:`load_prior` reads
            them. They are taken over, not copied.
        tasks: names that have a prompt.
        steps: the denoising steps, 1 to 4 in the paper; 0 decodes the latents of the degraded images as they are.
        cfrm: restore the encoder's features; False leaves them as they are (Table 4, "w/o CFRM").
        cfrm_blocks: the NAFBlocks on each level of the encoder but the last; the default is 1, ..., 1, 9.
        adapters: mix the encoder's features into the decoder by a :class:`TFA`; False lets the decoder see the latents
            alone (stage 1; Table 4, "w/o TFA").
        gate: of the TFA.
        control_channels: of the Controller's first level and of its maps.

    Raises:
        ValueError: For another kind of prior, ``cfrm_blocks`` that do not fit it, and ``tasks`` without adapters.
        ImportError: Without spandrel, which has the NAFBlocks: pip install spandrel.

    Example:
        >>> from restoreloss.restorers import UniRestore, small_latent_prior
        >>> prior = small_latent_prior(4, prediction_type="v_prediction")
        >>> model = UniRestore(prior, tasks=["look", "classify"], cfrm_blocks=[1], control_channels=8)
        >>> model(torch.rand(2, 3, 30, 21), ["look", "classify"]).shape
        torch.Size([2, 3, 30, 21])
        >>> prompt = model.requires_grad_(False).add_task("detect")  # stage 3: the one thing to train
        >>> [name for name, weight in model.named_parameters() if weight.requires_grad]
        ['tfa.prompts.detect']

    Source: Chen et al., "UniRestore: Unified Perceptual and Task-Oriented Image Restoration Model Using Diffusion
    Prior", Section 3. A prior that predicts the noise returns its error more than two hundred times as large in one
    step from t = 999; one of v-prediction does not.
    """

    prompt: Tensor

    def __init__(
        self,
        prior: LatentPrior,
        *,
        tasks: Sequence[str] = (),
        steps: int = 1,
        cfrm: bool = True,
        cfrm_blocks: Sequence[int] | None = None,
        adapters: bool = True,
        gate: Gate = "softmax",
        control_channels: int = 256,
    ) -> None:
        super().__init__()
        vae, unet, self.schedule, prompt = Parts.of(prior)
        warn_before_freezing(vae, "prior")
        warn_before_freezing(unet, "prior")
        self._vae, self._unet = FrozenNetwork(vae), FrozenNetwork(unet)
        self.register_buffer("prompt", prompt, persistent=False)
        widths = list(vae.config.block_out_channels)
        levels = len(unet.config.block_out_channels)
        blocks = [1] * (len(widths) - 2) + [9] if cfrm_blocks is None else list(cfrm_blocks)
        if len(blocks) != len(widths) - 1:
            raise ValueError(
                f"`cfrm_blocks` should be one number for each of the first {len(widths) - 1} levels of the encoder, "
                f"found {tuple(blocks)}."
            )
        if tasks and not adapters:
            raise ValueError(f"`tasks` should be left out without adapters, which have their prompts, found {tasks}.")
        self.cfrm = (
            nn.ModuleList(CFRM(width, blocks=count) for width, count in zip(widths[:-1], blocks, strict=True))
            if cfrm
            else None
        )
        self.controller = Controller(
            vae.config.latent_channels, channels=control_channels, multipliers=_multipliers(levels),
            control_channels=control_channels, groups=math.gcd(32, control_channels // 4),
        )  # fmt: skip
        self.skips = _skips(unet)
        self.tuners = nn.ModuleList(SCTuner(width, control_channels) for width, _ in self.skips)
        upwards = widths[::-1]
        self.adapter_channels = (upwards[1:], [upwards[0], *upwards[:-2]])
        """The channels of the encoder's features and of the decoder's, which reads at each level what the one below it
        wrote; the deepest first."""
        self.tfa: Any = TFA(*self.adapter_channels, tasks=tasks, gate=gate) if adapters else None
        self.gate, self.steps = gate, steps
        self.timesteps(steps)
        self.latent_factor = prior.encoder.multiple
        self.multiple = self.latent_factor * 2 ** (levels - 1)
        self._range = RangeWatch((0.0, 1.0), fixed=True)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names that images can be restored for; none without adapters."""
        names: tuple[str, ...] = () if self.tfa is None else self.tfa.tasks
        return names

    def timesteps(self, steps: int | None = None) -> list[int]:
        """The timesteps of a restoration, from the noisiest down: 999, or 999, 749, 499 and 249; of 0 steps none.

        A last level that is noise alone (zero terminal SNR) is none of them.
        """
        levels = self.schedule.last_timestep + 1
        steps = check_integer("steps", self.steps if steps is None else steps, low=0, high=levels)
        return [levels * k // steps - 1 for k in range(steps, 0, -1)]

    def encode(self, images: Tensor, *, restored: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Latents of images in [0, 1], and the features behind each level of the encoder but the last.

        With ``restored`` the features are the CFRM's, and gradients reach it through them. The latents have no graph:
        the rest of the encoder reads the features detached.

        Raises:
            ValueError: For sides that the networks cannot halve often enough; :meth:`restore` pads.
        """
        check_map("images", images, 3)
        if images.shape[2] % self.multiple or images.shape[3] % self.multiple:
            raise ValueError(
                f"`images` should have sides that are multiples of {self.multiple}, found {tuple(images.shape)}; "
                "`restore` pads them."
            )
        self._range.look({"images": images})
        vae: Any = self._vae.network
        h, skips = vae.encoder.conv_in((2 * images - 1).to(vae.dtype)), []
        cfrm = self.cfrm if restored else None
        for level, block in enumerate(vae.encoder.down_blocks[:-1]):
            h = block(h)
            if cfrm is not None:
                h = cfrm[level](h)
            skips.append(h)
        with torch.no_grad():
            h = vae.encoder.mid_block(vae.encoder.down_blocks[-1](h))
            h = vae.encoder.conv_out(vae.encoder.conv_act(vae.encoder.conv_norm_out(h)))
            if vae.quant_conv is not None:
                h = vae.quant_conv(h)
            mode = h.chunk(2, dim=1)[0]
            latents = normalize_latents(mode.float(), vae.config)
        return latents, skips

    def decode(self, latents: Tensor, skips: Sequence[Tensor], tasks: str | Sequence[str]) -> Tensor:
        """Images in [0, 1], up to overshoot, each for its task.

        Args:
            latents: (N, c, h, w).
            skips: of :meth:`encode`.
            tasks: one for each image, or one for all.

        Raises:
            ValueError: For an unknown task.
        """
        vae: Any = self._vae.network
        decoder, prompt = vae.decoder, None if self.tfa is None else self.tfa.prompt(tasks, len(latents))
        h = denormalize_latents(latents, vae.config).to(vae.dtype)
        h = decoder.conv_in(h if vae.post_quant_conv is None else vae.post_quant_conv(h))
        h = decoder.mid_block(h)
        for level, block in enumerate(decoder.up_blocks):
            if self.tfa is not None and level < len(skips):
                h, prompt = self.tfa.levels[level](h, skips[-1 - level], prompt)
            h = block(h)
        image: Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))
        return (image.float() + 1) / 2

    def denoiser(self, condition: Tensor) -> PredictsNoise:
        """``(z_t, t) -> noise``: the diffusion model, steered by the latents of the degraded images."""
        unet: Any = self._unet.network
        dtype = unet.dtype  # the latents stay in float32 between the steps

        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            prompt, time = self.prompt.expand(len(z_t), -1, -1).to(dtype), self.schedule.model_time(t)
            with self._tuned(unet, self.controller(condition.to(dtype), time)):
                output = unet(z_t.to(dtype), time, prompt).sample
            return self.schedule.to_noise(output.float(), z_t, t)

        return predict

    def predict(self, z_t: Tensor, condition: Tensor, t: Tensor | int) -> Tensor:
        """The clean latents that the steered diffusion model finds in noisy ones, in one step (Eq. 3).

        Args:
            z_t: (N, c, h, w), noisy up to t.
            condition: latents of the degraded images.
            t: the timestep, one or (N,).
        """
        return denoise(self.denoiser(condition), z_t, t, self.schedule)

    def denoise(self, latents: Tensor, noise: Tensor, steps: int | None = None) -> Tensor:
        """Restored latents: the noise is put on those of the degraded images and taken out again (DDIM)."""
        if not (timesteps := self.timesteps(steps)):
            return latents
        return partial_diffusion(
            self.denoiser(latents), latents, timesteps, self.schedule, sampler="deterministic", noise=noise
        )

    def forward(
        self,
        images: Tensor,
        tasks: str | Sequence[str],
        *,
        noise: Tensor | None = None,
        generator: Generators = None,
        steps: int | None = None,
        smallest: int = 0,
    ) -> Tensor:
        """Restored images of any size, each for its task; gradients reach the TFA alone (stages 2 and 3).

        Args:
            images: (N, 3, H, W) in [0, 1]; continued by reflection to the size the networks want, and cut back.
            tasks: one for each image, or one for all: a batch may mix them.
            noise: standard normal, in the shape of the latents; drawn by default.
            generator: for the noise: one, or one for each image.
            steps: denoising steps, 0 for none. The default is this restorer's.
            smallest: enlarge the images (bicubic) until the shorter side is this long, and reduce the result; 512 in
                the paper.

        Returns:
            (N, 3, H, W), in [0, 1] up to overshoot.
        """
        check_map("images", images, 3)
        large = upscale_to_side(images, smallest)
        padded = fit_size(large, self.multiple, "pad")
        restored = self._restored(padded, tasks, self._noise(padded, generator) if noise is None else noise, steps)
        return resize_to(restored[..., : large.shape[2], : large.shape[3]], images.shape[2:])

    @torch.no_grad()
    def restore(
        self,
        images: Tensor,
        tasks: str | Sequence[str],
        *,
        generator: Generators = None,
        steps: int | None = None,
        smallest: int = 0,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """What :meth:`forward` gives, in [0, 1] and without a graph.

        Args:
            images: as there, as the others.
            tasks: one for each image, or one for all.
            generator: for the noise.
            steps: denoising steps.
            smallest: enlarge smaller images.
            tile: restore larger images in overlapping tiles of this size, brought to a multiple; the noise is drawn
                once for the whole image.
            overlap: pixels that tiles share, at most half of ``tile``; a quarter by default.
        """
        check_map("images", images, 3)
        tile = tile_if_larger(images, tile)
        large = upscale_to_side(images, smallest)
        padded = fit_size(large, self.multiple, "pad")

        def restored(part: Tensor, noise: Tensor) -> Tensor:
            return self._restored(part, tasks, noise, steps)

        noise = self._noise(padded, generator)
        found = tiled(
            restored, padded, tile=tile, overlap=overlap, multiple=self.multiple, fields=[noise],
            step=self.latent_factor,
        )  # fmt: skip
        return resize_to(found[..., : large.shape[2], : large.shape[3]], images.shape[2:]).clamp(0, 1)

    def _noise(self, images: Tensor, generator: Generators) -> Tensor:
        height, width = (side // self.latent_factor for side in images.shape[2:])
        channels = self._vae.network.config.latent_channels
        return standard_normal(torch.empty(len(images), channels, height, width, device=images.device), generator)

    def _restored(self, images: Tensor, tasks: str | Sequence[str], noise: Tensor, steps: int | None) -> Tensor:
        """Restored images of a size that the networks take."""
        with torch.no_grad():
            latents, skips = self.encode(images)
            found = self.denoise(latents, noise, steps)
        return self.decode(found, skips, tasks)

    def add_task(self, name: str, *, like: str | None = None) -> nn.Parameter:
        """A prompt for a new task, the one thing to train for it (stage 3).

        Args:
            name: of the task.
            like: a task whose prompt it begins as; else it begins at zero.

        Raises:
            ValueError: For a name that is taken, and a model without prompts.
        """
        return self._prompts("add_task").add_task(name, like=like)

    @contextmanager
    def _tuned(self, unet: "UNet2DConditionModel", control: Sequence[Tensor]) -> Iterator[None]:
        """A block in which the skips that reach the U-Net's up blocks pass the SC-Tuners.

        A U-Net that was compiled in place runs eagerly here: compiled code knows only the hooks of its first call.
        """

        def tune(first: int) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
                skips = kwargs["res_hidden_states_tuple"]
                tuned = tuple(
                    self.tuners[first + k](skip, control[self.skips[first + k][1]]) for k, skip in enumerate(skips)
                )
                return args, {**kwargs, "res_hidden_states_tuple": tuned}

            return hook

        handles, last = [], len(self.skips)
        try:
            for block in unet.up_blocks:  # Each block takes the last of the skips that are left.
                last -= len(block.resnets)
                handles.append(block.register_forward_pre_hook(tune(last), with_kwargs=True))
            in_place = any(getattr(module, "_compiled_call_impl", None) is not None for module in unet.modules())
            with torch.compiler.set_stance("force_eager") if in_place else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def fingerprint(self) -> str:
        """A hash of the gate, the prior and all weights but prompts; models with the same share prompts."""
        trained = {name: value for name, value in self.state_dict().items() if not name.startswith(PROMPTS)}
        return hash_of(trained | self._prior_state() | {f"gate.{self.gate}": torch.empty(0)})

    def _prior_state(self) -> dict[str, Tensor]:
        """All that makes the prior what it is: its weights, empty prompt and schedule, and the scale of its latents."""
        config: Any = self._vae.network.config
        ends = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, config.latent_channels, -1, -1)
        state = {"prompt": self.prompt, "latents": denormalize_latents(ends, config)}
        for name, part in (("vae", self._vae.network), ("unet", self._unet.network)):
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        kind = f"{type(self.schedule).__name__}.{self.schedule.prediction_type}"
        return state | {f"{kind}.{key}": value for key, value in self.schedule.named_buffers()}

    def save_trained(self, file: str | Path) -> None:
        """Write all that was trained, as safetensors, and a hash of the frozen prior."""
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        _save(state, file, metadata={"gate": self.gate, "prior": hash_of(self._prior_state())})

    def load_trained(self, file: str | Path, *, with_adapters: bool = True) -> None:
        """Load what :meth:`save_trained` wrote.

        Tasks that are new to this model are added; tasks that the file does not have keep their prompts. A prior that
        is not the one of the file, to the digit, is warned of.

        Args:
            file: a file of safetensors.
            with_adapters: False for a file of stage 1, where there were none.

        Raises:
            ValueError: If there is no such file, or it is of another model or gate.
        """
        state, metadata = _read(file), _metadata(file)
        gate = metadata.get("gate", self.gate)
        if with_adapters and self.tfa is not None and gate != self.gate:
            raise ValueError(f"{file} should be of the gate {self.gate!r}, found {gate!r}.")
        prompts = {name.removeprefix(PROMPTS): state.pop(name) for name in list(state) if name.startswith(PROMPTS)}
        own = {
            name: value for name, value in self.state_dict().items()
            if not name.startswith(PROMPTS if with_adapters else "tfa.")
        }  # fmt: skip
        differ = sorted(
            name for name in own.keys() | state.keys()
            if name not in own or name not in state or own[name].shape != state[name].shape
        )  # fmt: skip
        if differ:
            raise ValueError(
                f"{file} should hold the weights of this UniRestore, found {len(differ)} that are missing, left over "
                f"or of another size, {differ[0]} first."
            )
        if prompts:
            cast(TFA, self.tfa).load_prompts(prompts)
        self.load_state_dict(state, strict=False)
        prior = metadata.get("prior")
        if prior is not None and (found := hash_of(self._prior_state())) != prior:
            warnings.warn(
                f"{file} was trained with the prior {prior[:12]}, found {found[:12]}: another one, or the same in "
                "another precision. What was trained for one prior is of no use with another.",
                stacklevel=2,
            )

    def save_prompts(self, file: str | Path, tasks: Sequence[str] | None = None) -> None:
        """Write the prompts of some tasks, or of all, as safetensors: a task is a few hundred numbers."""
        adapters = self._prompts("save_prompts")
        chosen = adapters.tasks if tasks is None else tasks
        prompts = {name: adapters.prompt(name)[0].detach().clone() for name in chosen}
        _save(prompts, file, metadata={"fingerprint": self.fingerprint()})

    def load_prompts(self, file: str | Path) -> tuple[str, ...]:
        """Load what :meth:`save_prompts` wrote, for a model with the same weights.

        Returns:
            The names of the tasks.

        Raises:
            ValueError: If there is no such file, or it was written for other weights.
        """
        adapters, prompts = self._prompts("load_prompts"), _read(file)
        written = _metadata(file).get("fingerprint", "none")
        if written != (own := self.fingerprint()):
            raise ValueError(
                f"{file} should hold prompts for a model with the fingerprint {own[:12]}, found {written[:12]}: "
                "prompts mean nothing to adapters that they were not trained with."
            )
        adapters.load_prompts(prompts)
        return tuple(prompts)

    def _prompts(self, who: str) -> TFA:
        if type(self.tfa) is not TFA:  # A subclass may have one prompt for all tasks.
            raise ValueError(f"`{who}` needs a UniRestore with a TFA, found {describe(self.tfa)} in its place.")
        return self.tfa


def _save(tensors: dict[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
    file = Path(file)
    writer = require("safetensors.torch", purpose=f"writing {file.name}", install="safetensors")
    partial = file.with_name(f"{file.name}.partial")
    writer.save_file(tensors, partial, metadata)
    partial.replace(file)  # at once, so that a file is whole or is not there


def _read(file: str | Path) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise ValueError(f"The weights of a UniRestore should be in {file}, found no such file.")
    return read_weights(file)


def _metadata(file: str | Path) -> dict[str, str]:
    """What is written beside the tensors; nothing beside those of ``torch.save``."""
    safetensors = require("safetensors", purpose=f"reading {Path(file).name}", install="safetensors")
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except safetensors.SafetensorError:
        return {}


def _multipliers(levels: int) -> list[int]:
    """The multipliers of the Controller's channels: 1, 1, 2, 2 for the four levels of Stable Diffusion."""
    return [1 if 2 * level < levels else 2 for level in range(levels)]


def _skips(unet: "UNet2DConditionModel") -> list[tuple[int, int]]:
    """(channels, level) of each skip of a U-Net, in the order of its encoder; 0 is the finest level."""
    skips = [(int(unet.config.block_out_channels[0]), 0)]
    for level, (block, width) in enumerate(zip(unet.down_blocks, unet.config.block_out_channels, strict=True)):
        skips += [(int(width), level)] * len(block.resnets)
        if block.downsamplers is not None:
            skips.append((int(width), level + 1))
    return skips
