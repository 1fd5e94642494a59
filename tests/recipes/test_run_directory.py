import json
import logging
import math
import os
import signal
import socket
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from examples.common.engine import run_directory
from examples.common.engine.run_directory import RunDirectory, read_json
from tests.helpers.processes import launch, server

CONFIG: dict[str, Any] = {"lr": 1e-5, "layers": (1, 2), "name": "ü", "weights": {"tdp": 1.0}, "start": None}


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run_directory._summary_writer.cache_clear()
    yield
    run_directory._summary_writer.cache_clear()


def train(path: Path, until: float, *, save_every: int = 3, payload: int = 0) -> None:
    """A random walk that resumes where the checkpoint is."""
    run = RunDirectory(path, {"walk": 1})
    state = run.load() or {"step": 0, "position": 0.0, "generator": torch.Generator().manual_seed(0).get_state()}
    step, position = state["step"], state["position"]
    generator = torch.Generator().set_state(state["generator"])
    while step < until:
        step += 1
        position += torch.randn((), generator=generator).item()
        run.log(step, {"position": position})
        if step % save_every == 0:
            body = torch.full((payload,), step)
            run.save({"step": step, "position": position, "generator": generator.get_state(), "body": body})


def files(path: Path) -> dict[str, bytes]:
    """All but the lock."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"}


def test_config_is_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    RunDirectory(path, CONFIG)
    assert list(files(path)) == ["config.yaml"]
    read = yaml.safe_load((path / "config.yaml").read_text())
    assert list(read.items()) == list({**CONFIG, "layers": [1, 2]}.items())
    written = (path / "config.yaml").stat()
    RunDirectory(path, CONFIG)
    assert (path / "config.yaml").stat() == written


def test_another_config_is_refused_by_name(tmp_path: Path) -> None:
    RunDirectory(tmp_path, {"lr": 0.5, "steps": 10, "same": "here", "old": None})
    before = files(tmp_path)
    for main in (True, False):
        with pytest.raises(ValueError, match="belongs to another run") as error:
            RunDirectory(tmp_path, {"lr": 0.25, "steps": 20, "same": "here", "new": 3}, main=main, ignore=["steps"])
        message = str(error.value)
        assert str(tmp_path / "config.yaml") in message
        for part in ("`lr` was 0.5 and is 0.25", "`old` was None and is absent", "`new` was absent and is 3"):
            assert part in message
        assert "steps" not in message and "same" not in message
    assert files(tmp_path) == before


def test_an_ignored_key_takes_its_new_value(tmp_path: Path) -> None:
    RunDirectory(tmp_path, {"lr": 0.5, "steps": 10})
    RunDirectory(tmp_path, {"lr": 0.5, "steps": 20}, ignore=["steps"])
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"lr": 0.5, "steps": 20}
    with pytest.raises(ValueError, match="`steps` was 20 and is 10"):
        RunDirectory(tmp_path, {"lr": 0.5, "steps": 10})


def test_a_key_that_may_grow_takes_a_larger_value_and_keeps_the_results(tmp_path: Path) -> None:
    RunDirectory(tmp_path, {"lr": 0.5, "steps": 10}).finish({"psnr": 20.0})
    with pytest.raises(ValueError, match="`steps` was 10 and is 9"):
        RunDirectory(tmp_path, {"lr": 0.5, "steps": 9}, grow=["steps"])
    with pytest.raises(ValueError, match="`lr` was 0.5 and is 1.0"):
        RunDirectory(tmp_path, {"lr": 1.0, "steps": 20}, grow=["steps"])
    assert RunDirectory(tmp_path, {"lr": 0.5, "steps": 10}, grow=["steps"]).results == {"psnr": 20.0}
    assert RunDirectory(tmp_path, {"lr": 0.5, "steps": 20}, grow=["steps"], main=False).results == {"psnr": 20.0}
    assert RunDirectory(tmp_path, {"lr": 0.5, "steps": 20}, grow=["steps"]).results is None
    assert read_json((tmp_path / "results_10.json").read_text()) == {"psnr": 20.0}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"lr": 0.5, "steps": 20}


def test_an_emptied_config_is_another_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="`lr` was absent and is 1"):
        RunDirectory(tmp_path, {"lr": 1})


def test_every_line_of_metrics_is_standard_json_at_once(tmp_path: Path, no_tensorboard: None) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    assert run.metrics() == []
    run.log(1, {"loss": 0.1, "tensor": torch.tensor(0.5), "count": 2})
    expected = [{"step": 1, "loss": 0.1, "tensor": 0.5, "count": 2.0}]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == expected
    run.log(2, {"nan": float("nan"), "up": float("inf"), "down": -torch.tensor(float("inf"))})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert not any(word in text for word in ("NaN", "Infinity"))
    assert json.loads(text.splitlines()[1]) == {"step": 2, "nan": "nan", "up": "inf", "down": "-inf"}
    (_, read) = run.metrics()
    assert math.isnan(read["nan"]) and (read["up"], read["down"]) == (math.inf, -math.inf)
    with pytest.raises(TypeError, match="step"):
        run.log(3, {"step": 1.0})


def test_without_tensorboard_it_is_said_once(
    tmp_path: Path, no_tensorboard: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("a", "b"):
        run = RunDirectory(tmp_path / name, CONFIG)
        for step in range(3):
            run.log(step, {"loss": 1.0})
        run.save({"step": 2})
        run.finish({})
        assert len(run.metrics()) == 3
        assert not (tmp_path / name / "tb").exists()
    assert [r.levelname for r in caplog.records if "tensorboard is not installed" in r.getMessage()] == ["INFO"]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def log(run: RunDirectory, steps: range, offset: int = 0) -> None:
        for step in steps:
            run.log(step, {"loss": step + offset})

    run = RunDirectory(tmp_path, CONFIG)
    run.load()
    log(run, range(1, 4))
    run.save({"step": 3})
    log(run, range(4, 6), offset=100)
    time.sleep(1.1)  # event files are ordered by the second
    run.load()  # in the same process: back to the checkpoint
    log(run, range(4, 9), offset=200)
    run._writer.close()  # as if TensorBoard had written it before a kill
    time.sleep(1.1)
    run = RunDirectory(tmp_path, CONFIG)
    run.load()
    log(run, range(4, 7))
    run.finish({})
    events = reader.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(step, step) for step in range(1, 7)]


def test_tensorboard_is_flushed_before_a_checkpoint_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Writer:
        def __init__(self, log_dir: str, purge_step: int | None) -> None:
            calls.append(f"{Path(log_dir).relative_to(tmp_path)} from {purge_step}")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append(f"{name} {value} {step}")

        def flush(self) -> None:
            assert not (tmp_path / "checkpoint.pt").exists()
            calls.append("flush")

        def close(self) -> None:
            assert not (tmp_path / "results.json").exists()
            calls.append("close")

    monkeypatch.setattr(run_directory, "_summary_writer", lambda: Writer)
    run = RunDirectory(tmp_path, CONFIG)
    run.log(1, {"a": 0.5, "b": 2})
    run.save({"step": 1})
    run.load()
    run.log(2, {"a": 0.25})
    run.finish({})
    run.finish({"again": 1})
    expected = "tb from None, a 0.5 1, b 2.0 1, flush, close, tb from 2, a 0.25 2, close"
    assert ", ".join(calls) == expected


def test_grid_pixels_are_what_was_given(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 3, 8, 6), generator=generator)
    small = torch.randint(0, 256, (3, 3, 4, 3), generator=generator)
    path = run.grid("test", [small / 255, *(pixels / 255).requires_grad_()], step=12)
    assert path == tmp_path / "samples" / "test_0000012.png"
    image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert image.shape == (3, 3 * (8 + 2) + 2, 3 * (6 + 2) + 2)
    expected = [small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), *pixels]
    for row in range(3):
        for column in range(3):
            top, left = 2 + row * 10, 2 + column * 8
            assert torch.equal(image[:, top : top + 8, left : left + 6], expected[row][column].byte())
    assert run.grid("of/one", [torch.ones(1, 3, 4, 4)]) == tmp_path / "samples" / "of" / "one.png"
    beyond = np.array(
        Image.open(run.grid("beyond", [torch.tensor([-0.5, 1.5]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)]))
    )
    assert (beyond[2:6, 2:6] == 0).all() and (beyond[2:6, 8:12] == 255).all()
    with pytest.raises(RuntimeError, match="stack"):
        run.grid("uneven", [torch.ones(2, 3, 4, 4), torch.ones(3, 3, 4, 4)])


def test_state_is_read_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    assert run.load() is None
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    run.save({"step": 7, "net": net.state_dict(), "optimizer": optimizer.state_dict(), "names": ["a"]})
    state = RunDirectory(tmp_path, CONFIG).load()
    assert state is not None and state["step"] == 7 and state["names"] == ["a"]
    assert torch.equal(state["net"]["weight"], net.weight)
    assert state["optimizer"]["state"][0]["step"] == 1
    moved = run.load(map_location="meta")
    assert moved is not None and moved["net"]["weight"].device.type == "meta"
    with pytest.raises(ValueError, match=r'"step", found \[\'net\'\]'):
        run.save({"net": {}})


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.5, 0.9, 0.99, "text", "no step", "code"])
def test_a_damaged_checkpoint_says_what_to_do(kept: float | str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    run.log(1, {"loss": 1.0})
    run.save({"step": 1, "body": torch.randn(2000)})
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    if kept == "text":
        path.write_text("hello")
    elif kept == "no step":
        torch.save({"net": 1}, path)
    elif kept == "code":
        torch.save({"step": 1, "path": tmp_path}, path)  # a class, which weights_only refuses
    else:
        path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match="delete it") as error:
        run.load()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(run.metrics()) == 1, "nothing is dropped while nobody knows the step"


def test_a_failed_save_leaves_the_last_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    run.save({"step": 1})
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        run.save({"step": 2, "cannot be pickled": (i for i in range(3))})
    assert run.load() == {"step": 1}
    run.save({"step": 3})
    assert run.load() == {"step": 3}
    assert sorted(files(tmp_path)) == ["checkpoint.pt", "config.yaml"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    run.save({"step": 1})
    done, fsync, replace = [], os.fsync, Path.replace

    def watched_fsync(fd: int) -> None:
        fsync(fd)
        (partial,) = tmp_path.glob("*.partial")
        with partial.open() as file:
            assert os.path.sameopenfile(fd, file.fileno())
        whole = json.loads(partial.read_text()) if "json" in partial.name else torch.load(partial, weights_only=True)
        assert whole == {"step": 2}, "flushed"
        done.append("fsync")

    def watched_replace(self: Path, target: Path) -> Path:
        assert run.load() == {"step": 2 if "replace" in done else 1}
        done.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    run.save({"step": 2})
    assert done == ["fsync", "replace"]
    assert run.load() == {"step": 2}
    run.finish({"step": 2})
    assert done == ["fsync", "replace"] * 2


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path: Path, no_tensorboard: None) -> None:
    train(tmp_path / "straight", 12)
    expected = (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    assert len(expected.splitlines()) == 12
    for stop in range(12):
        path = tmp_path / str(stop)
        train(path, stop)  # saves after 3, 6, 9: stop 2 has no checkpoint, stop 3 loses nothing
        for torn in ('{"step": 99, "posi', "", '{"step": 99, "position": 1.0}'):
            with (path / "metrics.jsonl").open("a") as file:
                file.write(torn)
            RunDirectory(path, {"walk": 1}).load()
            assert len(RunDirectory(path, {"walk": 1}).metrics()) == stop // 3 * 3
        train(path, 12)
        assert (path / "metrics.jsonl").read_bytes() == expected, stop
        assert not list(path.glob("*.partial"))


def test_a_torn_last_line_is_not_read_and_a_broken_one_before_it_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    file.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2"):
        run.metrics()


def test_a_run_that_is_done_keeps_what_it_logged(tmp_path: Path, no_tensorboard: None) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    run.save({"step": 2})
    for step in range(1, 5):
        run.log(step, {"loss": 1.0})
    assert run.results is None
    run.finish({"score": 0.5, "nan": float("nan"), "nested": {"list": [1, float("inf")], "pair": (1, -float("inf"))}})
    for found in (run.results, RunDirectory(tmp_path, CONFIG, main=False).results):
        assert found is not None and math.isnan(found.pop("nan"))
        assert found == {"score": 0.5, "nested": {"list": [1, math.inf], "pair": [1, -math.inf]}}
    assert "NaN" not in (tmp_path / "results.json").read_text()
    state = run.load()
    assert state is not None and state["step"] == 2
    assert len(run.metrics()) == 4


def test_other_processes_write_nothing_and_load(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def everything(run: RunDirectory) -> None:
        run.log(9, {"loss": 1.0})
        run.grid("test", [torch.ones(1, 3, 4, 4)])
        run.save({"step": 9})
        run.finish({"score": 1.0})

    other = RunDirectory(path, CONFIG, main=False)
    assert other.load() is None and other.results is None and other.metrics() == []
    everything(other)
    assert not path.exists()

    run = RunDirectory(path, CONFIG)
    run.save({"step": 3})
    (path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"st')
    before = files(path)
    other = RunDirectory(path, {**CONFIG, "lr": 7}, main=False, ignore=["lr"])
    assert other.load() == {"step": 3}
    everything(other)
    with pytest.raises(ValueError, match="step"):
        other.save({})
    assert files(path) == before


def train_without_end(path: Path, payload: int) -> None:
    sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    train(path, 10**9, save_every=2, payload=payload)


def test_a_process_killed_in_the_middle_of_a_save(tmp_path: Path, no_tensorboard: None) -> None:
    path = tmp_path / "killed"
    payload = 1_000_000  # 8 MB: a save takes long enough to be met
    process = server.Process(target=train_without_end, args=(path, payload))
    process.start()
    assert process.pid is not None
    partial = path / f"checkpoint.pt.{process.pid}.partial"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
            os.kill(process.pid, signal.SIGSTOP)  # look while nothing moves
            saved = (path / "checkpoint.pt").exists()
            if saved and partial.exists() and 0 < partial.stat().st_size < 8 * payload:
                break
            os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert partial.exists() and f"process {process.pid} on " in (path / "lock").read_text()
    logged = RunDirectory(path, {"walk": 1}, main=False).metrics()
    state = RunDirectory(path, {"walk": 1}).load()
    assert state is not None
    step = state["step"]
    assert step > 0 and step % 2 == 0
    assert torch.equal(state["body"], torch.full((payload,), step))
    assert logged[-1]["step"] == step + 2, "killed while it saved the next"
    assert RunDirectory(path, {"walk": 1}).metrics() == logged[:-2]

    assert not partial.exists(), "what a killed process left half written is removed"
    train(path, step + 5)
    train(tmp_path / "straight", step + 5)
    assert (path / "metrics.jsonl").read_bytes() == (tmp_path / "straight" / "metrics.jsonl").read_bytes()


# one owner


def hold(path: Path, held: Event) -> None:
    """Own a folder until the end."""
    run = RunDirectory(path, {"a": 1})
    held.set()
    time.sleep(3600)
    del run


def test_a_second_process_is_refused_and_the_lock_ends_with_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "run"
    held = server.Event()
    process = server.Process(target=hold, args=(path, held))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(ValueError, match="is being written by process") as error:
            RunDirectory(path, {"a": 1})
        for part in (str(path), f"process {process.pid} on {socket.gethostname()} since 2"):
            assert part in str(error.value)
        assert RunDirectory(path, {"a": 1}, main=False).load() is None, "a rank of the same run only reads"
    finally:
        process.kill()
        process.join()
    RunDirectory(path, {"a": 1})
    assert f"process {os.getpid()} on" in (path / "lock").read_text()


def test_one_process_may_open_a_folder_again_and_a_finished_run_has_no_owner(tmp_path: Path) -> None:
    path = tmp_path / "run"
    one = RunDirectory(path, {"a": 1})
    other = RunDirectory(path, {"a": 1})
    del one
    code = f"from examples.common.engine.run_directory import *; RunDirectory(Path({str(path)!r}), {{'a': 1}})"
    assert "is being written by" in launch("-c", code, processes=1).stderr
    other.finish({"score": 1.0})
    assert launch("-c", code, processes=1).returncode == 0


def test_where_nothing_can_be_locked_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunDirectory(tmp_path / "run", {"a": 1}).save({"step": 1})
    assert "cannot be locked (no locks available)" in caplog.text


@pytest.mark.parametrize("below", ["", "deep/run"])
def test_a_file_in_the_place_of_the_folder_is_named(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(ValueError, match="`out` should be a folder, found the file .*file"):
        RunDirectory(tmp_path / "file" / below, {"a": 1})
    assert (tmp_path / "file").read_text() == "here"


def test_a_grid_that_is_not_finite_is_named_and_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory(tmp_path, CONFIG)
    path = run.grid("test", [torch.ones(1, 3, 4, 4), torch.full((1, 3, 4, 4), math.nan)])
    assert not path.exists() and "the images of row 2 are not finite" in caplog.text
