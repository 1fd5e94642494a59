"""The contract of all recipes: runs resume, go on, restore and are evaluated; what is refused leaves no folder."""

import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped, unused-ignore]

from examples.common.data.folder import read_image
from examples.common.engine.recipe import Recipe
from tests.recipes import cases
from tests.recipes.cases import CASES, MORE, SIZES, Case, Prepared, assert_same_weights, command, logged, results_of

every = pytest.mark.parametrize("name", CASES)
restoring = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.restore is not None])
evaluating = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.data is not None])


def case_of(name: str) -> Case:
    return (CASES | MORE)[name]


@pytest.fixture(scope="module")
def start(prepared: Prepared) -> Callable[..., Recipe[Any]]:
    """A run of a case in a folder, with some options changed."""

    def build(name: str, out: Path, **changes: Any) -> Recipe[Any]:
        return case_of(name).build(replace(case_of(name).config(prepared), out=out, **changes))

    return build


@pytest.fixture(scope="module")
def whole(start: Callable[..., Recipe[Any]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that was not stopped, which the tests leave as it is."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(name: str) -> Path:
        start(name, folder / name).run()
        return folder / name

    return run


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_stopped_run_resumes_to_the_same_weights_figures_and_logs(
    name: str, start: Callable[..., Recipe[Any]], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    cases.stop_before_the_end(start(name, tmp_path / "run"))
    assert not (tmp_path / "run" / "results.json").exists()
    start(name, tmp_path / "run").run()
    assert_same_weights(whole(name), tmp_path / "run")
    assert results_of(whole(name)) == results_of(tmp_path / "run")
    assert logged(whole(name)) == logged(tmp_path / "run")


@every
def test_what_is_logged_is_finite(name: str, whole: Callable[[str], Path]) -> None:
    rows = logged(whole(name))
    assert rows and all(len(row) > 1 for row in rows)
    for row in (*rows, results_of(whole(name))):
        assert all(math.isfinite(value) for value in row.values()), row


@every
def test_a_finished_run_is_not_done_again(
    name: str, start: Callable[..., Recipe[Any]], whole: Callable[[str], Path]
) -> None:
    before = times(whole(name))
    run = start(name, whole(name))
    for stage in run.stages:
        stage.alternation.step = None  # type: ignore[assignment, method-assign]
    assert run.run() == json.loads((whole(name) / "results.json").read_text())
    assert times(whole(name)) == before


@every
def test_another_config_is_refused_by_the_name_of_the_option(
    name: str, start: Callable[..., Recipe[Any]], whole: Callable[[str], Path]
) -> None:
    before = times(whole(name))
    for changes, message in (
        ({"seed": 2}, "`seed` was 1 and is 2"), ({"steps": 2}, "`steps` was 3 and is 2"),
        ({"max_norm": 1.0}, "`max_norm` was None and is 1.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"belongs to another run: {message}. Choose another folder"):
            start(name, whole(name), **changes)
    assert times(whole(name)) == before


@every
def test_a_finished_run_goes_on_with_more_steps(
    name: str, start: Callable[..., Recipe[Any]], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole(name), tmp_path / name))
    if name == "dtp":
        with pytest.raises(ValueError, match="`steps` was 3 and is 5"):  # of several stages
            start(name, out, steps=5)
        return
    run = start(name, out, steps=5)
    taken: list[float] = []
    (stage,) = run.stages
    step = stage.alternation.step

    def watched(batch: Any) -> Any:
        taken.append(rate_of(stage.alternation))
        return step(batch)

    stage.alternation.step = watched  # type: ignore[method-assign]
    results = run.run()
    assert len(taken) == 2  # not five
    # the learning rate jumps to where the longer cosine is
    lowest = getattr(run.options, "lr_min", 0.0) / getattr(run.options, "lr", 1.0)
    begun = round(getattr(run.options, "restart", 0.0) * 5)
    first, second = (0.5 * (1 + math.cos(math.pi * (k - begun) / (5 - begun))) for k in (3, 4))
    expected = (lowest + (1 - lowest) * second) / (lowest + (1 - lowest) * first)
    assert taken[1] / taken[0] == pytest.approx(expected)
    assert [row["step"] for row in logged(out)][-1] == 5
    assert json.loads((out / "results_3.json").read_text()) == json.loads((whole(name) / "results.json").read_text())
    assert json.loads((out / "results.json").read_text()) == results
    assert start(name, out, steps=5).run() == results


def rate_of(steps: Any) -> float:
    """The learning rate of an optimizer whose cosine is that of the whole training."""
    if hasattr(steps, "alternations"):  # EDTR
        steps = next(iter(steps.alternations.values()))
    steps = getattr(steps, "alternation", steps)  # DiffLoss
    optimizers = steps.phases[-1].optimizers if hasattr(steps, "phases") else steps.optimizer
    optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
    return float(optimizer.param_groups[0]["lr"])


@every
def test_options_come_from_a_yaml_file_and_from_the_command_line_which_wins(
    name: str, whole: Callable[[str], Path], prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = case_of(name)
    options = case.config(prepared).plain() | {"seed": 5}
    given = {key: value for key, value in options.items() if key not in ("out", "stage", "name")}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(given))
    arguments = (f"--config={tmp_path / 'options.yaml'}", f"--out={tmp_path / 'run'}", "--seed=1")
    command(case.train, *case.arguments, *arguments)
    printed = capsys.readouterr().out
    assert all(figure in printed for figure in results_of(whole(name))) and f"in {tmp_path / 'run'}" in printed
    one, other = (
        yaml.safe_load((folder / "config.yaml").read_text()) | {"out": ""} for folder in (whole(name), tmp_path / "run")
    )
    assert one == other
    assert_same_weights(whole(name), tmp_path / "run")


@every
def test_the_help_describes_every_option(name: str, prepared: Prepared, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("docstring_parser")
    with pytest.raises(SystemExit, match="^0$"):
        command(case_of(name).train, "--help")
    _, *parts = capsys.readouterr().out.replace("\n", " ").split(" --")
    text = {re.split("[=+ ]", part)[0]: part.partition("(type:")[0] for part in parts}
    for option, value in case_of(name).config(prepared).plain().items():
        if option not in ("stage", "name") and not isinstance(value, dict):  # given by place, or a group
            words = [word for word in text[option].split() if word.islower() and word[:1].isalpha()]
            assert len(words) > 2, text[option]


@every
def test_what_is_refused_leaves_no_folder(
    name: str, start: Callable[..., Recipe[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes, message in (
        ({"batch": 0}, "`batch` should be at least 1, found 0"), ({"steps": 0}, "`steps` should be at least 1"),
        ({"batch": 64}, "`batch` should be between 1 and the [0-9]+ training samples, found 64"),
        ({"max_norm": -1.0}, "`max_norm` should be above 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            start(name, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()
    run = start(name, tmp_path / "other")

    def refuse(self: Any) -> None:
        raise ValueError("The test images should be readable.")

    monkeypatch.setattr(type(run), "try_evaluation", refuse)
    with pytest.raises(ValueError, match="should be readable"):
        start(name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# with a finished run


@restoring
def test_a_folder_of_images_is_restored(
    name: str, start: Callable[..., Recipe[Any]], whole: Callable[[str], Path], images: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    case = case_of(name)
    before = times(whole(name))

    def restored(out: str, *options: str) -> list[torch.Tensor]:
        arguments = (str(whole(name)), str(images), str(tmp_path / out), "--device=cpu", *case.more, *options)
        command(case.restore, *arguments)
        return [read_image(tmp_path / out / file) for file in SIZES]

    with caplog.at_level("INFO"):
        found = restored("out")
    assert "broken.png skipped" in caplog.text and "3 images restored" in caplog.text
    assert "4/4" in capsys.readouterr().err  # the progress has a total
    assert sum(path.is_file() for path in (tmp_path / "out").rglob("*")) == len(SIZES)
    for image, size in zip(found, SIZES.values(), strict=True):
        assert tuple(image.shape[1:]) == tuple(case.scale * side for side in size)
    assert all(map(torch.equal, found, restored("again")))
    tiles = restored("tiles", "--tile=32", "--overlap=8")
    assert not torch.equal(tiles[0], found[0]) and torch.equal(tiles[2], found[2])
    assert times(whole(name)) == before
    if case.restored is not None:
        run: Any = start(name, whole(name))
        run.load_finished()
        for network in run.networks.values():
            network.eval()
        with torch.no_grad():
            for image, file in zip(found, ("cat.jpg", "cat.png", "deep/part.png"), strict=True):
                wanted = case.restored(run, read_image(images / file)[None])[0].clamp(0, 1)
                torch.testing.assert_close(image, wanted, atol=0.51 / 255, rtol=0)


@restoring
def test_what_cannot_be_restored_is_named_and_leaves_no_folder(
    name: str, whole: Callable[[str], Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, run, out = case_of(name), str(whole(name)), str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    shutil.copy(whole(name) / "config.yaml", tmp_path / "half")
    for arguments, message in (
        ((str(tmp_path / "none"), str(images), out), "`run` should be a finished run of examples."),
        ((str(tmp_path / "half"), str(images), out), "found no results.json in"),
        ((run, str(tmp_path / "none"), out), "`images` should be a folder"),
        ((run, str(tmp_path / "empty"), out), "`images` should hold an image that can be read, found none"),
        ((run, str(images), str(images / "deep" / "out")), "`out` should be outside of the images"),
        ((run, str(images), str(images / "cat.png")), "`out` should be a folder, found the file"),
        ((run, str(images), out, "--tile=16"), "`tile` should be at least 32, or 0 for no tiles, found 16"),
        ((run, str(images), out, "--tile=-1"), "`tile` should be at least 0, found -1"),
        ((run, str(images), out, "--tile=32", "--overlap=17"), r"from 0 to half of `tile` \(16\), found 17"),
        ((run, str(images), out, "--seed=-1"), "`seed` should be at least 0, found -1"),
        ((run, str(images), out, "--device=abacus"), "argument --device: no such device"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="^2$"):
            command(case.restore, *arguments, *case.more)
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(message, said), said
        assert not (tmp_path / "out").exists()


@evaluating
def test_a_finished_run_is_evaluated_on_its_data_and_on_others(
    name: str, whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, before = case_of(name), times(whole(name))
    command(case.train, *case.arguments, f"--evaluate={whole(name)}", f"--out={tmp_path / 'same'}")
    assert str(tmp_path / "same") in capsys.readouterr().out
    trained = {key: value for key, value in results_of(whole(name)).items() if not key.startswith("share/")}
    assert results_of(tmp_path / "same") == pytest.approx(trained, rel=1e-6)
    assert not list((tmp_path / "same").glob("*.safetensors")) and (tmp_path / "same" / "samples.pt").is_file()
    other = [f"--{option}={value}" for option, value in (case.data or {}).items()]
    command(case.train, *case.arguments, f"--evaluate={whole(name)}", f"--out={tmp_path / 'other'}", *other)
    found = results_of(tmp_path / "other")
    of_all = [
        {name for name in figures if "gain_" not in name} for figures in (found, trained)
    ]  # gains by what there is
    assert of_all[0] == of_all[1] and all(map(math.isfinite, found.values()))
    assert found != pytest.approx(trained, rel=1e-3)
    assert times(whole(name)) == before


@evaluating
def test_what_cannot_be_evaluated_is_named_and_leaves_no_folder(
    name: str, start: Callable[..., Recipe[Any]], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(whole(name), tmp_path / "damaged")
    for file in (tmp_path / "damaged").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    for changes, message in (
        ({"evaluate": tmp_path}, "`evaluate` should be a finished run of this recipe, found no config.yaml"),
        ({"evaluate": whole(name), "steps": 7}, "`steps` should be 3, as in .*, found 7"),
        ({"evaluate": whole(name), "max_norm": 1.0}, "`max_norm` should be None, as in .*, found 1.0"),
        ({"evaluate": tmp_path / "damaged"}, "safetensors"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            start(name, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()


def test_a_run_of_another_recipe_is_not_evaluated(
    whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        command(case_of("sr4ir").train, f"--evaluate={whole('diffloss')}", f"--out={tmp_path / 'run'}")
    assert re.search("`[a-z_]+` should be None, as in .*diffloss, found", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
