"""Two processes train what one trains, also in the runs that tests/contract/test_distributed.py leaves out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import launch
from tests.recipes import cases
from tests.recipes.cases import Case, Prepared, weights

pytestmark = pytest.mark.slow

RUNS: dict[str, Case] = {
    "sr4ir": cases.sr4ir_case(method="no_tdp", batch=4),
    # the reference's features alone: those of H follow its batch statistics, which are each process's own
    "edtr": cases.edtr_case(method="only_reference"),
    "dtp, replay": cases.dtp_case(method="replay", replay_share=0.5),
    "dtp, projection": cases.dtp_case(method="project", replay_share=0.5),
    "diffloss": cases.diffloss_case(ema=0.5, pixel=cases.diffloss.Pixel(distance="mse")),
    "diffloss, shares": cases.diffloss_case(filter=cases.diffloss.Filter(share=0.5)),
    "unirestore, stage 1": cases.unirestore_case("stage1", batch=4, lr=1e-3),
    "unirestore, stage 2": cases.unirestore_case("stage2", batch=4, lr=1e-3, restored_too=1.0),
    "unirestore, adapters of each task": cases.unirestore_case("stage2", batch=4, lr=1e-3, adapter="several"),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_trains(name: str, prepared: Prepared, tmp_path: Path) -> None:
    case = RUNS[name]
    config = replace(case.config(prepared), steps=2)
    run = case.build(replace(config, out=tmp_path / "one"))
    network, module = next(iter(run.networks.items()))
    start = {key: value.clone() for key, value in module.state_dict().items()}
    run.run()
    given = {key: value for key, value in config.plain().items() if key not in ("out", "stage", "name")}
    (tmp_path / "options.yaml").write_text(json.dumps(given))
    options = (*case.arguments, f"--config={tmp_path / 'options.yaml'}", f"--out={tmp_path / 'two'}")
    ran = launch("-m", case.train.__name__, *options)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "2 processes" in ran.stderr
    one, two = (weights(tmp_path / folder)[f"{network}.safetensors"] for folder in ("one", "two"))

    def distance(first: dict[str, Any], second: dict[str, Any]) -> float:
        pairs = [(first[key].double(), second[key].double()) for key in one if one[key].is_floating_point()]
        return float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5

    # Adam magnifies what rounding leaves of gradients near zero
    moved = distance(one, start)
    assert moved > 0.01 and distance(two, one) < 0.02 * moved
