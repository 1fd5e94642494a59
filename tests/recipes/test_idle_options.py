"""Options that a method does not look at are named before the first step."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

import examples.dtp.config as dtp
import examples.edtr.config as edtr
import examples.sr4ir.config as sr4ir
import examples.unirestore.config as unirestore
from examples.common.engine.options import RunOptions, unused
from examples.dtp.train import trainer
from tests.recipes import cases

DTP: Any = dtp.Config
SR4IR: Any = sr4ir.Config
EDTR: Any = edtr.Config
UNIRESTORE: Any = unirestore.Config


@pytest.mark.parametrize(
    ("config", "changes", "idle"),
    [
        (DTP, {"method": "plain", "penalty_weight": 5.0, "decay": 9.0}, {"penalty_weight", "decay"}),
        (DTP, {"method": "plain", "experts": 3}, {"experts"}),
        (DTP, {"method": "pretrain", "moe": True, "fft_weight": 0.5, "flips": True}, {"moe", "fft_weight", "flips"}),
        (DTP, {"method": "scratch", "pretrained": Path("run")}, {"pretrained"}),
        (DTP, {"method": "l2sp", "importance_samples": 8, "normalize": "mean"}, {"importance_samples"}),
        (DTP, {"method": "replay", "orthogonality_every": 2, "shallow": 0.1}, {"orthogonality_every"}),
        (DTP, {"method": "gef", "orthogonality_every": 2, "moe": True, "experts": 3, "decay": 0.1}, set()),
        (SR4IR, {"method": "no_tdp", "tdp_weight": 2.0, "layers": ["a"], "mix": 0.2}, {"tdp_weight", "layers"}),
        (SR4IR, {"method": "s_to_t", "grid": 2, "mix": 0.2, "separate": True}, {"grid", "mix", "separate"}),
        (SR4IR, {"method": "oracle", "s_weights": Path("run")}, {"s_weights"}),
        (SR4IR, {"h_weight_decay": 0.1}, {"h_weight_decay"}),
        (SR4IR, {"h_weight_decay": 0.1, "h_optimizer": "sgd", "grid": 2, "layers": ["a"], "separate": True}, set()),
        (EDTR, {"method": "hlf_long", "n": 4, "t_p": 300, "alpha": 2.0}, {"n", "t_p"}),
        (EDTR, {"method": "no_fm", "long_steps": 4, "alpha": 2.0}, {"long_steps", "alpha"}),
        (EDTR, {"method": "no_prior", "draws": 2}, {"draws"}),
        (EDTR, {"n": 4, "t_p": 300, "alpha": 2.0, "draws": 2}, set()),
        (UNIRESTORE, {"network": "edsr-small", "gate": "sigmoid", "task_weights": {"restoration": 2.0}}, {"gate"}),
        (UNIRESTORE, {"cfrm": False, "cfrm_weights": [1.0]}, {"cfrm_weights"}),
        (UNIRESTORE, {"task_weights": {"restoration": 2.0}, "restored_too": 0.1}, {"task_weights", "restored_too"}),
        (UNIRESTORE, {"stage": "stage2", "task_weights": {"restoration": 2.0}, "restored_too": 0.1}, set()),
    ],
)
def test_options_of_other_methods_are_named(config: Any, changes: dict[str, Any], idle: set[str]) -> None:
    assert set(unused(config(out=Path(), **changes))) == idle


@pytest.mark.parametrize(
    ("config", "methods"),
    [
        (DTP, ("pretrain", *dtp.METHODS)),
        (SR4IR, get_args(sr4ir.MethodName)),
        (EDTR, get_args(edtr.MethodName)),
    ],
)
def test_no_default_is_idle(config: Any, methods: Any) -> None:
    for method in methods:
        assert not unused(config(out=Path(), method=method))


@pytest.mark.parametrize("config", [DTP, SR4IR, EDTR, UNIRESTORE])
def test_only_options_are_looked_at(config: Any) -> None:
    options: RunOptions = config(out=Path())
    assert options.looked_at() and not set(options.looked_at()) - set(vars(options))


def test_idle_options_are_said_before_the_first_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(replace(cases.DTP, out=tmp_path / "run", method="scratch", decay=0.3, importance_samples=64, experts=10))
    assert "Of no effect on this run: `replay_share`, `decay`" in caplog.text
