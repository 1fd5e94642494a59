"""A real Trainer on the CPU: phases, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import restoreloss.integrations.lightning as integration
from restoreloss import ParameterImportance, Phase
from restoreloss.integrations.lightning import (
    ImportanceCallback,
    LightningAlternation,
    ObjectivesCallback,
    log_terms,
)
from tests.helpers.lightning import Restorer, difference, lightning, scaled
from tests.helpers.processes import launch
from tests.integrations.lightning_worker import STEPS, TaskDriven, data, measured, trainer, weights_after

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning")

# Phases


def by_hand(norm):
    """The phases of TaskDriven in plain PyTorch."""
    module = TaskDriven(norm)
    first, second = module.configure_optimizers()[0]
    for batch in data():
        degraded, clean, label, number = batch
        module.train()
        module.classifier.eval()
        restored = module.restorer(degraded)
        loss = F.l1_loss(restored, clean) + F.cross_entropy(module.classifier(restored), label)
        (loss + module.tdp(restored, clean)).backward()
        nn.utils.clip_grad_norm_(module.restorer.parameters(), module.max_norm)
        first.step()
        module.zero_grad()
        module.train()
        module.restorer.eval()
        with torch.no_grad():
            restored = module.restorer(degraded)
        coins = [torch.Generator().manual_seed(int(n)) for n in number]
        mixed = [module.mix(z[None], x[None], generator=g) for z, x, g in zip(restored, clean, coins, strict=True)]
        F.cross_entropy(module.classifier(torch.cat([restored, clean, *mixed])), label.repeat(3)).backward()
        second.step()
        second.param_groups[0]["lr"] *= 0.5
        module.zero_grad()
    return module


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_phases_are_those_of_a_loop_by_hand(norm, tmp_path):
    module = TaskDriven(norm)
    run = trainer(tmp_path)
    run.fit(module, data())
    torch.testing.assert_close(module.state_dict(), by_hand(norm).state_dict())
    logged = {"restorer/pixel", "restorer/tdp", "restorer/task", "restorer/grad_norm", "classifier/loss"}
    assert set(run.callback_metrics) == logged
    assert all(part.training for part in module.modules())
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "scaler"])
def test_phases_run_in_the_precision_of_the_trainer(precision, tmp_path):
    dtypes = []

    class Watched(TaskDriven):
        def restore(self, batch):
            dtypes.append(self.restorer(batch[0].to(next(self.parameters()).dtype)).dtype)
            return super().restore(batch)

        def recognise(self, batch):
            return super().recognise(
                [part.to(self.classifier.head.weight.dtype) if part.is_floating_point() else part for part in batch]
            )

    module, plain = Watched(), TaskDriven()
    module.mix.p = plain.mix.p = 1.0  # coins are drawn in the default dtype, which 64-true sets
    start = copy.deepcopy(plain.state_dict())
    options = {"plugins": [scaled()]} if precision == "scaler" else {"precision": precision}
    trainer(tmp_path, **options).fit(module, data())
    trainer(tmp_path).fit(plain, data())
    assert set(dtypes) == {{"bf16-mixed": torch.bfloat16, "64-true": torch.float64, "scaler": torch.float16}[precision]}
    found = {name: value.float() for name, value in module.state_dict().items()}
    moved = difference(start, plain.state_dict())
    assert (
        difference(found, plain.state_dict()) < {"bf16-mixed": 0.2, "64-true": 1e-4, "scaler": 0.1}[precision] * moved
    )
    for one, other in zip(module.logs, plain.logs, strict=True):  # of gradients without their scale
        torch.testing.assert_close(one["restorer/grad_norm"].float(), other["restorer/grad_norm"], rtol=0.05, atol=1e-3)


def test_what_is_not_finite_stops_the_run_before_the_weights(tmp_path):
    class Broken(TaskDriven):
        def recognise(self, batch):
            return {"task": super().recognise(batch), "odd": float("nan") * self.classifier.head.weight.sum()}

    module = Broken()
    before = copy.deepcopy(module.classifier.state_dict())
    with pytest.raises(FloatingPointError, match="Phase 'classifier' should .* found term 'odd' = nan"):
        trainer(tmp_path).fit(module, data())
    torch.testing.assert_close(module.classifier.state_dict(), before, rtol=0, atol=0)


def test_a_scheduler_rests_where_the_scale_made_the_step_be_skipped(tmp_path):
    rates = []

    class Overflowing(TaskDriven):
        def recognise(self, batch):
            return (1e10 if not rates else 1.0) * super().recognise(batch)

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            rates.append(self.optimizers()[1].param_groups[0]["lr"])

    trainer(tmp_path, plugins=[scaled()]).fit(Overflowing(max_norm=None), data())
    assert rates[0] == 0.5 and rates[-1] < 0.5


def test_resumed_phases_are_the_uninterrupted_ones(tmp_path):
    whole, half, resumed = TaskDriven(nn.BatchNorm2d), TaskDriven(nn.BatchNorm2d), TaskDriven(nn.BatchNorm2d)
    trainer(tmp_path, max_epochs=2).fit(whole, data())
    run = trainer(tmp_path)
    run.fit(half, data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert len(resumed.logs) == STEPS and difference(half.classifier.state_dict(), whole.classifier.state_dict()) > 1e-4


def test_importance_is_charged_in_the_phase_of_its_network_only(tmp_path):
    def run(strength):
        module = TaskDriven(max_norm=None)
        callback = ImportanceCallback(measured(module.restorer, strength))
        trainer(tmp_path, callbacks=[callback]).fit(module, data(1))
        return module

    charged, free = run(3.0), run(0.0)
    assert difference(charged.restorer.state_dict(), free.restorer.state_dict()) > 1e-3
    importance = measured((fresh := TaskDriven()).restorer)
    gradients = torch.autograd.grad(importance(), fresh.restorer.parameters())
    for one, other, gradient in zip(charged.restorer.parameters(), free.restorer.parameters(), gradients, strict=True):
        torch.testing.assert_close(one, other - 0.5 * gradient, rtol=1e-4, atol=1e-6)


def test_two_processes_are_one_on_the_whole_batch(tmp_path):
    done = launch("tests/integrations/lightning_worker.py", str(tmp_path / "two"), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("unequal batches refused") == 2
    one = weights_after(tmp_path, 1)
    for rank in range(2):
        two = torch.load(tmp_path / f"two.{rank}", weights_only=True)
        assert list(two) == ["phases", "projected"]
        for name, weights in one.items():
            torch.testing.assert_close(two[name], weights, rtol=1e-4, atol=1e-6)


# What is refused


def refused(module, tmp_path, **options):
    with pytest.raises(ValueError, match="should|not measured") as error:
        trainer(tmp_path, **options).fit(module, data(1))
    return str(error.value)


def test_importance_that_charges_nothing_here_is_refused(tmp_path):
    module = Restorer()
    unmeasured = ImportanceCallback(ParameterImportance(module.network))
    assert "found not measured: call `accumulate(" in refused(module, tmp_path, callbacks=[unmeasured])
    elsewhere = ImportanceCallback(measured(copy.deepcopy(module.network)))
    assert "does it hold a copy of the network?" in refused(module, tmp_path, callbacks=[elsewhere])
    with pytest.raises(ValueError, match="`importance` should be a ParameterImportance, found a Conv2d"):
        ImportanceCallback(nn.Conv2d(1, 1, 1))


@pytest.mark.filterwarnings("ignore:.*input_range")
def test_callbacks_that_share_a_name_or_an_importance_are_refused(tmp_path):
    module = Restorer()
    one, two = measured(module.network), measured(module.network)
    with pytest.raises(RuntimeError, match="`callback.state_key` must be unique"):
        trainer(tmp_path, callbacks=[ImportanceCallback(one), ImportanceCallback(two)])
    message = refused(module, tmp_path, callbacks=[ImportanceCallback(one), ImportanceCallback(one, name="again")])
    assert message == "`importance` should be in one callback, found in 'again' and 'importance'."
    run = trainer(tmp_path, callbacks=[ImportanceCallback(one)])
    run.callbacks.append(ImportanceCallback(two))
    with pytest.raises(
        ValueError, match="`name` should be another for each ImportanceCallback, found 'importance' twice"
    ):
        run.fit(module, data(1))
    trainer(tmp_path, callbacks=[ImportanceCallback(one), ImportanceCallback(two, name="other")]).fit(module, data(1))


def test_fused_optimizer_under_a_scaler_is_refused(tmp_path):
    module = Restorer(optimizer=lambda network: torch.optim.AdamW(network.parameters(), fused=True))
    callbacks = [ImportanceCallback(measured(module.network))]
    assert "AdamW should have fused=False under 16-mixed" in refused(
        module, tmp_path, callbacks=callbacks, plugins=[scaled()]
    )
    trainer(tmp_path, callbacks=callbacks).fit(module, data(1))  # and without a scaler it is none of our business


class Turns(TaskDriven):
    """Phases as a test wants them."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def on_fit_start(self):
        self.turns = self.make(self)

    def phase(self, optimizers, network=None):
        return Phase("all", [network or self.restorer], lambda batch: self.restorer(batch[0]).mean(), optimizers)


def test_phases_that_would_go_round_the_trainer_are_refused(tmp_path):
    def own(module):
        return LightningAlternation(module, [module.phase(torch.optim.SGD(module.restorer.parameters(), lr=0.1))])

    assert "should be those of `self.optimizers()`" in refused(Turns(own), tmp_path)

    def automatic(module):
        module.automatic_optimization = True
        return LightningAlternation(module, [])

    assert "`module` should have `automatic_optimization = False`" in refused(Turns(automatic), tmp_path)
    with pytest.raises(ValueError, match="`module` should be in a Trainer: make its phases in `on_fit_start`"):
        LightningAlternation(TaskDriven(), [])
    with pytest.raises(
        ValueError,
        match="`module` should be a LightningModule of `lightning.pytorch` or `pytorch_lightning`, found a Conv2d",
    ):
        LightningAlternation(nn.Conv2d(1, 1, 1), [])
    module = TaskDriven()
    trainer(tmp_path).fit(module, data(1))
    with pytest.raises(ValueError, match="the Trainer's checkpoint holds it all"):
        module.turns.load_state_dict({})


def test_several_optimizers_of_a_phase_under_a_scaler_are_refused(tmp_path):
    def both(module):
        return LightningAlternation(module, [module.phase(module.optimizers(), network=module)])

    assert "should be one under 16-mixed, found 2" in refused(Turns(both), tmp_path, plugins=[scaled()])


@pytest.mark.parametrize(("strategy", "message"), [("ddp", "found DDP that waits for all"), ("fsdp", None)])
def test_strategies_that_cannot_leave_a_network_out_are_refused(strategy, message, tmp_path, monkeypatch):
    if message is None:  # it wants a GPU to begin with
        module = TaskDriven()
        trainer(tmp_path).fit(module, data(1))
        strategy = type("FSDPStrategy", (), {"model": module})()
        with pytest.raises(ValueError, match="`strategy` should be one device or DDP, found FSDPStrategy"):
            integration._check_strategy(lightning.pytorch, strategy)
        return
    # all that Lightning would set and leave behind
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", **ranks}.items():
        monkeypatch.setenv(name, value)
    try:
        assert message in refused(TaskDriven(), tmp_path, strategy=strategy)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("terms", "found"),
    [({"noise": torch.ones(2)}, r"\{'noise': \(2,\)\}"), ({"noise": 1.0}, r"\{'noise': 'float'\}"), ({}, "none")],
)
def test_terms_that_are_no_scalars_are_refused(terms, found):
    with pytest.raises(
        ValueError, match=r"`terms` should be scalar tensors by name \(reduction='mean'\), found " + found
    ):
        log_terms(None, {"pixel": torch.ones(()), **terms} if terms else terms)


def test_terms_are_a_mapping_and_logged_by_a_module():
    with pytest.raises(
        ValueError, match=r"`terms` should be scalar tensors by name, as `loss.terms\(...\)`, found a te"
    ):
        log_terms(Restorer(), torch.ones(()))
    with pytest.raises(ValueError, match="`module` should be a LightningModule, found a Linear"):
        log_terms(nn.Linear(1, 1), {"noise": torch.ones(())})


class Logged:
    def log_dict(self, values, sync_dist):
        self.values = values


@pytest.mark.parametrize(
    ("terms", "logged"),
    [
        ({"pixel": 1.0, "diff": 2.0}, {"train_loss": 3.0, "train_pixel": 1.0, "train_diff": 2.0}),
        ({"loss": 1.0, "diff": 2.0}, {"train_loss": 1.0, "train_diff": 2.0}),
    ],
)
def test_the_sum_is_logged_beside_the_terms(terms, logged):
    module = Logged()
    total = log_terms(module, {name: torch.tensor(value) for name, value in terms.items()}, prefix="train_")
    assert total == 3 and module.values == logged


def test_phases_are_those_of_pytorch_lightning_too(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.network = nn.Conv2d(3, 3, 3, padding=1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.network.parameters(), 0.1)

        def on_fit_start(self):
            self.turns = LightningAlternation(self, [Phase("one", [self.network], self.fit_it, self.optimizers())])

        def fit_it(self, batch):
            return {"pixel": (self.network(batch[0]) - batch[1]).abs().mean()}

        def training_step(self, batch, batch_idx):
            self.log_dict(self.turns.step(batch))

    module = Other()
    before = module.network.weight.detach().clone()
    run = other.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, callbacks=[ObjectivesCallback()],
    )  # fmt: skip
    run.fit(module, data())
    assert "one/pixel" in run.callback_metrics and not torch.equal(module.network.weight, before)


def test_losses_that_a_checkpoint_does_not_know_begin_anew(tmp_path):
    run = trainer(tmp_path)
    run.fit(Restorer(), data(1))
    run.save_checkpoint(tmp_path / "it.ckpt")
    module = Restorer(every=2)
    module.load_state_dict(torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"])
    assert module.loss.objective_diff.calls == 0


@pytest.mark.parametrize("version", ["1.9.5", "2.3.3"])
def test_old_lightning_is_refused(version, monkeypatch):
    monkeypatch.setattr(integration.metadata, "version", lambda name: version)
    for make in (
        lambda: ObjectivesCallback(),
        lambda: LightningAlternation(None, []),
        lambda: ImportanceCallback(None),
    ):
        with pytest.raises(ImportError, match=f"needs `lightning` 2.4 or newer, found {version}: pip install"):
            make()


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_compromised_lightning_is_refused_before_it_is_imported(version):
    code = f"""
import importlib.metadata, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: {version!r} if name == "lightning" else real(name)
try:
    import restoreloss.integrations.lightning
except ImportError as error:
    print(error)
print("lightning" in sys.modules)
"""
    done = launch("-c", code, processes=1)
    assert done.returncode == 0, done.stderr
    message, imported = done.stdout.splitlines()
    assert message.startswith(f"`lightning` {version} is malware (advisory GHSA-w37p-236h-pfx3): take it off")
    assert imported == "False"


def test_without_lightning_the_module_imports_and_its_classes_say_what_to_install():
    code = """
import importlib.metadata, importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "lightning" else find(name, package)
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightning":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

sys.meta_path.insert(0, Blocked())
importlib.metadata.version = absent
import restoreloss.integrations.lightning as integration
from tests.helpers.processes import ROOT
for make in (lambda: integration.ObjectivesCallback(), lambda: integration.LightningAlternation(None, [])):
    try:
        make()
    except ImportError as error:
        print(error)
"""
    done = launch("-c", code, processes=1)
    assert done.returncode == 0, done.stderr
    wanted = (
        "restoreloss.integrations.lightning needs `lightning`, which is not installed: "
        'pip install -e ".[integrations]" in a clone of restoreloss'
    )
    assert done.stdout.splitlines() == [wanted] * 2
