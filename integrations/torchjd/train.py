"""A step in which an aggregator of TorchJD takes the place of `backward()`."""

import torch
from torch import nn
from torchjd.aggregation import MGDA

from restoreloss import DiffLoss, WeightedSum, small_prior
from restoreloss.integrations.torchjd import aggregate

restorer = nn.Conv2d(3, 3, 3, padding=1)  # your network
diff = DiffLoss(small_prior(), timesteps=(100, 600), h_space_weight=0)
objective = WeightedSum({"pixel": nn.L1Loss(), "diff": diff})  # the aggregator weighs them
optimizer = torch.optim.AdamW(restorer.parameters())
degraded, clean = torch.rand(2, 2, 3, 32, 32)

terms = objective.terms(restorer(degraded), clean)  # {"pixel": ..., "diff/noise": ...}
optimizer.zero_grad()
weights = aggregate(terms, restorer.parameters(), MGDA())  # .grad is written; {"pixel": 0.9, ...} is yours to log
optimizer.step()
