"""Run a worker, a module, or lines of Python by processes of their own."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[2]

# To import torch and diffusers takes longer than most workers work: a server does it once, and is forked for each.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["restoreloss", "tests.helpers.networks"])


def launch(
    *command: str, processes: int = 2, cwd: Path = ROOT, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """What ``torchrun --standalone --nproc_per_node 2`` does: a script, -m module or -c program, and its arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        place = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
        started = [server.Process(target=_work, args=(rank, place, command, cwd, folder)) for rank in range(processes)]
        for process in started:
            process.start()
        while running := [process.sentinel for process in started if process.exitcode is None]:
            if any(process.exitcode for process in started) or not wait(running, timeout):
                break  # where one fails, the others would wait for it
        for process in started:
            process.kill()
            process.join()
        out, err = ("".join(path.read_text() for path in sorted(Path(folder).glob(f"{name}*"))) for name in "12")
    codes = [process.exitcode or 0 for process in started]
    return subprocess.CompletedProcess(command, next(filter(None, codes), 0), out, err)


def _work(rank: int, place: Mapping[str, int], command: Sequence[str], cwd: Path, folder: str) -> None:
    os.environ |= {name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "tests"}
    torch.set_num_threads(1)
    os.chdir(cwd)
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/{stream}.{rank}", os.O_WRONLY | os.O_CREAT), stream)
    sys.path[:0] = [str(cwd), str(ROOT)]
    named = command[0] in ("-m", "-c")
    sys.argv = list(command[named:])
    if command[0] == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        exec(command[1], {"__name__": "__main__"})
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
