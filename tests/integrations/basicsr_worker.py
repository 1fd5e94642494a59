"""Run by two processes: RestorelossModel under DDP, against one process on the whole batch."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from restoreloss.integrations.basicsr import register
from restoreloss.integrations.basicsr_model import WithRestoreloss
from tests.helpers.processes import in_group

STEPS, BATCH, RANKS = 3, 4, 2


def options(folder, rank, ranks):
    return {
        "num_gpu": 0, "is_train": True, "dist": ranks > 1, "rank": rank, "world_size": ranks, "manual_seed": 0,
        "datasets": {"train": {"dataroot_gt": "/gt"}},
        "network_g": {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 2, "upscale": 1},
        # no batch normalisation, which sees the pictures of its own process, and no dropout
        "network_t": {"name": "timm/test_convnext", "weights": "random", "num_classes": 3},
        "path": {"training_states": str(folder), "models": str(folder)},
        "train": {
            # a gradient near 0 is a step near 0, so that rounding is not enlarged
            "optim_g": {"type": "Adam", "lr": 1e-2, "eps": 1e-2}, "optim_t": {"type": "SGD", "lr": 0.05},
            "scheduler": {"type": "MultiStepLR", "milestones": [2], "gamma": 0.5},
            "pixel_opt": {"type": "MSELoss"},
            "task_opt": {"labels": str(folder / "labels.txt"), "p": 1.0},  # nothing is left to chance
            "importance_opt": {"path": str(folder / "importance.pth"), "strength": 0.1},
        },
    }  # fmt: skip


def trained(folder, rank, ranks):
    """The model after some iterations on its part of every batch."""
    register()
    from basicsr.models.sr_model import SRModel

    class Model(WithRestoreloss, SRModel):
        def model_to_device(self, net):  # BasicSR's own is for CUDA alone
            return DistributedDataParallel(net) if ranks > 1 else net

    torch.manual_seed(0)
    model = Model(options(folder, rank, ranks))
    mine = slice(rank, None, ranks)
    for number in range(1, STEPS + 1):
        torch.manual_seed(number)
        gt = torch.rand(BATCH, 3, 32, 32)
        lq, paths = gt + 0.1 * torch.randn_like(gt), [f"/gt/{n}.png" for n in range(BATCH)]
        model.update_learning_rate(number)
        model.feed_data({"lq": lq[mine], "gt": gt[mine], "gt_path": paths[mine]})
        model.optimize_parameters(number)
    return model


def result(model):
    networks = {name: model.get_bare_model(getattr(model, name)).state_dict() for name in ("net_g", "net_t")}
    return networks | {"log": model.log_dict}


def train_alone(folder):
    return result(trained(folder, 0, 1))


def main():
    rank, folder = dist.get_rank(), Path.cwd()
    model = trained(folder, rank, RANKS)
    for network in (model.net_g, model.net_t):
        assert isinstance(network, DistributedDataParallel)
        for parameter in network.parameters():
            first = parameter.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, parameter)
    model.save(0, STEPS)
    if rank == 0:
        torch.save(result(model), folder / "two.pth")


if __name__ == "__main__":
    in_group(main)
