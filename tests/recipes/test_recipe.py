"""What all recipes do alike: what is refused before the first step, and what is kept of a training that fails."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.common.data.folder import a_tenth, image_files
from examples.common.data.tasks import IGNORED, InMemory
from examples.common.engine.evaluation import usable
from examples.common.engine.recipe import as_value_error
from examples.common.engine.run_directory import RunDirectory
from examples.common.engine.schedules import cosine, cosine_schedule
from examples.common.networks.restorers import restorer
from examples.diffloss.config import Config
from examples.diffloss.train import Trainer
from examples.dtp.config import Config as DTPConfig
from examples.dtp.train import trainer as dtp_trainer
from examples.experiments.report import read_run
from examples.sr4ir.config import Config as SR4IRConfig
from examples.sr4ir.train import Trainer as SR4IRTrainer
from examples.unirestore.config import Config as UniRestoreConfig
from examples.unirestore.train import Trainer as UniRestoreTrainer
from tests.helpers.processes import launch

TINY = Config(
    out=Path(), steps=4, batch=2, patch=24, train_count=8, test_count=2, test_size=24, save_every=2, cpu=True
)  # fmt: skip
NAN = torch.tensor(math.nan)


class Failing:
    """Steps that go wrong at one of them."""

    def __init__(self, inner: Any, step: int, how: str, network: nn.Module) -> None:
        self.inner, self.at, self.how, self.network, self.count = inner, step, how, network, 0

    def step(self, batch: Any) -> dict[str, Tensor]:
        self.count += 1
        logs: dict[str, Tensor] = self.inner.step(batch)
        if self.count < self.at:
            return logs
        if self.how == "term":
            return {**logs, "restore/other": NAN}
        if self.how == "raise":
            raise FloatingPointError("phase 'restore': pixel is nan.")
        with torch.no_grad():
            next(self.network.parameters()).view(-1)[0] = math.inf
        return logs

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.inner.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)


def failing(out: Path, step: int, how: str, **changes: Any) -> Trainer:
    trainer = Trainer(replace(TINY, out=out, **changes))
    stage = trainer.stages[0]
    trainer.stages = [replace(stage, alternation=Failing(stage.alternation, step, how, trainer.net))]
    return trainer


@pytest.mark.parametrize(
    ("how", "step", "message"),
    [
        ("term", 3, "Step 3: restore/other is nan"),
        ("raise", 3, "Step 3: phase 'restore': pixel is nan"),
        ("weight", 4, "Step 4: networks/restorer/.* holds inf. Nothing was saved"),
    ],
)
def test_a_training_that_becomes_nan_stops_before_it_is_saved(
    how: str, step: int, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=message):
        failing(out, step, how, eval_every=4).run()
    assert not (out / "results.json").exists()
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["networks"]["restorer"].values())
    assert all(value.isfinite().all() for value in load_file(out / "last.safetensors").values())
    resumed = Trainer(replace(TINY, out=out, eval_every=4)).run()
    straight = Trainer(replace(TINY, out=tmp_path / "straight", eval_every=4)).run()
    assert {**resumed, "seconds": 0} == {**straight, "seconds": 0}


def test_a_training_that_fails_at_once_leaves_the_weights_it_began_with(tmp_path: Path) -> None:
    trainer = failing(tmp_path / "run", 1, "weight")
    start = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    with pytest.raises(FloatingPointError, match="Step 2"):
        trainer.run()
    left = load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(left[name], value) for name, value in start.items())


def test_weights_that_are_not_finite_are_refused_before_the_first_step(tmp_path: Path) -> None:
    state = restorer("nafnet-small", 1).state_dict()
    name = next(iter(state))
    state[name].view(-1)[0] = math.nan
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"finite before the first step, found nan in restorer/{name}"):
        Trainer(replace(TINY, out=tmp_path / "run", weights=tmp_path / "weights.pth"))


def test_a_mask_may_hold_infinity(tmp_path: Path) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "a", steps=1))
    trainer.net.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    trainer.begin(lambda: trainer.stages)
    assert math.isfinite(trainer.run()["psnr"])


def test_nan_ends_a_command_in_one_line(tmp_path: Path) -> None:
    command = ["-m", "examples.diffloss.train", "--cpu", "true", "--steps", "4", "--batch", "2", "--patch", "24"]
    command += ["--train_count", "4", "--test_count", "1", "--test_size", "24", "--lr", "1e30"]
    done = launch(*command, "--out", str(tmp_path / "run"), processes=1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Step 2: " in done.stderr.splitlines()[-1] and "nan" in done.stderr.splitlines()[-1]
    assert "psnr" not in done.stdout


def test_figures_that_are_not_finite_are_kept_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"psnr": math.inf, "ssim": math.nan}
    from examples.diffloss import train as training

    monkeypatch.setattr(Trainer, "_test_figures", lambda self, tests: ({f"rainy_{k}": v for k, v in figures.items()},
        {kind: [torch.rand(1, 3, 24, 24)] for kind in ("lr", "restored", "hr")}))  # fmt: skip
    arguments = ["train", "--cpu=true", "--steps=2", "--eval_every=1", "--batch=2", "--patch=24", "--test_size=24"]
    arguments += ["--train_count=4", "--test_count=1", f"--out={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", arguments)
    for _ in range(2):  # the second time from results.json
        training.main()
        printed = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
        assert printed["psnr"] == "inf" and printed["ssim"] == "nan"
    assert json.loads((tmp_path / "run" / "results.json").read_text())["psnr"] == "inf"
    (tmp_path / "run" / "results.json").unlink()
    config = Config(**{**vars(TINY), "out": tmp_path / "run", "steps": 2, "train_count": 4, "test_count": 1,
        "eval_every": 1, "save_every": 250})  # fmt: skip
    assert Trainer(config).best == math.inf


def test_the_last_step_is_saved_before_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Trainer) -> Any:
        raise RuntimeError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", fail)
        with pytest.raises(RuntimeError, match="no space"):
            Trainer(replace(TINY, out=tmp_path / "run", save_every=250)).run()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4
    trainer = Trainer(replace(TINY, out=tmp_path / "run", save_every=250))
    monkeypatch.setattr(trainer.stages[0].alternation, "step", None)  # no step is taken again
    straight = Trainer(replace(TINY, out=tmp_path / "straight", save_every=250)).run()
    assert {**trainer.run(), "seconds": 0} == {**straight, "seconds": 0}


def test_an_evaluation_on_the_way_that_failed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, calls = Trainer.evaluate, []

    def fail(self: Trainer) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no space left")
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", fail)
    with pytest.raises(RuntimeError, match="no space"):
        Trainer(replace(TINY, out=tmp_path / "run", eval_every=2)).run()
    Trainer(replace(TINY, out=tmp_path / "run", eval_every=2)).run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "test/psnr" in row] == [2, 4]


def write(path: Path, height: int = 40, width: int = 44) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def unreadable(path: Path) -> None:
    path.write_bytes(write(path).read_bytes()[:60])


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    for number in range(4):
        write(tmp_path / "data" / "train" / f"{number}.png")
        path = write(tmp_path / "data" / "test" / f"{number}.png")
        path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "data"


def pair_options(root: Path) -> dict[str, Any]:
    return {"data": "folders", "degradations": ["noisy"], "pairs": {"noisy": f"clean:{root}"}, "cpu": True,
        "patch": 24, "batch": 2, "steps": 1}  # fmt: skip


def cub(root: Path, *, test_readable: bool) -> Path:
    folder, rows = root / "CUB_200_2011", [[], [], []]  # type: tuple[Path, list[list[str]]]
    for number in range(1, 9):
        name = f"00{1 + number % 2}.Bird/{number}.png"
        path = write(folder / "images" / name)
        for table, value in zip(rows, (name, 1 + number % 2, int(number < 7)), strict=True):
            table.append(f"{number} {value}")
        if number >= 7 and not test_readable:
            path.write_bytes(path.read_bytes()[:60])
    for file, table in zip(("images.txt", "image_class_labels.txt", "train_test_split.txt"), rows, strict=True):
        (folder / file).write_text("\n".join(table))
    (folder / "classes.txt").write_text("1 001.Bird\n2 002.Bird")
    return root


def test_test_images_that_cannot_be_read_are_found_before_the_first_step(tmp_path: Path, broken: Path) -> None:
    builds: dict[str, tuple[Any, str]] = {
        "diffloss": (lambda out: Trainer(Config(out=out, **pair_options(broken))), "`pairs` should have test"),
        "dtp": (lambda out: dtp_trainer(DTPConfig(out=out, method="scratch", **pair_options(broken))),
            "`pairs` should hold test images of 'noisy' that can be read"),
        "pretrain": (lambda out: dtp_trainer(DTPConfig(out=out, method="pretrain", **pair_options(broken))),
            "`clean` should hold test images that can be read"),
        "sr4ir": (lambda out: SR4IRTrainer(SR4IRConfig(out=out, data="cub200", size=32, batch=2, steps=1, cpu=True,
            root=cub(tmp_path, test_readable=False))), "should hold an image that can be read, found none of 2"),
    }  # fmt: skip
    for name, (build, message) in builds.items():
        with pytest.raises(ValueError, match=message):
            build(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_unirestore_finds_them_too(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "in" / f"{number}.png")
    (path,) = a_tenth(image_files(tmp_path / "in"), tmp_path / "in")
    path.write_bytes(path.read_bytes()[:60])
    config = UniRestoreConfig(out=tmp_path / "run", network="nafnet-small", tasks=["restoration"], size=32, batch=2,
        images=tmp_path / "in", test_count=4, steps=1, cpu=True)  # fmt: skip
    with pytest.raises(ValueError, match="the test data of restoration should hold an image that can be read"):
        UniRestoreTrainer(config)


def test_nothing_is_evaluated_of_a_run_that_is_done(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(4):
            write(tmp_path / "data" / split / f"{number}.png")
    config = DTPConfig(out=tmp_path / "run", method="scratch", **pair_options(tmp_path / "data"))
    done = dtp_trainer(config).run()
    for number in range(4):
        unreadable(tmp_path / "data" / "test" / f"{number}.png")
    assert dtp_trainer(config).run() == done


def test_the_check_leaves_no_trace_in_the_randomness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(out: str) -> dict[str, Tensor]:
        trainer = Trainer(replace(TINY, out=tmp_path / out))
        trainer.run()
        return trainer.net.state_dict()

    with_check = steps("with")
    state = torch.get_rng_state()
    Trainer(replace(TINY, out=tmp_path / "again"))._try_evaluation()
    monkeypatch.setattr(Trainer, "try_evaluation", lambda self: None)
    without = steps("without")
    assert all(torch.equal(value, without[name]) for name, value in with_check.items())
    torch.set_rng_state(state)


def test_a_network_that_cannot_take_the_test_images_is_refused_with_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, image: Tensor) -> Tensor:
            found: Tensor = self.layer(image)
            return found + found.transpose(2, 3)

    from examples.diffloss import train as training

    monkeypatch.setattr(training, "restorer", lambda *_, option: Square())
    for split in ("train", "test"):
        for number in range(4):
            write(tmp_path / "data" / split / f"{number}.png")
    with pytest.raises(
        ValueError, match=r"`network` nafnet-small should take test images of \(40, 44\), found Runtime"
    ):
        Trainer(Config(out=tmp_path / "run", **pair_options(tmp_path / "data")))


class Data(InMemory):
    """Data whose first sample cannot be read."""

    def __getitem__(self, index: int) -> Any:
        return None if index == 0 else super().__getitem__(index)


def test_a_label_that_counts_is_looked_for() -> None:
    images = torch.rand(3, 3, 8, 8)
    void = torch.full((3, 8, 8), IGNORED)
    with pytest.raises(ValueError, match="should hold a pixel with a class, found none in 2 images"):
        usable(Data("segmentation", ["a", "b"], images, void), "segmentation")
    void[2, 0, 0] = 1
    found = usable(Data("segmentation", ["a", "b"], images, void), "segmentation")
    assert len(found) == 1 and torch.equal(found[0][0], images[2])  # type: ignore[index]
    none: list[Any] = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 3
    with pytest.raises(ValueError, match="should hold a box, found none in 2 images: the score could not be"):
        usable(Data("detection", ["background", "a"], images, none), "detection")
    with pytest.raises(ValueError, match="should hold an image that can be read, found none of 1"):
        usable(Data("classification", ["a"], images[:1], [0]), "classification")


def test_one_process_of_several_says_where_the_results_are(tmp_path: Path) -> None:
    done = launch(
        "-m", "examples.diffloss.train", "--cpu", "true", "--steps", "1", "--batch", "2", "--patch", "24",
        "--train_count", "4", "--test_count", "1", "--test_size", "24", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"in {tmp_path / 'run'}") == 1


def test_a_report_names_figures_that_are_not_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"task": "restoration", "data": "photos", "method": "a", "seed": 1}
    RunDirectory(tmp_path / "run", settings).finish({"psnr": math.inf, "ssim": math.nan, "score": 1.0})
    *_, run = read_run(tmp_path / "run")
    assert run.numbers == {"score": 1.0}
    assert "psnr is inf, and left out" in caplog.text and "ssim is nan, and left out" in caplog.text


def test_memory_that_runs_out_is_no_wrong_option() -> None:
    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), allocator):
        with pytest.raises(type(error)), as_value_error("`network` should take test images of (4, 4)"):
            raise error
    wrong = pytest.raises(ValueError, match="of \\(4, 4\\), found RuntimeError: sizes differ")
    with wrong, as_value_error("`network` should take test images of (4, 4)"):
        raise RuntimeError("sizes differ")


def test_a_schedule_goes_on_where_a_longer_one_is() -> None:
    weights = [nn.Parameter(torch.zeros(1))]
    short = cosine_schedule(adam := torch.optim.Adam(weights, lr=2.0), 4, lowest=0.1)
    for _ in range(4):
        adam.step()
        short.step()
    assert short.get_last_lr() == pytest.approx([0.2])
    for steps, expected in ((4, 0.2), (8, 2 * (0.1 + 0.9 * 0.5))):
        optimizer = torch.optim.Adam(weights, lr=2.0)
        schedule = cosine_schedule(optimizer, steps, lowest=0.1)
        schedule.load_state_dict(short.state_dict())
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert [cosine(step, 2) for step in (0, 1, 2, 3)] == pytest.approx([1, 0.5, 0, 0])
