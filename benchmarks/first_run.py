"""How long a newcomer's first commands take in a fresh clone of the last commit.

    python -m benchmarks.first_run

runs `make setup`, `make demo` and `make test`, and writes benchmarks/results/first_run.json. What pip and uv have in
their caches is not fetched again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.command_line import add_out, run_main
from benchmarks.envelope import ROOT, write_result

TARGETS = ("setup", "demo", "test")
#: Instruction sets that decide how fast a CPU multiplies matrices, as Linux calls them; the best comes last.
INSTRUCTION_SETS = {"avx2": "AVX2", "avx512f": "AVX-512", "amx_tile": "AMX"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_out(parser, "first_run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "spense")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        seconds = {f"{target}_s": seconds_of(target, clone) for target in TARGETS}
    row = {**seconds, "cores": len(os.sched_getaffinity(0)), "instructions": instructions()}
    write_result(options.out, "first_run", [row])
    print(f"written: {options.out}")


def seconds_of(target: str, folder: Path) -> float:
    """Of `make TARGET`, which must succeed; what it says goes to the terminal."""
    start = time.monotonic()
    done = subprocess.run(["make", target, f"PYTHON={getattr(sys, '_base_executable', sys.executable)}"], cwd=folder)
    if done.returncode:
        sys.exit(f"make {target} ended with code {done.returncode}")
    return round(time.monotonic() - start, 1)


def instructions() -> str | None:
    """The best of `INSTRUCTION_SETS` that this CPU has."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return next((said for flag, said in reversed(INSTRUCTION_SETS.items()) if flag in words), None)


if __name__ == "__main__":
    run_main(main)
