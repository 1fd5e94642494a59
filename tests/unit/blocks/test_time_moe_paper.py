"""The experts and routers of the paper's figure: bottlenecks, and a linear router for each timestep."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from restoreloss import FiLM, TimeConditioned, TimeMoE
from tests.helpers.parameters import count_parameters

NAFNET_64 = (512, 256, 128, 64)
"""The channels behind the decoder levels of NAFNet of 64 channels."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learned(module: nn.Module) -> Any:
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(0.4 * normal(*parameter.shape, seed=number))
    return module


def test_nafnet_has_the_parameters_that_the_paper_states() -> None:
    one, ten = (
        sum(count_parameters(TimeMoE(width, timesteps=steps)) for width in NAFNET_64) for steps in ([4], range(1, 11))
    )
    router = (ten - one) / 9
    assert router == sum(10 * width + 10 for width in NAFNET_64) == 9640
    assert one - router == 1_752_800 + len(NAFNET_64)  # and an alpha for each level
    assert 1.8e6 < ten < 1.9e6
    assert sum(count_parameters(TimeMoE(width, form="code")) for width in NAFNET_64) == pytest.approx(10.8e6, rel=0.02)


@pytest.mark.parametrize("top_k", [None, 2])
def test_each_timestep_has_a_linear_router(top_k: int | None) -> None:
    adapter = learned(TimeMoE(20, 8, experts=3, top_k=top_k, timesteps=[4, 12, 47]))
    h, t = normal(3, 20, 5, 6), torch.tensor([12, 50, 0])
    found = adapter(h, normal(3, 8), t)
    for n, row in enumerate((1, 2, 0)):  # the nearest of those that have a router
        means = torch.stack([channel.mean() for channel in h[n]])
        logits = adapter.gate.weight[row] @ means + adapter.gate.bias[row]
        weights = logits.exp() / logits.exp().sum()
        order = sorted(range(3), key=lambda i: -weights[i].item())[: top_k or 3]
        mixed = torch.zeros(20, 5, 6)
        for i in order:
            first, _, last = adapter.experts[i]
            assert first.weight.shape == (16, 20, 1, 1) and last.weight.shape == (20, 16, 1, 1)
            hidden = F.gelu(torch.einsum("oc,chw->ohw", first.weight[..., 0, 0], h[n]) + first.bias[:, None, None])
            answer = torch.einsum("oc,chw->ohw", last.weight[..., 0, 0], hidden) + last.bias[:, None, None]
            mixed = mixed + weights[i] / weights[order].sum() * answer
        torch.testing.assert_close(found[n], h[n] + adapter.alpha * mixed, rtol=1e-4, atol=1e-4)


def test_a_router_learns_from_its_timestep_alone() -> None:
    adapter = learned(TimeMoE(6, 8, experts=3, timesteps=[4, 12, 47]))
    adapter(normal(4, 6, 5, 5), normal(4, 8), torch.tensor([11, 12, 13, 47])).square().mean().backward()
    assert [bool(row.any()) for row in adapter.gate.weight.grad] == [False, True, True]
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.experts.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrapped_network_tells_it_the_timestep(compiled: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    model = TimeConditioned(network, {"0": FiLM(8), "1": TimeMoE(8, experts=2)})
    model.attach({"0": TimeMoE(8, experts=2, timesteps=[1, 50])})
    image = normal(2, 3, 6, 5)
    assert torch.equal(model(image, 5), network(image))
    learned(model)
    call: Any = torch.compile(model, backend="aot_eager") if compiled else model
    together = call(image, torch.tensor([3, 40]))
    for n, t in enumerate((3, 40)):
        torch.testing.assert_close(together[n : n + 1], model(image[n : n + 1], t), rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    with torch.no_grad():
        model.blocks["1"].gate.bias[2, 0] += 3.0  # of t = 3
    moved = model(image, torch.tensor([3, 40]))
    assert not torch.allclose(moved[0], together[0]) and torch.allclose(moved[1], together[1], rtol=1e-4, atol=1e-5)
    assert sum(name.endswith("gate.steps") for name in state) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TimeMoE(8, form="3x3"), "`form` should be .*found '3x3'"),
        (lambda: TimeMoE(8, timesteps=[]), "`timesteps` should be at least one, found none"),
        (lambda: TimeMoE(8, timesteps=0), "`timesteps` should be a whole number of at least 1, found 0"),
        (lambda: TimeMoE(8, timesteps=[1.5]), "`timesteps` should be a whole number"),
        (lambda: TimeMoE(8)(normal(2, 8, 3, 3), normal(2, 64)), "`t` should be the timestep of each of 2 samples"),
        (lambda: TimeMoE(8)(normal(2, 8, 3, 3), normal(2, 64), torch.ones(3)), "`t` should be .* found"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_that_no_block_reads_are_frozen() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
    timed = learned(TimeConditioned(network, {"0": TimeMoE(8)}))
    image, t = normal(2, 3, 8, 8), torch.tensor([3, 7])
    timed(image, t).square().mean().backward()  # DDP takes a parameter without a gradient for an error
    unread = [name for name, weight in timed.named_parameters() if weight.requires_grad and weight.grad is None]
    assert unread == [] and not any(weight.requires_grad for weight in timed.embed.parameters())
    timed.attach({"1": FiLM(3)})
    assert all(weight.requires_grad for weight in timed.embed.parameters())
    timed.requires_grad_(False)
    timed.attach({"0": FiLM(8)})  # what somebody else has frozen stays so
    assert not any(weight.requires_grad for weight in timed.embed.parameters())


def test_routers_of_other_timesteps_are_refused() -> None:
    learned_at = TimeMoE(8, timesteps=(4, 47)).state_dict()
    assert all(value.is_floating_point() for value in learned_at.values())  # so that averages of states can be taken
    TimeMoE(8, timesteps=(4, 999)).load_state_dict(
        {name: value.bfloat16() for name, value in TimeMoE(8, timesteps=(4, 999)).state_dict().items()}
    )
    TimeMoE(8, timesteps=(47, 4)).load_state_dict(learned_at)
    with pytest.raises(ValueError, match=r"`timesteps` should be \[4, 47\], as in the state, found \[1, 2\]"):
        TimeMoE(8, timesteps=(1, 2)).load_state_dict(learned_at)
    with pytest.raises(ValueError, match=r"`timesteps` should be \[500, 502\], as in the state, found \[501, 502\]"):
        TimeMoE(8, timesteps=(501, 502)).load_state_dict(TimeMoE(8, timesteps=(500, 502)).state_dict())
    with pytest.raises(ValueError, match=r"`timesteps` should be \[nan, nan\], as in the state"):
        TimeMoE(8, timesteps=2).load_state_dict(learned_at | {"gate.steps": torch.full((2,), torch.nan)})


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_an_average_of_the_weights_has_the_same_timesteps(decay: float) -> None:
    adapter = learned(TimeMoE(8, timesteps=50))
    average = AveragedModel(adapter, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for _ in range(20):
        average.update_parameters(adapter)
    h, t = normal(50, 8, 3, 3), torch.arange(1, 51)
    torch.testing.assert_close(average(h, normal(50, 64), t), adapter(h, normal(50, 64), t))
    TimeMoE(8, timesteps=50).load_state_dict(average.module.state_dict())


def test_weights_of_another_number_of_timesteps_are_refused() -> None:
    def timed(num_timesteps: int) -> TimeConditioned:
        return TimeConditioned(nn.Sequential(nn.Conv2d(3, 8, 1)), {"0": FiLM(8)}, num_timesteps=num_timesteps)

    learned = timed(1000).state_dict()
    timed(1000).load_state_dict(learned)
    nn.Sequential(timed(1000)).load_state_dict({f"0.{name}": value for name, value in learned.items()})
    average = {name: value.clone() for name, value in learned.items()}
    for name, value in timed(1000).state_dict().items():  # as an average of weights is kept by hand
        average[name].mul_(0.9).add_(value, alpha=0.1)
    timed(1000).load_state_dict(average)
    timed(1001).load_state_dict({name: value.bfloat16() for name, value in timed(1001).state_dict().items()})
    for count in (50, 999):
        with pytest.raises(ValueError, match=f"`num_timesteps` should be 1000, as in the state, found {count}"):
            timed(count).load_state_dict(learned)
    del learned["_extra_state"]  # of weights alone nothing is known
    timed(50).load_state_dict(learned)


def test_a_model_that_was_made_without_memory_takes_its_timesteps_from_the_state() -> None:
    state = TimeMoE(8, timesteps=[4, 47]).state_dict()
    for assign in (True, False):
        with torch.device("meta"):
            model = TimeMoE(8, timesteps=[4, 47])
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(state, assign=assign)
        torch.testing.assert_close(model.state_dict(), state)
