"""Options that a method does not look at are named before the first step."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

import examples.dtp.config as dtp
import examples.edtr.config as edtr
import examples.sr4ir.config as sr4ir
import examples.unirestore.config as unirestore
from examples.common.engine.options import unused
from examples.dtp.train import trainer
from tests.recipes import cases
from tests.recipes.unirestore_runs import trainer as unirestore_trainer

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
        (SR4IR, {"method": "oracle", "s_weights": Path("w"), "restorer": "file"}, set()),
        (EDTR, {"method": "no_prior_noise", "n": 4, "t_p": 100}, {"n"}),
        (DTP, {"method": "pretrain", "moe": True, "experts": 3, "lite0": True}, {"moe", "experts", "lite0"}),
        (UNIRESTORE, {"network": "edsr-small", "gate": "sigmoid", "task_weights": {"restoration": 2.0}}, {"gate"}),
        (UNIRESTORE, {"cfrm": False, "cfrm_weights": [1.0]}, {"cfrm_weights"}),
        (UNIRESTORE, {"after": Path("run"), "every_prompt": True}, {"after", "every_prompt"}),
        (
            UNIRESTORE,
            {"stage": "stage2", "adapter": "convolutions", "gate": "sigmoid", "prompt_lr": 1.0},
            {"gate", "prompt_lr"},
        ),
        (UNIRESTORE, {"stage": "stage2", "after": Path("run"), "gate": "sigmoid", "every_prompt": True}, set()),
    ],
)
def test_options_of_other_methods_are_named(config: Any, changes: dict[str, Any], idle: set[str]) -> None:
    assert set(unused(config(out=Path(), **changes))) == idle


OTHERS: dict[Any, list[dict[str, Any]]] = {
    DTP: [{"method": name, "moe": moe} for name in ("pretrain", *dtp.METHODS) for moe in (True, False)],
    SR4IR: [{"method": name, "h_optimizer": kind} for name in get_args(sr4ir.MethodName) for kind in ("sgd", "adamw")],
    EDTR: [{"method": name} for name in get_args(edtr.MethodName)],
    UNIRESTORE: [{"network": "edsr"}, {"cfrm": False}, {"stage": "stage2"}],
}


@pytest.mark.parametrize("config", OTHERS)
def test_every_option_that_may_be_idle_is_looked_at_by_some_run(config: Any) -> None:
    found = [config(out=Path(), **changes).looked_at() for changes in OTHERS[config]]
    names = set(vars(config(out=Path())))
    for option in found[0]:
        assert option in names and {looked_at[option] for looked_at in found} == {True, False}, option


def test_an_evaluation_names_its_own_idle_options_alone(
    tmp_path: Path, prepared: cases.Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"after": prepared.unirestore / "stage1", "steps": 1}
    stage1 = unirestore_trainer(tmp_path / "run", prepared.unirestore, "stage1", **changes)
    assert "Of no effect on this run: `after`\n" in caplog.text
    stage1.run()
    caplog.clear()
    changes |= {"evaluate": tmp_path / "run", "every_prompt": True}
    unirestore_trainer(tmp_path / "other", prepared.unirestore, "stage1", **changes)
    assert "Of no effect on this run: `every_prompt`\n" in caplog.text


def test_idle_options_are_said_before_the_first_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(replace(cases.DTP, out=tmp_path / "run", method="scratch", decay=0.3, importance_samples=64, experts=10))
    assert "Of no effect on this run: `replay_share`, `decay`" in caplog.text
