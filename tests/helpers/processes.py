"""Run a worker, or a module, by two processes."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def launch(*command: str, cwd: Path = ROOT, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command],
        cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def in_group(work: Callable[[], None]) -> None:
    """Does the work as one of two processes."""
    torch.distributed.init_process_group("gloo")
    assert torch.distributed.get_world_size() == 2
    work()
    leave_group()


def leave_group() -> None:
    """To be called when no DDP is in scope: one that outlives its group aborts the interpreter at its exit at times."""
    gc.collect()
    torch.distributed.barrier()  # the store is the first process's
    torch.distributed.destroy_process_group()
