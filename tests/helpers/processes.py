"""Run a worker, or a module, by two processes."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[2]

# To import torch and diffusers takes longer than most workers work: a server does it once, and is forked for each.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["restoreloss", "tests.helpers.networks"])


def launch(*command: str, cwd: Path = ROOT, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """What ``torchrun --standalone --nproc_per_node 2`` does: a script or -m module, and its arguments."""
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        processes = [server.Process(target=_work, args=(rank, port, command, cwd, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for _ in processes:
            ended = wait([process.sentinel for process in processes if process.exitcode is None], timeout)
            if not ended or any(process.exitcode for process in processes):
                break  # the other one would wait for this one
        for process in processes:
            process.kill()
            process.join()
        out, err = ("".join(path.read_text() for path in sorted(Path(folder).glob(f"{name}*"))) for name in "12")
    codes = [process.exitcode or 0 for process in processes]
    return subprocess.CompletedProcess(command, next(filter(None, codes), 0), out, err)


def _work(rank: int, port: int, command: Sequence[str], cwd: Path, folder: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    os.chdir(cwd)
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/{stream}.{rank}", os.O_WRONLY | os.O_CREAT), stream)
    sys.path.insert(0, str(ROOT))
    module = command[0] == "-m"
    sys.argv = list(command[module:])
    if module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


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
