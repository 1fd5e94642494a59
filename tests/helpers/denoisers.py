"""Diffusion models of every kind that as_denoiser knows, tiny, and how each would be called without it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from restoreloss import NoiseSchedule, as_denoiser
from tests.helpers.networks import guided_unet, tiny_conditional_unet, tiny_transformer, tiny_unet

T = torch.tensor([3, 700])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


NOISY = randn(2, 3, 8, 8)


LABELS = torch.tensor([1, 4])


STATES = randn(2, 5, 8, seed=1)


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
}


@dataclass
class Case:
    """A model, and how a person would call it without this library."""

    model: Any
    arguments: dict[str, Any]
    conditioning: Any = None

    @property
    def is_transformer(self):
        return hasattr(self.model, "transformer_blocks")

    @property
    def middle(self):
        if self.is_transformer:
            return self.model.transformer_blocks[1]  # of three
        return getattr(self.model, "mid_block", None) or self.model.middle_block

    @property
    def decoder(self):
        if self.is_transformer:
            return self.model.transformer_blocks[2]
        return (getattr(self.model, "up_blocks", None) or self.model.output_blocks)[0]

    def direct(self, noisy, t):
        """The noise of a direct call, cut to the channels of the image by hand, and what the middle put out."""
        seen = []
        handle = self.middle.register_forward_hook(lambda module, args, output: seen.append(output))
        if self.is_transformer:
            output = self.model(noisy, timestep=t, **self.arguments)
        else:
            output = self.model(noisy, t, **self.arguments)
        handle.remove()
        output = getattr(output, "sample", output)
        output = output[0] if isinstance(output, tuple) else output
        h = seen[0][1] if isinstance(seen[0], tuple) else seen[0]
        if self.is_transformer:  # tokens of 2x2 pixels, row by row
            h = torch.stack([h[:, 4 * row : 4 * row + 4].transpose(1, 2) for row in range(4)], dim=2)
        return output[:, :3], h


def wrap(case):
    return as_denoiser(case.model, NoiseSchedule.linear(), conditioning=case.conditioning)


def sdxl_case(rows):
    embedded = {"text_embeds": randn(2, 8, seed=2), "time_ids": torch.ones(2, 6)}
    if rows == 1:
        embedded = {name: value[:1] for name, value in embedded.items()}
    full = {name: value.expand(2, -1) for name, value in embedded.items()}
    return Case(
        tiny_conditional_unet(**SDXL),
        {"encoder_hidden_states": STATES, "added_cond_kwargs": full},
        {"encoder_hidden_states": STATES, "added_cond_kwargs": embedded},
    )


CAPTION, POOLED = randn(1, 4, 6, seed=3), randn(1, 5, seed=4)


SIX = torch.ones(1, 6)


CAPTION_2 = CAPTION.expand(2, -1, -1)


STATES_1 = STATES[:1].expand(2, -1, -1)


CASES = {
    "diffusers": lambda: Case(tiny_unet(), {}),
    "diffusers, attention": lambda: Case(tiny_unet(attention=True), {}),
    "diffusers, learned variance": lambda: Case(tiny_unet(out_channels=6), {}),
    "diffusers, one label": lambda: Case(
        tiny_unet(num_class_embeds=5), {"class_labels": LABELS[1:].expand(2)}, LABELS[1:]
    ),
    "diffusers, scalar label": lambda: Case(
        tiny_unet(num_class_embeds=5), {"class_labels": LABELS[1].expand(2)}, LABELS[1]
    ),
    "diffusers, labels": lambda: Case(tiny_unet(num_class_embeds=5), {"class_labels": LABELS}, LABELS),
    "conditional, one row": lambda: Case(tiny_conditional_unet(), {"encoder_hidden_states": STATES_1}, STATES[:1]),
    "conditional, rows": lambda: Case(tiny_conditional_unet(), {"encoder_hidden_states": STATES}, STATES),
    "conditional, mapping": lambda: Case(
        tiny_conditional_unet(num_class_embeds=5),
        {"encoder_hidden_states": STATES_1, "class_labels": LABELS},
        {"encoder_hidden_states": STATES[:1], "class_labels": LABELS},
    ),
    "conditional, nested mapping of one row": lambda: sdxl_case(1),
    "conditional, nested mapping of rows": lambda: sdxl_case(2),
    "DiT": lambda: Case(tiny_transformer("DiT"), {"class_labels": LABELS}, LABELS),
    "DiT, one label": lambda: Case(tiny_transformer("DiT"), {"class_labels": LABELS[1:].expand(2)}, LABELS[1:]),
    "PixArt": lambda: Case(tiny_transformer("PixArt"), {"encoder_hidden_states": CAPTION_2}, CAPTION),
    "SD3": lambda: Case(
        tiny_transformer("SD3"),
        {"encoder_hidden_states": CAPTION_2, "pooled_projections": POOLED.expand(2, -1)},
        {"encoder_hidden_states": CAPTION, "pooled_projections": POOLED},
    ),
    "guided": lambda: Case(guided_unet(), {}),
    "guided, not checkpointed": lambda: Case(guided_unet(use_checkpoint=False), {}),
    "guided, one label": lambda: Case(guided_unet(num_classes=5), {"y": LABELS[1:].expand(2)}, LABELS[1:]),
    "guided, labels": lambda: Case(guided_unet(num_classes=5), {"y": LABELS}, LABELS),
    "guided, fork that returns h": lambda: Case(guided_unet(returns_bottleneck=True), {}),
}


KINDS = ("diffusers", "conditional, one row", "guided", "guided, fork that returns h", "SD3")


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x_t, t):
        return self.conv(x_t) + t[:, None, None, None] / 1000


class BareWithBottleneck(Bare):
    def forward(self, x_t, t):
        return super().forward(x_t, t), x_t.mean(dim=(2, 3))


def sine(x_t, t):
    return (x_t * (1 + t[:, None, None, None])).sin()


def sine_and_mean(x_t, t):
    return sine(x_t, t), x_t.mean(dim=(2, 3))


def calls_of(module):
    """A list that grows with every call of a module."""
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls
