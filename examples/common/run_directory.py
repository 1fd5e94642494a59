"""Where does a run keep what it did, so that it may be killed at any moment and go on?

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
metrics.jsonl  one JSON object per logged step; NaN and infinity are written as null
tb/            the same for TensorBoard, where that is installed
samples/       picture grids
checkpoint.pt  the last state that was saved
results.json   written last: where it exists, the run is done; NaN and infinity are null
============== =========================================================================
"""

import functools
import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor
from torchvision.utils import save_image

logger = logging.getLogger(__name__)


class RunDirectory:
    """The folder of one run.

    Args:
        path: created if it is not there.
        config: plain values (numbers, strings, lists, mappings, None), written to ``config.yaml``.
        ignore: keys of ``config`` that may differ from an earlier ``config.yaml``, which then takes the new values.
        main: False for the other processes of a distributed run: they load, and write nothing at all.

    Raises:
        ValueError: If the folder holds a run whose config differs in a key that is not in ``ignore``.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], *, main: bool = True, ignore: Collection[str] = ()
    ) -> None:
        self.path, self.main = path, main
        self._writer: Any = None
        self._purge_step: int | None = None
        text = yaml.safe_dump(dict(config), sort_keys=False)
        now = yaml.safe_load(text)  # as the file will say it: a tuple is a list
        file = path / "config.yaml"
        before = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.exists() else now
        differ = [
            f"`{key}` was {before.get(key, 'absent')} and is {now.get(key, 'absent')}"
            for key in before | now
            if key not in ignore and (key in before, before.get(key)) != (key in now, now.get(key))
        ]
        if differ:
            raise ValueError(f"{file} belongs to another run: {', '.join(differ)}. Choose another folder.")
        if main and not (file.exists() and before == now):
            path.mkdir(parents=True, exist_ok=True)
            with _replacing(file) as out:
                out.write(text.encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``; NaN and infinity become null."""
        if not self.main:
            return
        numbers = {name: float(value) for name, value in values.items()}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_standard_json(dict(step=step, **numbers)) + "\n")
        if self._writer is None and (writer_class := _summary_writer()) is not None:
            self._writer = writer_class(str(self.path / "tb"), purge_step=self._purge_step)
        if self._writer is not None:
            for name, number in numbers.items():
                self._writer.add_scalar(name, number, step)

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, without a last line that was cut off while it was written."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ValueError(f"{file}: line {number} is no JSON, found {line!r}.") from None
        return rows

    def grid(self, name: str, rows: Sequence[Tensor], *, step: int | None = None) -> Path:
        """Write ``samples/name[_step].png``: each row an (N, 3, H, W) batch in [0, 1], smaller ones enlarged to fit."""
        path = self.path / "samples" / (f"{name}.png" if step is None else f"{name}_{step:07d}.png")
        if self.main:
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
                file.writelines(f"{_standard_json(row)}\n".encode() for row in rows)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``: the run is done."""
        if self.main:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            with _replacing(self.path / "results.json") as file:
                file.write(_standard_json(results, indent=1).encode())

    @property
    def results(self) -> dict[str, Any] | None:
        """What :meth:`finish` was given; None if the run is not done."""
        file = self.path / "results.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def file_in(path: Path | None, name: str) -> Path | None:
    """The file of a run directory, or the file that was named."""
    return path / name if path is not None and path.is_dir() else path


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` once it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _standard_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinity, which JSON lacks, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


@functools.cache
def _summary_writer() -> Any:
    """TensorBoard's writer, or None, which is said once."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("tensorboard is not installed: metrics go to metrics.jsonl alone.")
        return None
    return SummaryWriter
