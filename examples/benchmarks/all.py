"""All ratios of the benchmarks, one after the other: ours against naive code and against the authors' order.

    python -m examples.benchmarks.all                     # some ten minutes on an idle core
    python -m examples.benchmarks.all --only diffloss tdp

Each benchmark runs in a process of its own, on one thread, and fails by itself where its results differ from those of
the plain code or a ratio is above its bound; the others go on.
"""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = {
    "diffloss": ("diffloss_cost",),
    "tdp": ("tdp_cost",),
    "edtr": ("edtr_cost",),
    "dtp": ("dtp_cost",),
    "corruptions": ("corruptions_cost", "--repeats", "3"),
}
"""Module and arguments by name."""


def processor() -> str:
    """The name of the CPU, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="(default: all)")
    args = parser.parse_args()
    print(f"{processor()}, one thread; torch {torch.__version__}, Python {platform.python_version()}")
    failed = []
    for name in args.only:
        module, *arguments = BENCHMARKS[name]
        print(f"\n## {name}\n", flush=True)
        command = [sys.executable, "-m", f"examples.benchmarks.{module}", *arguments]
        ran = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
        if ran.returncode != 0:
            failed.append(name)
            print("\n".join(line for line in ran.stderr.splitlines() if line and "it/s" not in line)[-2000:])
    if failed:
        parser.exit(1, f"Failed: {', '.join(failed)}\n")


if __name__ == "__main__":
    main()
