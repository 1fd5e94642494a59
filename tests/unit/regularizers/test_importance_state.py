"""ParameterImportance: which parameters are charged, what is saved, and what is refused."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from restoreloss import ParameterImportance
from tests.helpers.importance import BATCH, ESTIMATORS, linear, measured, normal, shift, squared
from tests.helpers.processes import launch

WORKER = "tests/unit/regularizers/regularizers_worker.py"


def test_an_unmeasured_penalty_is_an_error() -> None:
    importance = ParameterImportance(linear())
    for call in (importance, importance.apply_, importance.begin_task):
        with pytest.raises(ValueError, match=r"not measured: call `accumulate\(loss_fn, batches\)`"):
            call()


def test_parameters_that_moved_between_two_measurements_are_an_error() -> None:
    model = linear()
    importance = ParameterImportance(model, strength=1.0)
    model.weight.data += 1  # the anchor is where the importance is measured
    importance.accumulate(squared, [BATCH])
    assert importance().item() == 0
    model.weight.data += 1
    assert importance().item() > 0
    with pytest.raises(ValueError, match=r"`weight` should be where .* has moved: call `begin_task\(\)`"):
        importance.accumulate(squared, [BATCH])


def test_importances_of_zero_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    importance = ParameterImportance(linear())
    with pytest.warns(UserWarning, match="`loss_fn` should depend on .*, found that all importances are 0"):
        importance.accumulate(squared, [torch.zeros(2, 2)])
    assert importance().item() == 0
    caplog.clear()
    measured()
    assert caplog.text == ""


def test_frozen_and_new_parameters_are_not_charged_and_missing_ones_not_missed() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 1)})
    model["b"].requires_grad_(False)
    importance = ParameterImportance(model, strength=1.0)
    importance.accumulate(lambda m, x: m["c"](m["b"](m["a"](x))).square().mean(), [normal(4, 2)])
    assert list(importance.importance()) == ["a.weight", "a.bias", "c.weight", "c.bias"]
    model["b"].requires_grad_(True)
    model["d"] = nn.Linear(1, 1)
    shift(model["b"]), shift(model["d"])
    assert importance().item() == 0
    importance.apply_()
    assert all(p.grad is None for name in "bd" for p in model[name].parameters())
    shift(model["c"])
    assert importance().item() > 0
    del model["c"]
    assert importance().item() == 0


def test_a_parameter_of_another_shape_is_an_error() -> None:
    model = linear()
    importance = measured(model)
    model.weight = nn.Parameter(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"`weight` should be of shape \(1, 2\), .* found \(1, 3\)"):
        importance()


def test_a_network_with_none_of_the_parameters_is_an_error() -> None:
    model = nn.Sequential(linear())
    importance = measured(model)
    del model[0]
    with pytest.raises(ValueError, match="`model` should have parameters that were measured, found none"):
        importance()
    with pytest.raises(ValueError, match="`model` should have parameters that were measured, found none"):
        importance.apply_()


def test_parameters_frozen_later_are_charged_and_get_no_gradient() -> None:
    model = nn.Linear(2, 1)
    importance = measured(model, strength=1.0)
    model.weight.data += 1
    charged = importance().item()
    model.weight.requires_grad_(False)
    assert importance().item() == charged
    importance.apply_()
    assert model.weight.grad is None and model.bias.grad is not None


def test_a_tied_parameter_counts_once() -> None:
    first, second = linear(), linear()
    second.weight = first.weight
    tied = nn.ModuleList([first, second])
    importance = ParameterImportance(tied, strength=1.0)
    importance.accumulate(lambda model, x: (model[0](x) + model[1](x)).square().mean(), [torch.tensor([[1.0, 0.0]])])
    # d (2 w x)^2 / dw = 8 w x^2
    assert {name: value.tolist() for name, value in importance.importance().items()} == {"0.weight": [[8.0, 0.0]]}
    first.weight.data += 0.25
    assert importance().item() == pytest.approx(8 / 4 + 0.5 * 64 / 16)


def test_the_mean_does_not_grow_with_the_network() -> None:
    penalties = []
    for copies in (1, 10):
        model = nn.ModuleList([linear() for _ in range(copies)])
        frozen = nn.Linear(50, 50).requires_grad_(False)
        model.append(frozen)
        importance = ParameterImportance(model, strength=1.0, normalize="mean")
        importance.accumulate(
            lambda model, x: sum(part(x).square().mean() for part in model[:-1]),
            [torch.tensor([[1.0, 0.0], [0.0, 2.0]])],
        )
        for part in model[:-1]:
            part.weight.data += torch.tensor([0.5, -0.25])
        penalties.append(importance().item())
    assert penalties == pytest.approx([2.125 / 2] * 2)


def test_the_longest_name_weighs_a_layer() -> None:
    model = nn.ModuleDict({name: nn.Sequential(linear(), linear()) for name in ("a", "ab", "c")})
    weights = {"": 0.5, "a": 2.0, "a.1": 3.0, "ab.0.weight": 0.0}
    importance = ParameterImportance(model, strength=1.0, layer_weights=weights)
    importance.accumulate(
        lambda model, x: sum(layer(x).square().mean() for part in model.values() for layer in part),
        [torch.tensor([[1.0, 0.0], [0.0, 2.0]])],
    )
    factors = {"a.0": 2.0, "a.1": 3.0, "ab.0": 0.0, "ab.1": 0.5, "c.0": 0.5, "c.1": 0.5}
    for name, factor in factors.items():
        weight = model.get_submodule(name).weight
        weight.data += torch.tensor([0.5, -0.25])
        assert importance().item() == pytest.approx(factor * 2.125)
        weight.data.fill_(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_half_precision_networks_importances_are_in_single(dtype: torch.dtype) -> None:
    model = linear(dtype)
    importance = ParameterImportance(model, strength=1.0)
    # the squares of these gradients leave float16
    importance.accumulate(lambda model, x: model(x).square().mean() * 2**-10, [torch.eye(2, dtype=dtype)])
    importance.half()
    value = importance.importance()["weight"]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.full((1, 2), 2.0**-10))
    model.weight.data += 0.5
    loss = importance()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(2 * (2**-11 + 2**-23), rel=1e-4)
    loss.backward()
    assert model.weight.grad is not None and model.weight.grad.dtype == dtype and bool(model.weight.grad.any())
    assert ParameterImportance(linear(torch.float64)).double().get_buffer("0/anchor/weight").dtype == torch.float64


def test_the_state_is_saved_and_loaded_with_any_number_of_tasks() -> None:
    model = linear()
    importance = measured(model, strength=1.0)
    model.weight.data += 1
    importance.begin_task()
    importance.accumulate(squared, [BATCH])
    file = io.BytesIO()
    torch.save(importance.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = nn.ModuleDict({"importance": ParameterImportance(copy.deepcopy(model), strength=1.0)})
    result = other.load_state_dict({f"importance.{name}": value for name, value in state.items()})
    assert result.missing_keys == result.unexpected_keys == []
    loaded = other["importance"]
    assert loaded.tasks == 2 and "2 samples" in repr(loaded)
    assert loaded().item() == importance().item() > 0
    fresh = ParameterImportance(copy.deepcopy(model), strength=1.0)
    fresh.accumulate(squared, [BATCH])
    loaded.load_state_dict(fresh.state_dict())  # and back to one
    assert loaded.tasks == 1 and loaded().item() == 0


def test_what_wraps_the_network_leaves_no_trace_in_names() -> None:
    def model() -> nn.Module:
        return nn.Sequential(linear(), nn.Sequential(linear()))

    def loss(model: Any, x: Tensor) -> Tensor:
        return sum((part(x).square().mean() for part in model), torch.zeros(()))

    plain = ParameterImportance(model(), strength=1.0)
    plain.accumulate(loss, [torch.eye(2)])
    inside = model()
    inside[1] = torch.compile(inside[1], backend="eager")
    wrapped: list[nn.Module] = [torch.compile(model(), backend="eager"), nn.DataParallel(model()), inside]
    wrapped.append(nn.DataParallel(torch.compile(model(), backend="eager")))
    for network in wrapped:
        importance = ParameterImportance(network, strength=1.0)
        assert importance.state_dict().keys() == {k for k in plain.state_dict() if "importance" not in k}
        importance.load_state_dict(plain.state_dict())
        assert list(importance.importance()) == ["0.weight", "1.0.weight"]
        assert importance().item() == 0
        for parameter in network.parameters():
            parameter.data += 0.5
        assert importance().item() == pytest.approx(4 * (0.5 + 0.5 * 0.25), rel=1e-5)


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_charges_the_copy_of_the_network(duplicate: Callable[[Any], Any]) -> None:
    model = linear()
    again, importance = duplicate((model, measured(model, strength=1.0)))
    model.weight.data += 1
    assert importance().item() == 0
    again.weight.data += torch.tensor([0.5, -0.25])
    assert importance().item() == 2.125


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "net"}, "`model` should be a module, found 'net'"),
        ({"estimator": "l2"}, "`estimator` should be one of .* found 'l2'"),
        ({"normalize": "max"}, "`normalize` should be one of .'sum', 'mean'., found 'max'"),
        ({"strength": -1.0}, "`strength` should be a finite number of at least 0, found -1"),
        ({"strength": float("nan")}, "`strength` should be a finite number of at least 0"),
        ({"strength": "1e-3"}, "`strength` should be .* found '1e-3' .YAML reads 1e-3 as text"),
        ({"strength": True}, "`strength` should be .* found True"),
        ({"strength": None}, "`strength` should be .* found None"),
        ({"chunk_size": 0}, "`chunk_size` should be a whole number of at least 1, found 0"),
        ({"chunk_size": "32"}, "`chunk_size` should be a whole number of at least 1, found '32'"),
        ({"chunk_size": 2.5}, "`chunk_size` should be a whole number of at least 1, found 2.5"),
        ({"model": nn.Linear}, "`model` should be a module, found the class Linear .an instance is needed"),
        ({"mode": "training"}, "`mode` should be one of .'eval', 'train', 'keep'., found 'training'"),
        ({"layer_weights": {"a": -1.0}}, r"`layer_weights\['a'\]` should be a finite number of at least 0, found -1.0"),
        ({"layer_weights": {"a": "1e-3"}}, r"`layer_weights\['a'\]` should be a finite number .* found '1e-3'"),
        ({"layer_weights": ["a"]}, "`layer_weights` should be a mapping of names to numbers, found list"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterImportance(**{"model": linear(), **arguments})


def test_two_processes_measure_what_one_does() -> None:
    done = launch(WORKER, "importance")
    for estimator in ESTIMATORS[:3]:
        assert f"{estimator}: equal" in done.stdout, done.stderr[-3000:]


class Slashed(nn.Module):
    """Parameters whose names hold what their buffers may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.blocks = nn.ModuleDict({"decoders/0": nn.Linear(2, 2), "100%2F": nn.Linear(2, 1)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks["100%2F"](self.blocks["decoders/0"](self.first(x)))
        return result


def test_every_name_of_a_parameter_is_found_again() -> None:
    model = Slashed()
    importance = ParameterImportance(model, strength=1.0)
    importance.accumulate(squared, [normal(4, 2)])
    assert set(importance.importance()) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        before = importance().item()
        with torch.no_grad():
            parameter += 0.5
        assert importance().item() > before, name
    again = ParameterImportance(model, strength=1.0)
    again.load_state_dict(importance.state_dict())
    assert again().item() == importance().item()


@pytest.mark.filterwarnings("ignore:.*meta parameter")
def test_what_was_measured_is_loaded_to_where_the_network_is() -> None:
    importance = measured(linear())
    elsewhere = ParameterImportance(linear().to("meta"))
    elsewhere.load_state_dict(importance.state_dict())
    assert {buffer.device.type for buffer in elsewhere.buffers()} == {"meta"}


def test_an_attached_importance_is_pickled_and_its_copy_is_attached_to_nothing() -> None:
    importance = measured(model := linear(), strength=1.0)
    model.weight.data += 1
    importance.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for twin in (pickle.loads(pickle.dumps(importance)), copy.deepcopy(importance)):
        assert twin().item() == importance().item() > 0
        own = next(module for module in twin._model)
        twin.attach(torch.optim.SGD(own.parameters(), lr=0.1))


def test_the_mean_is_over_parameters_of_all_tasks() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 1, bias=False)})
    model["b"].requires_grad_(False)
    both = [ParameterImportance(model, strength=1.0, normalize=kind) for kind in ("sum", "mean")]
    for importance in both:
        importance.accumulate(lambda m, x: m["b"](m["a"](x)).square().mean(), [normal(4, 2)])
    model["b"].requires_grad_(True)
    for importance in both:
        importance.begin_task()
        importance.accumulate(lambda m, x: m["b"](m["a"](x)).square().mean(), [normal(4, 2)])
    shift(model["a"]), shift(model["b"])
    total, mean = (importance() for importance in both)
    torch.testing.assert_close(mean, total / 6)
