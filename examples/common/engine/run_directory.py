"""The folder of a run: config, metrics, checkpoint and results, so that it may be killed at any moment and go on.

    run = RunDirectory(Path("runs/x4"), {"lr": 1e-3, "steps": 1000}, ignore=["steps"])
    state = run.load()                                      # None: begin at the beginning
    for step in range(state["step"] + 1 if state else 1, 1001):
        ...
        run.log(step, {"loss": loss})                       # a step is logged before it is saved
        if step % 100 == 0:
            run.save({"step": step, "net": net.state_dict(), "generator": generator.get_state()})
    run.finish({"psnr": 24.4})

============== =========================================================================
config.yaml    what decides the result; a run of another config is refused
lock           locked by the process that writes here, and who that is: pid, host, since
metrics.jsonl  one JSON object per logged step
tb/            the same for TensorBoard, where that is installed
samples/       image grids
checkpoint.pt  the last state that was saved
results.json   written last: where it exists, the run is done
============== =========================================================================

JSON has no numbers for NaN and infinity: they are written as the strings "nan", "inf" and "-inf", which
:func:`read_json` makes floats again.

A run directory has one owner. The lock is the operating system's (``flock``): it ends with the process, also with one
that was killed, so that none is left behind. On a network file system it holds between machines where the system's
locks do (NFS of Linux, Lustre with ``-o flock``); where there are none, one warning says so and nobody is refused.
"""

import functools
import json
import logging
import math
import os
import socket
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped, unused-ignore]
from safetensors.torch import save_model
from torch import Tensor, nn
from torchvision.utils import save_image

from examples.common.data.folder import check_folder
from restoreloss.restorers import UniRestore

logger = logging.getLogger(__name__)


class RunDirectory:
    """The folder of one run.

    Args:
        path: created if it is not there.
        config: plain values (numbers, strings, lists, mappings, None), written to ``config.yaml``.
        ignore: keys of ``config`` that may differ from an earlier ``config.yaml``, which then takes the new values.
        grow: keys whose number may be larger than before. The run goes on then, and earlier results become
            ``results_BEFORE.json``.
        main: False for the other processes of a distributed run: they load, and write nothing at all.

    Raises:
        ValueError: If the folder holds a run whose config differs in a key that is not in ``ignore``, if another
            process writes to it, and if there can be no such folder.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        *,
        main: bool = True,
        ignore: Collection[str] = (),
        grow: Collection[str] = (),
    ) -> None:
        self.path, self.main = path, main
        self._writer: Any = None
        self._purge_step: int | None = None
        self._lock: Lock | None = None
        text = yaml.safe_dump(dict(config), sort_keys=False)
        now = yaml.safe_load(text)  # as the file will say it: a tuple is a list
        file = path / "config.yaml"
        before = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.exists() else now
        grown = [key for key in grow if key in before and key in now and now[key] > before[key]]
        differ = [
            f"`{key}` was {before.get(key, 'absent')} and is {now.get(key, 'absent')}"
            for key in before | now
            if key not in (*ignore, *grown) and (key in before, before.get(key)) != (key in now, now.get(key))
        ]
        if differ:
            raise ValueError(f"{file} belongs to another run: {', '.join(differ)}. Choose another folder.")
        if main:
            if grown and self.results is not None:
                logger.info("goes on from the %s of %s to %s", grown[0], before[grown[0]], now[grown[0]])
                (path / "results.json").rename(path / f"results_{before[grown[0]]}.json")
            if self.results is None:
                self._lock = lock_folder(path)
            if not (file.exists() and before == now):
                with _replacing(file) as out:
                    out.write(text.encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``."""
        if not self.main:
            return
        numbers = {name: float(value) for name, value in values.items()}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(dict(step=step, **numbers)) + "\n")
        if self._writer is None and (writer_class := _summary_writer()) is not None:
            self._writer = writer_class(str(self.path / "tb"), purge_step=self._purge_step)
        if self._writer is not None:
            for name, number in numbers.items():
                self._writer.add_scalar(name, number, step)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines that were logged, without a last one that was cut off while it was written."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(read_json(line))
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ValueError(f"{file}: line {number} is no JSON, found {line!r}.") from None
        return rows

    def grid(self, name: str, rows: Sequence[Tensor], *, step: int | None = None) -> Path:
        """Write ``samples/name[_step].png``: each row an (N, 3, H, W) batch in [0, 1], smaller ones enlarged to fit.

        Images that are not finite are named in a warning, and the grid is not written.
        """
        path = self.path / "samples" / (f"{name}.png" if step is None else f"{name}_{step:07d}.png")
        if wrong := [number for number, row in enumerate(rows, start=1) if not row.isfinite().all()]:
            logger.warning("%s is not written: the images of row %d are not finite", path, wrong[0])
        elif self.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            size = [max(row.shape[dim] for row in rows) for dim in (2, 3)]
            same = [F.interpolate(row.float().cpu(), size, mode="nearest-exact") for row in rows]
            save_image(torch.stack(same).flatten(0, 1), path, nrow=len(rows[0]))
        return path

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``checkpoint.pt``: tensors and plain values, and under "step" the number of the last step done."""
        if "step" not in state:
            raise ValueError(f'`state` should have the key "step", found {sorted(state)}.')
        if self.main:
            if self._writer is not None:
                self._writer.flush()
            with _replacing(self.path / "checkpoint.pt") as file:
                torch.save(dict(state), file)

    def write(self, name: str, value: Any) -> None:
        """A small file NAME.json."""
        if self.main:
            with _replacing(self.path / f"{name}.json") as file:
                file.write(to_json(value).encode())

    def save_weights(self, name: str, network: nn.Module) -> None:
        """Write ``name.safetensors``, a plain state dict."""
        if self.main:
            partial = _partial(self.path / f"{name}.safetensors")
            if isinstance(network, UniRestore):  # which tells its gate and its prior as well
                network.save_trained(partial)
            else:
                save_model(network, str(partial))
            partial.replace(self.path / f"{name}.safetensors")

    def load(self, map_location: str | torch.device = "cpu") -> dict[str, Any] | None:
        """The last state saved, or None. What an unfinished run logged after it is dropped: it will be logged again.

        Raises:
            ValueError: If ``checkpoint.pt`` cannot be read.
        """
        path, state, step = self.path / "checkpoint.pt", None, -1
        if path.exists():
            try:
                state = torch.load(path, map_location=map_location, weights_only=True)
                step = int(state["step"])
            except Exception as error:  # of a damaged file torch raises nearly anything
                cause = str(error).partition("\n")[0]
                raise ValueError(
                    f"{path} cannot be read ({type(error).__name__}: {cause}). If it is damaged, put a good copy in "
                    "its place, or delete it and the run begins at the beginning."
                ) from error
        if self.main and self.results is None:
            self._forget_after(step)
        return state

    def _forget_after(self, step: int) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._purge_step = None, step + 1
        rows = [row for row in self.metrics() if row["step"] <= step]
        if (self.path / "metrics.jsonl").exists():
            with _replacing(self.path / "metrics.jsonl") as file:
                file.writelines(f"{to_json(row)}\n".encode() for row in rows)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``: the run is done, and the folder has no owner any more."""
        if self.main:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            with _replacing(self.path / "results.json") as file:
                file.write(to_json(results, indent=1).encode())
            self._lock = None

    @property
    def results(self) -> dict[str, Any] | None:
        """The results that :meth:`finish` was given; None if the run is not done."""
        file = self.path / "results.json"
        return dict(read_json(file.read_text(encoding="utf-8"))) if file.exists() else None


def file_in(path: Path | None, name: str) -> Path | None:
    """The file of a run directory, or the file that was named."""
    return path / name if path is not None and path.is_dir() else path


def finished_run(run: Path, module: str, *files: str, option: str = "run") -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and results of a finished run.

    Args:
        run: its directory.
        module: that trains such runs, for the message.
        files: that the directory should hold as well.
        option: that the run was given as, for the message.

    Raises:
        ValueError: If it is no such directory.
    """
    for name in ("config.yaml", "results.json", *files):
        if not (run / name).is_file():
            raise ValueError(f"`{option}` should be a finished run of {module}, found no {name} in {run}.")
    return settings_of(run), read_json((run / "results.json").read_text(encoding="utf-8"))


def settings_of(run: Path | None) -> dict[str, Any]:
    """The options that a run directory was trained with; empty where there is no config.yaml."""
    file = None if run is None else run / "config.yaml"
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file is not None and file.is_file() else {}


def class_names_of(run: Path, task: str) -> list[str] | None:
    """What the classes of a run are called; None where it did not say."""
    file = run / "classes.json"
    names: list[str] | None = read_json(file.read_text(encoding="utf-8")).get(task) if file.is_file() else None
    return names


def lock_folder(folder: Path) -> "Lock":
    """Make a folder and be the one process that writes to it, for as long as what is returned lives.

    Raises:
        ValueError: If another process owns it, or there can be no such folder.
    """
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock.of(folder)
        for partial in folder.glob("*.partial"):  # of a process that was killed
            partial.unlink()
    except OSError as error:
        raise ValueError(f"`out` should be a folder that can be written to, found {error}.") from error
    return lock


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that all runs below a folder have, or compare them with those that are there.

    Raises:
        ValueError: If they differ.
    """
    file = folder / "settings.json"
    if not file.exists():
        file.write_text(to_json(settings, indent=1))
    elif (found := json.loads(file.read_text())) != json.loads(to_json(settings)):
        raise ValueError(f"`out` should be a folder of runs with these settings, found {found} in {folder}.")


def read_json(text: str) -> Any:
    """Read what :class:`RunDirectory` wrote: "nan", "inf" and "-inf" are floats again."""

    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [numbers(item) for item in value]
        return float(value) if value in ("nan", "inf", "-inf") else value

    return numbers(json.loads(text))


class Lock:
    """The lock of a folder, held for as long as this object lives; one for all who ask in this process."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "lock").open("a+", encoding="utf-8")
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(f"{folder} is being written by {owner}. Wait for it, or choose another folder.") from None
        except (ImportError, OSError) as error:
            logger.warning("%s cannot be locked (%s): see that no other process writes there", folder, error)
            return
        self._file.truncate(0)
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        self._file.flush()
        weakref.finalize(self, self._file.close)

    @classmethod
    def of(cls, folder: Path) -> "Lock":
        """The lock of this process, or a new one."""
        lock = _held.get(folder.resolve())
        if lock is None:
            lock = _held[folder.resolve()] = cls(folder)
        return lock


_held: "weakref.WeakValueDictionary[Path, Lock]" = weakref.WeakValueDictionary()
"""The locks of this process."""


def _partial(path: Path) -> Path:
    """The path at which this process writes a file until it is whole."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` once it is whole and on the disk."""
    partial = _partial(path)
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinity, which JSON lacks, become strings."""

    def standard(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: standard(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [standard(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(standard(value), indent=indent, allow_nan=False)


@functools.cache
def _summary_writer() -> Any:
    """TensorBoard's writer, or None, which is said once."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("tensorboard is not installed: metrics go to metrics.jsonl alone.")
        return None
    return SummaryWriter
