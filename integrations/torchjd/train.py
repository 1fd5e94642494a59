"""A step in which an aggregator of TorchJD takes the place of `backward()`."""

import torch
from torch import nn
from torchjd.aggregation import MGDA

from restoreloss import DiffLoss, WeightedSum, small_prior
from restoreloss.integrations.torchjd import aggregate

restorer = nn.Conv2d(3, 3, 3, padding=1)  # your network
objective = WeightedSum({"pixel": nn.L1Loss(), "diff": DiffLoss(small_prior())}, weights={"diff": 0.1})
optimizer = torch.optim.AdamW(restorer.parameters())
degraded, clean = torch.rand(2, 2, 3, 32, 32)

terms = objective.terms(restorer(degraded), clean)  # {"pixel": ..., "diff/noise": ..., "diff/h_space": ...}
optimizer.zero_grad()
weights = aggregate(terms, restorer.parameters(), MGDA())  # .grad is written; {"pixel": 0.1, ...} is yours to log
optimizer.step()
