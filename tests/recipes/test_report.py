import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.common.engine.run_directory import RunDirectory
from examples.experiments import report as module
from examples.experiments.report import WORDS, main, read_runs

T_975 = {1: 12.706204736, 2: 4.302652730, 3: 3.182446305}  # of Student's t, from a printed table
GENERATED = {"task": "classification", "data": "generated", "scale": 4, "start": "scratch", "restorer": "edsr-small"}
SCORES = {"sr4ir": {1: 66.0, 2: 70.0, 3: 65.0}, "s_to_t": {1: 63.0, 2: 64.0, 3: 65.0}, "oracle": {1: 98.0, 2: 99.0}}
TITLE = "classification, generated, x4, start scratch, edsr-small"


def finished(
    root: Path, method: str, seed: int, results: Mapping[str, Any] | None, config: Mapping[str, Any] = GENERATED
) -> Path:
    """A run as the recipe leaves it."""
    group = "_".join(str(value) for value in config.values()).replace("/", "-")
    run = RunDirectory(root / group / method / f"seed{seed}", {**config, "method": method, "seed": seed, "lr": 1e-3})
    if results is not None:
        run.finish(results)
    return run.path


def miniature(root: Path) -> Path:
    for method, scores in SCORES.items():
        for seed, score in scores.items():
            psnr = {} if method == "oracle" else {"psnr": 24.0 + 0.1 * seed + (0.2 if method == "s_to_t" else 0)}
            finished(root, method, seed, {"score": score, "seconds": 50.0 + seed, "num_classes": 10, **psnr})
    return root


def leave_samples(folder: Path, predictions: list[str], truth: list[str], shade: float = 0.5) -> None:
    hr = torch.linspace(0, 1, len(truth)).reshape(-1, 1, 1, 1).expand(-1, 3, 32, 32).clone()
    torch.save(
        {
            "lr": hr[:, :, ::4, ::4].clone(),
            "restored": torch.full_like(hr, shade),
            "hr": hr,
            "predictions": predictions,
            "truth": truth,
        },
        folder / "samples.pt",
    )


def cells(text: str, first: str) -> list[str]:
    """The row of a Markdown table that begins with ``first``."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_numbers_are_those_of_the_formulas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(miniature(tmp_path / "runs")), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert f"## {TITLE}\n" in text
    assert cells(text, "method") == ["method", "seeds", "score", "psnr", "seconds"]

    # sr4ir: 66, 70, 65 have the mean 67 and the squares 1 + 9 + 4, over n - 1 = 2
    std = math.sqrt((1 + 9 + 4) / 2)
    assert cells(text, "sr4ir") == ["sr4ir", "3", f"67.0 ± {std:.1f}", "24.20 ± 0.10", "52 ± 1"]
    assert cells(text, "s_to_t") == ["s_to_t", "3", "64.0 ± 1.0", "24.40 ± 0.10", "52 ± 1"]
    assert cells(text, "oracle") == ["oracle", "2", f"98.5 ± {math.sqrt(0.5):.1f}", "", "52 ± 1"]

    # against s_to_t: 3, 6, 0; mean 3, squares 0 + 9 + 9
    half = T_975[2] * math.sqrt(18 / 2) / math.sqrt(3)
    assert "sr4ir - sr4ir" not in text
    row = cells(text, "sr4ir - s_to_t")
    assert row == [
        "sr4ir - s_to_t",
        "3",
        f"+3.0 [{3 - half:+.1f}, {3 + half:+.1f}]",
        "-0.20 [-0.20, -0.20]",
        "+0 [+0, +0]",
    ]
    # against the oracle, which lacks seed 3: -32, -29; mean -30.5, squares 2.25 + 2.25, over 1
    half = T_975[1] * math.sqrt(4.5) / math.sqrt(2)
    row = cells(text, "sr4ir - oracle")
    assert row == ["sr4ir - oracle", "2", f"-30.5 [{-30.5 - half:+.1f}, {-30.5 + half:+.1f}]", "", "+0 [+0, +0]"]

    with (tmp_path / "out" / "table.csv").open() as file:
        rows = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(rows) == 3 + 3 + 2
    row = rows["oracle", "score"]
    assert {key: row[key] for key in GENERATED} == {key: str(value) for key, value in GENERATED.items()}
    assert (row["n"], row["pairs"], row["reference"]) == ("2", "2", "sr4ir")
    for key, expected in {
        "mean": 98.5,
        "std": math.sqrt(0.5),
        "difference": -30.5,
        "low": -30.5 - half,
        "high": -30.5 + half,
    }.items():
        assert float(row[key]) == pytest.approx(expected, rel=1e-8)
    assert [rows["sr4ir", "score"][key] for key in ("pairs", "difference", "low")] == ["0", "", ""]


@pytest.mark.parametrize(("seeds", "shown"), [((5,), "+1.5"), ((5, 6), "+2.0 [{:+.1f}, {:+.1f}]")])
def test_one_seed_shows_no_spread(seeds: tuple[int, ...], shown: str, tmp_path: Path) -> None:
    for seed, other in zip(seeds, (60.0, 59.0), strict=False):
        finished(tmp_path / "runs", "sr4ir", seed, {"score": 61.5})
        finished(tmp_path / "runs", "joint", seed, {"score": other})
    finished(tmp_path / "runs", "joint", 9, {"score": 10.0})
    finished(tmp_path / "runs", "l_to_t", 9, {"score": 10.0})
    main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    half = T_975[1] * math.sqrt(0.5) / math.sqrt(2)  # of 1.5 and 2.5
    assert cells(text, "sr4ir - joint") == ["sr4ir - joint", str(len(seeds)), shown.format(2 - half, 2 + half)]
    assert cells(text, "sr4ir - l_to_t") == ["sr4ir - l_to_t", "0", ""]
    assert cells(text, "l_to_t") == ["l_to_t", "1", "10.0"]


def test_cells_on_fewer_seeds_say_so(tmp_path: Path) -> None:
    for seed in range(1, 5):
        lost = seed == 2
        finished(tmp_path, "sr4ir", seed, {"score": 60.0, "judge": float("nan") if lost else 50.0 + seed, "new": 0.125})
        finished(tmp_path, "joint", seed, {"score": 60.0, "judge": 50.0, "psnr": 20.0, "text": "none", "flag": True})
    main([str(tmp_path), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert cells(text, "method") == ["method", "seeds", "score", "judge", "psnr", "new"]
    assert cells(text, "difference") == ["difference", "common seeds", "score", "judge", "new"]
    std = math.sqrt(((-5 / 3) ** 2 + (1 / 3) ** 2 + (4 / 3) ** 2) / 2)  # of 51, 53, 54
    expected = ["sr4ir", "4", "60.0 ± 0.0", f"{158 / 3:.1f} ± {std:.1f} (n=3)", "", "0.125 ± 0.000"]
    assert cells(text, "sr4ir") == expected
    half = T_975[2] * std / math.sqrt(3)
    shown = f"{8 / 3:+.1f} [{8 / 3 - half:+.1f}, {8 / 3 + half:+.1f}] (n=3)"
    assert cells(text, "sr4ir - joint") == ["sr4ir - joint", "4", "+0.0 [+0.0, +0.0]", shown, ""]


def test_methods_and_groups_have_one_order(tmp_path: Path) -> None:
    for method in (*sorted(WORDS), "zebra", "ant"):
        finished(tmp_path, method, 1, {"score": 1.0})
    changes: tuple[dict[str, Any], ...] = (
        {"task": "detection"}, {"data": "photos/ü"}, {"scale": 8}, {"start": "hr"}, {"restorer": "swinir"},
        {"degradation": "mixture_b", "mixture_extent": 0.2}, {"contrast": [0.1, 0.2]}, {"steps": 1000},
    )  # fmt: skip
    for number, change in enumerate(changes):
        finished(tmp_path / str(number), "sr4ir", 1, {"score": 1.0}, {**GENERATED, **change})
    groups = read_runs(tmp_path)
    assert len(groups) == 9
    (methods,) = [methods for group, methods in groups.items() if str(group) == TITLE]
    assert list(methods) == [*WORDS, "ant", "zebra"]
    assert list(groups) == sorted(groups, key=str)
    assert len({group.slug for group in groups}) == 9
    assert not any("/" in group.slug for group in groups)
    assert {len(methods) for group, methods in groups.items() if str(group) != TITLE} == {1}


def test_another_reference(tmp_path: Path) -> None:
    main([str(miniature(tmp_path / "runs")), "--out", str(tmp_path / "out"), "--reference", "s_to_t"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert cells(text, "s_to_t - sr4ir")[1:3] == ["3", "-3.0 [-10.5, +4.5]"]
    main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--reference", "tdsr"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No finished run of tdsr here" in text and "confidence" not in text


def test_unfinished_and_corrupt_runs_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    miniature(tmp_path)
    good = {"score": 1.0}
    expected = {finished(tmp_path, "joint", 1, None): "no results.json: unfinished"}
    cut = finished(tmp_path, "joint", 2, good)
    (cut / "results.json").write_text('{"score": 1')
    expected[cut] = "line 1"
    listed = finished(tmp_path, "joint", 3, good)
    (listed / "results.json").write_text("[1]")
    expected[listed] = "names and values"
    expected[finished(tmp_path, "joint", 4, {"score": float("nan")})] = "no number"
    expected[infinite := finished(tmp_path, "joint", 9, good)] = "no number"
    (infinite / "results.json").write_text('{"score": NaN, "psnr": Infinity}')
    broken = finished(tmp_path, "joint", 5, good)
    (broken / "config.yaml").write_text("a: [1")
    expected[broken] = "expected ',' or ']'"
    bare = finished(tmp_path, "joint", 6, good)
    (bare / "config.yaml").unlink()
    expected[bare] = "no config.yaml"
    expected[finished(tmp_path, "joint", 7, good, {**GENERATED, "task": 4})] = "`task` of config.yaml should be str"
    bytes_only = finished(tmp_path, "joint", 8, good)
    (bytes_only / "results.json").write_bytes(b"\xff\xfe")
    expected[bytes_only] = "decode"
    twice = RunDirectory(tmp_path / "zz", {**GENERATED, "method": "sr4ir", "seed": 1})
    twice.finish({"score": 5.0})
    expected[twice.path] = "is already that of"
    (methods,) = read_runs(tmp_path).values()
    assert list(methods) == ["oracle", "s_to_t", "sr4ir"]
    assert methods["sr4ir"][1].numbers["score"] == 66
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == len(expected)
    for path, reason in expected.items():
        (message,) = [message for message in messages if message.startswith(f"{path} skipped: ")]
        assert reason in message and "\n" not in message


@pytest.mark.parametrize("make", ["nothing", "empty", "unfinished"])
def test_a_folder_without_finished_runs_is_refused(make: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    if make == "empty":
        runs.mkdir()
    elif make == "unfinished":
        finished(runs, "sr4ir", 1, None)
    with pytest.raises(SystemExit, match=f"no finished run .* below {runs}"):
        main([str(runs), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def close_to(image: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> np.ndarray:
    return (np.abs(image - np.array(color)) < tolerance).all(axis=2)


def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = miniature(tmp_path / "runs")
    for start, task in (("hr", "classification"), ("scratch", "detection")):
        for seed in (1, 2, 3):
            config = {**GENERATED, "start": start, "task": task}
            finished(runs, "sr4ir", seed, {"score": 70.0 + seed}, config)
            finished(runs, "pretrain", seed, {"psnr": 20.0}, config)
    folders = {run.parent.name: run.parent for run in runs.rglob(f"{'_'.join(map(str, GENERATED.values()))}/*/seed2")}
    truth = ["stripes", "rings", "checker", "bricks", "hexagonal dots", "band noise", "never shown"]
    for index, (method, folder) in enumerate(folders.items()):
        right = [word if number % (index + 2) else "rings!" for number, word in enumerate(truth)]
        leave_samples(folder / "seed2", right, truth, shade=0.25 + 0.25 * index)
        leave_samples(folder / "seed1", right, truth) if method != "oracle" else None
    main([str(runs), "--out", str(tmp_path / "out")])
    out = tmp_path / "out"
    names = ["bars.png", "report.md", "sheet_classification-generated-x4-start-scratch-edsr-small.png", "table.csv"]
    assert sorted(path.name for path in out.iterdir()) == names
    printed = capsys.readouterr().out
    assert all(str(out / name) in printed for name in names)
    assert all(f"({name})" in (out / "report.md").read_text() for name in names if name.endswith("png"))

    bars = pixels(out / "bars.png")
    assert close_to(bars, (255, 178, 110)).any(), "the reference, half transparent"
    assert close_to(bars, (121, 173, 210)).any(), "the others"

    sheet = pixels(out / names[2])
    assert close_to(sheet, (0, 128, 0)).any() and close_to(sheet, (255, 0, 0)).any()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every figure that is made."""
    kept: list[Any] = []

    class Kept(module.Figure):
        def subplots(self, *args: Any, **kwargs: Any) -> Any:
            kept.append(super().subplots(*args, **kwargs))
            return kept[-1]

    monkeypatch.setattr(module, "Figure", Kept)
    return kept


def test_bars_are_means_with_deviations_and_seeds(tmp_path: Path, drawn: list[Any]) -> None:
    miniature(tmp_path / "runs")
    for index, task in enumerate(("detection", "segmentation", "segmentation, again")):
        finished(tmp_path / "runs", "sr4ir", 1, {"score": 10.0 + index}, {**GENERATED, "task": task})
        finished(tmp_path / "runs", "pretrain", 1, {"psnr": 20.0}, {**GENERATED, "task": task})
    module.save_bars(tmp_path / "bars.png", read_runs(tmp_path / "runs"), "sr4ir")
    (panels,) = drawn
    assert panels.shape == (2, 3)
    assert [axes.get_title().split(",")[0] for axes in panels.flat] == [
        "classification", "detection", "segmentation", "segmentation", "", ""
    ]  # fmt: skip
    assert [axes.axison for axes in panels.flat] == [True] * 4 + [False] * 2
    axes = panels[0, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [WORDS[method] for method in list(SCORES)[::-1]]
    assert [bar.get_width() for bar in axes.patches] == [98.5, 64, 67]
    assert [bar.get_x() for bar in axes.patches] == [0, 0, 0], "from zero"
    colors = [bar.get_facecolor()[:3] for bar in axes.patches]
    assert colors[0] == colors[1] != colors[2]
    bars = [bars.get_segments()[0][:, 0] for bars in axes.collections]
    for (low, high), (mean, std) in zip(bars, ((98.5, 0.5**0.5), (64, 1), (67, 7**0.5)), strict=True):
        assert (low, high) == pytest.approx((mean - std, mean + std))
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert [list(x) for x in dots] == [list(SCORES[method].values()) for method in list(SCORES)[::-1]]
    assert [label.get_text() for label in panels[0, 1].get_yticklabels()] == ["SR4IR"], "pretrain has no score"
    assert panels[0, 1].patches[0].get_width() == 10


def test_sheet_shows_what_was_predicted_in_what(tmp_path: Path, drawn: list[Any]) -> None:
    truth = [f"class {index}" for index in range(7)]
    leave_samples(tmp_path, ["class 0", "class 9", "", "class 3", "class 4", "class 5", "class 6"], truth, shade=0.75)
    found = torch.load(tmp_path / "samples.pt", weights_only=True)
    module.save_sheet(tmp_path / "sheet.png", {"joint": found, "sr4ir": {**found, "predictions": truth}})
    (grid,) = drawn
    assert len(grid) == module.IMAGES < len(truth)
    assert [axes.get_title() for axes in grid[0]] == ["LR", "S and H, one\nloss", "SR4IR", "HR"]
    labels = [[(axes.get_xlabel(), axes.xaxis.label.get_color()) for axes in row] for row in grid[:3]]
    assert labels[0] == [("", "black"), ("✓ class 0", "green"), ("✓ class 0", "green"), ("class 0", "black")]
    assert labels[1][1:] == [("✗ class 9", "red"), ("✓ class 1", "green"), ("class 1", "black")]
    assert labels[2][1][0] == ""
    for number, row in enumerate(grid):
        for axes, key in zip(row, ("lr", "restored", "restored", "hr"), strict=True):
            shown = axes.images[0].get_array()
            assert np.array_equal(shown, found[key][number].permute(1, 2, 0).numpy())


def test_samples_are_of_the_lowest_common_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seeds = {"l_to_t": (1, 3, 10), "joint": (3, 10), "sr4ir": (1, 10, 3), "tdsr": ()}
    for method, with_samples in seeds.items():
        for seed in (1, 3, 10):
            folder = finished(tmp_path, method, seed, {"score": 1.0})
            if seed in with_samples:
                leave_samples(folder, [f"{method} {seed}"] * 2, ["a", "b"])
    (methods,) = read_runs(tmp_path).values()
    samples = module.read_samples(methods)
    assert {method: found["predictions"][0] for method, found in samples.items()} == {
        "l_to_t": "l_to_t 3",
        "joint": "joint 3",
        "sr4ir": "sr4ir 3",
    }
    assert not caplog.records
    joint = methods["joint"][3].folder / "samples.pt"
    darker = {**samples["joint"], "hr": samples["joint"]["hr"] / 2}
    for break_it, reason in (
        (lambda: leave_samples(joint.parent, ["x"] * 2, ["a", "c"]), "not those of l_to_t"),
        (lambda: torch.save(darker, joint), "not those of l_to_t"),
        (lambda: torch.save({**samples["joint"], "code": tmp_path}, joint), "Weights only"),
        (lambda: leave_samples(joint.parent, ["x"] * 3, ["a", "b"]), "as many"),
        (lambda: torch.save({"lr": torch.ones(2, 3, 4, 4)}, joint), "'restored'"),
        (lambda: joint.write_bytes(joint.read_bytes()[:300]), str(joint)),
    ):
        caplog.clear()
        break_it()
        assert list(module.read_samples(methods)) == ["l_to_t", "sr4ir"]
        (record,) = caplog.records
        assert record.getMessage().startswith(f"{joint} skipped: ") and reason in record.getMessage()
    caplog.clear()
    joint.unlink()
    (methods["l_to_t"][10].folder / "samples.pt").unlink()
    assert module.read_samples(methods) == {}
    assert "no common seed" in caplog.text


def test_runs_without_samples_have_no_sheet(tmp_path: Path) -> None:
    main([str(miniature(tmp_path / "runs")), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bars.png", "report.md", "table.csv"]
    assert "images" not in (tmp_path / "out" / "report.md").read_text()
    assert json.loads(next((tmp_path / "runs").rglob("results.json")).read_text())["num_classes"] == 10


def test_runs_of_one_method_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name, steps in (("short", 250), ("long", 1000)):
        for seed in (1, 2):
            run = RunDirectory(
                tmp_path / name / f"seed{seed}", {**GENERATED, "method": "sr4ir", "seed": seed, "steps": steps}
            )
            run.finish({"score": steps / 10 + seed})
    assert [list(methods) for methods in read_runs(tmp_path).values()] == [["sr4ir"], ["sr4ir"]]
    (methods,) = read_runs(tmp_path, by_folder=True).values()
    assert {name: [run.numbers["score"] for run in runs.values()] for name, runs in methods.items()} == {
        "long": [101, 102],
        "short": [26, 27],
    }
