"""A checkout as traiNNer-redux and neosr have it: a registry, and a losses folder that is scanned when imported."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

REGISTRY = """
class Registry:
    def __init__(self):
        self.found = {}

    def register(self, cls):
        name = NAME
        assert name not in self.found, name
        self.found[name] = cls

    def get(self, name):
        return self.found[NAME_OF_STRING]

    def __contains__(self, name):
        return NAME_OF_STRING in self.found


LOSS_REGISTRY = Registry()
"""

LOSSES = """
import importlib
from copy import deepcopy
from pathlib import Path

from PACKAGE.utils.registry import LOSS_REGISTRY

for file in Path(__file__).parent.iterdir():
    if file.name.endswith("_loss.py"):
        importlib.import_module(f"PACKAGE.losses.{file.stem}")


def build_loss(options):
    options = deepcopy(options)
    return LOSS_REGISTRY.get(options.pop("type"))(**options)
"""

OWN = """
import torch
from PACKAGE.utils.registry import LOSS_REGISTRY


class L1Loss(torch.nn.L1Loss):
    def __init__(self, loss_weight):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, restored, target):
        return WEIGHT * super().forward(restored, target)


LOSS_REGISTRY.register(L1Loss)
"""


def checkout(root: Path, package: str, *, lower: bool, weighs_itself: bool) -> Path:
    """Write it. ``lower``: names are registered in lower case; ``weighs_itself``: a loss applies its weight."""
    case = ".lower()" if lower else ""
    files = {
        "__init__.py": "",
        "utils/__init__.py": "",
        "utils/registry.py": REGISTRY.replace("NAME_OF_STRING", f"name{case}").replace("NAME", f"cls.__name__{case}"),
        "losses/__init__.py": LOSSES.replace("PACKAGE", package),
        "losses/own_loss.py": OWN.replace("PACKAGE", package).replace(
            "WEIGHT", "self.loss_weight" if weighs_itself else "1"
        ),
    }
    for name, text in files.items():
        path = root / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def import_losses(root: Path, package: str, monkeypatch) -> ModuleType:
    """``package.losses`` of this checkout and of no other."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(root)
    importlib.invalidate_caches()
    return importlib.import_module(f"{package}.losses")


def copied(name: str) -> str:
    """A file of integrations/, with no weights that would be downloaded."""
    path = Path(__file__).parents[2] / "integrations" / name
    return path.read_text(encoding="utf-8").replace("pretrained", "random")


def snippet(page: str, language: str, number: int = 0) -> str:
    """A block of code of a page of docs/."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    return text.split(f"```{language}\n")[number + 1].split("```")[0]
