"""What limits FP8 products of a 2:4 weight on a Hopper multiprocessor: tensor cores, shared memory or power.

    python -m benchmarks.mma_limits

runs the loop of a GEMM kernel (`mma_limits.cu`) with parts left out, and writes benchmarks/results/mma_limits.json.
`of_peak` is the share of the tensor cores' cycles that it keeps busy, which a clock that power lowers does not change.
A 2:4 instruction makes the products of two dense ones, so that its `speed_up` is over the dense loop of the same tile
as a kernel runs it, W copied into shared memory, in time, lowered clocks included.
"""

from __future__ import annotations

import argparse
import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.command_line import add_out, first_gpu, positive, run_main
from benchmarks.envelope import print_row, write_result
from vllm_spense.errors import SpenseError
from vllm_spense.kernels.jit import driver
from vllm_spense.kernels.jit.nvrtc import compile_program
from vllm_spense.kernels.jit.sources import with_includes
from vllm_spense.kernels.tuning.synthetic import random_fp8

SOURCE = Path(__file__).with_suffix(".cu")
#: (tokens, tiles of 64 rows for each of two consumers): as many accumulators as there are registers for.
TILES = ((256, 1), (128, 2))
#: By W_PATH of mma_limits.cu.
W_PATHS = ("shared memory", "registers, not loaded", "global memory to registers", "shared memory to registers")
_STEP_K, _SHARED_BYTES, _THREADS = 128, 227 * 1024, 384
#: Steps whose W is loaded at once: one, two or three.
_ROUND = 6
#: Of x and of W: both stay in the L2 cache.
_BYTES = 8 << 20


class Arguments(ctypes.Structure):
    """As in mma_limits.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "cycles", "sums")),
        ("bytes", ctypes.c_longlong),
        ("steps", ctypes.c_int),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=positive, default=1200, help=f"of 128 columns, in a launch; multiple of {_ROUND}"
    )
    parser.add_argument("--launches", type=positive, default=200, help="one after the other, which makes the GPU warm")
    add_out(parser, "mma_limits")
    options = parser.parse_args()
    if options.steps % _ROUND:
        parser.error(f"--steps: found {options.steps}, expected a multiple of {_ROUND}")
    device = first_gpu()
    if torch.cuda.get_device_capability(device)[0] != 9:
        raise SpenseError("these instructions need a GPU of compute capability 9.0")
    kinds = [Kind(*tile, *rest) for tile in TILES for rest in product((False, True), range(len(W_PATHS)), (4, 2, 1, 0))]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kind: compiled(kind, driver.arch(device)), kinds))
    rows = []
    for kind in kinds:
        rows.append(measure(kind, options.steps, options.launches, device))
        print_row(rows[-1])
    for row in rows:
        dense = next(
            other
            for other in rows
            if other["tile"] == row["tile"]
            and not other["sparse"]
            and other["w"] == W_PATHS[0]
            and other["copied"] == 1
        )
        row["speed_up"] = round(row["tflops"] / dense["tflops"], 2)
    write_result(options.out, "mma_limits", rows)


@dataclass(frozen=True)
class Kind:
    """Of loop, as mma_limits.cu describes it; `copies` counts quarters."""

    tokens: int
    row_tiles: int
    sparse: bool
    w_path: int
    copies: int

    @property
    def rows(self) -> int:
        return 128 * self.row_tiles

    @property
    def stages(self) -> int:
        """Of the ring."""
        stage = self.tokens * _STEP_K + self.rows * _STEP_K // (2 if self.sparse else 1)
        return (_SHARED_BYTES - 2048) // stage

    def macros(self) -> dict[str, int]:
        return {
            "TOKENS": self.tokens,
            "ROW_TILES": self.row_tiles,
            "SPARSE": int(self.sparse),
            "W_PATH": self.w_path,
            "COPIES": self.copies,
            "STAGES": self.stages,
        }


def measure(kind: Kind, steps: int, launches: int, device: torch.device) -> dict[str, Any]:
    """One kernel: the medians over launches that follow each other."""
    kernel = driver.load(compiled(kind, driver.arch(device)), "mma_limits", _THREADS, _SHARED_BYTES, device)
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    x, w = (random_fp8(1, _BYTES, device) for _ in range(2))
    cycles = torch.zeros(blocks, dtype=torch.int64, device=device)
    sums = torch.zeros(blocks, 256, device=device)
    arguments = Arguments(x.data_ptr(), w.data_ptr(), cycles.data_ptr(), sums.data_ptr(), _BYTES, steps)
    stream = torch.cuda.current_stream(device).cuda_stream
    times = []
    kernel.launch(blocks, arguments, stream)
    for _ in range(launches):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kernel.launch(blocks, arguments, stream)
        end.record()
        times.append((start, end))
    torch.cuda.synchronize(device)
    if not bool(sums.isfinite().all()):
        raise SpenseError(f"mma_limits: {kind} gave sums that are not finite")
    milliseconds = median(start.elapsed_time(end) for start, end in times[launches // 2 :])
    taken = float(cycles.double().median())
    instructions = 2 * kind.row_tiles * steps * _STEP_K // (64 if kind.sparse else 32)
    products = 2.0 * blocks * kind.rows * kind.tokens * _STEP_K * steps
    return {
        "tile": f"{kind.rows} × {kind.tokens}",
        "sparse": kind.sparse,
        "w": W_PATHS[kind.w_path],
        "copied": kind.copies / 4,
        "cycles_per_step": round(taken / steps, 1),
        "of_peak": round(instructions * kind.tokens / 2 / taken, 3),
        "us": round(milliseconds * 1e3, 1),
        "ghz": round(taken / milliseconds / 1e6, 2),
        "tflops": round(products / milliseconds / 1e9),
    }


@cache
def compiled(kind: Kind, arch: str) -> bytes:
    """Machine code."""
    sources = {SOURCE.name: SOURCE.read_text(encoding="utf-8")} | with_includes("wgmma.cuh")
    macros = [f"-D{name}={value}" for name, value in kind.macros().items()]
    return compile_program(sources, [f"--gpu-architecture={arch}", "--std=c++17", *macros]).cubin


if __name__ == "__main__":
    run_main(main)
