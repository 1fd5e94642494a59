"""With torch and what torch itself requires, and nothing else: the package imports, and what needs more says what."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLS = {  # what is missing there, or None where torch is enough
    "restoreloss.DiffLoss(lambda x, t: x, h_space_weight=0)(x, 1 - x)": None,
    "restoreloss.TDPLoss(torch.nn.Conv2d(3, 3, 1), '', normalize=None)(x, 1 - x)": None,
    "restoreloss.WaveletColorFix()(x, 1 - x)": None,
    "restoreloss.corrupt(x, 'fog', 3)": None,
    "restoreloss.CQMix()(x, 1 - x)": None,
    "restoreloss.corrupt(x, 'jpeg_compression', 3)": "numpy",
    "restoreloss.Corruptions(['jpeg_compression'])(x)": "numpy",
    "restoreloss.MixtureA()(x)": "numpy",
    "restoreloss.MixtureB()(x)": "numpy",
    "restoreloss.WaveletColorFix(wavelet='db2')": "PyWavelets",
    "restoreloss.small_prior()": "diffusers",
    "restoreloss.load_prior('name/of-a-prior')": "diffusers",
    "restoreloss.CFRM(4, naf_blocks(4, 1))": "spandrel",
    "restoreloss.Controller(4, small_latent_prior(4).unet)": "diffusers",
    "small_latent_prior(4)": "diffusers",
    "from restoreloss.integrations import transforms": "numpy Pillow torchvision",
    "from restoreloss.integrations import imagecorruptions": "numpy Pillow torchvision",
    "task_networks.task_network('torchvision/resnet18', weights='random')": "torchvision",
    "task_networks.task_network('timm/resnet18', weights='random')": "timm",
}
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")  # torch's own about numpy
import torch, restoreloss
from restoreloss.blocks.cfrm import naf_blocks
from restoreloss.restorers import small_latent_prior
from restoreloss.integrations import task_networks
x = torch.rand(1, 3, 32, 32)
for call in sys.argv[1:]:
    try:
        exec(call)
        print("works")
    except Exception as error:
        print(error if isinstance(error, ImportError) else repr(error))
"""


def lay_out(folder: Path) -> None:
    """Links to torch and all that its metadata requires, as an installation without extras has them."""
    found, wanted = set(), {"torch"}
    while wanted:
        name = wanted.pop()
        found.add(name)
        try:
            installed = distribution(name)
        except PackageNotFoundError:  # a requirement of another platform
            continue
        for file in installed.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(installed.locate_file(top))
        required = (line for line in installed.requires or () if "extra ==" not in line)
        wanted |= {re.match(r"[\w.-]+", line)[0] for line in required} - found


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each call prints there."""
    folder = tmp_path_factory.mktemp("site")
    lay_out(folder)
    (folder / "restoreloss").symlink_to(ROOT / "restoreloss")
    ran = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, *CALLS],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return dict(zip(CALLS, ran.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_torch_is_enough_or_the_error_says_what_to_install(printed: dict[str, str], call: str) -> None:
    package = CALLS[call]
    if package is None:
        assert printed[call] == "works"
    else:
        assert re.search(rf"needs `\w+`, which is not installed: pip install {re.escape(package)}$", printed[call])
