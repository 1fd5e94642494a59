"""A loop in plain PyTorch, with a loss of this library: the lines that are new end with "# new"."""

import torch
from torch import nn

from restoreloss import DiffLoss, WeightedSum, small_prior  # new

restorer = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))  # your network
diff = DiffLoss(small_prior(), timesteps=(100, 600))  # new
loss = WeightedSum({"pixel": nn.L1Loss(), "diff": diff}, shares={"diff": 0.5})  # new
optimizer = torch.optim.AdamW(restorer.parameters(), lr=1e-4)

for step in range(2):  # your loader
    clean = torch.rand(2, 3, 64, 64)
    degraded = (clean + 0.1 * torch.randn_like(clean)).clamp(0, 1)
    terms = loss.terms(restorer(degraded), clean)  # new: {"pixel": ..., "diff/noise": ..., "diff/h_space": ...}
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()
    print(step, {name: round(float(value.detach()), 5) for name, value in terms.items()})
