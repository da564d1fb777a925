"""Speed-up of both Spense paths over the best dense FP8 GEMM, against the number of tokens (the paper's Figure 1).

    python benchmarks/gemm_sweep.py

times shapes of two models and writes benchmarks/results/gemm_sweep.json and .png. Inputs are random, weights take
turns so that none is in the cache when its turn comes, everything runs inside CUDA graphs; times are medians. For each
number of tokens all kernels, dense and Spense's, take turns, because a GPU that gets warm gets slower.

Spense's kernels return raw sums, as most dense ones do; vLLM's CUTLASS and torch's row-wise one apply scales. Where
down's two regions run side by side their sums stay apart, as in a model, whose norm adds them up as it reads them. The
library path gets its activations in a multiple of 16 rows. `chosen` says which path the policy takes. `plan_s` is what
finding the plan took: seconds at the first run, next to nothing once the plan cache is filled.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path as File
from typing import Any

import torch

sys.path.insert(0, str(File(__file__).resolve().parents[1]))

from benchmarks.command_line import add_out, first_gpu, positive, run_main
from benchmarks.envelope import print_row, write_result
from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm import library, one_launch
from vllm_spense.kernels.region_gemm.problem import Problem, Split
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight
from vllm_spense.kernels.tuning.timing import cold_copies, medians_us
from vllm_spense.ops.dispatch import NEVER_ONE_LAUNCH, Path, choose
from vllm_spense.roofline import gpu_named

#: split, N, K, projections of the merged gate and up and of down: of whole models, then as one of several ranks has
#: them.
LAYERS: dict[str, tuple[Split, int, int, int]] = {
    "qwen3-32b gate_up": ("output", 51200, 5120, 2),
    "qwen3-32b down": ("input", 5120, 25600, 1),
    "llama-3.1-8b gate_up": ("output", 28672, 4096, 2),
    "llama-3.1-8b down": ("input", 4096, 14336, 1),
    "qwen3-32b gate_up of 2 ranks": ("output", 25600, 5120, 2),
    "qwen3-32b down of 2 ranks": ("input", 5120, 12800, 1),
    "llama-3.3-70b gate_up of 4 ranks": ("output", 14336, 8192, 2),
    "llama-3.3-70b down of 4 ranks": ("input", 8192, 7168, 1),
}
WHOLE_LAYERS = [layer for layer in LAYERS if "ranks" not in layer]
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
DENSE_RATIOS = (0.5, 0.25, 0.0)

Row = dict[str, Any]
Packed = Mapping[str, torch.Tensor]
Call = Callable[[], object]
Plan = library.LibraryPlan | one_launch.OneLaunchPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=WHOLE_LAYERS)
    parser.add_argument("--tokens", nargs="+", type=positive, default=TOKENS)
    parser.add_argument("--dense-ratios", nargs="+", type=float, default=DENSE_RATIOS)
    add_out(parser, "gemm_sweep")
    options = parser.parse_args()

    device = first_gpu()
    torch.manual_seed(0)
    rows: list[Row] = []
    for layer in options.layers:
        more = []
        for row in sweep(layer, options.dense_ratios, options.tokens, device):
            print_row(row)
            more.append(row)
        rows += sorted(more, key=lambda row: -row["dense_ratio"])
        # After each, so that a run that is cut short leaves what it has.
        write_result(options.out, "gemm_sweep", rows)
    plot(rows, options.out.with_suffix(".png"))


def sweep(layer: str, ratios: Sequence[float], tokens: Sequence[int], device: torch.device) -> Iterator[Row]:
    """One row for each number of tokens, dense ratio and path."""
    _, n, k, _ = LAYERS[layer]
    weights = [random_fp8(n, k, device) for _ in range(cold_copies(n * k, device))]
    packs: dict[Problem, list[Packed]] = {}
    for problem in (problem_of(layer, ratio) for ratio in ratios):
        weight = random_weight(problem, device)
        packs[problem] = [library.pack(weight, problem) for _ in range(cold_copies(problem.weight_bytes, device))]
        del weight
    for m in tokens:
        dense = dense_kernels(n, k, m, device)
        calls: dict[Any, list[Call]] = {
            name: [partial(kernel, weight) for weight in weights] for name, kernel in dense.items()
        }
        plans, plan_s = {}, {}
        x = random_fp8(library.padded(m), k, device)
        for problem, packed in packs.items():
            start = time.perf_counter()
            plans[problem] = plans_of(problem, m, device)
            plan_s[problem] = round(time.perf_counter() - start, 2)
            for path, plan in plans[problem].items():
                if isinstance(plan, library.LibraryPlan):
                    calls[problem, path] = [partial(plan.sums, x, one) for one in packed]
                else:
                    calls[problem, path] = [partial(plan.run, x[:m], one) for one in packed]
        us = dict(zip(calls, (round(us, 2) for us in medians_us(list(calls.values()), replays=15)), strict=True))
        dense_us = {name: us[name] for name in dense}
        best = min(dense_us, key=dense_us.__getitem__)
        for problem in packs:
            times = {path: us[problem, path] for path in plans[problem]}
            chosen = choose((Path.ONE_LAUNCH, Path.LIBRARY), m, lambda _, times=times: times)
            for path, plan in plans[problem].items():
                yield {
                    "layer": layer,
                    "m": m,
                    "dense_ratio": round(problem.regions.dense_ratio, 4),
                    "dense_us": dense_us[best],
                    "spense_us": times[path],
                    "ratio": round(dense_us[best] / times[path], 3),
                    "ideal": round(problem.ideal, 3),
                    "roofline": roofline(problem, m, device),
                    "path": path,
                    "chosen": path is chosen,
                    "dense_kernel": best,
                    "dense_kernels": dense_us,
                    "plan_s": plan_s[problem],
                    "choice": str(plan.choice if isinstance(plan, library.LibraryPlan) else plan.tiling),
                }


def problem_of(layer: str, ratio: float) -> Problem:
    """As models run it: gate_up region by region."""
    split, n, k, projections = LAYERS[layer]
    extent = n // projections if split == "output" else k
    dense_extent = round(extent * ratio / 128) * 128
    regions = Regions(extent - dense_extent, dense_extent)
    problem = Problem(n, k, regions, split, projections=projections, separate_outputs=split == "input")
    return problem.region_major()


def plans_of(problem: Problem, tokens: int, device: torch.device) -> dict[Path, Plan]:
    """Of every path that may run so many tokens."""
    plans: dict[Path, Plan] = {Path.LIBRARY: library.plan(problem, library.padded(tokens), device)}
    if tokens <= NEVER_ONE_LAUNCH:
        plans[Path.ONE_LAUNCH] = one_launch.plan(problem, one_launch.bucket(tokens), device)
    return plans


def dense_kernels(n: int, k: int, tokens: int, device: torch.device) -> dict[str, Callable[[torch.Tensor], object]]:
    """Every dense GEMM that there is, by name: functions of a weight."""
    x = random_fp8(tokens, k, device)
    one = torch.ones((), device=device)
    row_scales = torch.ones(tokens, 1, device=device)
    column_scales = torch.ones(1, n, device=device)
    scaled_mm = partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)

    problem = Problem(n, k, Regions(0, n), "output")
    cublaslt = library.LibraryPlan(problem, tokens, device, library.search(problem, tokens, device))
    kernels: dict[str, Callable[[torch.Tensor], object]] = {
        "cublaslt": lambda weight: cublaslt.run(x, {"dense": weight[None]}),
        "torch per-tensor": lambda weight: scaled_mm(x, weight.t(), one, one),
        "torch row-wise": lambda weight: scaled_mm(x, weight.t(), row_scales, column_scales),
    }
    try:
        from vllm._custom_ops import cutlass_scaled_mm
    except ImportError:
        print("vLLM is not installed: its CUTLASS kernel is left out")
    else:
        kernels["vllm cutlass"] = lambda weight: cutlass_scaled_mm(
            x, weight.t(), row_scales, column_scales, torch.bfloat16
        )
    return kernels


def roofline(problem: Problem, tokens: int, device: torch.device) -> float | None:
    """The speed-up if dense and Spense both ran at the nearer of two limits, memory and tensor cores.

    None for a GPU whose limits are not known here.
    """
    name = torch.cuda.get_device_name(device)
    gpu = gpu_named(name)
    if gpu is None:
        return None
    n, k = problem.n, problem.k
    activations = tokens * (k + n * problem.out_dtype.itemsize)
    flops = 2 * tokens * n * k

    def limit(weight_bytes: int, share: float) -> float:
        return max((weight_bytes + activations) / gpu.bytes_per_s, flops * share / gpu.fp8_flops)

    return round(limit(n * k, 1) / limit(problem.weight_bytes, (1 + problem.regions.dense_ratio) / 2), 3)


def plot(rows: Sequence[Row], file: File) -> None:
    """Speed-up against tokens, one panel for each layer and ρ."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(row["layer"], row["dense_ratio"]) for row in rows}, key=lambda panel: (panel[0], -panel[1]))
    layers = list(dict.fromkeys(layer for layer, _ in panels))
    columns = max(sum(layer == panel[0] for panel in panels) for layer in layers)
    figure, axes = plt.subplots(
        len(layers), columns, figsize=(4.2 * columns, 3.4 * len(layers)), sharey="row", squeeze=False
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for layer, ratio in panels:
        axis = axes[layers.index(layer)][[r for name, r in panels if name == layer].index(ratio)]
        axis.set_visible(True)
        mine = [row for row in rows if (row["layer"], row["dense_ratio"]) == (layer, ratio)]
        for path, marker in ((Path.ONE_LAUNCH, "o"), (Path.LIBRARY, "s")):
            points = [row for row in mine if row["path"] == path]
            axis.plot([row["m"] for row in points], [row["ratio"] for row in points], marker=marker, label=path)
        limits = [row for row in mine if row["path"] == Path.LIBRARY]
        axis.plot([row["m"] for row in limits], [row["ideal"] for row in limits], "k--", lw=1, label="ideal")
        if all(row["roofline"] for row in limits):
            axis.plot([row["m"] for row in limits], [row["roofline"] for row in limits], "k:", lw=1, label="roofline")
        axis.axhline(1, color="gray", lw=0.8)
        axis.set(title=f"{layer}, ρ = {ratio:g}", xlabel="tokens M", xscale="log")
        axis.set_xticks([row["m"] for row in limits], [str(row["m"]) for row in limits], fontsize=7)
        axis.minorticks_off()
        axis.set_ylim(0, 1.7)
        axis.grid(alpha=0.3)
    for row_of_axes in axes:
        row_of_axes[0].set_ylabel("speed-up over best dense")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    run_main(main)
