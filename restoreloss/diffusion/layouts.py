"""The weights of OpenAI and of latent diffusion as models of diffusers.

The names and shapes in a file tell all but two things: how wide an attention head is, and in which order queries, keys
and values lie. Published models are recognized by the rest; for others the caller has to say both.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from restoreloss._optional import require
from restoreloss.checks import check_integer
from restoreloss.diffusion.schedule import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

Weights = Mapping[str, Tensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Where a file of latent diffusion has its parts."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A published model of guided-diffusion or improved-diffusion: how to recognize it, and what its file does not say.

    Args:
        name: in messages.
        channels: of each level.
        blocks: ResBlocks in each level.
        attends: the levels with attention.
        by_resnet: whether ResBlocks change the resolution (``resblock_updown``).
        scale_shift: whether the time scales and shifts (``use_scale_shift_norm``).
        head_channels: of each attention head; None for a number of heads, of several widths.
        grouped_heads: False for ``use_new_attention_order``.
        schedule: of its training.
    """

    name: str
    channels: tuple[int, ...]
    blocks: int
    attends: tuple[int, ...]
    by_resnet: bool = True
    scale_shift: bool = True
    head_channels: int | None = 64
    grouped_heads: bool = True
    schedule: Callable[[], NoiseSchedule] = NoiseSchedule.linear


def _rescaled_cosine() -> NoiseSchedule:
    # There are 4000 levels, and the model receives their number divided by four, an integer at every fourth.
    return NoiseSchedule(NoiseSchedule.cosine(4000).alphas_cumprod[::4])


PUBLISHED: tuple[Published, ...] = (
    Published(
        "guided-diffusion's 64x64 model", (192, 384, 576, 768), 3, (1, 2, 3), grouped_heads=False,
        schedule=NoiseSchedule.cosine,
    ),
    Published("guided-diffusion's 128x128 model", (256, 256, 512, 768, 1024), 2, (2, 3, 4), head_channels=None),
    Published("guided-diffusion's 256x256 model", (256, 256, 512, 512, 1024, 1024), 2, (3, 4, 5)),
    Published("the 256x256 model of FFHQ (P2, DPS)", (128, 128, 256, 256, 512, 512), 1, (4,)),
    Published(
        "improved-diffusion's CIFAR-10 model", (128, 256, 256, 256), 3, (1, 2), by_resnet=False,
        schedule=_rescaled_cosine,
    ),
    Published(
        "improved-diffusion's ImageNet-64 model", (128, 256, 384, 512), 3, (2, 3), by_resnet=False, head_channels=None
    ),
    Published(
        "improved-diffusion's class-conditional ImageNet-64 model", (192, 384, 576, 768), 3, (2, 3), by_resnet=False,
        head_channels=None,
    ),
    Published(
        "improved-diffusion's LSUN bedroom model", (128, 128, 256, 256, 512, 512), 2, (4,), by_resnet=False,
        scale_shift=False, head_channels=512,
    ),
)  # fmt: skip
"""The published models, from the options in the READMEs of their repositories."""

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip


def is_guided_diffusion(weights: Weights) -> bool:
    """Whether these are the weights of a U-Net of guided-diffusion (ADM)."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"} <= set(weights)


def is_latent_diffusion(weights: Weights) -> bool:
    """Whether these are the weights of a latent diffusion model, Stable Diffusion for one."""
    return f"{UNET}input_blocks.0.0.weight" in weights


def guided_diffusion(
    weights: Weights, *, head_channels: int | None, grouped_heads: bool | None
) -> tuple["UNet2DModel", NoiseSchedule]:
    """A ``UNet2DModel`` that is numerically the U-Net of guided-diffusion with these weights, in float32.

    Args:
        weights: its state dict.
        head_channels: ``num_head_channels``. Default: that of the :class:`Published` model that this is.
        grouped_heads: whether queries, keys and values of each head lie together
            (``use_new_attention_order=False``). Default: as in the published model, else True.

    Returns:
        The model, and the schedule of the published one or the linear one.

    Raises:
        ValueError: If a ``UNet2DModel`` cannot be this network, keys are missing or unknown, or ``head_channels`` has
            to be given and is not.
    """
    unet_class: type[UNet2DModel] = require("diffusers", purpose="load_prior()", install="diffusers").UNet2DModel
    if not _under(weights, "output_blocks"):
        raise ValueError("A guided-diffusion U-Net should have output_blocks, found none: is this a classifier?")
    plan = _Plan.of(weights)
    channels, attends = plan.channels, [f"input_blocks.{first}.1.qkv.weight" in weights for first in plan.firsts]
    by_resnet = any(key.split(".")[3] == "in_layers" for i in plan.ups for key in _upsampler(weights, i))
    width = int(weights["time_embed.0.weight"].shape[1])
    if width != channels[0]:
        raise ValueError(
            f"A UNet2DModel embeds time in as many channels as its first level has, {channels[0]}, found {width}: this "
            "guided-diffusion U-Net (channel_mult does not begin with 1) cannot be loaded as one."
        )
    embedded = int(weights["input_blocks.1.0.emb_layers.1.weight"].shape[0])
    scale_shift = embedded == 2 * channels[0]
    published = recognized(plan, attends, by_resnet=by_resnet, scale_shift=scale_shift)
    if head_channels is not None and published is not None and head_channels != published.head_channels:
        published = None  # The caller knows that it is another model.
    if head_channels is None:
        head_channels = _head_channels(published, channels)
    check_integer("head_channels", head_channels)
    for attended, wide in [*zip(attends, channels, strict=True), (True, channels[-1])]:
        if attended and wide % head_channels:
            raise ValueError(
                f"`head_channels` should divide the {wide} channels of each attention, found {head_channels}."
            )
    if grouped_heads is None:
        grouped_heads = published is None or published.grouped_heads
    if published is not None:
        logger.info("read as %s: heads of %d channels, grouped: %s", published.name, head_channels, grouped_heads)
    plain = ("Resnet{}sampleBlock2D", "{}Block2D")[not by_resnet]
    labels = weights.get("label_emb.weight")
    with torch.device("meta"):
        unet = unet_class(
            in_channels=int(weights["input_blocks.0.0.weight"].shape[1]),
            out_channels=int(weights["out.2.weight"].shape[0]),
            block_out_channels=tuple(channels),
            layers_per_block=plan.per_level - 1,
            down_block_types=tuple("AttnDownBlock2D" if a else plain.format("Down") for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else plain.format("Up") for a in reversed(attends)),
            downsample_type="resnet" if by_resnet else "conv",
            upsample_type="resnet" if by_resnet else "conv",
            attention_head_dim=head_channels,
            resnet_time_scale_shift="scale_shift" if scale_shift else "default",
            attn_norm_num_groups=32,
            num_class_embeds=None if labels is None else len(labels),
        )
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        renamed |= _guided_key(key, value.float(), plan.per_level, head_channels if grouped_heads else None)
    schedule = NoiseSchedule.linear() if published is None else published.schedule()
    return _filled(unet, renamed, "guided-diffusion"), schedule


def recognized(plan: "_Plan", attends: list[bool], *, by_resnet: bool, scale_shift: bool) -> Published | None:
    """The published model that is laid out like this."""
    levels = tuple(level for level, attended in enumerate(attends) if attended)
    for one in PUBLISHED:
        same = (one.channels, one.blocks, one.attends) == (tuple(plan.channels), plan.per_level - 1, levels)
        if same and (one.by_resnet, one.scale_shift) == (by_resnet, scale_shift):
            return one
    return None


def _head_channels(published: Published | None, channels: list[int]) -> int:
    if published is None:
        raise ValueError(
            f"`head_channels` should be given for this U-Net (levels of {channels} channels), which is none of the "
            "published ones: the file does not say how wide an attention head is. It is `num_head_channels` of its "
            "training, or the width of its attention divided by `num_heads`. If it was trained with "
            "`use_new_attention_order`, give `grouped_heads=False` as well."
        )
    if published.head_channels is None:
        raise ValueError(
            f"{published.name} has four heads of any width in each attention, which a UNet2DModel does not have: give "
            "DiffLoss the U-Net of its own repository. If this is another one, say how wide its heads are: "
            "`head_channels`."
        )
    return published.head_channels


def latent_diffusion(weights: Weights) -> tuple["UNet2DConditionModel", "AutoencoderKL", Tensor | None]:
    """The U-Net, the autoencoder and ``alphas_cumprod`` of a file of latent diffusion, in float32.

    The table is None where the file has none. Text encoders are left out.

    Raises:
        ValueError: If the autoencoder is no ``AutoencoderKL``, the U-Net attends to no text, or keys are missing.
    """
    diffusers = require("diffusers", purpose="load_prior()", install="diffusers")
    utilities = require("diffusers.loaders.single_file_utils", purpose="load_prior()", install="diffusers")
    if f"{VAE}quantize.embedding.weight" in weights or f"{VAE}quant_conv.weight" not in weights:
        raise ValueError(
            f"A file of latent diffusion should hold an AutoencoderKL under {VAE}*, found "
            f"{'a VQModel' if any(key.startswith(VAE) for key in weights) else 'none'}."
        )
    config = _conditional_config(_part(weights, UNET))
    vae_config = _autoencoder_config(_part(weights, VAE), xl=config["addition_embed_type"] is not None)
    with torch.device("meta"):
        unet, vae = diffusers.UNet2DConditionModel(**config), diffusers.AutoencoderKL(**vae_config)
    parts = (
        (unet, utilities.convert_ldm_unet_checkpoint, unet.config, UNET),
        (vae, utilities.convert_ldm_vae_checkpoint, vae.config, VAE),
    )
    for model, convert, its_config, prefix in parts:
        own = {key: value.float() for key, value in weights.items() if key.startswith(prefix)}
        try:
            renamed = convert(own, config=dict(its_config))
        except KeyError as error:
            raise ValueError(f"The latent-diffusion layout should have the key {error}, found none.") from error
        _filled(model, renamed, "latent-diffusion")
    return unet, vae, weights.get("alphas_cumprod")


@dataclass(frozen=True)
class _Plan:
    """How a U-Net of this family is laid out."""

    per_level: int
    """Blocks in each level on the way up, one more than ResBlocks on the way down."""
    ups: list[int]
    """The output blocks that double the resolution."""
    firsts: list[int]
    """The first input block of each level."""
    channels: list[int]
    """Of each level."""

    @classmethod
    def of(cls, weights: Weights) -> "_Plan":
        """Read from a state dict.

        Raises:
            ValueError: If levels differ in their number of blocks, or weights that tell their width are missing.
        """
        down, up = _count(weights, "input_blocks"), _count(weights, "output_blocks")
        ups = [i for i in range(up) if _upsampler(weights, i)]
        levels = len(ups) + 1
        per_level = up // levels
        if ups != [per_level * (n + 1) - 1 for n in range(levels - 1)] or down != up or up != levels * per_level:
            raise ValueError(
                "A U-Net of guided or latent diffusion should have as many blocks in each level, found "
                f"{down} on the way down, {up} on the way up, and the resolution doubled after {ups}: are some missing?"
            )
        firsts = [1 + level * per_level for level in range(levels)]
        try:
            channels = [int(weights[f"input_blocks.{first}.0.out_layers.3.weight"].shape[0]) for first in firsts]
        except KeyError as error:
            raise ValueError(f"A U-Net of guided or latent diffusion should have {error}, found none.") from error
        return cls(per_level, ups, firsts, channels)


def _guided_key(key: str, value: Tensor, per_level: int, head_channels: int | None) -> dict[str, Tensor]:
    """One entry of a state dict under the names of diffusers."""
    module, _, kind = key.rpartition(".")
    if module in _OUTSIDE:
        return {f"{_OUTSIDE[module]}.{kind}": value}
    side, *path = module.split(".")
    if side not in ("input_blocks", "middle_block", "output_blocks") or len(path) < 2:
        return {key: value}
    number, part, rest = int(path[0]), path[1], ".".join(path[2:])
    if side == "middle_block":
        name = "mid_block." + ("attentions.0" if number == 1 else f"resnets.{number // 2}")
        rest = ".".join(path[1:])
    else:
        down = side == "input_blocks"
        level, place = divmod(number - 1 if down else number, per_level)
        name = f"{'down' if down else 'up'}_blocks.{level}."
        if down and place == per_level - 1:
            name += "downsamplers.0"
        elif part == "0":
            name += f"resnets.{place}"
        elif rest in ("norm", "qkv", "proj_out"):
            name += f"attentions.{place}"
        else:
            name += "upsamplers.0"
    if rest in _RESNET:
        return {f"{name}.{_RESNET[rest]}.{kind}": value}
    if rest == "norm":
        return {f"{name}.group_norm.{kind}": value}
    if rest == "proj_out":
        return {f"{name}.to_out.0.{kind}": value.reshape(*value.shape[:2])}
    if rest == "qkv":
        value = value.reshape(*value.shape[:2])
        if head_channels is not None:  # The queries, keys and values of each head lie together.
            value = value.unflatten(0, (-1, 3, head_channels)).transpose(0, 1).flatten(0, 2)
        return {f"{name}.{to}.{kind}": one for to, one in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True)}
    return {f"{name}.conv.{kind}": value} if rest in ("op", "conv") else {key: value}


def _conditional_config(weights: Weights) -> dict[str, Any]:
    """What a ``UNet2DConditionModel`` must be to take these weights."""
    plan = _Plan.of(weights)
    channels = plan.channels
    depths = [_count(weights, f"input_blocks.{first}.1.transformer_blocks") for first in plan.firsts]
    in_the_middle = max(1, _count(weights, "middle_block.1.transformer_blocks"))
    texts = [value for key, value in weights.items() if key.endswith("attn2.to_k.weight")]
    if not texts:
        raise ValueError("A latent-diffusion U-Net should attend to text (attn2), found one that does not.")
    projections = [value for key, value in weights.items() if key.endswith("1.proj_in.weight")]
    linear = projections[0].ndim == 2
    heads = [wide // 64 if linear else 8 for wide in channels]  # 64 channels each since version 2, eight heads before
    pooled = weights.get("label_emb.0.0.weight")
    return {
        "in_channels": int(weights["input_blocks.0.0.weight"].shape[1]),
        "out_channels": int(weights["out.2.weight"].shape[0]),
        "block_out_channels": tuple(channels),
        "layers_per_block": plan.per_level - 1,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        "transformer_layers_per_block": (*(depth or 1 for depth in depths[:-1]), in_the_middle),
        "cross_attention_dim": int(texts[0].shape[1]),
        "attention_head_dim": tuple(heads),
        "use_linear_projection": linear,
        "addition_embed_type": None if pooled is None else "text_time",
        "addition_time_embed_dim": None if pooled is None else 256,
        "projection_class_embeddings_input_dim": None if pooled is None else int(pooled.shape[1]),
    }


def _autoencoder_config(weights: Weights, *, xl: bool) -> dict[str, Any]:
    """What an ``AutoencoderKL`` must be to take these weights."""
    levels, blocks = _count(weights, "encoder.down"), _count(weights, "encoder.down.0.block")
    return {
        "in_channels": int(weights["encoder.conv_in.weight"].shape[1]),
        "out_channels": int(weights["decoder.conv_out.weight"].shape[0]),
        "latent_channels": int(weights["post_quant_conv.weight"].shape[0]),
        "block_out_channels": tuple(
            int(weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0]) for level in range(levels)
        ),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": blocks,
        "scaling_factor": 0.13025 if xl else 0.18215,
    }


def _filled(model: Any, weights: Weights, layout: str) -> Any:
    """The model on the CPU, with these weights.

    Raises:
        ValueError: If keys are missing, unknown, or of another shape.
    """
    expected = model.state_dict()
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    shaped = [key for key in expected if key in weights and expected[key].shape != weights[key].shape]
    for problem, keys in (("missing", missing), ("unexpected", unknown), ("of another shape", shaped)):
        if keys:
            raise ValueError(
                f"The {layout} layout should give every weight of a {type(model).__name__}, found {len(keys)} "
                f"{problem}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}."
            )
    model.load_state_dict(weights, assign=True)
    module: nn.Module = model
    return module.eval()


def _part(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _under(weights: Weights, prefix: str) -> list[str]:
    return [key for key in weights if key.startswith(f"{prefix}.")]


def _count(weights: Weights, prefix: str) -> int:
    """How many modules a list has."""
    return len({key.removeprefix(f"{prefix}.").partition(".")[0] for key in _under(weights, prefix)})


def _upsampler(weights: Weights, number: int) -> list[str]:
    """The keys in an output block of what doubles the resolution, a convolution or a ResBlock."""
    later = [key for place in (1, 2) for key in _under(weights, f"output_blocks.{number}.{place}")]
    return [key for key in later if key.split(".")[3] in ("conv", "in_layers")]
