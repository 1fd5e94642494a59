"""The gradients of two objectives under accelerate, freed of each other."""

import torch
from accelerate import Accelerator
from torch import nn

from restoreloss import GradientOrthogonality
from restoreloss.integrations.accelerate import project

accelerator, pixel = Accelerator(cpu=True), nn.L1Loss()
restorer = nn.Conv2d(3, 3, 3, padding=1)  # your network
restorer, first = accelerator.prepare(restorer, torch.optim.AdamW(restorer.parameters(), lr=1e-4))
degraded, clean = torch.rand(2, 2, 3, 64, 64)

orthogonality = GradientOrthogonality(restorer.parameters())
cosine = project(
    accelerator, orthogonality, restorer,
    lambda: pixel(restorer(clean + 0.1 * torch.randn_like(clean)), clean),  # generation
    lambda: pixel(restorer(degraded), clean),  # reconstruction
)  # fmt: skip
accelerator.clip_grad_norm_(restorer.parameters(), 1.0)
first.step()
first.zero_grad()
