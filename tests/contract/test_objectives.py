"""What every exported objective keeps: DESIGN's conventions, one test each."""

import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import restoreloss
from restoreloss import Objective
from tests.contract.objectives import CASES, ELSEWHERE, LIVE, SHAPE, Case, images, live_networks, networks
from tests.helpers.processes import launch_by_torchrun

every_objective = pytest.mark.parametrize("case", CASES, ids=str)
every_live = pytest.mark.parametrize("case", LIVE, ids=str)
# a U-Net like that of DiffLoss-mse, which takes seconds to trace, below or above a line of another kind
TRACED_BEFORE = (
    "DiffLoss-rms", "DiffLoss-l2", "DiffLoss-l1", "DiffLoss-noise", "DiffLoss-crop", "DiffLoss-latent",
    "DiffLoss-flow", "DiffLoss-checkpointing", "DiffLoss-conditional", "DiffLoss-guided", "DiffLoss-latent_prior",
    "DiffLoss-transformer", "Subsampled-subset",
)  # fmt: skip
QUICKLY_TRACED = {"DiffLoss-callable", "TDPLoss-l1", "TDPLoss-detector", "HLFLoss-l1"}


def every_objective_slow(names: Collection[str]) -> pytest.MarkDecorator:
    """Every objective; those of the names are slow."""
    cases = [pytest.param(case, marks=pytest.mark.slow) if case.name in names else case for case in CASES]
    return pytest.mark.parametrize("case", cases, ids=str)


def value_and_gradient(objective: nn.Module, z: Tensor, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    z = z.detach().clone().requires_grad_()
    value = objective(z, x)
    value.backward()
    assert z.grad is not None
    return value.detach(), z.grad


def test_no_exported_objective_is_left_out() -> None:
    exported = {
        name
        for name, value in vars(restoreloss).items()
        if inspect.isclass(value) and issubclass(value, Objective) and not inspect.isabstract(value)
    }
    assert exported == {case.name.partition("-")[0] for case in CASES} | ELSEWHERE


@every_objective
def test_scalar_finite_and_positive(case: Case) -> None:
    value, gradient = value_and_gradient(case.build(), *images())
    assert value.shape == () and value.dtype == torch.float32 and value > 0
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.5 * case.part


@every_objective
def test_exactly_zero_with_zero_gradient_on_equals(case: Case) -> None:
    z, _ = images()
    value, gradient = value_and_gradient(case.build(), z, z.detach())
    assert value == 0 and not gradient.any()


@every_objective
def test_gradient_reaches_restored_and_nothing_else(case: Case) -> None:
    objective, (z, x) = case.build(), images()
    x.requires_grad_()
    objective(z, x).backward()
    assert z.grad is not None and x.grad is None
    held = [p for network in networks(objective) for p in network.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in held)


@every_objective
def test_exchanged_arguments_are_refused_where_a_gradient_is_asked_for(case: Case) -> None:
    objective, (z, x) = case.build(), images()
    for call in (objective, objective.terms):
        with pytest.raises(ValueError, match=r"`restored` should require a gradient .* were the two exchanged"):
            call(x, z)
    with torch.no_grad():
        objective(x, z)
    objective(z.detach(), x)


@every_objective
@pytest.mark.parametrize("which", [0, 1], ids=["restored", "target"])
def test_a_range_that_is_clearly_wrong_is_told_once(case: Case, which: int) -> None:
    objective, pair = case.build(), [image.detach() for image in images()]
    pair[which] = 255 * pair[which]
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            objective(*pair)
        # two objectives of a sum say the same, which Python shows once
        told = {str(one.message) for one in caught if "input_range" in str(one.message)}
        name = ("restored", "target")[which]
        assert len(told) == expected and all(f"`{name}` spans" in message for message in told)


@every_objective
def test_terms_sum_to_the_call_and_are_differentiable(case: Case) -> None:
    objective, (z, x) = case.build(), images()
    torch.manual_seed(0)
    value = objective(z, x)
    torch.manual_seed(0)
    terms = objective.terms(z, x)
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), value)
    for term in terms.values():
        (gradient,) = torch.autograd.grad(term, z, retain_graph=True)
        assert gradient.any()


@every_objective
def test_frozen_networks_stay_frozen_and_hidden(case: Case) -> None:
    objective = case.build()
    parent = nn.Sequential(objective).train().requires_grad_(True)
    assert list(parent.parameters()) == []
    # the running norms of shares and the number of calls are state of the loss itself
    own = re.compile(r"(norms\.(mean|calls|idle)_\w+|_extra_state)$")
    assert [name for name in parent.state_dict() if not own.search(name)] == []
    for network in networks(objective):
        network.train().requires_grad_(True)  # by somebody who holds it as well
    state = [copy.deepcopy(network.state_dict()) for network in networks(objective)]
    z, x = images()
    value, _ = value_and_gradient(objective, x, x)
    assert value == 0  # dropout would show
    value_and_gradient(objective, z, x)
    for network, before in zip(networks(objective), state, strict=True):
        assert not any(module.training for module in network.modules())
        assert all(p.grad is None for p in network.parameters())
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@every_objective
def test_an_exception_leaves_no_trace(case: Case) -> None:
    objective, (z, x) = case.build(), images()
    before = value_and_gradient(objective, z, x)
    with pytest.raises(ValueError, match="restored|target"):
        objective(z, x[:, :, :3])
    layers = [m for network in networks(objective) for m in network.modules() if isinstance(m, nn.Conv2d)]
    if layers:  # a plain callable has none

        def fail(module: nn.Module, args: object) -> None:
            raise RuntimeError("out of memory, say")

        handle = layers[min(1, len(layers) - 1)].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            objective(z, x)
        handle.remove()
    assert torch.is_grad_enabled()
    for one, other in zip(value_and_gradient(objective, z, x), before, strict=True):
        assert torch.equal(one, other)


def singular(point: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z = images(dtype)[0].detach()
    half = torch.full(SHAPE, 0.5, dtype=dtype)
    return {
        "equal": (z, z.clone()),
        "zeros": (torch.zeros(SHAPE, dtype=dtype), torch.zeros(SHAPE, dtype=dtype)),
        "constants": (half, half + 0.25),
        "one pixel apart": (half, half + torch.eye(8).to(dtype) * 1e-3),
    }[point]


@every_objective
@pytest.mark.parametrize("point", ["equal", "zeros", "constants", "one pixel apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_finite_at_singular_points(case: Case, point: str, dtype: torch.dtype) -> None:
    value, gradient = value_and_gradient(case.build(), *singular(point, dtype))
    assert value.isfinite() and gradient.isfinite().all() and gradient.dtype == dtype


@every_objective
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_finite_under_autocast_and_near_single_precision(case: Case, dtype: torch.dtype) -> None:
    objective, (z, x) = case.build(), images()
    _, expected = value_and_gradient(objective, z, x)
    for u in (x, z):
        with torch.autocast("cpu", dtype):
            value, gradient = value_and_gradient(objective, u, x)
        assert value.isfinite() and gradient.isfinite().all()
    assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.98


@every_objective
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (16, 11)], ids=str)
def test_any_size(case: Case, size: tuple[int, int]) -> None:
    z, x = images(shape=(2, 3, *size))
    value, gradient = value_and_gradient(case.build(), z, x)
    assert value.isfinite() and gradient.isfinite().all() and gradient.any()


@every_objective_slow(TRACED_BEFORE)
def test_compiles_to_the_same_numbers(case: Case) -> None:
    torch._dynamo.reset()
    objective, (z, x) = case.build(), images()
    expected = value_and_gradient(objective, z, x)
    before = [condition(network) for network in live_networks(objective)]
    compiled = torch.compile(objective, backend="aot_eager")
    for one, other in zip(value_and_gradient(compiled, z, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert [condition(network) for network in live_networks(objective)] == before


# tracing a U-Net with symbolic sizes takes most of a minute
@every_objective_slow({case.name for case in CASES} - QUICKLY_TRACED)
def test_compiled_for_one_size_it_takes_others_and_a_smaller_last_batch(case: Case) -> None:
    torch._dynamo.reset()
    objective = case.build()
    compiled = torch.compile(copy.deepcopy(objective), backend="aot_eager")  # each with the shares of its own calls
    for shape in (SHAPE, (4, 3, 16, 8), (2, 3, 8, 12), (2, 3, 8, 8)):
        z, x = images(shape=shape)
        expected = value_and_gradient(objective, z, x)
        for one, other in zip(value_and_gradient(compiled, z, x), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_compiled_networks_stay_in_eval_mode() -> None:
    torch._dynamo.reset()
    objective, (z, x) = next(case for case in CASES if case.name == "HLFLoss-l1").build(), images()
    compiled = torch.compile(objective, backend="aot_eager")
    value = compiled(z, x)
    assert networks(objective)
    for network in networks(objective):
        network.train()  # batch normalisation would show
    assert torch.equal(compiled(z, x), value)


@every_objective
def test_deepcopy_and_pickle_go_on_alone(case: Case) -> None:
    objective, (z, x) = case.build(), images()
    expected = value_and_gradient(objective, z, x)
    for copied in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        theirs = {p for network in networks(copied) + live_networks(copied) for p in network.parameters()}
        for network in networks(objective) + live_networks(objective):
            assert not theirs & set(network.parameters())
        for one, other in zip(value_and_gradient(copied, z, x), expected, strict=True):
            assert torch.equal(one, other)


@every_objective
def test_same_seed_same_result(case: Case) -> None:
    objective, (z, x) = case.build(), images()
    results = [value_and_gradient(objective, z, x, seed)[0] for seed in (0, 0)]
    assert torch.equal(*results)


@every_objective
def test_target_may_be_single_precision_where_the_network_ran_in_half(case: Case) -> None:
    z, x = images()
    value, gradient = value_and_gradient(case.build(), z.bfloat16(), x)
    assert value.isfinite() and gradient.dtype == torch.bfloat16 and gradient.any()


def condition(network: nn.Module) -> dict[str, Any]:
    """All that a borrower has to leave as it was."""
    parts, parameters = list(network.modules()), list(network.parameters())
    return {
        "parts": parts,
        "modes": [part.training for part in parts],
        "attributes": [sorted(vars(part)) for part in parts],
        "hooks": [len(hooks) for part in parts for name, hooks in vars(part).items() if name.endswith("_hooks")],
        "parameters": [id(p) for p in parameters],
        "flags": [p.requires_grad for p in parameters],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
        "values": {name: value.tolist() for name, value in network.state_dict().items()},
    }


def leave_mixed(network: nn.Module) -> None:
    """Part at rest and part frozen, in the middle of accumulating gradients."""
    for n, part in enumerate(network.modules()):
        part.training = n % 2 == 0
    for n, p in enumerate(network.parameters()):
        p.requires_grad_(n % 3 > 0)
        p.grad = torch.full_like(p, 0.5) if n % 4 else None
    norms = {part.training for part in network.modules() if isinstance(part, nn.BatchNorm2d)}
    assert norms == {True, False}


USES: dict[str, Callable[[Objective, Tensor, Tensor], object]] = {
    "call": lambda objective, z, x: objective(z, x),
    "terms": lambda objective, z, x: objective.terms(z, x),
    "backward": lambda objective, z, x: objective(z, x).backward(),
    "without gradient": torch.no_grad()(lambda objective, z, x: objective(z, x)),
    "for evaluation": torch.inference_mode()(lambda objective, z, x: objective(z.detach(), x)),
}


@every_live
@pytest.mark.parametrize("use", USES)
def test_live_networks_are_left_as_they_were(case: Case, use: str) -> None:
    objective, (z, x) = case.build(), images()
    (network,) = live_networks(objective)
    leave_mixed(network)
    before = condition(network)
    for _ in range(2):
        USES[use](objective, z, x)
        assert condition(network) == before


@every_live
@pytest.mark.parametrize("failing", ["target", "restored"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_live_networks_are_left_as_they_were_when_they_fail(
    case: Case, failing: str, error: type[BaseException]
) -> None:
    objective, (z, x) = case.build(), images()
    expected = value_and_gradient(objective, z, x)
    (network,) = live_networks(objective)
    leave_mixed(network)

    def fail(module: nn.Module, args: object) -> None:
        if torch.is_grad_enabled() == (failing == "restored"):
            raise error("out of memory, say")

    conv = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
    handle = conv.register_forward_pre_hook(fail)
    before = condition(network)
    with pytest.raises(error, match="out of memory"):
        objective(z, x)
    assert condition(network) == before
    assert torch.is_grad_enabled()
    handle.remove()
    for one, other in zip(value_and_gradient(objective, z, x), expected, strict=True):
        assert torch.equal(one, other)


@every_live
def test_live_networks_are_left_as_they_were_when_images_are_refused(case: Case) -> None:
    objective, (z, x) = case.build(), images()
    (network,) = live_networks(objective)
    leave_mixed(network)
    before = condition(network)
    for wrong in (x[:, :, :3], x[0], x.long(), x.double(), x.to("meta")):
        with pytest.raises(ValueError, match="restored|target"):
            objective(z, wrong)
    with pytest.raises(ValueError, match="device"):
        objective(z.to("meta"), x.to("meta"))
    assert condition(network) == before


@every_live
def test_live_networks_are_not_part_of_the_loss(case: Case) -> None:
    objective, (z, x) = case.build(), images()
    (network,) = live_networks(objective)
    leave_mixed(network)
    before = condition(network)
    parent = nn.Sequential(objective)
    assert not set(network.modules()) & set(parent.modules())
    assert not list(parent.parameters()) and not list(parent.buffers()) and not parent.state_dict()
    for change in (parent.train, parent.eval, parent.double, parent.requires_grad_, parent.zero_grad):
        change()
        assert condition(network) == before
    for flag in (True, False):
        parent.train(flag).requires_grad_(flag)
        assert objective(z, x) > 0 and condition(network) == before


@every_live
def test_live_networks_are_looked_through_as_they_are_now(case: Case) -> None:
    objective, (z, x) = case.build(), images()
    (network,) = live_networks(objective)
    before = objective(z, x)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)
    assert objective(z, x) > 1.5 * before
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    others = ("pixel", "reference")  # do not look through it
    assert not any(value.any() for name, value in objective.terms(z, x).items() if not name.startswith(others))


@every_live
def test_live_networks_rest_while_they_are_looked_through(case: Case) -> None:
    torch.manual_seed(0)
    untouched, results = torch.get_rng_state(), []
    for prepare in (nn.Module.train, nn.Module.eval, leave_mixed):
        objective, (z, x) = case.build(), images()
        (network,) = live_networks(objective)
        prepare(network)
        results.append(value_and_gradient(objective, z, x, seed=0))
        assert torch.equal(torch.get_rng_state(), untouched)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_two_processes_give_what_one_gives() -> None:
    result = launch_by_torchrun("tests/contract/distributed_worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("equal") == sum(case.part == 1 for case in CASES)
