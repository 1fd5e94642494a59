"""How does one latent diffusion model restore pictures for people and for several task networks at once?

    model = UniRestore.from_pretrained(STABLE_DIFFUSION, tasks=["look", "classify"])
    restored = model.restore(pictures, ["look", "classify"])   # one task for each picture

What is trained is ours: CFRM in the encoder, Controller and SC-Tuner at the diffusion model, TFA in the decoder. The
autoencoder and the diffusion model are frozen, and run block by block or with hooks for the length of a call: neither
is edited.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.common.networks.latent_diffusion import load_latent_diffusion
from examples.unirestore.adapters import AdapterName, build_adapters
from restoreloss import CFRM, TFA, Controller, NoiseSchedule, SCTuner
from restoreloss.blocks.tfa import Gate
from restoreloss.diffusion.latents import denormalize_latents, normalize_latents
from restoreloss.frozen import FrozenNetwork
from restoreloss.generators import Generators, standard_normal

PROMPTS = "tfa.prompts."


class UniRestore(nn.Module):
    """An autoencoder and a diffusion model in its latents, both frozen, and the modules that make restorers of them.

    Args:
        vae: of Stable Diffusion's layout; its mode is what pictures are encoded to.
        unet: the diffusion model.
        prompt: the embedded empty prompt (1, L, D).
        schedule: of the diffusion model.
        tasks: that have a prompt.
        steps: denoising steps, 1 to 4 in the paper.
        cfrm: restore the encoder's features; False leaves them as they are (Table 4, "w/o CFRM").
        cfrm_blocks: NAFBlocks on each level of the encoder but the last; the default is 1, ..., 1, 9.
        adapter: what mixes the encoder's features into the decoder, one of examples/unirestore/adapters.py; with None
            the decoder sees the latents alone (Table 4, "w/o TFA").
        gate: of the TFA.
        control_channels: of the Controller's first level and of its maps.
    """

    prompt: Tensor

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        prompt: Tensor,
        schedule: NoiseSchedule,
        *,
        tasks: Sequence[str] = (),
        steps: int = 1,
        cfrm: bool = True,
        cfrm_blocks: Sequence[int] | None = None,
        adapter: AdapterName | None = "prompts",
        gate: Gate = "softmax",
        control_channels: int = 256,
    ) -> None:
        super().__init__()
        self._vae, self._unet = FrozenNetwork(vae), FrozenNetwork(unet)
        self.register_buffer("prompt", prompt, persistent=False)
        self.schedule = schedule
        widths = list(vae.config.block_out_channels)
        latents, levels = int(vae.config.latent_channels), unet.config.block_out_channels
        if unet.config.in_channels != latents:
            raise ValueError(
                f"The autoencoder's latents should have the {unet.config.in_channels} channels of the diffusion model, "
                f"found {latents}."
            )
        blocks = [1] * (len(widths) - 2) + [9] if cfrm_blocks is None else list(cfrm_blocks)
        if len(blocks) != len(widths) - 1:
            raise ValueError(
                f"`cfrm_blocks` should be one number for each of the first {len(widths) - 1} levels of the encoder, "
                f"found {tuple(blocks)}."
            )
        self.cfrm = nn.ModuleList(map(_cfrm, widths, blocks)) if cfrm else None
        self.controller = Controller(
            latents, channels=control_channels, multipliers=_multipliers(len(levels)),
            control_channels=control_channels, groups=math.gcd(32, control_channels // 4),
        )  # fmt: skip
        self.skips = _skips(unet)
        self.tuners = nn.ModuleList(SCTuner(width, self.controller.control_channels) for width, _ in self.skips)
        upwards = widths[::-1]
        # each level of the decoder reads what the one below it wrote
        inputs = [upwards[0], *upwards[:-2]]
        self.tfa = None if adapter is None else build_adapters(adapter, upwards[1:], inputs, tasks, gate)
        self._tasks = tuple(tasks)
        self.gate, self.steps = gate, steps
        self.timesteps(steps)
        self.latent_factor = 2 ** (len(widths) - 1)
        self.multiple = self.latent_factor * 2 ** (len(levels) - 1)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names that pictures can be restored for."""
        if self.tfa is None:
            return self._tasks
        names: tuple[str, ...] = self.tfa.tasks
        return names

    def timesteps(self, steps: int | None = None) -> list[int]:
        """The timesteps of a restoration, from the noisiest down: 999, or 999, 749, 499 and 249."""
        steps, last = self.steps if steps is None else steps, self.schedule.num_timesteps
        if not 1 <= steps <= last:
            raise ValueError(f"`steps` should be from 1 to {last}, found {steps}.")
        return [last * k // steps - 1 for k in range(steps, 0, -1)]

    def encode(self, pictures: Tensor, *, restored: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Latents of pictures in [0, 1], and the features behind each level of the encoder but the last.

        With ``restored`` the features are the CFRM's, and gradients reach it through them. The latents have no graph:
        the rest of the encoder reads the features detached.

        Raises:
            ValueError: For sides that the networks cannot halve often enough; :meth:`restore` pads.
        """
        if pictures.shape[2] % self.multiple or pictures.shape[3] % self.multiple:
            raise ValueError(
                f"Pictures should have sides that are multiples of {self.multiple}, found {tuple(pictures.shape)}; "
                "`restore` pads them."
            )
        vae: Any = self._vae.network
        h, skips = vae.encoder.conv_in(2 * pictures - 1), []
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
        """Pictures in [0, 1], more or less, each for its task.

        Args:
            latents: (N, c, h, w).
            skips: of :meth:`encode`.
            tasks: one for each picture, or one for all.

        Raises:
            ValueError: For an unknown task.
        """
        vae: Any = self._vae.network
        decoder, prompt = vae.decoder, None if self.tfa is None else self.tfa.prompt(tasks, len(latents))
        h = denormalize_latents(latents, vae.config)
        h = decoder.conv_in(h if vae.post_quant_conv is None else vae.post_quant_conv(h))
        h = decoder.mid_block(h)
        for level, block in enumerate(decoder.up_blocks):
            if self.tfa is not None and level < len(skips):
                h, prompt = self.tfa.levels[level](h, skips[-1 - level], prompt)
            h = block(h)
        picture: Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))
        return (picture.float() + 1) / 2

    def predict(self, z_t: Tensor, condition: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that the steered diffusion model finds in noisy ones.

        Args:
            z_t: (N, c, h, w), noisy up to t.
            condition: latents of the degraded pictures, which the Controller reads.
            t: timestep, one or (N,).
        """
        steps = self.schedule.expand_timestep(t, z_t)
        control = self.controller(condition, steps)
        unet: Any = self._unet.network
        with self._tuned(unet, control):
            output = unet(z_t, steps, self.prompt.expand(len(z_t), -1, -1)).sample
        noise = self.schedule.to_noise(output, z_t, steps)
        return self.schedule.predict_x0(z_t, noise, steps), noise

    def denoise(self, latents: Tensor, noise: Tensor, steps: int | None = None) -> Tensor:
        """Restored latents: noise on those of the degraded pictures, then DDIM."""
        timesteps = self.timesteps(steps)
        z_t = self.schedule.add_noise(latents, noise, timesteps[0])
        for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
            z_0, found = self.predict(z_t, latents, t)
            if following is not None:
                z_t = self.schedule.add_noise(z_0, found, following)
        return z_0

    def forward(
        self,
        pictures: Tensor,
        tasks: str | Sequence[str],
        *,
        noise: Tensor | None = None,
        generator: Generators = None,
        steps: int | None = None,
        smallest: int = 0,
    ) -> Tensor:
        """Restored pictures of any size, each for its task; gradients reach the TFA alone (stages 2 and 3).

        Args:
            pictures: (N, 3, H, W) in [0, 1]; continued by reflection to the size the networks want, and cut back.
            tasks: one for each picture, or one for all: a batch may mix them.
            noise: standard normal, in the shape of the latents; drawn by default.
            generator: for the noise: one, or one for each picture.
            steps: denoising steps.
            smallest: enlarge the pictures (bicubic) until the shorter side is this long, and reduce the result; 512 in
                the paper.

        Returns:
            (N, 3, H, W), in [0, 1] more or less.
        """
        size = pictures.shape[2:]
        with torch.no_grad():
            large = enlarged(pictures, smallest)
            latents, skips = self.encode(reflected(large, self.multiple))
            noise = standard_normal(latents, generator) if noise is None else noise
            found = self.denoise(latents, noise, steps)
        restored = self.decode(found, skips, tasks)[..., : large.shape[2], : large.shape[3]]
        if restored.shape[2:] == size:
            return restored
        return F.interpolate(restored, size=size, mode="bicubic", align_corners=False, antialias=True)

    @torch.no_grad()
    def restore(
        self,
        pictures: Tensor,
        tasks: str | Sequence[str],
        *,
        generator: Generators = None,
        steps: int | None = None,
        smallest: int = 0,
    ) -> Tensor:
        """What :meth:`forward` gives, in [0, 1] and without a graph."""
        restored: Tensor = self(pictures, tasks, generator=generator, steps=steps, smallest=smallest)
        return restored.clamp(0, 1)

    def add_task(self, name: str, *, like: str | None = None) -> nn.Parameter:
        """A prompt for a new task, the one thing to train for it (stage 3).

        Raises:
            ValueError: For a name that is taken, and a model without prompts.
        """
        return self._prompts("add_task").add_task(name, like=like)

    @contextmanager
    def _tuned(self, unet: UNet2DConditionModel, control: Sequence[Tensor]) -> Iterator[None]:
        """While it lasts, the skips that reach the U-Net's up blocks pass the SC-Tuners."""

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
            for block in unet.up_blocks:  # each takes the last of the skips that are left
                last -= len(block.resnets)
                handles.append(block.register_forward_pre_hook(tune(last), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        trained: Path | None = None,
        tasks: Sequence[str] = (),
        steps: int = 1,
        cfrm: bool = True,
        cfrm_blocks: Sequence[int] | None = None,
        adapter: AdapterName | None = "prompts",
        gate: Gate = "softmax",
        control_channels: int = 256,
    ) -> "UniRestore":
        """Of a folder in the layout of Stable Diffusion (2.1, turbo), or a name on the hub.

        Args:
            path: vae/, unet/, scheduler/, and text_encoder/ with tokenizer/ or prompt.safetensors.
            trained: what :meth:`save_trained` wrote, with its tasks; ``tasks`` come on top.
            tasks: as above.
            steps: as above.
            cfrm: as above.
            cfrm_blocks: as above.
            adapter: as above.
            gate: as above.
            control_channels: as above.

        Raises:
            ValueError: If a part is missing, or ``trained`` is of another model.
        """
        parts = load_latent_diffusion(path)
        model = cls(
            parts.vae, parts.unet, parts.prompt, parts.schedule, tasks=tasks, steps=steps, cfrm_blocks=cfrm_blocks,
            adapter=adapter, gate=gate, control_channels=control_channels, cfrm=cfrm,
        )  # fmt: skip
        if trained is not None:
            model.load_trained(trained)
        return model

    def fingerprint(self) -> str:
        """A hash of the gate and of all weights but prompts, frozen ones too: of models whose prompts fit this one."""
        digest = hashlib.sha256(self.gate.encode())
        frozen = {f"{name}.{key}": value for name, network in (("vae", self._vae), ("unet", self._unet))
                  for key, value in network.network.state_dict().items()}  # fmt: skip
        for name, value in sorted((self.state_dict() | frozen).items()):
            if not name.startswith(PROMPTS):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save_trained(self, file: Path) -> None:
        """All that was trained, as safetensors."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, file)

    def load_trained(self, file: Path, *, with_adapters: bool = True) -> None:
        """What :meth:`save_trained` wrote. Tasks that are new to this model are added; those that are new to the file
        keep their prompts.

        Args:
            file: of safetensors.
            with_adapters: False for one of stage 1, where there were none.

        Raises:
            ValueError: If there is no such file, or it is of another model.
        """
        state = _read(file)
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

    def save_prompts(self, file: Path, tasks: Sequence[str] | None = None) -> None:
        """The prompts of some tasks, or of all, as safetensors: a task is a few hundred numbers."""
        adapters = self._prompts("save_prompts")
        chosen = adapters.tasks if tasks is None else tasks
        prompts = {name: adapters.prompt(name)[0].detach().clone() for name in chosen}
        save_file(prompts, file, metadata={"fingerprint": self.fingerprint()})

    def load_prompts(self, file: Path) -> tuple[str, ...]:
        """What :meth:`save_prompts` wrote, for a model with the same weights; its tasks are returned.

        Raises:
            ValueError: If there is no such file, or it was written for other weights.
        """
        adapters, prompts = self._prompts("load_prompts"), _read(file)
        with safe_open(file, "pt") as opened:
            written = (opened.metadata() or {}).get("fingerprint", "none")
        if written != (own := self.fingerprint()):
            raise ValueError(
                f"{file} should hold prompts for a model with the fingerprint {own[:12]}, found {written[:12]}: "
                "prompts mean nothing to adapters that they were not trained with."
            )
        adapters.load_prompts(prompts)
        return tuple(prompts)

    def _prompts(self, who: str) -> TFA:
        if type(self.tfa) is not TFA:  # nor one with one prompt for all
            raise ValueError(f"`{who}` needs a model with adapter='prompts', found {type(self.tfa).__name__}.")
        return self.tfa


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"The weights of a UniRestore should be in {file}, found no such file.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} should be a file of safetensors: {error}") from error


def enlarged(pictures: Tensor, smallest: int) -> Tensor:
    """Bicubic, until the shorter side is at least ``smallest``."""
    height, width = pictures.shape[2:]
    factor = smallest / min(height, width)
    if factor <= 1:
        return pictures
    size = (round(height * factor), round(width * factor))
    return F.interpolate(pictures, size=size, mode="bicubic", align_corners=False)


def reflected(pictures: Tensor, multiple: int) -> Tensor:
    """Continued to the right and below by reflection, as often as that takes, to multiples of ``multiple``."""
    for axis in (3, 2):
        side = pictures.shape[axis]
        period = [*range(side), *range(side - 2, 0, -1)]  # 0 .. s-1 .. 1, and again
        wanted = -(-side // multiple) * multiple
        if wanted > side:
            index = torch.tensor([period[place % len(period)] for place in range(wanted)], device=pictures.device)
            pictures = pictures.index_select(axis, index)
    return pictures


def _cfrm(channels: int, blocks: int) -> CFRM:
    return CFRM(channels, blocks=blocks)


def _multipliers(levels: int) -> list[int]:
    """Of the Controller's channels: 1, 1, 2, 2 for the four levels of Stable Diffusion."""
    return [1 if 2 * level < levels else 2 for level in range(levels)]


def _skips(unet: UNet2DConditionModel) -> list[tuple[int, int]]:
    """(channels, level) of each skip of a U-Net, in the order of its encoder; 0 is the finest level."""
    skips = [(int(unet.config.block_out_channels[0]), 0)]
    for level, (block, width) in enumerate(zip(unet.down_blocks, unet.config.block_out_channels, strict=True)):
        skips += [(int(width), level)] * len(block.resnets)
        if block.downsamplers is not None:
            skips.append((int(width), level + 1))
    return skips
