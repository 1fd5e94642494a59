"""Run a worker, a module, or lines of Python by processes of their own."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
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
    """A script, -m module or -c program and its arguments, in processes that are forked from the server.

    Several are given what torchrun gives them. Only a process of torchrun itself has a hash seed of its own and an
    interpreter that ends: see ``launch_by_torchrun``.

    Raises:
        subprocess.TimeoutExpired: If they take longer.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with TemporaryDirectory() as folder:
        started = [
            server.Process(target=_work, args=(rank, environment, command, cwd, folder)) for rank in range(processes)
        ]
        for process in started:
            process.start()
        code, end = 0, time.monotonic() + timeout
        while (running := [process.sentinel for process in started if process.exitcode is None]) and not code:
            if not wait(running, end - time.monotonic()):
                break
            code = next(filter(None, (process.exitcode for process in started)), 0)  # the others would wait for it
        for process in started:
            process.kill()
            process.join()
        out, err = ("".join(path.read_text() for path in sorted(Path(folder).glob(f"{name}*"))) for name in "12")
    if running and not code:
        raise subprocess.TimeoutExpired(command, timeout, out, err)
    return subprocess.CompletedProcess(command, code, out, err)


def launch_by_torchrun(script: str) -> subprocess.CompletedProcess[str]:
    """The same for two processes of interpreters of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def _work(rank: int, environment: Mapping[str, str], command: Sequence[str], cwd: Path, folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if "WORLD_SIZE" in environment:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
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
