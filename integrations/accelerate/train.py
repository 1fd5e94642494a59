"""A loop under accelerate: two networks that learn in turn, a regularizer, and what is saved."""

import torch
from accelerate import Accelerator
from torch import nn
from torchvision.models import resnet18

from restoreloss import Alternation, CQMix, DiffLoss, ParameterImportance, Phase, TDPLoss, WeightedSum, small_prior
from restoreloss.integrations.accelerate import prepare, register
from restoreloss.integrations.processes import check_equal_batches

accelerator = Accelerator(cpu=True)
restorer, classifier = nn.Conv2d(3, 3, 3, padding=1), resnet18(num_classes=2)  # your networks
task, mix = nn.CrossEntropyLoss(), CQMix()

importance = ParameterImportance(restorer)  # what an earlier training taught it, to be kept
importance.accumulate(lambda net, images: net(images).square().mean(), [torch.rand(2, 3, 32, 32)])

first = torch.optim.AdamW(restorer.parameters(), lr=1e-4)
second = torch.optim.SGD(classifier.parameters(), lr=3e-2, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(second, T_max=1000)
importance.attach(first)  # before each step of the optimizer itself, not of accelerate's wrapper
restorer, classifier, first, second = prepare(accelerator, restorer, classifier, first, second)
parts = {
    "pixel": nn.L1Loss(),
    "diff": DiffLoss(small_prior(), timesteps=(100, 600)),
    "tdp": TDPLoss(classifier),
}
objective = WeightedSum(parts, shares={"diff": 0.3, "tdp": 0.3}).to(accelerator.device)


def restore(batch):
    return objective.terms(restorer(batch["degraded"]), batch["clean"])


def recognize(batch):
    restored = restorer(batch["degraded"])
    images = torch.cat([restored, batch["clean"], mix(restored, batch["clean"])])
    return task(classifier(images), batch["label"].repeat(3))


phases = [
    Phase("restorer", [restorer], restore, first, max_norm=1.0),
    Phase("classifier", [classifier], recognize, second, schedulers=schedule),
]
training = Alternation(phases, accelerator=accelerator)
register(accelerator, {"phases": training, "importance": importance, "objective": objective})

degraded, clean = torch.rand(2, 2, 3, 64, 64)
for step, batch in enumerate([{"degraded": degraded, "clean": clean, "label": torch.tensor([0, 1])}]):
    if step == 0:
        check_equal_batches(batch)
    logs = training.step(batch)
accelerator.save_state("last")
accelerator.load_state("last")
