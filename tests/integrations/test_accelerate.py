"""Under accelerate: does everything get the numbers of a plain loop, and does a restart go on with them?"""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from restoreloss import (  # noqa: E402
    Alternation,
    DiffLoss,
    GradientOrthogonality,
    ParameterImportance,
    Phase,
    Subsampled,
    WeightedSum,
)
from restoreloss.integrations.accelerate import prepare, project, register  # noqa: E402
from tests.helpers.processes import launch  # noqa: E402
from tests.integrations.accelerate_worker import Run, batches, phases_after, projected_after  # noqa: E402


@pytest.fixture(autouse=True)
def _no_state_of_other_tests():
    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture
def accelerator():
    return accelerate.Accelerator(cpu=True)


def restorer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))


def sgd(network, lr=0.5):
    return torch.optim.SGD(network.parameters(), lr=lr)


def measured(network, strength=3.0):
    importance = ParameterImportance(network, strength=strength)
    importance.accumulate(lambda net, batch: net(batch).square().mean(), [torch.rand(4, 3, 6, 6)])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    return importance


# Two processes


def test_two_processes_are_one_on_the_whole_batch(tmp_path):
    done = launch("tests/integrations/accelerate_worker.py", str(tmp_path / "two"), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("unequal batches refused") == 2
    weights, resumed = phases_after(tmp_path / "one", 1)
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)
    one = {"phases": weights, "resumed": weights, "projected": projected_after(1)}
    assert one["projected"]["cosines"][0] < -0.05  # the gradients conflict, so there is something to project
    for rank in range(2):
        two = torch.load(tmp_path / f"two.{rank}", weights_only=True)
        assert list(two) == list(one)
        for name, found in two.items():
            torch.testing.assert_close(found, one[name], rtol=1e-4, atol=1e-6)


# prepare


def test_what_rests_is_moved_and_neither_wrapped_nor_saved(accelerator, tmp_path):
    network, frozen = restorer(), nn.Conv2d(3, 3, 1).requires_grad_(False)
    prior = nn.Conv2d(3, 3, 1)
    loss = WeightedSum({"pixel": nn.L1Loss(), "diff": DiffLoss(lambda x, t: prior(x), h_space_weight=0)})
    found = prepare(accelerator, loss, network, frozen, sgd(network))
    assert found[0] is loss and found[2] is frozen and found[1] is network
    assert isinstance(found[3], accelerate.optimizer.AcceleratedOptimizer)
    assert accelerator._models == [network]
    accelerator.save_state(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_loss_goes_to_the_device_with_its_hidden_prior(monkeypatch):
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "device", torch.device("meta"))
    denoiser = nn.Sequential(nn.Conv2d(3, 3, 1))
    loss = DiffLoss(Denoiser(denoiser), h_space_weight=0)
    assert prepare(accelerator, loss) is loss
    assert denoiser[0].weight.device.type == "meta"
    accelerator.device_placement = False
    stays = nn.Conv2d(3, 3, 1).requires_grad_(False)
    assert prepare(accelerator, stays).weight.device.type == "cpu"


class Denoiser(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        return self.network(x)


def test_prepare_gives_back_what_accelerate_would(accelerator):
    network = restorer()
    assert prepare(accelerator, network) is network
    loader = torch.utils.data.DataLoader([1, 2])
    one, two = prepare(accelerator, loader, sgd(network))
    assert isinstance(one, accelerate.data_loader.DataLoaderShard) and hasattr(two, "param_groups")
    with pytest.raises(ValueError, match="`objects` should be at least one, found none"):
        prepare(accelerator)


# Regularisers


@pytest.mark.parametrize("scaled", [False, True])
def test_importance_is_added_once_per_step_of_an_accumulation(scaled):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    network = restorer()
    importance = measured(network)
    expected = copy.deepcopy(network)
    network, optimizer = prepare(accelerator, network, sgd(network))
    if scaled:  # as mixed_precision="fp16" has it on an accelerator
        optimizer = scale(accelerator, sgd(network))
    importance.attach(optimizer.optimizer)
    pairs = [batch[:2] for batch in batches(2)]
    loss = sum(F.mse_loss(expected(degraded), clean) for degraded, clean in pairs) / 2
    gradients = torch.autograd.grad(loss, expected.parameters())
    charges = torch.autograd.grad(importance(), network.parameters())
    for degraded, clean in pairs:
        with accelerator.accumulate(network):
            accelerator.backward(F.mse_loss(network(degraded), clean))
            optimizer.step()
            optimizer.zero_grad()
    for parameter, before, gradient, charge in zip(
        network.parameters(), expected.parameters(), gradients, charges, strict=True
    ):
        torch.testing.assert_close(parameter, before - 0.5 * (gradient + charge), rtol=1e-4, atol=1e-6)
        assert charge.abs().max() > 1e-3


def scale(accelerator, optimizer):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=accelerator.scaler)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("policy", "sign"), [("conflict", 1), ("conflict", -1), ("full", 1), ("full", -1)])
def test_project_is_the_projection_by_hand(accelerator, policy, sign, scaled):
    network = restorer()
    expected, ((degraded, clean, *_),) = copy.deepcopy(network), batches(1)

    def losses(network):
        return sign * network(clean).square().mean(), F.mse_loss(network(degraded), clean)

    shared, deep = list(expected[0].parameters()), list(expected[2].parameters())
    of_generation = torch.autograd.grad(losses(expected)[0], shared)
    of_both = torch.autograd.grad(losses(expected)[1], [*shared, *deep])
    one, two = (torch.cat([g.flatten() for g in side]).double() for side in (of_generation, of_both[:2]))
    factor = one @ two / (two @ two)
    assert sign * factor < -0.01  # with sign 1 they conflict
    factor = 0.3 * factor.float() if sign == 1 or policy == "full" else 0.0
    steps = [0.3 * g + r - factor * r for g, r in zip(of_generation, of_both, strict=False)] + list(of_both[2:])
    network, optimizer = prepare(accelerator, network, sgd(network))
    if scaled:
        optimizer = scale(accelerator, sgd(network))
    cosine = project(
        accelerator, GradientOrthogonality(network[0].parameters()), network,
        lambda: losses(network)[0], lambda: losses(network)[1], policy=policy, weight=0.3, others=network.parameters(),
    )  # fmt: skip
    torch.testing.assert_close(cosine.double(), one @ two / one.norm() / two.norm(), rtol=1e-4, atol=1e-6)
    optimizer.step()
    for parameter, before, step in zip(network.parameters(), expected.parameters(), steps, strict=True):
        torch.testing.assert_close(parameter, before - 0.5 * step, rtol=1e-4, atol=1e-6)


def test_project_runs_under_the_autocast_of_the_accelerator():
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    network, dtypes = restorer(), []
    orthogonality = GradientOrthogonality(network[0].parameters())
    inner = network[0]

    def loss():
        dtypes.append(inner(torch.rand(1, 3, 4, 4)).dtype)
        return network(torch.rand(1, 3, 4, 4)).square().mean()

    project(accelerator, orthogonality, network, loss, loss)
    assert dtypes == [torch.bfloat16] * 2


def test_project_refuses_what_it_cannot_get_right(accelerator):
    network = restorer()
    arguments = GradientOrthogonality(network.parameters()), network, lambda: network.weight, lambda: 1.0
    with pytest.raises(ValueError, match="`accelerator` should be an accelerate.Accelerator, found SimpleNamespace"):
        project(SimpleNamespace(), *arguments)
    with pytest.raises(ValueError, match="`reconstruction` should return a scalar loss, found 1.0"):
        project(accelerator, *arguments[:2], lambda: network(torch.rand(1, 3, 4, 4)).mean(), lambda: 1.0)
    with pytest.raises(ValueError, match="`orthogonality` should be a GradientOrthogonality, found None"):
        project(accelerator, None, *arguments[1:])
    with pytest.raises(ValueError, match="`network` should be a module, found the class Linear"):
        project(accelerator, arguments[0], nn.Linear, *arguments[2:])
    with pytest.raises(ValueError, match="`accelerator` should be .* found the class Accelerator"):
        project(accelerate.Accelerator, *arguments)
    accelerator.gradient_accumulation_steps = 3
    with pytest.raises(ValueError, match="should have gradient_accumulation_steps=1, found 3: a sum of projected"):
        project(accelerator, *arguments)


def test_project_refuses_sharded_parameters(accelerator, monkeypatch):
    monkeypatch.setattr(type(accelerator), "distributed_type", accelerate.DistributedType.FSDP)
    with pytest.raises(ValueError, match="should run one process or DDP, whose parameters are whole, found FSDP"):
        project(accelerator, None, None, lambda: torch.zeros(()), lambda: torch.zeros(()))
    with pytest.raises(ValueError, match=r"`generation` should be callable as generation\(\), found a tensor"):
        project(accelerator, None, None, torch.zeros(()), torch.zeros(()))


# Checkpoints


def test_saved_and_loaded_run_is_the_uninterrupted_one(tmp_path):
    weights, resumed = phases_after(tmp_path, 1)
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)


def test_each_registered_part_is_restored(accelerator, tmp_path):
    run = Run(accelerator)
    for batch in batches(1):
        run.training.step(batch)
    accelerator.save_state(tmp_path)
    before = {name: value.clone() for name, value in run.importance.state_dict().items()}
    for batch in batches(2):
        run.training.step(batch)
    for buffer in run.importance.buffers():
        buffer.zero_()
    phase = run.training.phases[1]
    assert phase.schedulers.last_epoch == 3
    accelerator.load_state(tmp_path)
    assert phase.schedulers.last_epoch == 1 and phase.optimizers.param_groups[0]["lr"] == 0.25
    assert run.loss.objective_diff.calls == 1
    torch.testing.assert_close(run.importance.state_dict(), before, rtol=0, atol=0)


def test_parts_are_told_apart_by_name_not_by_order(tmp_path):
    def objectives():
        whole = DiffLoss(lambda x, t: x, h_space_weight=0)
        return {name: Subsampled(whole, every=k) for name, k in (("two", 2), ("three", 3))}

    first = accelerate.Accelerator(cpu=True)
    losses = objectives()
    losses["two"].calls, losses["three"].calls = 20, 30
    register(first, losses)
    first.save_state(tmp_path)
    second = accelerate.Accelerator(cpu=True)
    fresh = dict(reversed(objectives().items()))
    register(second, fresh)
    second.load_state(tmp_path)
    assert (fresh["two"].calls, fresh["three"].calls) == (20, 30)
    third = accelerate.Accelerator(cpu=True)
    register(third, {"two": fresh["two"], "four": fresh["three"]})
    with pytest.raises(
        ValueError, match=r"The checkpoint should hold \['four', 'two'\], as registered, found \['three'"
    ):
        third.load_state(tmp_path)


def test_names_and_parts_given_twice_are_refused(accelerator):
    network = restorer()
    one, two = ParameterImportance(network), ParameterImportance(network)
    register(accelerator, {"importance": one})
    with pytest.raises(ValueError, match="names of their own, found 'importance' registered before"):
        register(accelerator, {"importance": two})
    with pytest.raises(ValueError, match="registered once, found 'importance' again as 'other'"):
        register(accelerator, {"other": one})
    with pytest.raises(ValueError, match="registered once, found 'a' again as 'b'"):
        register(accelerator, {"a": two, "b": two})
    assert len(accelerator._custom_objects) == 1
    with pytest.raises(ValueError, match="should have `state_dict` and `load_state_dict`, found 'mix': the function"):
        register(accelerator, {"mix": restorer})
    for parts in ({}, one):
        with pytest.raises(ValueError, match="`parts` should be a mapping of names to what is saved, found"):
            register(accelerator, parts)


def test_loss_with_parameters_of_its_own_is_saved_with_them(accelerator, tmp_path):
    learned = WeightedSum({"learned": Learned()})
    register(accelerator, {"loss": learned})
    accelerator.save_state(tmp_path)
    learned.objective_learned.log_weight.data.fill_(3.0)
    accelerator.load_state(tmp_path)
    assert learned.objective_learned.log_weight.item() == 0.5


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, restored, target):
        return self.log_weight.exp() * F.l1_loss(restored, target)


def test_objective_of_a_phase_that_gives_no_scalars_is_refused(accelerator):
    network, optimizer = prepare(accelerator, network := restorer(), sgd(network))
    phase = Phase("fit", [network], lambda batch: {"pixel": (network(batch) - batch).abs()}, optimizer)
    with pytest.raises(
        ValueError, match=r"should return a scalar, or scalars by name, found \{'pixel': \(1, 3, 4, 4\)\}"
    ):
        Alternation([phase], accelerator=accelerator).step(torch.rand(1, 3, 4, 4))


def test_old_and_absent_accelerate_are_refused(accelerator, monkeypatch):
    monkeypatch.setattr(accelerate, "__version__", "0.34.2")
    for call in (lambda: prepare(accelerator, restorer()), lambda: register(accelerator, {})):
        with pytest.raises(ImportError, match="needs `accelerate` 1.0 or newer, found 0.34.2: pip install"):
            call()
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'needs `accelerate`, which is not installed: pip install -e ".\[integ'):
        prepare(accelerator, restorer())
