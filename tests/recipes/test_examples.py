import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import quickstart
from examples.common.data.folder import load_folder, read_image
from examples.common.data.photos import HELD_OUT, TRAIN, grid_crops, load_photo, pyramid, random_crops
from examples.common.engine.training import by_turns
from examples.diffloss import photos_run
from examples.diffloss.prior_report import linear_errors, noise_errors
from examples.diffloss.train_prior import Recipe, Trainer
from restoreloss import NoiseSchedule
from tests.helpers.processes import ROOT


def gradient_picture(height: int = 100, width: int = 120) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 2, columns * 2, (rows + columns) % 256], axis=-1).astype(np.uint8)


def test_photographs_are_at_hand_and_split() -> None:
    assert not set(TRAIN) & set(HELD_OUT)
    for name in (*TRAIN, *HELD_OUT):
        photo = load_photo(name)
        assert photo.shape[0] == 3
        assert 0 <= photo.min() < photo.max() <= 1


def test_random_crops_are_a_function_of_the_seed() -> None:
    photos = pyramid(load_photo("chelsea"), smallest=96)
    assert [min(p.shape[1:]) for p in photos] == [300, 225, 150]
    crops = [random_crops(photos, 4, 32, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert crops[0].shape == (4, 3, 32, 32)
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


def test_grid_crops_are_parts_of_the_photograph_and_differ() -> None:
    photo = torch.rand(3, 50, 70)
    crops = grid_crops(photo, 16, 5)
    windows = photo.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    assert all(any(torch.equal(crop, window) for window in windows) for crop in crops)
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 5


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "I;16", "1", "LA", "F"])
def test_every_kind_of_picture_becomes_rgb_in_the_unit_range(mode: str, tmp_path: Path) -> None:
    pixels = gradient_picture()
    grey = pixels[..., 0]
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        picture = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        picture = Image.fromarray(pixels).convert(mode)
    path = tmp_path / f"picture.{'tif' if mode in ('CMYK', 'F') else 'png'}"
    picture.save(path)
    tensor = read_image(path)
    assert tensor.shape == (3, 100, 120)
    assert tensor.dtype == torch.float32
    if mode in ("I;16", "F"):
        torch.testing.assert_close(tensor[0], torch.from_numpy(grey).float() / 255)
    elif mode in ("RGB", "RGBA"):
        torch.testing.assert_close(tensor, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    assert 0 <= tensor.min() < tensor.max() <= 1


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (100, 100), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(read_image(tmp_path / "clear.png"), torch.ones(3, 100, 100))


def test_unusable_files_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(gradient_picture()).save(tmp_path / "good.png")
    Image.fromarray(gradient_picture(8, 8)).save(tmp_path / "tiny.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert list(load_folder(tmp_path, smallest=96)) == ["good.png"]
    for name in ("tiny.png", "notes.txt", "empty.jpg", "cut.png"):
        assert any(record.getMessage().startswith(f"{name} skipped: ") for record in caplog.records), name
    assert "8x8 pixels, at least 96" in caplog.text


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_pictures_is_refused(make: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    if make:
        folder.mkdir()
    with pytest.raises(ValueError, match="The folder should hold an image|There should be a folder of images"):
        load_folder(folder, smallest=96)
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--on=photographs", "--images", str(folder), "--out", str(tmp_path / "out")])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "The folder should hold an image" in last or "There should be a folder of images" in last
    assert not (tmp_path / "out").exists()


WRONG: dict[str, list[str]] = {
    "steps": ["--steps=0"],
    "invalid int value": ["--steps=many"],
    "share": ["--share=1.5"],
    "blur": ["--blur=-1"],
    "h_space_weight": ["--h-space-weight=-1"],
    "timesteps": ["--timesteps", "600", "100"],
    "device": ["--device=abacus"],
    "images": ["--images=nowhere"],
    "unrecognized": ["--picture=x"],
}


@pytest.mark.parametrize(("name", "arguments"), WRONG.items(), ids=WRONG)
def test_wrong_use_of_quickstart_is_one_line_and_leaves_no_folder(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--on=photographs", *arguments, f"--out={tmp_path / 'out'}"])
    assert name in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_quickstart_says_what_is_in_the_place_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--on=photographs", f"--out={tmp_path / 'file' / 'out'}"])
    assert "`--out` should be a folder, found the file" in capsys.readouterr().err


def test_quickstart_stops_where_the_loss_is_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, calls = photos_run.Crops.batch, []

    def broken(self: photos_run.Crops, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        clean, degraded = batch(self, size, generator)
        return clean, degraded * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(photos_run.Crops, "batch", broken)
    with pytest.raises(SystemExit, match="1"):
        quickstart.main(["--on=photographs", "--steps=20", f"--out={tmp_path / 'out'}"])
    assert "quickstart: L1, step 2: the loss is nan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quickstart_on_own_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos_run, "by_turns", partial(by_turns, rounds=1))
    monkeypatch.setattr(photos_run, "BATCH", 2)
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for name in ("chelsea", "coffee"):
        pixels = (load_photo(name) * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(pictures / f"{name}.png")
    (pictures / "broken.png").write_bytes(b"\x89PNG")
    result = quickstart.main(["--on=photographs", "--images", str(pictures), "--out", str(out), "--steps", "3"])
    printed = capsys.readouterr().out
    for name in ("comparison.png", "audit.png", "audit.txt", "results.json"):
        assert str(out / name) in printed
        assert (out / name).stat().st_size > 100
    written = json.loads((out / "results.json").read_text())
    scores, seconds, steps = (written[name] for name in ("scores", "seconds_per_step", "steps"))
    assert list(scores) == ["degraded", "pixel", "gradients", "diff", "pixel_long"]
    assert all(math.isfinite(v) for metrics in scores.values() for values in metrics.values() for v in values)
    assert len({str(score) for score in scores.values()}) == 5
    assert steps == {
        "pixel": 3,
        "gradients": 3,
        "diff": 3,
        "pixel_long": round(3 * seconds["diff"] / seconds["pixel"]),
    }
    terms = result["audit"]["terms"]
    assert 0.3 < sum(terms[name]["share"] for name in ("diff/noise", "diff/h_space")) < 0.7
    assert printed.count("±") == 6  # DiffLoss minus each of the three others, in both figures


def test_quickstart_says_where_the_prior_does_not_help() -> None:
    up, down = torch.tensor([30.0, 31.0, 32.0]), torch.tensor([29.0, 30.0, 31.1])
    good, bad = ({"PSNR": values, "SSIM": values / 40} for values in (up, down))
    seconds, steps = (
        dict.fromkeys(("pixel", "gradients", "diff"), 0.01),
        dict.fromkeys(("pixel", "gradients", "diff"), 9),
    )
    rows = photos_run.table({"pixel": good, "gradients": good, "diff": bad}, seconds, steps, 3).splitlines()
    assert [row.count("WORSE") for row in rows] == [0, 2, 2, 0]
    rows = photos_run.table({"pixel": bad, "gradients": good, "diff": good}, seconds, steps, 3).splitlines()
    assert [row.count("better") for row in rows] == [0, 2, 0, 0] and rows[2].count("no clear change") == 2


def test_prior_training_learns_and_resumes_exactly(tmp_path: Path) -> None:
    recipe = Recipe(steps=8, batch=2, crop=16)
    photos = [load_photo("chelsea")]
    straight, first = Trainer(recipe), Trainer(recipe)
    for _ in range(8):
        straight.train_step(photos)
    for _ in range(3):
        first.train_step(photos)
    first.save(tmp_path / "checkpoint.pt", ["chelsea"])
    resumed = Trainer(recipe)
    resumed.resume(tmp_path / "checkpoint.pt", ["chelsea"])
    for _ in range(5):
        resumed.train_step(photos)
    for one, other in zip(resumed.average.parameters(), straight.average.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(SystemExit, match="another --out"):
        Trainer(Recipe(steps=9)).resume(tmp_path / "checkpoint.pt", ["chelsea"])
    with pytest.raises(SystemExit, match="photos.*another --out"):
        Trainer(recipe).resume(tmp_path / "checkpoint.pt", ["coffee"])


@pytest.mark.slow
def test_prior_training_survives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.diffloss.train_prior", "--steps", "6", "--save-every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = []
    for out, kill in ((tmp_path / "killed", True), (tmp_path / "straight", False)):
        arguments = [*command, "--out", str(out)]
        if kill:
            process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
            while not (out / "checkpoint.pt").exists():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert "linear" in done.stdout
        logs.append([row.split(",")[:2] for row in (out / "training_log.csv").read_text().splitlines()])
        for name in (
            "config.json",
            "diffusion_pytorch_model.fp16.safetensors",
            "errors.csv",
            "loss.png",
            "samples.png",
        ):
            assert (out / name).stat().st_size > 0
    assert logs[0] == logs[1]


def test_linear_error_is_that_of_the_filter_itself() -> None:
    # white images of variance s: the Wiener estimate is a number times x_t
    crops = torch.randn(400, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5
    schedule = NoiseSchedule.linear()
    abar = float(schedule.alphas_cumprod[300])
    expected = abar * 0.25 / (abar * 0.25 + 1 - abar)
    assert linear_errors(schedule, crops, crops, [300])[0] == pytest.approx(expected, rel=0.02)
    factor = (1 - abar) ** 0.5 / (abar * 0.25 + 1 - abar)
    (measured,) = noise_errors(lambda x_t, t: factor * x_t, schedule, crops, [300])
    assert measured == pytest.approx(expected, rel=0.02)


def test_linear_error_fitted_elsewhere_is_no_better() -> None:
    crops, others = grid_crops(load_photo("chelsea"), 16, 64), grid_crops(load_photo("rocket"), 16, 64)
    told, guessed = (linear_errors(NoiseSchedule.linear(), crops, u, [50, 400]) for u in (crops, others))
    assert all(a < b for a, b in zip(told, guessed, strict=True))
