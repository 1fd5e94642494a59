"""Wrong uses of what keeps fine-tuning from undoing what pre-training taught."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restoreloss import GradientOrthogonality, ParameterImportance
from restoreloss.regularizers.layer_decay import add_gradients, execution_order, layer_of, layer_weights, shallow
from tests.contract.wrong_uses.table import wrong
from tests.contract.wrong_uses.things import ARRAY, NOT_NUMBERS, NOT_WHOLE, clean, restorer, seeded

NOT_MODULES: dict[str, Any] = {
    "None": None, "a class": nn.Linear, "text": "model.pth", "parameters": list(restorer().parameters()), "a list": [restorer()],
    "a function": lambda x: x, "a state dict": restorer().state_dict(), "an array": ARRAY,
}  # fmt: skip
ORDER = ["0", "2"]


def two() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))


def mean(model: Any, batch: Any) -> Tensor:
    return model(batch).square().mean()


def measured(**options: Any) -> ParameterImportance:
    importance = ParameterImportance(two(), **options)
    importance.accumulate(mean, [clean()])
    return importance


def moved() -> ParameterImportance:
    model = two()
    importance = ParameterImportance(model)
    importance.accumulate(mean, [clean()])
    model[0].weight.data.add_(1)
    return importance


def grown() -> ParameterImportance:
    model = two()
    importance = ParameterImportance(model)
    importance.accumulate(mean, [clean()])
    model[2] = nn.Conv2d(4, 5, 3)
    return importance


def renamed() -> ParameterImportance:
    model = two()
    importance = ParameterImportance(model)
    importance.accumulate(mean, [clean()])
    other = nn.ModuleDict({"other": nn.Conv2d(3, 3, 1)})
    importance._model = (other,)
    return importance


def losses(network: nn.Module) -> tuple[Tensor, Tensor]:
    return network(clean()).square().mean(), network(clean()).abs().pow(3).mean()


def orthogonal(method: Any) -> Any:
    network = two()
    return method(GradientOrthogonality(network.parameters()), network, *losses(network))


BAD_LOSSES: dict[str, Any] = {
    "a float": 0.5, "None": None, "an image": clean().requires_grad_(), "without a graph": clean().mean(), "a mapping": {"a": clean().mean()},
    "a list of floats": [0.5], "text": "0.5", "nothing": [], "a function": lambda: 0.5, "a class": Tensor,
}  # fmt: skip

WRONG = [
    *(wrong("ParameterImportance", f"{k} for the model", partial(ParameterImportance, v), "`model`") for k, v in NOT_MODULES.items()),
    wrong("ParameterImportance", "an unknown estimator", lambda: ParameterImportance(two(), estimator="ewc"), "`estimator`"),
    wrong("ParameterImportance", "an unknown normalize", lambda: ParameterImportance(two(), normalize="max"), "`normalize`"),
    wrong("ParameterImportance", "an unknown mode", lambda: ParameterImportance(two(), mode=True), "`mode`"),
    wrong("ParameterImportance", "an estimator in a list", lambda: ParameterImportance(two(), estimator=["mas"]), "`estimator`"),
    *(wrong("ParameterImportance", f"strength={k}", partial(ParameterImportance, two(), strength=v), "`strength`") for k, v in NOT_NUMBERS.items()),
    *(wrong("ParameterImportance", f"chunk_size={k}", partial(ParameterImportance, two(), chunk_size=v), "`chunk_size`") for k, v in NOT_WHOLE.items()),
    *(wrong("ParameterImportance", f"layer_weights={v!r}", partial(ParameterImportance, two(), layer_weights=v), "layer_weights") for v in ([1.0], 2.0, "0", {"0": "1"}, {"0": -1}, {"0": None}, {"0": float("nan")}, {"0": True})),
    wrong("ParameterImportance", "layer_weights of layers that are not there", lambda: ParameterImportance(two(), layer_weights={"encoder": 0.0}), "`layer_weights`", "encoder", by=Warning),
    wrong("ParameterImportance", "layer_weights set to a list", lambda: setattr(ParameterImportance(two()), "layer_weights", [1]), "`layer_weights`"),
    wrong("ParameterImportance", "an unknown option", lambda: ParameterImportance(two(), weight=1.0), "weight", by=TypeError),
    wrong("ParameterImportance", "not measured", lambda: ParameterImportance(two())(), "accumulate"),
    wrong("ParameterImportance", ".apply_ not measured", lambda: ParameterImportance(two()).apply_(), "accumulate"),
    *(wrong("ParameterImportance", f".begin_task(decay={v!r})", partial(lambda v: measured().begin_task(decay=v), v), "`decay`") for v in (1.5, -0.5, "0.9", True, float("nan"), [0.9])),
    wrong("ParameterImportance", ".begin_task not measured", lambda: ParameterImportance(two()).begin_task(), "accumulate"),
    wrong("ParameterImportance", "a call with a loss", lambda: measured()(clean()), "argument", by=TypeError),
    *(wrong("ParameterImportance", f".accumulate with {k} for loss_fn", partial(lambda v: ParameterImportance(two()).accumulate(v, [clean()]), v), "`loss_fn`") for k, v in {"None": None, "a class": nn.L1Loss, "a loss": nn.L1Loss(), "the network": two(), "a function of one": lambda batch: batch.mean(), "text": "mse", "a loss value": clean().mean()}.items()),
    *(wrong("ParameterImportance", f".accumulate of {k}", partial(lambda v: ParameterImportance(two()).accumulate(mean, v), v), "`batches`") for k, v in {"one batch": clean(), "nothing": [], "None": None, "a mapping": {"a": clean()}, "text": "folder", "a number": 10, "paths": ["a.png"], "numbers": [1, 2], "arrays": [ARRAY], "empty batches": [clean(0, 3, 8, 8)]}.items()),
    *(wrong("ParameterImportance", f".accumulate with a loss that is {k}", partial(lambda v: ParameterImportance(two()).accumulate(v, [clean()]), v), "loss_fn") for k, v in {"a float": lambda m, b: 0.5, "an image": lambda m, b: m(b), "None": lambda m, b: None, "a mapping": lambda m, b: {"a": m(b).mean()}}.items()),
    wrong("ParameterImportance", ".accumulate with a loss without a graph", lambda: ParameterImportance(two()).accumulate(lambda m, b: b.mean(), [clean()]), "`loss_fn`", by=Warning),
    wrong("ParameterImportance", ".accumulate of NaN", lambda: ParameterImportance(two()).accumulate(lambda m, b: m(b).mean() * float("nan"), [clean()]), "finite"),
    wrong("ParameterImportance", ".accumulate of a frozen network", lambda: ParameterImportance(two().requires_grad_(False)).accumulate(mean, [clean()]), "`model`"),
    wrong("ParameterImportance", ".accumulate after a move", lambda: moved().accumulate(mean, [clean()]), "begin_task"),
    *(wrong("ParameterImportance", f".accumulate with generator={k}", partial(lambda v: ParameterImportance(two(), estimator="gn").accumulate(lambda m, b: m(b), [clean()], generator=v), v), "`generator`") for k, v in {"0": 0, "a list": [seeded()] * 2, "text": "0"}.items()),
    wrong("ParameterImportance", "a grown head", lambda: grown()(), "2.weight"),
    wrong("ParameterImportance", "a grown head, .apply_", lambda: grown().apply_(), "2.weight"),
    wrong("ParameterImportance", "measured on another network", lambda: renamed()(), "another network"),
    wrong("ParameterImportance", ".apply_ measured on another network", lambda: renamed().apply_(), "another network"),
    wrong("ParameterImportance", ".importance of a task that was not", lambda: measured().importance(3), "`task`"),
    wrong("ParameterImportance", ".importance of a name", lambda: measured().importance("0.weight"), "`task`"),
    *(wrong("ParameterImportance", f".attach({k})", partial(lambda v: measured().attach(v), v), "`optimizer`") for k, v in {"None": None, "a class": torch.optim.Adam, "parameters": [1], "the network": two(), "text": "adam"}.items()),
    # --- gradients
    *(wrong("GradientOrthogonality", f"{k} for the parameters", partial(GradientOrthogonality, v), "`parameters`") for k, v in {"a network": two(), "None": None, "nothing": [], "one parameter": two()[0].weight, "names": ["0.weight"], "networks": [two()], "a class": nn.Conv2d, "text": "all", "a frozen network's": list(two().requires_grad_(False).parameters()), "named": list(two().named_parameters()), "a state dict": two().state_dict(), "arrays": [ARRAY], "buffers": [clean()]}.items()),
    *(wrong("GradientOrthogonality", f"gamma={k}", partial(GradientOrthogonality, two().parameters(), gamma=v), "`gamma`") for k, v in NOT_NUMBERS.items()),
    wrong("GradientOrthogonality", "an unknown mode", lambda: GradientOrthogonality(two().parameters(), mode="full"), "`mode`"),
    wrong("GradientOrthogonality", "an unknown option", lambda: GradientOrthogonality(two().parameters(), policy="full"), "policy", by=TypeError),
    *(wrong("GradientOrthogonality", f"generation that is {k}", partial(lambda v: orthogonal(lambda o, n, a, b: o(v, b)), v), "`generation`") for k, v in BAD_LOSSES.items()),
    *(wrong("GradientOrthogonality", f"reconstruction that is {k}", partial(lambda v: orthogonal(lambda o, n, a, b: o(a, v)), v), "`reconstruction`") for k, v in BAD_LOSSES.items()),
    *(wrong("GradientOrthogonality", f".project of generation that is {k}", partial(lambda v: orthogonal(lambda o, n, a, b: o.project(v, b)), v), "`generation`") for k, v in BAD_LOSSES.items()),
    *(wrong("GradientOrthogonality", f".project of reconstruction that is {k}", partial(lambda v: orthogonal(lambda o, n, a, b: o.project(a, v)), v), "`reconstruction`") for k, v in BAD_LOSSES.items()),
    wrong("GradientOrthogonality", "one loss", lambda: orthogonal(lambda o, n, a, b: o(a)), "reconstruction", by=TypeError),
    wrong("GradientOrthogonality", "a loss of another network", lambda: orthogonal(lambda o, n, a, b: o(two()(clean()).mean(), b)), "generation"),
    wrong("GradientOrthogonality", ".project several losses", lambda: orthogonal(lambda o, n, a, b: o.project([a, a], b)), "`generation`"),
    *(wrong("GradientOrthogonality", f".project(weight={v!r})", partial(lambda v: orthogonal(lambda o, n, a, b: o.project(a, b, weight=v)), v), "`weight`") for v in ("1", -1.0, None, [1.0], float("nan"), True, ["1"] * 4)),
    wrong("GradientOrthogonality", ".project by an unknown policy", lambda: orthogonal(lambda o, n, a, b: o.project(a, b, policy="always")), "`policy`"),
    *(wrong("GradientOrthogonality", f".project(others={k})", partial(lambda v: orthogonal(lambda o, n, a, b: o.project(a, b, others=v)), v), "`others`") for k, v in {"a network": two(), "names": ["0.weight"], "None": None, "one": two()[0].weight}.items()),
    *(wrong("GradientOrthogonality", f"at={k}", partial(lambda v: orthogonal(lambda o, n, a, b: o(a, b, at=v)), v), "`at`") for k, v in {"one tensor": clean(), "floats": (0.5, 0.5), "three": (clean(), clean(), clean()), "no graph": (clean(), clean()), "a number": 1}.items()),
    wrong("GradientOrthogonality", ".from_gradients of tensors", lambda: GradientOrthogonality(two().parameters()).from_gradients(clean(), clean()), "generation"),
    wrong("GradientOrthogonality", ".from_gradients of nothing", lambda: GradientOrthogonality(two().parameters()).from_gradients([], []), "generation"),
    wrong("GradientOrthogonality", ".from_gradients of other shapes", lambda: GradientOrthogonality(two().parameters()).from_gradients([[clean()]], [[clean(size=4)]]), "gradients"),
    wrong("GradientOrthogonality", ".from_gradients of None", lambda: GradientOrthogonality(two().parameters()).from_gradients([[None]], [[None]]), "generation"),
    # --- layers
    *(wrong("execution_order", f"{k} for the model", partial(execution_order, v, clean()), "`model`") for k, v in NOT_MODULES.items()),
    *(wrong("execution_order", f"blocks={v!r}", partial(execution_order, two(), clean(), blocks=v), "`blocks`") for v in ("0", ["7"], [0], 3, [], [None])),
    wrong("execution_order", "an unknown mode", lambda: execution_order(two(), clean(), mode="test"), "`mode`"),
    wrong("execution_order", "no input", lambda: execution_order(two()), "inputs"),
    wrong("execution_order", "an array for the input", lambda: execution_order(two(), ARRAY), "inputs"),
    wrong("execution_order", "an input of other channels", lambda: execution_order(two(), clean(channels=4)), "3 channels", "4 channels", by=RuntimeError, obscure="the network's own error passes, with its trace; it tells both numbers"),
    wrong("execution_order", "blocks that do not run", lambda: execution_order(_Idle(), clean(), blocks=["idle"]), "idle"),
    *(wrong("layer_weights", f"order={v!r}", partial(layer_weights, v, 5), "`order`") for v in ("stem", [], None, 3, [1], {"a": 1}, [None])),
    wrong("layer_weights", "a network for the order", lambda: layer_weights(two(), 5), "`order`"),
    *(wrong("layer_weights", f"timestep={k}", partial(layer_weights, ORDER, v), "`timestep`") for k, v in NOT_NUMBERS.items()),
    *(wrong("layer_weights", f"rate={k}", partial(layer_weights, ORDER, 5, rate=v), "`rate`") for k, v in NOT_NUMBERS.items()),
    *(wrong("layer_weights", f"share={v!r}", partial(layer_weights, ORDER, 5, share=v), "`share`") for v in (0, 3, 1.5, -0.5, "0.5", None, True, float("nan"), 0.0)),
    wrong("layer_weights", "exchanged", lambda: layer_weights(5, ORDER), "`order`"),
    *(wrong("shallow", f"{k} for the model", partial(shallow, v, ORDER), "`model`") for k, v in NOT_MODULES.items()),
    *(wrong("shallow", f"order={v!r}", partial(shallow, two(), v), "`order`") for v in ("0", [], None, [1], 2)),
    *(wrong("shallow", f"share={v!r}", partial(shallow, two(), ORDER, v), "`share`") for v in (0, 3, 1.5, "0.5", None, True)),
    wrong("shallow", "another network's order", lambda: shallow(two(), ["encoder"]), "encoder"),
    wrong("shallow", "exchanged", lambda: shallow(ORDER, two()), "`model`"),
    *(wrong("add_gradients", f"{k} for the model", partial(lambda v: add_gradients(two()(clean()).mean(), v, {"0": 1.0}), v), "`model`") for k, v in NOT_MODULES.items()),
    *(wrong("add_gradients", f"a loss that is {k}", partial(lambda v: add_gradients(v, two(), {"0": 1.0}), v), "`loss`") for k, v in BAD_LOSSES.items()),
    *(wrong("add_gradients", f"weights={v!r}", partial(lambda v: (lambda n: add_gradients(n(clean()).mean(), n, v))(two()), v), "weights") for v in ([1.0], 0.5, None, {"encoder": 1.0}, {"0": "1"}, {}, {"0": float("nan")}, {"0": 0.0}, {"0": None})),
    wrong("add_gradients", "exchanged", lambda: add_gradients(two(), clean().mean(), {"0": 1.0}), "`loss`"),
    wrong("add_gradients", "a loss of another network", lambda: add_gradients(two()(clean()).mean(), two(), {"0": 1.0}), "`loss`"),
    wrong("layer_of", "one name for the layers", lambda: layer_of("0.weight", "0"), "`layers`"),
    wrong("layer_of", "a parameter for the name", lambda: layer_of(two()[0].weight, ORDER), "`name`"),
]  # fmt: skip


class _Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)
