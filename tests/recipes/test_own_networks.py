"""Networks of one's own, named as module:Class."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.common.networks.own import own_network
from examples.common.networks.recognizers import recognizer
from examples.common.networks.restorers import restorer
from examples.diffloss.train import Trainer as DiffLossTrainer
from examples.dtp.networks import timed_network
from tests.recipes import cases

TEXT = """
from torch import nn

class Restorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
    def forward(self, image):
        return image + self.decoder(self.encoder(image).relu())

def classifier(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))

number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks.py").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return "my_networks"


def test_a_network_in_the_current_folder_is_found(mine: str) -> None:
    network = restorer(f"{mine}:Restorer", 1)
    assert type(network).__name__ == "Restorer"
    assert recognizer(f"{mine}:classifier", "classification", 7)[2].out_features == 7  # type: ignore[index]
    timed = timed_network(f"{mine}:Restorer", num_timesteps=50, time_layers=["encoder", "decoder"], moe=True)
    assert timed.layers == ["encoder", "decoder"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("no_such_module:Restorer", "No module named"), ("my_networks:Missing", "has no attribute"),
        ("my_networks:classifier", "num_classes"), ("my_networks:number", "not callable"),
    ],
)  # fmt: skip
def test_what_is_no_network_is_named(name: str, found: str, mine: str) -> None:
    with pytest.raises(ValueError, match=f"`network` should be module:Class .*{found}"):
        own_network(name, "network")
    with pytest.raises(ValueError, match="`network` should make a module, found dict"):
        own_network("builtins:dict", "network")


def test_timesteps_need_layers(mine: str) -> None:
    with pytest.raises(ValueError, match="`time_layers` should name layers of my_networks:Restorer"):
        timed_network(f"{mine}:Restorer", num_timesteps=50)
    with pytest.raises(ValueError, match="`time_layers` should be left out for nafnet-small"):
        timed_network("nafnet-small", num_timesteps=50, time_layers=["a"])
    with pytest.raises(ValueError, match="`time_layers` should have one with 'dec' or 'up'"):
        timed_network(f"{mine}:Restorer", num_timesteps=50, time_layers=["encoder"], moe=True)


def test_a_recipe_trains_it(mine: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"network": f"{mine}:Restorer", "steps": 1}
    results = DiffLossTrainer(replace(cases.DIFFLOSS, out=tmp_path / "run", **changes)).run()
    assert any(key.endswith("psnr") for key in results)
