"""Is a network told the time without being changed, and are its experts mixed by the formula?"""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from restoreloss import FiLM, TimeConditioned, TimeMoE
from restoreloss.blocks.time_conditioned import channels_of, time_features
from tests.helpers.networks import live_recogniser
from tests.helpers.parameters import count_parameters

CodeMoE = partial(TimeMoE, form="code")
"""The form of the authors' code, whose gate reads the embedding; that of the paper is in test_time_moe_paper.py."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.ReLU(inplace=True)), nn.Conv2d(8, 3, 3, padding=1)
        )


def learned(module: nn.Module) -> Any:
    """As if it had been trained: nothing is the identity any more."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(0.4 * normal(*parameter.shape, seed=number))
    return module


def timed(**options: Any) -> TimeConditioned:
    blocks = {"0": FiLM(8, 16), "1.0": CodeMoE(8, 16, experts=3, **options)}
    return learned(TimeConditioned(network(), blocks, time_dim=16))


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def written_out(adapter: TimeMoE, h: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by sample and expert by expert: the result, all weights, and who was used."""
    adapter = copy.deepcopy(adapter).double().requires_grad_(False)
    results, weights, used = [], [], []
    first, _, second = adapter.gate
    for sample, e in zip(h.double(), embedding.double(), strict=True):
        x = torch.tensor([*(float(channel.sum()) / channel.numel() for channel in sample), *e.tolist()]).double()
        hidden = torch.tensor([gelu(float(v)) for v in first.weight @ x + first.bias]).double()
        logits = second.weight @ hidden + second.bias
        w = logits.exp() / logits.exp().sum()
        order = sorted(range(len(w)), key=lambda i: -float(w[i]))[: adapter.top_k or len(w)]
        mixed = sum(float(w[i]) * adapter.experts[i](sample[None])[0] for i in order) / float(w[order].sum())
        results.append(sample + float(adapter.alpha) * mixed)
        weights.append(w)
        used.append(torch.tensor([float(i in order) for i in range(len(w))]).double())
    return torch.stack(results).detach(), torch.stack(weights).detach(), torch.stack(used)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
    st.integers(1, 5).flatmap(lambda m: st.tuples(st.just(m), st.one_of(st.none(), st.integers(1, m)))),
    st.integers(1, 9),
)
def test_the_experts_are_mixed_as_in_the_formula(
    shape: tuple[int, int, int, int], experts: tuple[int, int | None], time_dim: int
) -> None:
    adapter = learned(CodeMoE(shape[1], time_dim, experts=experts[0], top_k=experts[1]))
    h, embedding = normal(*shape), normal(shape[0], time_dim, seed=1)
    expected, weights, used = written_out(adapter, h, embedding)
    torch.testing.assert_close(adapter(h, embedding).double(), expected, rtol=1e-4, atol=1e-4)
    work = weights if experts[1] is None else used / experts[1]
    balance = experts[0] * float((work.mean(dim=0) * weights.mean(dim=0)).sum())
    assert adapter.balance is not None and adapter.balance.item() == pytest.approx(balance, rel=1e-4)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_adapter_is_the_identity_at_the_start_and_alpha_alone_begins_to_learn(
    top_k: int | None, dtype: torch.dtype
) -> None:
    adapter = CodeMoE(8, 16, experts=4, top_k=top_k).to(dtype)
    h, embedding = normal(2, 8, 5, 6, dtype=dtype), normal(2, 16, dtype=dtype)
    result = adapter(h, embedding)
    assert torch.equal(result, h) and result.dtype == dtype
    result.square().mean().backward()
    assert adapter.alpha.grad is not None and adapter.alpha.grad.isfinite() and bool(adapter.alpha.grad)
    assert all(not p.grad.any() for name, p in adapter.named_parameters() if name != "alpha" and p.grad is not None)


@pytest.mark.parametrize("top_k", [None, 2])
def test_when_alpha_has_left_zero_gate_and_experts_learn(top_k: int | None) -> None:
    adapter = learned(CodeMoE(4, 8, experts=3, top_k=top_k))
    adapter(normal(6, 4, 5, 5), normal(6, 8)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) and p.grad.isfinite().all() for p in adapter.parameters())


def test_all_of_the_experts_sparse_are_all_of_them_dense() -> None:
    dense = learned(CodeMoE(5, 8, experts=4))
    sparse = CodeMoE(5, 8, experts=4, top_k=4)
    sparse.load_state_dict(dense.state_dict())
    h, embedding = normal(3, 5, 4, 4), normal(3, 8)
    torch.testing.assert_close(sparse(h, embedding), dense(h, embedding), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("top_k", "spread", "balance"), [(None, 0.0, 1.0), (None, 50.0, 4.0), (1, 50.0, 4.0)])
def test_the_balance_is_one_where_all_are_used_alike_and_their_number_where_one_does_all(
    top_k: int | None, spread: float, balance: float
) -> None:
    adapter = CodeMoE(2, 3, experts=4, top_k=top_k)
    last = adapter.gate[2]
    nn.init.zeros_(last.weight)
    last.bias.data.copy_(torch.tensor([0.0, spread, 0.0, 0.0]))
    assert adapter.balance is None
    adapter(normal(5, 2, 3, 3), normal(5, 3))
    assert adapter.balance is not None and adapter.balance.item() == pytest.approx(balance)


def test_a_step_on_the_balance_evens_the_work() -> None:
    model = timed(top_k=1)
    x = normal(6, 3, 5, 5)
    model(x, 5)
    before = model.balance_loss()
    before.backward()
    with torch.no_grad():
        for p in model.blocks["1/0"].gate.parameters():
            p -= 0.02 * p.grad
    model(x, 5)
    assert model.balance_loss() < before


def test_the_balance_of_several_mixtures_is_their_mean() -> None:
    model = TimeConditioned(network(), {"0": CodeMoE(8), "1": FiLM(8)})
    with pytest.raises(ValueError, match="`balance_loss` should follow a call of a network with a TimeMoE, found none"):
        model.balance_loss()
    model.attach({"2": CodeMoE(3)})
    learned(model)(normal(2, 3, 4, 4), 5)
    found = [model.blocks[key].balance for key in ("0", "2")]
    assert model.balance_loss().item() == pytest.approx((found[0].item() + found[1].item()) / 2)


@pytest.mark.parametrize(("channels", "time_dim", "experts"), [(32, 64, 10), (128, 64, 10), (7, 5, 1), (64, 64, 3)])
def test_the_number_of_parameters_is_that_of_the_formula(channels: int, time_dim: int, experts: int) -> None:
    hidden = max(channels // 4, 16)
    gate = (channels + time_dim + 1) * hidden + (hidden + 1) * experts
    one = (9 * channels + 1) * hidden + (9 * hidden + 1) * hidden + (hidden + 1) * channels
    adapter = CodeMoE(channels, time_dim, experts=experts)
    assert count_parameters(adapter) == gate + experts * one + 1
    adapter.gate.requires_grad_(False)
    assert count_parameters(adapter) == experts * one + 1


def test_time_is_sines_and_cosines_of_a_scale_of_a_thousand() -> None:
    t = torch.tensor([0.0, 3.0, 12.5, 50.0])
    found = time_features(t, 8, 50)
    for row, value in zip(found, t.tolist(), strict=True):
        angles = [value * 20 * 10_000 ** (-k / 4) for k in range(4)]
        expected = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(time_features(t, 9, 50), torch.cat([found, torch.zeros(4, 1)], dim=1))


def test_film_scales_and_shifts_every_channel() -> None:
    film = learned(FiLM(4, 6))
    h, embedding = normal(2, 4, 3, 5), normal(2, 6)
    scale, shift = (embedding @ film.to_scale_shift.weight.T + film.to_scale_shift.bias).split(4, dim=1)
    expected = torch.stack([h[n] * (1 + scale[n]).view(4, 1, 1) + shift[n].view(4, 1, 1) for n in range(2)])
    torch.testing.assert_close(film(h, embedding), expected)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 3)])
@pytest.mark.parametrize("t", [0, 12, 0.5, torch.tensor(3), torch.tensor([3, 50]), torch.tensor([[7], [8]])])
def test_a_wrapped_network_computes_what_it_did_until_it_has_learned(size: tuple[int, int], t: Any) -> None:
    image, bare = normal(2, 3, *size), network()
    expected = bare(image)
    model = TimeConditioned(bare, {"0": FiLM(8), "1": CodeMoE(8), "2": CodeMoE(3, top_k=2)})
    assert torch.equal(model(image, t), expected)
    assert not torch.allclose(learned(model)(image, t), bare(image))


def test_the_blocks_act_on_the_outputs_of_their_layers() -> None:
    model, image, t = timed(), normal(2, 3, 4, 5), torch.tensor([3, 40])
    bare = copy.deepcopy(model).network
    for module in bare.modules():
        module._forward_hooks.clear()
    embedding = model.embed(time_features(t, 16, 50))
    h = model.blocks["0"](bare[0](image), embedding)
    expected = bare[2](model.blocks["1/0"](h.relu(), embedding))
    torch.testing.assert_close(model(image, t), expected)


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_batch_of_mixed_timesteps_is_each_sample_alone(top_k: int | None) -> None:
    model, images, t = timed(top_k=top_k), normal(4, 3, 6, 5), torch.tensor([1, 50, 12, 1])
    together = model(images, t)
    for n in range(4):
        torch.testing.assert_close(together[n : n + 1], model(images[n : n + 1], int(t[n])), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(images[:1], 1), model(images[:1], 50))
    assert torch.equal(model(images, 12), model(images, torch.full((4,), 12)))


def test_outside_of_the_wrapper_the_network_computes_as_before() -> None:
    model, image, expected = timed(), normal(2, 3, 4, 4), None
    expected = copy.deepcopy(model).network(image)  # no call has been made yet
    model(image, 5)
    assert torch.equal(model.network(image), expected)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory, say")

    handle = model.network[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(image, 5)
    handle.remove()
    assert torch.equal(model.network(image), expected) and not torch.allclose(model(image, 5), expected)


def test_blocks_are_attached_one_after_the_other_and_detached() -> None:
    model, image = TimeConditioned(network(), time_dim=16), normal(2, 3, 4, 4)
    bare = model(image, 5)
    first, second = learned(FiLM(8, 16)), learned(CodeMoE(8, 16, experts=2))
    model.attach({"1.0": first})
    one = model(image, 5)
    model.attach({"1.0": second})
    assert model.layers == ["1.0"]
    embedding = model.embed(time_features(torch.tensor([5.0, 5.0]), 16, 50))
    h = second(first(model.network[0](image).relu(), embedding), embedding)
    torch.testing.assert_close(model(image, 5), model.network[2](h))
    model.attach({"2": FiLM(3, 16)})
    assert model.layers == ["1.0", "2"] and not torch.allclose(model(image, 5), one)
    model.detach("1.0")
    assert model.layers == ["2"] and torch.equal(model(image, 5), bare)
    model.detach()
    assert model.layers == [] and not any(module._forward_hooks for module in model.network.modules())
    assert torch.equal(model(image, 5), bare)


def test_one_timestep_makes_a_module_of_the_image_alone() -> None:
    model, image = timed(), normal(2, 3, 4, 4)
    fixed = model.at(7)
    assert torch.equal(fixed(image), model(image, 7))
    assert {id(p) for p in fixed.parameters()} == {id(p) for p in model.parameters()}


def test_a_network_that_reads_the_time_itself_is_told_it_too() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(x) + t.view(-1, 1, 1, 1)

    told, image = Told(), normal(2, 3, 4, 4)
    model = TimeConditioned(told, {"layer": FiLM(3)}, passes_time=True)
    assert torch.equal(model(image, 4), told(image, torch.tensor([4, 4])))


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def reloaded(module: TimeConditioned) -> TimeConditioned:
    other = TimeConditioned(network(), {"0": FiLM(8, 16), "1.0": CodeMoE(8, 16, experts=3)}, time_dim=16)
    result = other.load_state_dict(module.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    return other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, reloaded])
def test_a_copy_computes_the_same_and_is_on_its_own(duplicate: Callable[[Any], Any]) -> None:
    model, image = timed(), normal(2, 3, 4, 4)
    again = duplicate(model)
    expected = model(image, 5).detach()
    torch.testing.assert_close(again(image, 5), expected)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert not again(image, 5).any()
    again.detach("0")
    assert again.layers == ["1.0"] and len(again.network[0]._forward_hooks) == 0
    assert torch.equal(model(image, 5), expected) and model.layers == ["0", "1.0"]


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_compiled_network_computes_the_same(top_k: int | None) -> None:
    model = timed(top_k=top_k)
    image, t = normal(2, 3, 4, 4), torch.tensor([5, 40])
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(image, t), model(image, t), rtol=1e-4, atol=1e-5)
    compiled(image, t).square().mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(image, t).square().mean().backward()
    for one, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.network(image), model.network(image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 1])
def test_half_precision_and_autocast_give_nearly_the_same(dtype: torch.dtype, top_k: int | None) -> None:
    model, image, t = timed(top_k=top_k), normal(2, 3, 6, 6), torch.tensor([5, 40])
    expected = model(image, t).detach()
    scale = float(expected.abs().max())
    with torch.autocast("cpu", dtype):
        found = model(image, t)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float() / scale, expected / scale, rtol=0.05, atol=0.05)
    model = model.to(dtype)
    found = model(image.to(dtype), t)
    assert found.dtype == dtype and model.balance_loss().dtype == torch.float32
    torch.testing.assert_close(found.float() / scale, expected / scale, rtol=0.05, atol=0.05)
    found.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_channels_are_found_by_running_the_network() -> None:
    model = live_recogniser()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    found = channels_of(model, ["stage", "stem.0"], normal(2, 3, 7, 9))
    assert found == {"stage": 8, "stem.0": 8}
    assert [m.training for m in model.modules()] == modes and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"The layer 'head' should return \(N, C, H, W\), .* or \(N, L, C\), found \(2, 4\)"
    ):
        channels_of(model, ["stem", "head"], normal(2, 3, 8, 8))
    with pytest.raises(ValueError, match="neck"):
        channels_of(model, ["neck"], normal(2, 3, 8, 8))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Unpack(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0].mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CodeMoE(8, experts=0), "`experts` should be a whole number of at least 1, found 0"),
        (
            lambda: CodeMoE(8, experts=3, top_k=4),
            "`top_k` should be a whole number of at least 1 and at most 3, found 4",
        ),
        (
            lambda: CodeMoE(8, experts=3, top_k=0),
            "`top_k` should be a whole number of at least 1 and at most 3, found 0",
        ),
        (
            lambda: TimeConditioned(network(), {"neck": FiLM(8)}),
            "`blocks` should name layers of the network, found 'neck'; there are 0, 1, 1.0, 2",
        ),
        (lambda: TimeConditioned(network(), {"": FiLM(8)}), "`blocks` should name layers of the network, found ''"),
        (lambda: timed().detach("2"), r"`layers` should be among \['0', '1.0'\], found \['2'\]"),
        (
            lambda: timed()(normal(2, 3, 4, 4), torch.tensor([1, 2, 3])),
            r"`t` should be one timestep or 2, found shape \(3,\)",
        ),
        (
            lambda: TimeConditioned(nn.Sequential(Pair(), Unpack()), {"0": FiLM(3)})(normal(2, 3, 4, 4), 1),
            r"The layer '0' should return \(N, C, H, W\), .* or \(N, L, C\) to be conditioned, found tuple",
        ),
        (
            lambda: TimeConditioned(nn.Sequential(Pair(), Unpack()), {"1": FiLM(3)})(normal(2, 3, 4, 4), 1),
            r"The layer '1' should .* found \(2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_adapters_are_copied_after_a_call() -> None:
    adapter = CodeMoE(8, 16)
    adapter(torch.rand(2, 8, 4, 4), torch.rand(2, 16))
    assert copy.deepcopy(adapter).balance is None and adapter.balance is not None


def test_what_is_refused_changes_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    model, image = TimeConditioned(network, {"0": FiLM(8)}), torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match="nope"):
        model.detach("0", "nope")
    with pytest.raises(ValueError, match="nope"):
        model.attach({"1": FiLM(8), "nope": FiLM(8)})
    assert model.layers == ["0"] and torch.equal(model(image, 1), network(image))


@pytest.mark.parametrize("name", ["keys", "values", "items"])
def test_layers_may_have_the_names_of_methods(name: str) -> None:
    network = nn.Sequential()
    network.add_module(name, nn.Conv2d(3, 8, 1))
    model = TimeConditioned(network, {name: FiLM(8)})
    nn.init.ones_(next(model.blocks.parameters()))
    assert model.layers == [name] and not torch.equal(model(torch.rand(1, 3, 4, 4), 1), network(torch.rand(1, 3, 4, 4)))
    model.detach(name)
    assert model.layers == []


def test_what_is_put_in_the_place_of_an_experts_layer_is_called() -> None:
    class Low(nn.Module):
        def __init__(self, layer: nn.Conv2d) -> None:
            super().__init__()
            self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = 2 * self.layer(x)
            return result

    adapter, h, embedding = CodeMoE(8, 16, experts=3), torch.rand(2, 8, 5, 5), torch.rand(2, 16)
    nn.init.ones_(adapter.alpha)
    plain = adapter(h, embedding)
    handle = adapter.experts[0][0].register_forward_hook(lambda *call: call[-1])  # type: ignore[index]
    torch.testing.assert_close(adapter(h, embedding), plain)
    handle.remove()
    adapter.experts[0][0] = Low(adapter.experts[0][0])  # type: ignore[index, operator]
    assert not torch.allclose(adapter(h, embedding), plain)


def test_a_replica_of_data_parallel_is_refused() -> None:
    model = TimeConditioned(nn.Sequential(nn.Conv2d(3, 8, 1)), {"0": FiLM(8)})
    model.network[0]._is_replica = True  # as DataParallel marks the copies it runs
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        model(torch.rand(1, 3, 4, 4), 1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)
        return result


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_recomputed_without_its_timestep_is_refused(reentrant: bool) -> None:
    network = Checkpointed(reentrant)
    timed = TimeConditioned(network, {"second": FiLM(3)})
    with pytest.raises(ValueError, match="'second' should not be recomputed .* checkpoint the whole TimeConditioned"):
        timed(torch.rand(2, 3, 4, 4), torch.tensor([3, 7])).sum().backward()


def test_a_whole_network_may_be_checkpointed() -> None:
    torch.manual_seed(0)
    timed = TimeConditioned(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()), {"0": FiLM(3)})
    for parameter in timed.parameters():
        nn.init.normal_(parameter)
    t, gradients = torch.tensor([3, 7]), []
    for run in (timed, partial(checkpoint, timed, use_reentrant=True)):
        image = torch.linspace(0, 1, 96).view(2, 3, 4, 4).requires_grad_()
        run(image, t).square().sum().backward()
        gradients.append(image.grad)
    assert torch.equal(*gradients)
