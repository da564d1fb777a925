"""Time of an output token and of prefill: stock vLLM in FP8 against Spense, end to end (the paper's Figure 5).

    python benchmarks/decode_speed.py

times the shape of Qwen3-32B with random weights and writes benchmarks/results/decode_speed.json and .png. Every engine
is a process of its own: one start for each sparsity and each type of KV cache. `--work FOLDER` keeps what finished
engines measured, so that the same command goes on where it was cut short.

    python benchmarks/decode_speed.py --url http://localhost:8001/v1 --dense-url http://localhost:8000/v1

times running servers instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import add_out, at_least, mlp_sparsity, positive, run_main, writable_folder
from benchmarks.engine_runs import EngineRun, Measured, in_turn
from benchmarks.envelope import print_row, write_result
from benchmarks.make_shape import ALL_SHAPES, BALANCED, SKEWED, expert_counts, make_shape, shape_config, text_config

SPARSITIES = (0.25, 0.375, 0.5)
BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXTS = (16, 1024, 4096)
KV_CACHES = ("auto", "fp8")

Row = dict[str, Any]


def main() -> None:
    options = parse()
    rows: list[Row] = []
    # After each engine, so that a run that is cut short leaves what it has.
    for more in server_rows(options) if options.url else engine_rows(options):
        rows += more
        for row in more:
            print_row(row)
        write_result(options.out, "decode_speed", rows)
    if any(row["ratio"] for row in rows):
        plot(rows, options.out.with_suffix(".png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=ALL_SHAPES, default="qwen3-32b")
    parser.add_argument("--layers", type=positive, help="fewer layers than the shape has")
    parser.add_argument("--sparsities", nargs="+", type=mlp_sparsity, default=SPARSITIES)
    parser.add_argument("--batches", nargs="+", type=positive, default=BATCHES)
    parser.add_argument("--contexts", nargs="+", type=positive, default=CONTEXTS)
    parser.add_argument("--most-tokens", type=positive, help="leave out what has a larger batch × context")
    parser.add_argument("--kv", nargs="+", choices=KV_CACHES, default=KV_CACHES, help="types of KV cache")
    parser.add_argument(
        "--steps", type=at_least(8), default=24, help="output tokens timed for each batch and context, 8 or more"
    )
    parser.add_argument(
        "--routing", choices=(BALANCED, SKEWED), help=f"how tokens of a mixture choose experts [{BALANCED}]"
    )
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture: to try things out")
    parser.add_argument(
        "--capture",
        # vLLM captures as many by itself.
        type=at_least(512),
        default=512,
        help="tokens of the largest step that runs as a CUDA graph in both engines [512, and more in Spense's]",
    )
    parser.add_argument(
        "--together", type=positive, default=1, help="engines that share the GPU's memory; one is timed at a time"
    )
    parser.add_argument(
        "--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that share every layer [1]"
    )
    parser.add_argument("--gpu-time", action="store_true", help="find out, too, for how much of a step the GPU is busy")
    parser.add_argument(
        "--work", type=writable_folder, help="folder for configurations, logs and what engines measured"
    )
    parser.add_argument("--url", help="of a server that runs Spense, …/v1")
    parser.add_argument("--dense-url", help="of the server to compare it with")
    add_out(parser, "decode_speed")
    options = parser.parse_args()
    if options.dense_url and not options.url:
        parser.error("--dense-url: found no --url, expected the server to compare")
    experts = expert_counts(text_config(shape_config(options.shape)), "")
    if options.routing and not experts:
        parser.error(f"--routing: {options.shape} has no experts; expected the shape of a mixture")
    options.routing = options.routing or (BALANCED if experts else None)
    if options.together > 1 and options.tensor_parallel > 1:
        parser.error("--together: several engines share one GPU only; expected 1 with --tensor-parallel")
    return options


def engine_rows(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of each sparsity and type of KV cache, all against the dense engine with the same type of KV cache."""
    with TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        cases = [(kv, sparsity) for kv in options.kv for sparsity in (None, *options.sparsities)]
        runs = [shape_run(options, sparsity, kv, work) for kv, sparsity in cases]
        with closing(in_turn(runs, options.together)) as turns:
            for (kv, sparsity), run in zip(cases, turns, strict=True):
                found = run.measure()
                if sparsity is None:
                    dense = found
                else:
                    about = {
                        "shape": options.shape,
                        "layers": run.layers,
                        "tensor_parallel": run.ranks,
                        "routing": options.routing,
                        "kv_cache_dtype": kv,
                        "sparsity": sparsity,
                    }
                    yield compare(about, dense, found)


def shape_run(options: argparse.Namespace, sparsity: float | None, kv: str, work: Path) -> EngineRun:
    """An engine of the shape: Spense's, or stock FP8's where the sparsity is None."""
    name = f"{options.shape}-{'dense' if sparsity is None else sparsity}"
    folder = make_shape(options.shape, work / name, sparsity, options.layers)
    quantization = "compressed-tensors" if sparsity is None else "spense"
    return EngineRun(options, folder, quantization, kv, gpu_time=options.gpu_time, routing=options.routing)


def server_rows(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of a running server, and of another to compare it with if there is one."""
    from benchmarks.server_times import time_server

    found = [
        Measured(time_server(url, options.batches, options.contexts, options.steps)) if url else Measured({})
        for url in (options.dense_url, options.url)
    ]
    yield compare(
        {
            "shape": options.url,
            "layers": None,
            "tensor_parallel": None,
            "routing": None,
            "kv_cache_dtype": None,
            "sparsity": None,
        },
        *found,
    )


def compare(about: Row, dense: Measured, spense: Measured) -> list[Row]:
    """One row for each batch and context that Spense was measured at; what dense lacks is null."""
    rows = []
    for (batch, context), ours in spense.timings.items():
        theirs = dense.timings.get((batch, context))
        rows.append(
            {
                "shape": about["shape"],
                "layers": about["layers"],
                "tensor_parallel": about["tensor_parallel"],
                "routing": about["routing"],
                "batch": batch,
                "context": context,
                "kv_cache_dtype": about["kv_cache_dtype"],
                "sparsity": about["sparsity"],
                "dense_ms": theirs and theirs.ms,
                "spense_ms": ours.ms,
                "ratio": theirs and round(theirs.ms / ours.ms, 4),
                "dense_spread_ms": theirs and theirs.spread_ms,
                "spense_spread_ms": ours.spread_ms,
                "prefill_dense_ms": theirs and theirs.prefill_ms,
                "prefill_spense_ms": ours.prefill_ms,
                "prefill_ratio": theirs and round(theirs.prefill_ms / ours.prefill_ms, 4),
                "gpu_dense_ms": (theirs_gpu := dense.gpu_ms.get((batch, context))),
                "gpu_spense_ms": (ours_gpu := spense.gpu_ms.get((batch, context))),
                "gpu_ratio": round(theirs_gpu / ours_gpu, 4) if theirs_gpu and ours_gpu else None,
                "dense_start_s": dense.start_s,
                "spense_start_s": spense.start_s,
                "spense_load_s": spense.load_s,
                "spense_search_s": spense.search_s,
                "dense_weight_bytes": dense.weight_bytes,
                "spense_weight_bytes": spense.weight_bytes,
                "format_weight_bytes": dense.weight_bytes and dense.weight_bytes - spense.saved_bytes,
                "dense_layer_kernels": dense.layer_kernels,
                "spense_layer_kernels": spense.layer_kernels,
            }
        )
    return rows


def plot(rows: Sequence[Row], file: Path) -> None:
    """Speed-up against batch, one panel for each type of KV cache and context, one line for each sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["kv_cache_dtype"] for row in rows))
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    sparsities = list(dict.fromkeys(row["sparsity"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    size = (4.2 * len(contexts), 3.2 * len(kinds))
    figure, axes = plt.subplots(len(kinds), len(contexts), figsize=size, sharey=True, squeeze=False)
    for kind, panels in zip(kinds, axes, strict=True):
        for context, axis in zip(contexts, panels, strict=True):
            for sparsity in sparsities:
                points = [
                    (row["batch"], row["ratio"])
                    for row in rows
                    if (row["kv_cache_dtype"], row["context"], row["sparsity"]) == (kind, context, sparsity)
                ]
                label = None if sparsity is None else f"{sparsity:.1%} sparse"
                axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
            axis.axhline(1, color="gray", lw=0.8)
            axis.set(title=f"context {context}, KV cache {kind}", xlabel="batch", xscale="log")
            axis.set_xticks(batches, [str(batch) for batch in batches])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        panels[0].set_ylabel("speed-up of an output token")
    if sparsities != [None]:
        axes[0][0].legend(fontsize=8)
    figure.suptitle(rows[0]["shape"])
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    run_main(main)
