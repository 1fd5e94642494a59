"""What the recipes leave behind after a few steps, on tiny settings: run by two processes, and by one for comparison.

torchrun --standalone --nproc_per_node 2 tests/contract/distributed_recipes_worker.py PREPARED OUT
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from examples.common.engine.recipe import Recipe
from examples.diffloss import config as diffloss
from examples.diffloss.train import Trainer as DiffLossTrainer
from examples.dtp.config import Config as DTPConfig
from examples.dtp.train import trainer as dtp_trainer
from examples.edtr import prepare as edtr_preparing
from examples.edtr.config import Config as EDTRConfig
from examples.edtr.train import Trainer as EDTRTrainer
from examples.sr4ir.config import Config as SR4IRConfig
from examples.sr4ir.train import Trainer as SR4IRTrainer
from examples.unirestore.config import Config as UniRestoreConfig
from examples.unirestore.train import Trainer as UniRestoreTrainer
from restoreloss.frozen import unwrap

# 5 test images: two processes do not share them evenly
TASK: dict[str, Any] = {"batch": 4, "train_count": 20, "test_count": 5, "cpu": True}
EDTR: dict[str, Any] = {**TASK, "mixture_extent": 0.2}
PAIRS: dict[str, Any] = {
    "batch": 4, "patch": 24, "train_count": 16, "test_count": 5, "test_size": 24, "cpu": True,
}  # fmt: skip
DTP: dict[str, Any] = {**PAIRS, "importance_samples": 5, "timesteps": "paper", "replay_share": 0.5}
UNI: dict[str, Any] = {
    **TASK, "size": 32, "unseen": False, "control_channels": 8, "cfrm_blocks": [1], "lr": 1e-3,
    "tasks": ["restoration", "classification"],
}  # fmt: skip


class Norm(nn.GroupNorm):
    """In the place of batch normalization, whose statistics are each process's own."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


def prepare(folder: Path) -> None:
    """What the runs begin with, by one process."""
    edtr_preparing.prepare(edtr_preparing.Config(out=folder, steps=2, prior_steps=2, **EDTR))
    dtp_trainer(DTPConfig(out=folder / "generates", method="pretrain", steps=4, **DTP)).run()
    UniRestoreTrainer(UniRestoreConfig(out=folder / "stage1", stage="stage1", prepared=folder, steps=1, **UNI)).run()


def _diffloss(_: Path, out: Path, *, judge: float = 0.0, parts: int = 1) -> Recipe[Any]:
    prior = diffloss.Diff(weight=0.1, timesteps=(100, 600), crop=0.5)
    adversarial = diffloss.Adversarial(weight=judge, width=4) if judge else diffloss.Adversarial()
    options: dict[str, Any] = {"diff": prior, "adversarial": adversarial, "ema": 0.5, "max_norm": 0.1}
    return DiffLossTrainer(diffloss.Config(out=out, steps=2, accumulate=parts, **PAIRS, **options))


def _edtr(prepared: Path, out: Path) -> Recipe[Any]:
    trainer = EDTRTrainer(EDTRConfig(out=out, prepared=prepared, steps=2, n=2, **EDTR))
    # H begins as H_HQ, where L1 between their features has the sign of rounding for a gradient
    generator = torch.Generator().manual_seed(0)
    for reader in trainer.readers.values():
        for p in reader.network.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return trainer


def _unirestore(prepared: Path, out: Path) -> Recipe[Any]:
    after = prepared / "stage1"
    return UniRestoreTrainer(UniRestoreConfig(out=out, stage="stage2", prepared=prepared, after=after, steps=2, **UNI))


def _dtp(method: Any) -> Callable[[Path, Path], Recipe[Any]]:
    return lambda prepared, out: dtp_trainer(
        DTPConfig(out=out, method=method, pretrained=prepared / "generates", steps=2, penalty_weight=100.0, **DTP)
    )


RUNS: dict[str, Callable[..., Recipe[Any]]] = {
    "diffloss, adversarial": partial(_diffloss, judge=1e-2),
    "diffloss, in parts": _diffloss,  # two processes with two parts each
    "sr4ir": lambda _, out: SR4IRTrainer(SR4IRConfig(out=out, method="sr4ir", steps=3, **TASK)),
    "edtr": _edtr,
    "unirestore": _unirestore,
    "dtp, projection and penalty": _dtp("gef_project"),
    "dtp, gn": _dtp("gn"),
}


def run(name: str, prepared: Path, out: Path, *, processes: int) -> None:
    """One run into ``out``; in noted.pt the weights that it began with, and the gradients of its first step."""
    options = {"parts": processes} if name == "diffloss, in parts" else {}
    recipe = RUNS[name](prepared, out, **options)
    assert recipe.accelerator.num_processes == processes, recipe.accelerator.num_processes
    start = {
        f"{network}/{key}": value.clone()
        for network, module in recipe.networks.items()
        for key, value in unwrap(module).state_dict().items()
    }
    gradients: dict[str, torch.Tensor] = {}
    seen: list[Any] = []

    def note(optimizer: Any, *_: Any) -> None:
        if not any(optimizer is other for other in seen):  # the first step of each
            seen.append(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, p in enumerate(parameters):
                gradients[f"{len(seen)}/{number}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()

    handle = register_optimizer_step_pre_hook(note)
    try:
        recipe.run()
    finally:
        handle.remove()
    if recipe.main:
        torch.save({"start": start, "gradients": gradients}, out / "noted.pt")


def main() -> None:
    prepared, out = map(Path, sys.argv[1:])
    nn.BatchNorm2d = Norm  # type: ignore[misc, assignment]
    for name in RUNS:
        run(name, prepared, out / name, processes=2)


if __name__ == "__main__":
    main()
