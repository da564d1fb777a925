"""Time of one MLP inside and outside its GEMMs: stock vLLM, SlideSparse's scheme and Spense (the paper's Figure 2).

    python benchmarks/layer_breakdown.py

times the MLP of Qwen3-32B and writes benchmarks/results/layer_breakdown.json and .png. `total_us` is the whole MLP,
from the addition before its norm to the FP8 input of the next layer, inside a CUDA graph, weights cold; `gemm_us` is
its two GEMMs alone, timed the same way; `other_us` is the difference: what the rest adds, overlap taken into account.
`kernels` is how many a profiler saw.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import add_out, first_gpu, mlp_sparsity, positive, run_main
from benchmarks.envelope import print_row, write_result
from benchmarks.make_shape import annotation
from benchmarks.mlp_schemes import Sizes, SlideSparse, Spense, Stock
from vllm_spense.kernels.tuning.timing import cold_copies, median_us
from vllm_spense.shapes import SHAPES

TOKENS = (1, 16, 32, 64, 128, 256, 2048)
SPARSITIES = (0.25, 0.375, 0.5)
_NAME_LENGTH = 80

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-32b")
    parser.add_argument("--tokens", nargs="+", type=positive, default=TOKENS)
    parser.add_argument("--sparsities", nargs="+", type=mlp_sparsity, default=SPARSITIES)
    add_out(parser, "layer_breakdown")
    options = parser.parse_args()
    device = first_gpu()
    # Every scheme compiles the same functions anew.
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        for scheme in schemes(options.shape, options.sparsities, device):
            for row in measure(scheme, options.shape, options.tokens):
                print_row(row)
                rows.append(row)
            # After each, so that a run that is cut short leaves what it has.
            write_result(options.out, "layer_breakdown", with_ratios(rows))
    plot(with_ratios(rows), options.out.with_suffix(".png"))


def schemes(shape: str, sparsities: Sequence[float], device: torch.device) -> Iterator[Stock]:
    """Stock first, which the others are compared with; each is made when it is its turn."""
    config = SHAPES[shape]
    sizes = Sizes(config["hidden_size"], config["intermediate_size"])
    yield Stock(sizes, device)
    yield SlideSparse(sizes, device)
    for sparsity in sparsities:
        yield Spense(sizes, device, annotation(config, sparsity).default)


def measure(scheme: Stock, shape: str, tokens: Sequence[int]) -> Iterator[Row]:
    """One row for each number of tokens."""
    device, hidden = scheme.device, scheme.sizes.hidden
    if isinstance(scheme, Spense):
        scheme.prepare(max(tokens))
    copies = [scheme.weights() for _ in range(cold_copies(scheme.weight_bytes, device))]
    # The largest first: what is compiled for it serves the others but a single token.
    for m in sorted(tokens, reverse=True):
        padded = scheme.padded(m)
        x, residual = torch.randn(2, padded, hidden, dtype=torch.bfloat16, device=device)
        inputs, scale = scheme.gemm_inputs(padded), torch.ones(padded, 1, device=device)
        total = median_us([partial(scheme.run, x, residual, weights) for weights in copies], replays=15)
        gemm = median_us([partial(scheme.run_gemms, inputs, scale, weights) for weights in copies], replays=15)
        names = kernels(partial(scheme.run, x, residual, copies[0]))
        yield {
            "shape": shape,
            "m": m,
            "scheme": scheme.name,
            "sparsity": scheme.sparsity,
            "total_us": round(total, 2),
            "gemm_us": round(gemm, 2),
            "other_us": round(total - gemm, 2),
            "weight_bytes": scheme.weight_bytes,
            "kernels": sum(names.values()),
            "kernel_names": dict(names),
        }


def kernels(call: Callable[[], object]) -> Counter[str]:
    """What runs on the GPU during one call, by name; copies and memsets count."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    # Some are templates spelled out over hundreds of characters.
    return Counter(event.name[:_NAME_LENGTH] for event in events)


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Sorted by tokens, each row with `ratio`: stock's total over its own."""
    stock = {row["m"]: row["total_us"] for row in rows if row["scheme"] == Stock.name}
    added = [{**row, "ratio": round(stock[row["m"]] / row["total_us"], 3)} for row in rows]
    return sorted(added, key=lambda row: row["m"])


def plot(rows: Sequence[Row], file: Path) -> None:
    """Stacked bars, one panel for each number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = list(dict.fromkeys(row["m"] for row in rows))
    figure, axes = plt.subplots(1, len(tokens), figsize=(2.6 * len(tokens), 4), squeeze=False)
    for m, axis in zip(tokens, axes[0], strict=True):
        bars = [row for row in rows if row["m"] == m]
        labels = [row["scheme"] if row["scheme"] != Spense.name else f"spense {row['sparsity']:.1%}" for row in bars]
        gemm = [row["gemm_us"] for row in bars]
        axis.bar(labels, gemm, label="GEMM")
        drawn = axis.bar(labels, [row["other_us"] for row in bars], bottom=gemm, label="other")
        axis.bar_label(drawn, [f"{row['ratio']:.2f}×" for row in bars], fontsize=7)
        axis.set_title(f"{m} tokens", fontsize=9)
        axis.tick_params(axis="x", rotation=90, labelsize=7)
        axis.tick_params(axis="y", labelsize=7)
    axes[0][0].set_ylabel("µs of one MLP")
    axes[0][0].legend(fontsize=7, loc="lower left")
    figure.suptitle(rows[0]["shape"])
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    run_main(main)
