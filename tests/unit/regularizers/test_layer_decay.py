"""Is depth that of the computation, and does generation reach no further than it may?"""

import copy
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from restoreloss.regularizers.layer_decay import add_gradients, execution_order, layer_of, layer_weights, shallow
from tests.helpers.processes import launch


class Backwards(nn.Module):
    """Defined in another order than it runs in; one layer runs twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.idle = nn.Linear(2, 2)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.stem = nn.Linear(3, 4)
        self.fails = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        assert not torch.is_grad_enabled() or self.training
        x = self.body(self.stem(x)) * scale
        if self.fails:
            raise RuntimeError("out of memory, say")
        return self.head(self.body[0](x))


def network() -> Backwards:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Backwards()


def rows() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


ORDER = ["stem", "body.0", "body.1", "head"]


def test_the_order_is_that_of_execution_and_not_of_definition(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    assert next(name for name, _ in model.named_parameters()) == "head.weight"
    with caplog.at_level(logging.WARNING):
        assert execution_order(model, rows()) == ORDER
    assert "did not run, and have no depth: idle" in caplog.text


def test_blocks_may_be_chosen() -> None:
    assert execution_order(network(), rows(), 2.0, blocks=["head", "body", "stem"]) == ["stem", "body", "head"]
    assert execution_order(network(), rows(), blocks=iter(["head", "stem"])) == ["stem", "head"]


def test_wrappers_do_not_show_in_the_names() -> None:
    assert execution_order(nn.DataParallel(network()), rows()) == ORDER
    assert execution_order(torch.compile(network(), backend="eager"), rows()) == ORDER


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(fails: bool) -> None:
    model = network()
    model.body[2].eval()
    model.stem.requires_grad_(False)
    model.fails = fails
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            execution_order(model, rows())
    else:
        execution_order(model, rows())
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_names_that_are_none_and_blocks_that_never_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`blocks` should name submodules, found \['neck'\]; there are \['head'"):
        execution_order(network(), rows(), blocks=["stem", "neck"])
    with pytest.raises(ValueError, match=r"`blocks` should name some that run in mode 'eval', found \['idle'\]"):
        execution_order(network(), rows(), blocks=["idle"])


@pytest.mark.parametrize(("t", "deepest"), [(4, 0.8187), (20, 0.3679), (47, 0.0954), (50, 0.0821), (0, 1.0)])
def test_weights_fall_to_the_closed_form_with_depth(t: int, deepest: float) -> None:
    weights = layer_weights(ORDER, t)
    assert list(weights) == ORDER and weights["stem"] == 1.0
    assert weights["head"] == pytest.approx(deepest, abs=5e-5)
    assert [*weights.values()] == pytest.approx([math.exp(-0.05 * t * n / 3) for n in range(4)])


def test_the_rate_is_that_of_the_exponent_and_one_layer_is_shallow() -> None:
    assert layer_weights(["a", "b"], 2, rate=0.5) == pytest.approx({"a": 1.0, "b": math.exp(-1)})
    assert layer_weights(["a"], 50) == {"a": 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 5), "`order` should name at least one layer"),
        (("stem", 5), "`order` should be a list of names, .* found 'stem'"),
        ((nn.Linear(2, 1), 5), "`order` should be a list of names, .* found a Linear"),
        ((["a"], -1), "`timestep` should be a finite number of at least 0, found -1"),
        ((["a"], "5"), "`timestep` should be a finite number of at least 0, found '5'"),
        ((["a"], None), "`timestep` should be .* found None"),
    ],
)
def test_weights_that_cannot_be_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_weights(*arguments)
    with pytest.raises(ValueError, match=r"`rate` should be a finite number of at least 0, found -0.1"):
        layer_weights(["a"], 5, rate=-0.1)
    with pytest.raises(ValueError, match="`rate` should be .* found '1e-3' .YAML reads"):
        layer_weights(["a"], 5, rate="1e-3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: execution_order(Backwards, rows()), "`model` should be a module, found the class Backwards"),
        (lambda: execution_order(network(), rows(), blocks="stem"), "`blocks` should be a list of names"),
        (lambda: execution_order(network(), rows(), mode="test"), "`mode` should be one of .'eval', 'train', 'keep'."),
        (lambda: shallow("net", ORDER), "`model` should be a module, found 'net'"),
        (lambda: shallow(network(), "stem"), "`order` should be a list of names"),
        (lambda: shallow(network(), ORDER, "0.5"), "`share` should be within .* found '0.5'"),
        (lambda: shallow(network(), ORDER, True), "`share` should be within .* found True"),
        (lambda: add_gradients(1.0, network(), {"head": 1}), "`loss` should be a scalar .* found 1.0"),
        (lambda: add_gradients(torch.ones(()), network(), {"head": 1}), "`loss` should be .* without a graph"),
        (lambda: add_gradients(torch.ones((), requires_grad=True), [], {}), "`model` should be a module, found list"),
        (
            lambda: add_gradients(torch.ones((), requires_grad=True), network(), ["head"]),
            "`weights` should be a mapping of layers to numbers, found list",
        ),
        (
            lambda: add_gradients(torch.ones((), requires_grad=True), network(), {"head": "1e-3"}),
            r"`weights\['head'\]` should be a finite number, found '1e-3'",
        ),
    ],
)
def test_what_is_no_network_order_or_number_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (1, ["stem"]),
        (2, ["stem", "body.0"]),
        (0.25, ["stem"]),
        (0.26, ["stem", "body.0"]),
        (0.5, ["stem", "body.0"]),
        (1.0, ORDER),
        (4, ORDER),
        (1e-9, ["stem"]),
    ],
)
def test_a_share_or_a_number_of_layers_is_shallow(share: float, names: list[str]) -> None:
    model = network()
    found = {id(p) for p in shallow(model, ORDER, share)}
    assert found == {id(p) for name in names for p in model.get_submodule(name).parameters()}
    assert len(shallow(model, ORDER, share)) == len(found)


def test_half_of_the_layers_are_shallow_unless_said_otherwise() -> None:
    model = network()
    assert {id(p) for p in shallow(model, ORDER)} == {id(p) for p in shallow(model, ORDER, 2)}
    assert {id(p) for p in shallow(nn.DataParallel(model), ORDER)} == {id(p) for p in shallow(model, ORDER, 2)}


def test_a_layer_within_another_belongs_to_itself() -> None:
    model = network()
    assert {id(p) for p in shallow(model, ["body", "body.1"], 1)} == {id(p) for p in model.body[0].parameters()}
    assert {id(p) for p in shallow(model, ["", "stem", "head", "body"], 1)} == {id(p) for p in model.idle.parameters()}


def test_a_name_that_begins_alike_is_another_layer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "ab": nn.Linear(1, 1)})
    assert {id(p) for p in shallow(model, ["a"], 1)} == {id(p) for p in model["a"].parameters()}


def test_frozen_parameters_are_not_shallow() -> None:
    model = network()
    model.stem.weight.requires_grad_(False)
    assert [id(p) for p in shallow(model, ORDER, 1)] == [id(model.stem.bias)]
    model.stem.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\['stem'\] should have parameters that require a gradient, found none"):
        shallow(model, ORDER, 1)


@pytest.mark.parametrize("share", [0, 0.0, -0.5, 1.5, 5, -1])
def test_a_share_that_there_is_not_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"`share` should be within \(0, 1\] or 1 to 4 layers, found"):
        shallow(network(), ORDER, share)


@pytest.mark.parametrize("held", [False, True])
def test_every_layer_gets_its_share_of_the_gradient_and_others_exactly_nothing(held: bool) -> None:
    model = network().double()
    model.body[2].eval()
    model.body[0].bias.requires_grad_(False)
    loss = lambda: model(rows().double()).square().mean()  # noqa: E731
    names = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("idle")]
    full = dict(zip(names, torch.autograd.grad(loss(), [model.get_parameter(n) for n in names]), strict=True))
    for p in model.parameters():
        p.grad = torch.ones_like(p) if held else None
    add_gradients(loss(), model, {"stem": 0.5, "body": 0.25, "body.1": 2.0, "head": 0.0, "idle": 1.0})
    factors = {"stem": 0.5, "body.0": 0.25, "body.1": 2.0}
    for name, p in model.named_parameters():
        factor = factors.get(name.rpartition(".")[0])
        if factor is None or name == "body.0.bias":
            assert p.grad is None or (held and bool((p.grad == 1).all()))
            assert held == (p.grad is not None)
        else:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, held + factor * full[name])


def test_the_graph_is_kept_where_it_is_asked_for() -> None:
    model = network()
    loss = model(rows()).square().mean()
    add_gradients(loss, model, {"stem": 1.0}, retain_graph=True)
    add_gradients(loss, nn.DataParallel(model), {"stem": 1.0})
    with pytest.raises(RuntimeError, match="second time"):
        add_gradients(loss, model, {"stem": 1.0})


@pytest.mark.parametrize("weights", [{}, {"neck": 1.0}, {"head": 0.0}])
def test_weights_that_reach_no_parameter_are_refused(weights: dict[str, float]) -> None:
    model = network()
    with pytest.raises(ValueError, match="`weights` should name layers with parameters that require a gradient"):
        add_gradients(model(rows()).sum(), model, weights)


def test_layers_inside_one_that_ran_belong_to_it(caplog: pytest.LogCaptureFixture) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner, self.idle = nn.Parameter(torch.ones(())), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * nn.functional.linear(x, self.inner.weight, self.inner.bias)

    assert execution_order(nn.Sequential(Outer()), torch.zeros(1, 2)) == ["0"]
    assert "did not run" not in caplog.text


def test_a_compiled_block_is_a_layer_like_others() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 1))

    plain, compiled = network(), network()
    compiled[1] = torch.compile(compiled[1], backend="eager")  # type: ignore[assignment]
    x = torch.rand(3, 2)
    order = execution_order(compiled, x)
    assert order == execution_order(plain, x) == ["0", "1.0", "2"]
    assert len(shallow(compiled, order, 2)) == len(shallow(plain, order, 2)) == 4
    for model in (plain, compiled):
        add_gradients(model(x).sum(), model, layer_weights(order, 20))
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


def test_two_processes_add_the_mean_of_their_gradients() -> None:
    done = launch("tests/unit/regularizers/regularizers_worker.py", "layers")
    assert done.stdout.count("layers: equal") == 2, done.stderr[-3000:]


@given(st.text("ab.", max_size=12), st.sets(st.text("ab.", max_size=6)))
def test_the_longest_name_that_fits_is_the_layer(name: str, layers: set[str]) -> None:
    fitting = [layer for layer in layers if layer == "" or name == layer or name.startswith(f"{layer}.")]
    assert layer_of(name, layers) == (max(fitting, key=len) if fitting else None)
