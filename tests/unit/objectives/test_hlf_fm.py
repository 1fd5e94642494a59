"""HLFLoss against Eq. (7) of EDTR."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from restoreloss import FeatureExtractor, FeatureMatchingLoss, HLFLoss, TDPLoss
from tests.helpers.hlf_fm import MEAN, STD, everything, network, pair, same

# HLF


def test_hlf_is_equation_7() -> None:
    task, reference, (z, x) = network(0).train(), network(1).train(), pair()
    loss = HLFLoss(task, reference, ["4"])
    terms = loss.terms(z, x)
    expected = []
    for net in (copy.deepcopy(task).eval(), copy.deepcopy(reference).eval()):
        seen = [net[:5]((image - MEAN) / STD) for image in (z, x)]
        expected.append((seen[0] - seen[1]).abs().mean() / 2)
    assert list(terms) == ["task/4", "reference/4"]
    for found, wanted in zip(terms.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(loss(z, x), expected[0] + expected[1])
    (mine,) = torch.autograd.grad(loss(z, x), z)
    (theirs,) = torch.autograd.grad(expected[0] + expected[1], z)
    torch.testing.assert_close(mine, theirs)
    assert all(p.grad is None for p in (*task.parameters(), *reference.parameters()))


def test_hlf_is_half_of_two_tdp_losses_with_its_options() -> None:
    task, reference, (z, x) = network(0), network(1), pair()
    options: dict[str, Any] = {
        "layers": ["0", "4"], "normalize": None, "distance": "rms", "layer_weights": {"0": 0.3, "4": 2.0},
        "reduction": "none", "input_range": (-1.0, 1.0),
    }  # fmt: skip
    z, x = 2 * z - 1, 2 * x - 1
    found = HLFLoss(task, reference, **options)(z, x)
    expected = sum(TDPLoss(net, **options)(z, x) for net in (task, reference)) / 2
    assert found.shape == (4,)
    torch.testing.assert_close(found, expected)


def test_the_task_network_is_left_as_it_is_and_the_reference_is_frozen() -> None:
    task, reference, (z, x) = network(0).train(), network(1).train(), pair()
    task[0].requires_grad_(False)
    before = everything(task)
    loss = HLFLoss(task, reference, ["4"])
    parent = nn.ModuleDict({"loss": loss}).train().requires_grad_(True)
    loss(z, x).backward()
    with pytest.raises(ValueError, match="`target`"):
        loss(z, x[:2])
    assert same(everything(task), before)
    _ = loss(z, x)
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    assert list(parent.parameters()) == [] and parent.state_dict() == {}
    reference.train().requires_grad_(True)  # by somebody who holds it too
    loss(z, x)
    assert not any(module.training for module in reference.modules())
    parent.to(torch.float64)
    assert reference[0].weight.dtype == torch.float64 and task[0].weight.dtype == torch.float32


def test_the_reference_sees_the_targets_once_for_all_losses() -> None:
    task, reference, (z, x) = network(0), FeatureExtractor(network(1), ["4"]), pair()
    hlf, matching = HLFLoss(FeatureExtractor(task, ["4"]), reference), FeatureMatchingLoss(task, reference, ["4"])
    alone = (hlf(z, x), matching(z, x))
    seen: list[bool] = []
    reference.network[0].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with reference.shared():
        shared = (hlf(z, x), matching(z, x))
    assert seen == [False, True]  # x once, z once
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def test_one_network_cannot_be_both() -> None:
    net = network()
    for other in (net, nn.Sequential(net), FeatureExtractor(net, ["4"])):
        with pytest.raises(ValueError, match="`reference` should be another network than `task`"):
            HLFLoss(net, other, ["4"])
        with pytest.raises(ValueError, match="`teacher` should be another network than `student`"):
            FeatureMatchingLoss(net, other, ["4"])
    with pytest.raises(ValueError, match="`reference` should be a network"):
        HLFLoss(net, "resnet18", ["4"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`layers` should name modules"):
        HLFLoss(net, network(1), ["9"])
    with pytest.raises(ValueError, match="`distance`"):
        FeatureMatchingLoss(net, network(1), ["4"], distance="cosine")  # type: ignore[arg-type]
