"""The wheel holds what an installed package needs, and works outside of the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_from_sdist_works_from_an_environment_without_the_checkout(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    data = "restoreloss/data/small_prior/"
    assert {"restoreloss/py.typed", data + "config.json", data + "diffusion_pytorch_model.fp16.safetensors"} <= names
    assert not [name for name in names if name.startswith(("tests", "examples"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]

    # without its dependencies; torch and diffusers are borrowed from this environment
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    code = (
        "import torch, restoreloss; assert 'venv' in restoreloss.__file__, restoreloss.__file__; "
        "z, x = torch.rand(2, 1, 3, 16, 16); z.requires_grad_(); "
        "restoreloss.DiffLoss(restoreloss.small_prior())(z, x).backward(); assert z.grad.abs().sum() > 0"
    )
    # appended, not PYTHONPATH: the venv's own packages come first
    code = f"import sys; sys.path.append({borrowed!r}); {code}"
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})
