"""Do two processes do what one does on the whole batch? Recipes, FSDP2, and chance that belongs to a picture."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.common.engine.batches import Batches
from restoreloss import DenoisingLoss, DiffLoss, NoiseSchedule, Objective, Subsampled, WeightedSum
from tests.contract import distributed_recipes_worker as recipes
from tests.contract import fsdp_worker
from tests.helpers.networks import tiny_unet
from tests.helpers.processes import ROOT, launch

# the recipes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same runs by one process and by two."""
    folder = tmp_path_factory.mktemp("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "BatchNorm2d", recipes.Norm)
        recipes.prepare(folder / "prepared")
        for name in recipes.RUNS:
            recipes.run(name, folder / "prepared", folder / "one" / name, processes=1)
    ran = launch("tests/contract/distributed_recipes_worker.py", str(folder / "prepared"), str(folder / "two"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder / "one", folder / "two"


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    pairs = [(value, other[name]) for name, value in one.items() if value.is_floating_point()]
    return float(sum((a.double() - b.double()).square().sum() for a, b in pairs)) ** 0.5


@pytest.mark.parametrize("name", recipes.RUNS)
def test_two_processes_have_the_gradients_of_one(name: str, runs: tuple[Path, Path]) -> None:
    one, two = (torch.load(folder / name / "noted.pt")["gradients"] for folder in runs)
    for optimizer in {key.partition("/")[0] for key in one}:
        mine, other = ({k: v for k, v in found.items() if k.startswith(f"{optimizer}/")} for found in (one, two))
        norm = distance(mine, {key: torch.zeros_like(value) for key, value in mine.items()})
        # a recognizer looks at what the restorer makes after its first step, and Adam magnifies what rounding leaves
        # of gradients near zero; torch 2.6 leaves more than later ones
        assert norm > 1e-3 and distance(mine, other) < 1e-3 * norm


@pytest.mark.parametrize("name", recipes.RUNS)
def test_two_processes_train_what_one_trains(name: str, runs: tuple[Path, Path]) -> None:
    noted = torch.load(runs[0] / name / "noted.pt")["start"]
    networks = {key.partition("/")[0] for key in noted}
    moved = 0
    for network in networks:
        one, two = (load_file(folder / name / f"{network}.safetensors") for folder in runs)
        start = {key: noted[f"{network}/{key}"] for key in one}
        moved += distance(one, start) > 0.01
        assert distance(one, two) <= 0.06 * distance(one, start), network
    assert moved


@pytest.mark.parametrize("name", recipes.RUNS)
def test_two_processes_report_what_one_reports(name: str, runs: tuple[Path, Path]) -> None:
    """The mean of their losses, and figures of test pictures, of which each counts once."""
    logs = [json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1]) for folder in runs]
    assert len(logs[0]) > 2
    results = [json.loads((folder / name / "results.json").read_text()) for folder in runs]
    for one, two in (logs, results):
        extra = {"stage2/nothing"}  # of UniRestore, for DDP
        assert one.keys() == two.keys() - extra
        for key in one.keys() - {"seconds"}:
            assert two[key] == pytest.approx(one[key], rel=3e-3, abs=1e-6), key


def test_a_batch_is_shared_evenly_or_refused() -> None:
    with pytest.raises(ValueError, match="`batch` should be a multiple of the 2 processes, found 5"):
        Batches(10, 5, seed=1, first=0, last=1, rank=0, processes=2)


# FSDP2


@pytest.fixture(scope="module")
def fsdp() -> subprocess.CompletedProcess[str]:
    return launch("tests/contract/fsdp_worker.py")


@pytest.mark.parametrize("case", fsdp_worker.CASES)
def test_a_network_cut_by_fsdp_does_what_a_whole_one_does(case: str, fsdp: subprocess.CompletedProcess[str]) -> None:
    if fsdp_worker.UNSUPPORTED in fsdp.stdout:
        pytest.skip(fsdp_worker.UNSUPPORTED)
    assert f"{case}: equal" in fsdp.stdout, fsdp.stderr[-3000:]


# chance that belongs to a picture


def generators(count: int, *, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


def sampler(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(5, 900, (count,), generator=generator)


OBJECTIVES: dict[str, Any] = {
    "all": lambda: DiffLoss(tiny_unet(), reduction="none"),
    "tiles": lambda: DiffLoss(tiny_unet(), reduction="none", crop=8),
    "sampler": lambda: DiffLoss(tiny_unet(), reduction="none", timesteps=sampler),
    "sum": lambda: WeightedSum({"diff": DiffLoss(tiny_unet(), reduction="none", timesteps=(3, 500))}, {"diff": 0.1}),
}


@pytest.mark.parametrize("build", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_picture_is_judged_alike_in_every_batch(build: Any) -> None:
    loss: Objective = build()
    restored, clean = torch.rand(2, 5, 3, 19, 16)
    restored.requires_grad_()
    whole: Any = loss(restored, clean, generator=generators(5))
    assert len(set(whole.tolist())) == 5
    for rows in ([0, 1], [4], [3, 0, 2]):
        mine = [generators(5)[row] for row in rows]
        torch.testing.assert_close(loss(restored[rows], clean[rows], generator=mine), whole[rows], rtol=1e-4, atol=1e-7)
    other: Any = loss(restored, clean, generator=generators(5, seed=9))
    assert not torch.isclose(other, whole).any()


def test_pictures_are_chosen_by_their_own_chance() -> None:
    loss = Subsampled(DiffLoss(tiny_unet(), reduction="none"), subset=2)
    restored, clean = torch.rand(2, 5, 3, 16, 16)
    restored.requires_grad_()
    chosen = []
    for seed in range(20):
        found: Any = loss(restored, clean, generator=generators(5, seed=10 * seed))
        rows = found.nonzero().flatten()
        assert len(rows) == 2
        again = [generators(5, seed=10 * seed)[row] for row in rows]
        for generator in again:
            torch.rand(1, generator=generator)  # what the choice has drawn
        whole = DiffLoss(tiny_unet(), reduction="none")(restored[rows], clean[rows], generator=again)
        torch.testing.assert_close(found[rows], whole * 5 / 2)
        chosen += rows.tolist()
    assert set(chosen) == set(range(5))


def test_a_denoiser_learns_from_a_picture_alike_in_every_batch() -> None:
    loss = DenoisingLoss(tiny_unet(), NoiseSchedule.linear(), reduction="none")
    clean = torch.rand(4, 3, 16, 16)
    whole = loss(clean, generator=generators(4))
    torch.testing.assert_close(loss(clean[2:], generator=generators(4)[2:]), whole[2:], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_generators_are_one_for_each_picture(count: int) -> None:
    images = torch.rand(2, 3, 16, 16)
    message = f"`generator` should be one, or one for each of 2, found {count}"
    with pytest.raises(ValueError, match=message):
        DiffLoss(tiny_unet())(images, images, generator=generators(count))
    with pytest.raises(ValueError, match=message):
        DenoisingLoss(tiny_unet(), NoiseSchedule.linear())(images, generator=generators(count))


# the commands of the page

PAGE = ROOT / "docs" / "guides" / "distributed.md"
TINY = "--cpu true --steps 2 --batch 4 --train_count 20 --test_count 5"
SHORT = {
    "examples.diffloss.train": f"{TINY} --patch 24 --test_size 32",
    "examples.sr4ir.train": TINY,
    "examples.edtr.prepare": f"{TINY} --prior_steps 2",
    "examples.edtr.train": TINY,
    "examples.unirestore.prepare": f"{TINY} --prior_steps 2",
    "examples.unirestore.train": f"{TINY} --control_channels 8 --unseen false",
    "examples.dtp.train": f"{TINY} --patch 24 --test_size 24 --timesteps paper --importance_samples 4",
}


def commands() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python -m ") and "examples." in line]


def test_the_page_has_a_command_for_every_recipe() -> None:
    named = {word for command in commands() for word in command if word.startswith("examples.")}
    assert named == set(SHORT)


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    for command in commands():
        (module,) = {word for word in command if word.startswith("examples.")}
        words = [sys.executable, *command[1:], *shlex.split(SHORT[module])]
        if "--nproc_per_node" in words:
            words[words.index("--nproc_per_node") + 1] = "2"
        ran = subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert (f"{2 if '--nproc_per_node' in words else 1} processes") in ran.stderr, module
