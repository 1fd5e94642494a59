"""Small networks, batches and losses for the tests of Alternation."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from restoreloss import Phase


class Batch(NamedTuple):
    degraded: Tensor
    clean: Tensor
    label: Tensor


def make_batches(count, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        clean = torch.rand(size, 3, 8, 9, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        label = torch.randint(0, 2, (size,), generator=generator)
        yield Batch((clean + 0.3 * noise).clamp(0, 1), clean, label)


def make_batch(size=4, seed=0):
    return next(make_batches(1, size, seed))


def make_restorer(chance=True):
    """``chance``: with what a network keeps and draws by itself, batch norm and dropout."""
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(4), nn.Dropout(0.2)] if chance else []
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))


class Classifier(nn.Module):
    def __init__(self, chance=True):
        super().__init__()
        middle = [nn.BatchNorm2d(5), nn.Dropout(0.2)] if chance else []
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3), *middle, nn.Tanh())
        self.head = nn.Linear(5, 2)

    def forward(self, images):
        return self.head(self.features(images).mean(dim=(2, 3)))


def make_classifier(chance=True):
    torch.manual_seed(1)
    return Classifier(chance)


def see(network):
    """What a phase has to leave of a network that it does not train."""
    return (
        [part.training for part in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in network.parameters()],
        {name: value.clone() for name, value in network.state_dict().items()},
    )


def assert_untouched(network, before):
    modes, flags, gradients, state = see(network)
    assert modes == before[0]
    assert flags == before[1]
    for found, expected in zip(gradients, before[2], strict=True):
        assert (found is None) == (expected is None) and (found is None or torch.equal(found, expected))
    assert_same_state(state, before[3])


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_rests(network):
    assert not any(part.training for part in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def changed(network, before):
    """Names of the parameters that are not what they were."""
    return {name for name, value in network.named_parameters() if not torch.equal(value, before[3][name])}


def make_joint_phases(restorer, classifier, max_norm=None):
    def restore(batch):
        restored = restorer(batch.degraded)
        return {"pixel": F.l1_loss(restored, batch.clean), "task": F.cross_entropy(classifier(restored), batch.label)}

    def recognise(batch):
        return F.cross_entropy(classifier(torch.cat([restorer(batch.degraded), batch.clean])), batch.label.repeat(2))

    return [
        Phase("restorer", [restorer], restore, SGD(restorer.parameters(), lr=0.5, momentum=0.9), max_norm=max_norm),
        Phase("classifier", [classifier], recognise, SGD(classifier.parameters(), lr=0.5, momentum=0.9)),
    ]


@pytest.fixture
def accelerate():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield accelerate
    reset()


NETWORK = nn.Linear(2, 1)


def phase(name="one", trains=(NETWORK,), objective=lambda batch: NETWORK(batch).mean(), optimizers=None, **options):
    if optimizers is None:
        optimizers = SGD(NETWORK.parameters(), lr=0.1)
    return Phase(name, trains, objective, optimizers, **options)
