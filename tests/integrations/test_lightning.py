"""A real Trainer on the CPU: losses and importances as in a plain loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from restoreloss import ParameterImportance
from restoreloss.integrations.lightning import (
    ImportanceCallback,
    ObjectivesCallback,
)
from tests.helpers.lightning import Restorer, difference, scaled
from tests.integrations.lightning_worker import BATCH, data, measured, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning")


def fit(tmp_path, with_callback, strength=3.0, dtype=torch.float32, optimizer=None, **options):
    module = Restorer(dtype=dtype, optimizer=optimizer)
    importance = measured(module.network, strength)
    callbacks = [ImportanceCallback(importance)] if with_callback else []
    if not with_callback:
        module.penalty = importance
    loader = data(4)
    if dtype != torch.float32:
        loader = DataLoader(
            TensorDataset(*(t.to(dtype) if t.is_floating_point() else t for t in loader.dataset.tensors)), BATCH
        )
    trainer(tmp_path, callbacks=callbacks, **options).fit(module, loader)
    return {name: value.detach().clone() for name, value in module.network.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 4},
        {"precision": "bf16-mixed"},
        {"precision": "64-true", "dtype": torch.float64},
        {"plugins": "scaler"},
        {"plugins": "scaler", "gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
        {"optimizer": lambda network: torch.optim.LBFGS(network.parameters(), lr=0.1, max_iter=3)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_callback_is_the_penalty_added_to_the_loss(options, tmp_path):
    def run(with_callback, strength=3.0):
        made = {"plugins": [scaled()]} if "plugins" in options else {}
        return fit(tmp_path, with_callback, strength, **{**options, **made})

    found, expected, without = run(True), run(False), run(True, strength=0.0)
    assert difference(found, expected) < 0.01 * difference(found, without)


def test_step_that_overflows_is_skipped_with_the_penalty(tmp_path):
    def first_of(scale, steps):
        module = Restorer()
        callback = ImportanceCallback(measured(module.network))
        start = copy.deepcopy(module.network.state_dict())
        run = trainer(tmp_path, callbacks=[callback], plugins=[scaled(scale)], max_steps=steps)
        run.fit(module, data(1))
        return difference(start, module.network.state_dict())

    assert first_of(2.0**40, 1) == 0
    assert first_of(2.0**10, 1) > 0


def test_each_optimizer_steps_the_penalty_of_its_own_parameters_once(tmp_path):
    class Split(Restorer):
        """Two optimizers step at every batch, and gradients stay until both have."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.network[n].parameters(), lr=0.5) for n in (0, 2)]

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(F.l1_loss(self.network(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()

    module = Split()
    importance = measured(module.network)
    expected = copy.deepcopy(module.network)
    ((degraded, clean, *_),) = data(1)
    F.l1_loss(expected(degraded), clean).backward()
    charges = torch.autograd.grad(importance(), module.network.parameters())
    with torch.no_grad():
        for parameter, charge in zip(expected.parameters(), charges, strict=True):
            parameter -= 0.5 * (parameter.grad + charge)
    trainer(tmp_path, callbacks=[ImportanceCallback(importance)]).fit(module, data(1))
    torch.testing.assert_close(dict(module.network.named_parameters()), dict(expected.named_parameters()))
    assert all(p.requires_grad for p in module.network.parameters())


def test_attach_cannot_be_used_under_lightning(tmp_path):
    module = Restorer()
    measured(module.network).attach(optimizer := torch.optim.SGD(module.network.parameters(), lr=0.1))
    module.optimizer = lambda network: optimizer
    with pytest.raises(ValueError, match="A closure computes the gradients anew"):
        trainer(tmp_path).fit(module, data(1))


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    def setup(measure):
        module = Restorer(every=3, optimizer=lambda network: torch.optim.Adam(network.parameters(), lr=0.01))
        importance = measured(module.network) if measure else ParameterImportance(module.network, strength=3.0)
        return module, [ImportanceCallback(importance, name="first training"), ObjectivesCallback()]

    module, callbacks = setup(True)
    trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(module, data(4))
    half, callbacks = setup(True)
    run = trainer(tmp_path, callbacks=callbacks)
    run.fit(half, data(4))
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert half.denoiser[0].count == 2 * 2  # of 4 calls the 1st and the 4th, each for two images
    resumed, callbacks = setup(False)
    trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(resumed, data(4), ckpt_path=tmp_path / "half.ckpt")
    # of 4 calls the 7th; at the 5th, which is left out, the terms are called once to know their names
    assert resumed.denoiser[0].count == 2 * 2
    assert resumed.loss.objective_diff.calls == module.loss.objective_diff.calls == 8
    torch.testing.assert_close(resumed.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert difference(resumed.network.state_dict(), half.network.state_dict()) > 1e-3
    for one, other in zip(
        callbacks[0].importance.buffers(), half.trainer.callbacks[0].importance.buffers(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_checkpoint_holds_what_is_trained_and_the_state_of_callbacks(tmp_path):
    module = Restorer(every=2)
    run = trainer(tmp_path, callbacks=[ImportanceCallback(measured(module.network)), ObjectivesCallback()])
    run.fit(module, data(1))
    run.save_checkpoint(tmp_path / "it.ckpt")
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
    calls = saved["state_dict"].pop("loss.objective_diff._extra_state")
    assert calls == 1
    assert set(saved["state_dict"]) == {f"network.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    (state,) = saved["optimizer_states"]
    assert len(state["param_groups"][0]["params"]) == 4 == len(list(module.parameters()))
    assert "0/importance/0/weight" in saved["callbacks"]["ImportanceCallback[importance]"]
    assert set(run.callback_metrics) == {"train/pixel", "train/diff/noise", "train/loss"}


def test_prior_of_a_loss_rests_and_both_it_and_an_importance_follow_the_module(tmp_path):
    module = Restorer()
    before = copy.deepcopy(module.denoiser[0].state_dict())
    importance, devices = measured(module.network), []
    importance.to = lambda device: devices.append(device)
    trainer(tmp_path, callbacks=[ImportanceCallback(importance)]).fit(module, data(2))
    assert devices == [torch.device("cpu")]
    torch.testing.assert_close(module.denoiser[0].state_dict(), before, rtol=0, atol=0)
    assert module.training and not module.denoiser[0].network.training
    module.to("meta")
    assert {p.device.type for p in module.denoiser[0].parameters()} == {"meta"}
