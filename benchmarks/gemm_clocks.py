"""GEMMs of many tokens, each alone until the GPU's power limit has settled its clock: time, clock, watts.

    python -m benchmarks.gemm_clocks

`gemm_sweep.py` lets kernels take turns, so that all run at one clock. A prompt is read for longer than that, and each
scheme then runs at the clock that its own power allows. `ratio` is over the fastest dense GEMM so, in time;
`ratio_in_cycles` is what it would be if both had the same clock. Watts are what nvidia-smi reads meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.command_line import add_out, first_gpu, positive, run_main
from benchmarks.envelope import print_row, write_result
from benchmarks.gemm_sweep import LAYERS, dense_kernels, plans_of, problem_of
from benchmarks.gpu_clock import Sustained, Watch
from vllm_spense.kernels.region_gemm import library
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight
from vllm_spense.kernels.tuning.timing import cold_copies

TOKENS = (1024, 2048, 4096, 8192, 16384)
DENSE_RATIOS = (0.5, 0.25, 0.0)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS)[:2])
    parser.add_argument("--tokens", nargs="+", type=positive, default=TOKENS)
    parser.add_argument("--dense-ratios", nargs="+", type=float, default=DENSE_RATIOS)
    parser.add_argument("--milliseconds", type=positive, default=500, help="to settle, and to measure as long again")
    add_out(parser, "gemm_clocks")
    options = parser.parse_args()
    device = first_gpu()
    torch.manual_seed(0)
    rows: list[Row] = []
    for layer in options.layers:
        for row in measured(layer, options.dense_ratios, options.tokens, options.milliseconds, device):
            print_row(row)
            rows.append(row)
        # After each, so that a run that is cut short leaves what it has.
        write_result(options.out, "gemm_clocks", rows)


def measured(
    layer: str, ratios: Sequence[float], tokens: Sequence[int], milliseconds: int, device: torch.device
) -> Iterator[Row]:
    """One row for each number of tokens and dense ratio."""
    _, n, k, _ = LAYERS[layer]
    weights = [random_fp8(n, k, device) for _ in range(cold_copies(n * k, device))]
    packs = {}
    for problem in (problem_of(layer, ratio) for ratio in ratios):
        weight = random_weight(problem, device)
        packs[problem] = [library.pack(weight, problem) for _ in range(cold_copies(problem.weight_bytes, device))]
        del weight
    watch = Watch(device, milliseconds)
    for m in tokens:
        dense = {
            name: watch.sustained([partial(kernel, weight) for weight in weights])
            for name, kernel in dense_kernels(n, k, m, device).items()
        }
        kernel = min(dense, key=lambda name: dense[name].us)
        x = random_fp8(library.padded(m), k, device)
        for problem, packed in packs.items():
            ours = {}
            for path, plan in plans_of(problem, m, device).items():
                run = partial(plan.sums, x) if isinstance(plan, library.LibraryPlan) else partial(plan.run, x[:m])
                ours[path] = watch.sustained([partial(run, one) for one in packed])
            path = min(ours, key=lambda path: ours[path].us)
            yield {
                "layer": layer,
                "m": m,
                "dense_ratio": round(problem.regions.dense_ratio, 4),
                "path": path,
                "dense_kernel": kernel,
                **compared(dense[kernel], ours[path]),
            }


def compared(dense: Sustained, ours: Sustained) -> Row:
    """Both sides of a row, and their ratio in time and in cycles."""
    return {
        "dense_us": round(dense.us, 1),
        "spense_us": round(ours.us, 1),
        "dense_ghz": round(dense.ghz, 3),
        "spense_ghz": round(ours.ghz, 3),
        "dense_watts": dense.watts,
        "spense_watts": ours.watts,
        "ratio": round(dense.us / ours.us, 3),
        "ratio_in_cycles": round(dense.us * dense.ghz / (ours.us * ours.ghz), 3),
    }


if __name__ == "__main__":
    run_main(main)
