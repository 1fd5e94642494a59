"""Small networks that several tests share: of each kind the smallest that still has all of its parts.

The factories give the same weights at every call and leave the global random state alone.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])


def _same_weights_every_time(factory: Factory) -> Factory:
    @functools.wraps(factory)
    def seeded(*args: Any, **options: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return factory(*args, **options)

    return seeded  # type: ignore[return-value]


def as_if_trained(network: nn.Module) -> nn.Module:
    """The network, with a normalization layer that is no more as it was made."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm)]
    norm = next(module for module in norms if module.bias is not None)
    with torch.no_grad():
        norm.bias.add_(0.01)
    return network


@_same_weights_every_time
def tiny_unet(channels: Sequence[int] = (8, 8, 16), *, attention: bool = False, **options: Any) -> UNet2DModel:
    """About 50k parameters. ``options`` are UNet2DModel's: out_channels, dropout, num_class_embeds, mid_block_type."""
    plain, kind = len(channels) - 1, "Attn" if attention else ""
    defaults = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": tuple(channels),
        "down_block_types": ("DownBlock2D",) * plain + (f"{kind}DownBlock2D",),
        "up_block_types": (f"{kind}UpBlock2D",) + ("UpBlock2D",) * plain,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "add_attention": attention,
        "attention_head_dim": 4,
    }
    return UNet2DModel(**{**defaults, **options})


@_same_weights_every_time
def tiny_conditional_unet(**options: Any) -> UNet2DConditionModel:
    """64k parameters, hidden states (N, tokens, 8). ``options`` are UNet2DConditionModel's."""
    defaults = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**defaults, **options})


@_same_weights_every_time
def tiny_transformer(kind: str, **options: Any) -> nn.Module:
    """Of 3 blocks, with patches of 2x2 pixels and random weights throughout; a "DiT", "PixArt" or "SD3".

    ``options`` are those of the class in diffusers.
    """
    common = {"in_channels": 3, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 4, "patch_size": 2}
    each: dict[str, tuple[Any, dict[str, Any]]] = {
        "DiT": (DiTTransformer2DModel, {"sample_size": 8, "num_embeds_ada_norm": 5, "norm_num_groups": 1}),
        "PixArt": (
            PixArtTransformer2DModel,
            {
                "sample_size": 8, "cross_attention_dim": 8, "caption_channels": 6, "norm_num_groups": 1,
                "out_channels": 6,
            },
        ),
        "SD3": (
            SD3Transformer2DModel,
            {
                "sample_size": 8, "joint_attention_dim": 6, "caption_projection_dim": 8, "pooled_projection_dim": 5,
                "out_channels": 3, "pos_embed_max_size": 16,
            },
        ),
    }  # fmt: skip
    network, own = each[kind]
    model: nn.Module = network(**{**common, **own, **options})
    for parameter in model.parameters():  # the gates of a fresh transformer are zero: it is no function of its input
        nn.init.normal_(parameter, std=0.3)
    return model


@_same_weights_every_time
def tiny_autoencoder(**options: Any) -> AutoencoderKL:
    """15k parameters, halves once, 4 latent channels. ``options`` are AutoencoderKL's."""
    defaults = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    return AutoencoderKL(**{**defaults, **options})


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], num_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.inputs, ctx.parameters = run, tensors[:num_inputs], tensors[num_inputs:]
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = [value.detach().requires_grad_() for value in ctx.inputs]
        with torch.enable_grad():
            output = ctx.run(*inputs)
        # raises where a parameter is frozen, like the original
        return None, None, *torch.autograd.grad(output, (*inputs, *ctx.parameters), grad, allow_unused=True)


def checkpoint(run: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Recompute in the backward, and ask there for the gradient of every parameter, frozen or not."""
    return _Recomputed.apply(run, len(inputs), *inputs, *parameters)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, embedding: int, use_checkpoint: bool) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.project = nn.Linear(embedding, out_channels)
        self.norm2, self.conv2 = nn.GroupNorm(4, out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, (x, embedding), tuple(self.parameters()))
        return self._forward(x, embedding)

    def _forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.project(F.silu(embedding))[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Checkpointed whatever the model was asked for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), tuple(self.parameters()))

    def _forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=-1)
        return (tokens + self.out(v @ weights.transpose(1, 2))).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Stage(nn.Sequential):
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block in self:
            x = block(x, embedding) if isinstance(block, ResBlock) else block(x)
        return x


class GuidedUNet(nn.Module):
    """The shape of guided-diffusion's U-Net: its attribute names, its calling convention, its own checkpointing."""

    def __init__(
        self,
        channels: Sequence[int] = (8, 8, 16),
        *,
        in_channels: int = 3,
        num_classes: int | None = None,
        use_checkpoint: bool = True,
        returns_bottleneck: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.returns_bottleneck = in_channels, num_classes, returns_bottleneck
        width = 4 * channels[0]
        self.time_embed = nn.Sequential(nn.Linear(channels[0], width), nn.SiLU(), nn.Linear(width, width))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, width)

        def resblock(before: int, after: int) -> ResBlock:
            return ResBlock(before, after, width, use_checkpoint)

        deepest = len(channels) - 1
        skips, now = [channels[0]], channels[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, now, 3, padding=1))])
        for level, size in enumerate(channels):
            self.input_blocks.append(Stage(resblock(now, size)))
            skips.append(now := size)
            if level < deepest:
                self.input_blocks.append(Stage(Downsample(now)))
                skips.append(now)
        self.middle_block = Stage(resblock(now, now), AttentionBlock(now), resblock(now, now))
        self.output_blocks = nn.ModuleList()
        for level, size in reversed(list(enumerate(channels))):
            self.output_blocks.append(Stage(resblock(now + skips.pop(), size)))
            self.output_blocks.append(Stage(resblock(size + skips.pop(), size)))
            now = size
            if level > 0:
                self.output_blocks[-1].append(Upsample(now))
        # twice the channels: the second half is the learned variance
        self.out = nn.Sequential(nn.GroupNorm(4, now), nn.SiLU(), nn.Conv2d(now, 2 * in_channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        assert (y is not None) == (self.num_classes is not None)
        half = self.time_embed[0].in_features // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=x.device) / half)
        angles = timesteps[:, None].float() * frequencies
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        if y is not None:
            embedding = embedding + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            skips.append(x := block(x, embedding))
        x = bottleneck = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return (self.out(x), bottleneck) if self.returns_bottleneck else self.out(x)


@_same_weights_every_time
def guided_unet(**options: Any) -> GuidedUNet:
    """About 50k parameters. ``options`` are GuidedUNet's."""
    return GuidedUNet(**options)


class Recogniser(nn.Module):
    """A classifier with all that could disturb a borrower, or be disturbed by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stage = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(images)).mean(dim=(2, 3)))


class Pyramid(nn.Module):
    """A backbone as torchvision's detectors want it."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.body = Recogniser()
        self.fpn = FeaturePyramidNetwork([8, 8], self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        low = self.body.stem(images)
        return self.fpn({"0": low, "1": self.body.stage(low)})


def _in_training(network: nn.Module) -> nn.Module:
    """In train mode, with statistics that are not those of any batch."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return network.train()


@_same_weights_every_time
def live_recogniser() -> nn.Module:
    """1k parameters, in the middle of its training: batch norm, dropout, in-place ReLU."""
    return _in_training(Recogniser())


@_same_weights_every_time
def live_detector(size: int = 16) -> nn.Module:
    """3k parameters, a torchvision detector in the middle of its training; images are resized to ``size``."""
    return _in_training(
        FasterRCNN(
            Pyramid(),
            min_size=size,
            max_size=2 * size,
            rpn_anchor_generator=AnchorGenerator(((4,), (8,)), ((1.0,),) * 2),
            box_roi_pool=MultiScaleRoIAlign(["0", "1"], 2, 1),
            box_head=nn.Flatten(),
            box_predictor=nn.Linear(32, 2),
        )
    )


class Classifier(nn.Module):
    """Two classes, without batch statistics: two processes can do what one does."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Conv2d(6, 6, 3))
        self.head = nn.Linear(6, 2)

    def forward(self, images):
        return self.head(self.features(images).mean(dim=(2, 3)))
