"""Is the importance that of the parameters which train, in networks that compute otherwise in eval mode?"""

import copy
import importlib
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss import ParameterImportance
from restoreloss.frozen import in_mode
from restoreloss.regularizers.layer_decay import execution_order


class Fused(nn.Module):
    """Two linear layers while it trains, and their product, kept beside them, in eval mode: as SPAN does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fused = (nn.Linear(2, 2, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            result: Tensor = self.two(self.one(x))
            return result
        self.fused.weight.data = self.two.weight.detach() @ self.one.weight.detach()
        return F.linear(x, self.fused.weight)


def squared(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0))


def network() -> Fused:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Fused()


def test_in_train_mode_the_importance_is_that_of_the_parameters_that_train() -> None:
    model = network().eval()
    importance = ParameterImportance(model, strength=1.0, mode="train")
    with pytest.warns(UserWarning, match="`fused.weight`.*does not depend on them in train mode"):
        importance.accumulate(squared, [rows()])
    assert not model.training and not model.one.training
    found, by_hand = importance.importance(), copy.deepcopy(model).train()
    expected = {"one.weight": torch.zeros(2, 2), "two.weight": torch.zeros(2, 2)}
    for row in rows():
        loss = by_hand(row[None]).square().mean()
        one, two = torch.autograd.grad(loss, [by_hand.one.weight, by_hand.two.weight])
        expected["one.weight"] += one.abs() / 5
        expected["two.weight"] += two.abs() / 5
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    model.one.weight.data += 1
    assert importance().item() > 0


def test_parameters_that_get_exactly_nothing_are_named_once_with_the_way_out() -> None:
    model = network()
    importance = ParameterImportance(model, strength=1.0)
    with pytest.warns(UserWarning, match="exactly 0") as told:
        importance.accumulate(squared, [rows()])
    (message,) = [str(warning.message) for warning in told]
    assert "`one.weight`, `two.weight` (67% of the numbers" in message and 'mode="train"' in message
    assert told[0].filename == __file__
    again = ParameterImportance(network(), mode="keep")
    with pytest.warns(UserWarning, match="exactly 0"):
        again.accumulate(squared, [rows()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.accumulate(squared, [rows()])
        whole = ParameterImportance(nn.Sequential(nn.Linear(2, 2)))
        whole.accumulate(squared, [rows()])


def test_an_empty_parameter_is_not_called_unimportant() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("empty", nn.Parameter(torch.ones(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importance = ParameterImportance(model)
        importance.accumulate(squared, [rows()])
    assert importance().item() == 0


class Remembering(nn.Module):
    """What a network keeps of a pass in train mode: batch statistics, counts, and the vectors of spectral_norm."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.norm, self.instance = nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True)
        self.last, self.traceable = nn.Conv2d(2, 2, 1), traceable
        if not traceable:
            self.last = nn.utils.parametrizations.spectral_norm(self.last)

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable:
            x.numpy(force=True)  # not under vmap
        result: Tensor = self.last(self.instance(self.norm(x)).tanh())
        return result


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize(("mode", "training"), [("train", False), ("keep", True)])
def test_statistics_do_not_move_and_normalize_each_sample_by_itself(mode: Any, training: bool, traceable: bool) -> None:
    model = Remembering(traceable).train(training)
    model.instance.train(not training)
    modes = [module.training for module in model.modules()]
    images = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    importance = ParameterImportance(model, mode=mode)
    importance.accumulate(squared, [images])
    assert importance._one_by_one != traceable
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    by_hand = copy.deepcopy(model)
    if mode == "train":
        by_hand.train()
    name, parameter = list(by_hand.named_parameters())[-1]
    expected = torch.zeros_like(parameter)
    for image in images:
        by_hand.load_state_dict(before)
        expected += torch.autograd.grad(by_hand(image[None]).square().mean(), parameter)[0].abs() / 3
    torch.testing.assert_close(importance.importance()[name], expected, rtol=1e-3, atol=1e-6)


def test_modes_and_statistics_are_put_back_after_an_exception() -> None:
    model = Remembering(True).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="expected input"), in_mode(model, "train"):
        model.norm(torch.rand(2, 2, 4, 4)), model.last(torch.rand(2, 3, 4, 4))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train()(torch.rand(2, 2, 4, 4))
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])  # it counts again


class WritesOver(nn.Module):
    """In eval mode it writes over the input of its convolution, as PLKSR does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            return torch.cat([self.conv(x[:, :2]), x[:, 2:]], dim=1)
        x[:, :2] = self.conv(x[:, :2])
        return x


@pytest.mark.parametrize("estimator", ["taylor2", "mas", "gn"])
def test_a_network_that_writes_over_what_its_gradient_needs_is_measured_in_both_modes(estimator: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WritesOver()
    images = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for mode in ("eval", "train"):
        importance = ParameterImportance(model, estimator=estimator, mode=mode)
        loss_fn = squared if estimator == "taylor2" else lambda model, batch: model(batch)
        importance.accumulate(loss_fn, [images], generator=torch.Generator().manual_seed(0))
        found.append(importance.importance())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert all(bool(value.any()) for value in found[0].values())


@pytest.mark.parametrize("kind", ["SPAN", "PLKSR", "RealPLKSR"])
def test_networks_of_spandrel_are_measured_and_their_penalty_moves(kind: str) -> None:
    """`mode="train"` measures what trains; PLKSR can be measured in both modes."""
    architectures = pytest.importorskip("spandrel.architectures")
    module = importlib.import_module(f"{architectures.__name__}.{'SPAN' if kind == 'SPAN' else 'PLKSR'}")
    if kind == "SPAN":
        model = module.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=4, upscale=1)
    elif kind == "PLKSR":
        model = module.PLKSR(dim=8, n_blocks=1, upscaling_factor=1, kernel_size=3)
    else:
        model = module.RealPLKSR(dim=8, n_blocks=1, upscaling_factor=1, kernel_size=3, dropout=0.0)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for mode in ("train", "eval"):
        importance = ParameterImportance(model, strength=1.0, mode=mode)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            importance.accumulate(squared, [images])
        assert any("exactly 0" in str(warning.message) for warning in told) == (kind == "SPAN")
        trained = [(name, p) for name, p in model.named_parameters() if "eval_conv" not in name]
        zero = sum(float((importance.importance()[name] == 0).sum()) for name, _ in trained)
        share = zero / sum(p.numel() for _, p in trained)
        assert share > 0.5 if kind == "SPAN" and mode == "eval" else share < 0.1, (kind, mode, share)


def test_execution_order_sees_the_blocks_of_the_mode() -> None:
    model = network()
    assert execution_order(model, rows(), blocks=["two", "one"], mode="train") == ["one", "two"]
    assert execution_order(model, rows(), blocks=["two", "one"], mode="keep") == ["one", "two"]
    with pytest.raises(ValueError, match=r"run in mode 'eval', found \['two', 'one'\]"):
        execution_order(model, rows(), blocks=["two", "one"])
    assert model.training
    remembering = Remembering(True).eval()
    before = copy.deepcopy(remembering.state_dict())
    assert execution_order(remembering, torch.rand(2, 2, 4, 4), mode="train") == ["norm", "last"]
    assert not remembering.training
    assert all(torch.equal(value, before[name]) for name, value in remembering.state_dict().items())


def test_a_grown_head_is_an_error_that_says_how_to_go_on() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    importance = ParameterImportance(model, strength=1.0)
    importance.accumulate(squared, [rows()])
    model[1] = nn.Linear(2, 3)
    for call in (importance, importance.apply_, lambda: importance.accumulate(squared, [rows()])):
        with pytest.raises(
            ValueError, match=r"`1.weight` should be of shape \(1, 2\).*found \(3, 2\).*layer_weights ="
        ):
            call()
    importance.layer_weights = {"1": 0}
    assert importance().item() == 0
    model[0].weight.data += 1
    penalty = importance()
    penalty.backward()
    assert penalty.item() > 0 and model[1].weight.grad is None
    importance.layer_weights = {"": 0.0}
    nothing = importance()
    nothing.backward()
    assert nothing.item() == 0
    with pytest.raises(ValueError, match=r"`layer_weights\['0'\]` should be a finite number of at least 0, found '1'"):
        importance.layer_weights = {"0": "1"}  # type: ignore[dict-item]


class Wrapper:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model: None, "`optimizer` should be an optimizer of torch, found None"),
        (lambda model: torch.optim.SGD, "`optimizer` should be .* found the class SGD"),
        (lambda model: Wrapper(torch.optim.SGD(model.parameters())), "should be the SGD itself, found a wrapper"),
    ],
)
def test_a_penalty_is_attached_to_an_optimizer_of_torch(build: Any, message: str) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=message):
        ParameterImportance(model).attach(build(model))


def test_a_seed_is_no_generator() -> None:
    importance = ParameterImportance(nn.Linear(2, 1), estimator="gn")
    with pytest.raises(ValueError, match=r"`generator` should be a torch.Generator, found 0"):
        importance.accumulate(lambda model, batch: model(batch), [rows()], generator=0)  # type: ignore[arg-type]


# L2-SP


def test_l2sp_holds_all_parameters_alike_without_a_measurement() -> None:
    model = nn.Linear(3, 2).double()
    model.bias.requires_grad_(False)
    importance = ParameterImportance(model, estimator="l2sp", strength=0.3, layer_weights={"weight": 2.0})
    assert importance().item() == 0
    moved = torch.arange(6, dtype=torch.float64).view(2, 3)
    with torch.no_grad():
        model.weight += moved
        model.bias += 5  # frozen: not held
    penalty = importance()
    torch.testing.assert_close(penalty, 0.3 * 2 * 0.5 * moved.square().sum())
    penalty.backward()
    torch.testing.assert_close(model.weight.grad, 0.3 * 2 * moved)
    resumed = ParameterImportance(nn.Linear(3, 2).double(), estimator="l2sp", strength=0.3)
    resumed.load_state_dict(importance.state_dict())
    torch.testing.assert_close(resumed.importance()["weight"], torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="`estimator` should be another one to measure with, found 'l2sp'"):
        importance.accumulate(lambda net, batch: net(batch).sum(), [torch.ones(1, 3).double()])


def test_an_optimizer_is_attached_to_once_and_holds_the_network() -> None:
    model = nn.Linear(3, 2)
    importance = ParameterImportance(model, estimator="l2sp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = importance.attach(optimizer)
    with pytest.raises(ValueError, match="`optimizer` should be attached to once, found that it is"):
        importance.attach(optimizer)
    handle.remove()
    importance.attach(optimizer)
    with pytest.raises(ValueError, match="`optimizer` should hold parameters of `model`"):
        importance.attach(torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1))


def test_each_of_two_optimizers_charges_its_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    importance = ParameterImportance(model, estimator="l2sp", strength=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.25) for layer in model]
    for optimizer in optimizers:
        importance.attach(optimizer)
    for optimizer in optimizers:
        optimizer.step()
    for parameter, start in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), start + 0.75)  # a gradient of 1, once
