"""Seconds and peak memory of functions, measured for all benchmarks in one way."""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm


def seconds(step: Callable[[], object], device: str = "cpu") -> float:
    """The time of one call, until the device is done."""
    if device != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def median_seconds(functions: Mapping[str, Callable[[], object]], rounds: int, title: str) -> dict[str, float]:
    """Medians over rounds, in each of which the functions take turns; each is called once before."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in tqdm(range(rounds), desc=title, leave=False):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_of_each(
    build: Callable[..., Callable[[], object]], variants: Sequence[str], *arguments: Any, device: str = "cpu"
) -> dict[str, float]:
    """MiB by which two steps raise the peak of a process of its own, by variant.

    To be called while this process is small: a child's peak starts from its parent's.

    Args:
        build: a function of a module, from a variant and ``arguments`` to the step.
        variants: names.
        arguments: of ``build``.
        device: whose memory is measured.
    """
    context, memory = multiprocessing.get_context("spawn"), {}
    # glibc then gives freed tensors back at once, so that the peak is theirs and not the heap's fragmentation
    with patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
        for variant in tqdm(variants, desc="memory"):
            answer: multiprocessing.Queue[float] = context.Queue()
            process = context.Process(target=_peak, args=(build, variant, arguments, device, answer))
            process.start()
            memory[variant] = answer.get(timeout=600)
            process.join()
    return memory


def _peak(
    build: Callable[..., Callable[[], object]], variant: str, arguments: Sequence[Any], device: str,
    answer: "multiprocessing.Queue[float]",
) -> None:  # fmt: skip
    step = build(variant, *arguments)
    if device == "cpu":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        step()
        answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    else:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        answer.put((torch.cuda.max_memory_allocated() - before) / 2**20)
