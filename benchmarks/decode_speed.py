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
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.envelope import RESULTS, ROOT, write_result
from benchmarks.make_shape import ALL_SHAPES, make_shape, text_config
from benchmarks.timings import READY, TOKEN_BUDGET, Timing
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY, Annotation

SPARSITIES = (0.25, 0.375, 0.5)
BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXTS = (16, 1024, 4096)
KV_CACHES = ("auto", "fp8")
#: Of a failed engine's output.
_LAST_LINES = 40

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One engine or server.

    Attributes:
        timings: by (batch, context).
        start_s, weight_bytes: of an engine.
        load_s: what Spense adds to loading, with what `search_s` found; None in stock vLLM.
        search_s: that a search of kernels took before the engines began; None where the engine itself searched.
        saved_bytes: what the format says its regions save over dense weights.
        layer_kernels: how many kernels run in each layer in a decode step; None where nobody counted.
        gpu_ms: by (batch, context), for how much of a step the GPU is busy, where that was asked for.
    """

    timings: Mapping[tuple[int, int], Timing]
    start_s: float | None = None
    load_s: float | None = None
    search_s: float | None = None
    weight_bytes: int | None = None
    saved_bytes: int = 0
    layer_kernels: int | None = None
    gpu_ms: Mapping[tuple[int, int], float] = field(default_factory=dict)


def main() -> None:
    options = parse()
    rows: list[Row] = []
    # After each engine, so that a run that is cut short leaves what it has.
    for more in server_rows(options) if options.url else engine_rows(options):
        rows += more
        for row in more:
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        write_result(options.out, "decode_speed", rows)
    if any(row["ratio"] for row in rows):
        plot(rows, options.out.with_suffix(".png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=ALL_SHAPES, default="qwen3-32b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--most-tokens", type=int, help="leave out what has a larger batch × context")
    parser.add_argument("--kv", nargs="+", choices=KV_CACHES, default=KV_CACHES, help="types of KV cache")
    parser.add_argument(
        "--steps", type=int, default=24, help="output tokens timed for each batch and context, 8 or more"
    )
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture: to try things out")
    parser.add_argument(
        "--capture",
        type=int,
        default=512,
        help="tokens of the largest step that runs as a CUDA graph in both engines [512: what each has by default]",
    )
    parser.add_argument(
        "--together", type=int, default=1, help="engines that share the GPU's memory; one is timed at a time"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs that share every layer [1]")
    parser.add_argument("--gpu-time", action="store_true", help="find out, too, for how much of a step the GPU is busy")
    parser.add_argument("--work", type=Path, help="folder for configurations, logs and what engines measured")
    parser.add_argument("--url", help="of a server that runs Spense, …/v1")
    parser.add_argument("--dense-url", help="of the server to compare it with")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode_speed.json")
    options = parser.parse_args()
    if options.steps < 8:
        parser.error(f"--steps: found {options.steps}, expected at least 8")
    if options.capture < 512:
        parser.error(f"--capture: found {options.capture}, expected at least 512, which vLLM captures by itself")
    for option, found in (("together", options.together), ("tensor-parallel", options.tensor_parallel)):
        if found < 1:
            parser.error(f"--{option}: found {found}, expected at least 1")
    if options.together > 1 and options.tensor_parallel > 1:
        parser.error("--together: several engines share one GPU only; expected 1 with --tensor-parallel")
    return options


def engine_rows(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of each sparsity and type of KV cache, all against the dense engine with the same type of KV cache."""
    with TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        runs = [EngineRun(options, s, kv, work) for kv in options.kv for s in (None, *options.sparsities)]
        groups = [runs[i : i + options.together] for i in range(0, len(runs), options.together)]
        try:
            for group, following in zip(groups, [*groups[1:], []], strict=True):
                begin(group)
                for run in following:
                    run.start()
                for run in group:
                    found = run.measure()
                    if run.sparsity is None:
                        dense = found
                    else:
                        about = {
                            "shape": options.shape,
                            "layers": run.layers,
                            "tensor_parallel": options.tensor_parallel,
                            "kv_cache_dtype": run.kv,
                        }
                        yield compare({**about, "sparsity": run.sparsity}, dense, found)
        finally:
            for run in runs:
                run.stop()


def begin(group: Sequence[EngineRun]) -> None:
    """Starts engines; several of them, which share the GPU, until all are ready."""
    for run in group:
        run.start()
    if len(group) > 1:
        search_first(group)
        for run in group:
            run.begin()
        for run in group:
            run.wait_until_ready()


class EngineRun:
    """A process that measures one engine, or what an equal one left in `work`.

    Args:
        sparsity: None for stock vLLM.
        work: folder for its configuration, log and answer.
    """

    def __init__(self, options: argparse.Namespace, sparsity: float | None, kv: str, work: Path) -> None:
        name = f"{options.shape}-{'dense' if sparsity is None else sparsity}"
        self.sparsity = sparsity
        self.kv = kv
        self.layers = options.layers or text_config({**ALL_SHAPES[options.shape]})["num_hidden_layers"]
        self.ranks = options.tensor_parallel
        self.folder = make_shape(options.shape, work / name, sparsity, options.layers)
        self.order = json.dumps(
            {
                "model": str(self.folder.resolve()),
                "quantization": "compressed-tensors" if sparsity is None else "spense",
                "kv_cache_dtype": kv,
                "batches": options.batches,
                "contexts": options.contexts,
                "most_tokens": options.most_tokens,
                "steps": options.steps,
                "eager": options.eager,
                "capture": options.capture,
                "engines": options.together,
                "gpu_time": options.gpu_time,
                "tensor_parallel": options.tensor_parallel,
            }
        )
        digest = sha256(f"{self.order}{options.layers}".encode()).hexdigest()[:8]
        self.stem = f"{name}-kv-{kv}-{digest}"
        self.answer, self.log = work / f"{self.stem}.json", work / f"{self.stem}.log"
        self.process: subprocess.Popen[str] | None = None
        self.search_s: float | None = None

    def start(self) -> None:
        """Lets the process import vLLM, which takes long, while another engine still has the GPU."""
        if self.process:
            return
        if self.answer.exists():
            print(f"{self.stem}: measured before", flush=True)
            return
        command = [sys.executable, "-m", "benchmarks.engine_times", self.order, str(self.answer.resolve())]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True
            )

    def begin(self) -> None:
        """Lets the process start its engine beside others."""
        if self.process and self.process.stdin:
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def wait_until_ready(self) -> None:
        while self.process and self.process.poll() is None and READY not in self.log.read_text(errors="replace"):
            time.sleep(0.2)

    def measure(self) -> Measured:
        """Lets the process have the GPU, and waits for its answer.

        Raises:
            SpenseError: the process failed; shows the end of its log.
        """
        if self.process:
            print(f"{self.stem}: measuring", flush=True)
            self.process.communicate("\n\n")
            if self.process.returncode:
                end = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
                raise SpenseError(f"{end}\nthe engine of {self.stem} ended with code {self.process.returncode}")
        found = json.loads(self.answer.read_text(encoding="utf-8"))
        timings = [Timing(**timing) for timing in found["timings"]]
        return Measured(
            {(timing.batch, timing.context): timing for timing in timings},
            found["start_s"],
            found["plugin_load_s"],
            self.search_s,
            found["weight_bytes"],
            saved_bytes(json.loads((self.folder / "config.json").read_text(encoding="utf-8"))) // self.ranks,
            layer_kernels([kernel["runs"] for kernel in found.get("kernels", ())], self.layers),
            {(batch, context): ms for batch, context, ms in found["gpu_ms"]},
        )

    def stop(self) -> None:
        if self.process:
            self.process.kill()


def search_first(runs: Sequence[EngineRun]) -> None:
    """Fills the plan cache while nobody else uses the GPU: engines that start together would disturb each other."""
    import torch
    import vllm._custom_ops  # noqa: F401 - the kernels that ours compete with

    from vllm_spense.kernels.region_gemm.problem import Problem
    from vllm_spense.ops.layer_plan import plan_of
    from vllm_spense.ops.unpruned_ops import prepare_unpruned
    from vllm_spense.plugin.vllm_internals import stock_gemm

    if not torch.cuda.is_available():
        return
    device = torch.device("cuda", 0)
    for run in runs:
        config = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
        if KEY in config["quantization_config"]:
            start = time.perf_counter()
            text = text_config(config)
            hidden, heads = text["hidden_size"], text["num_attention_heads"] * text["head_dim"]
            keys_and_values = 2 * text["num_key_value_heads"] * text["head_dim"]
            prepare_unpruned(heads + keys_and_values, hidden, device, stock_gemm())
            prepare_unpruned(hidden, heads, device, stock_gemm())
            annotation = Annotation.from_dict(config["quantization_config"][KEY])
            for regions in {annotation.regions(module) for module in annotation.modules}:
                i = regions.intermediate
                for problem in (
                    Problem(2 * i, hidden, regions, "output", projections=2).region_major(),
                    Problem(hidden, i, regions, "input", separate_outputs=True),
                ):
                    plan_of(problem.op_key, device).prepare(TOKEN_BUDGET)
            run.search_s = round(time.perf_counter() - start, 1)
    torch.cuda.empty_cache()


def layer_kernels(runs: Sequence[float], layers: int) -> int | None:
    """Kernels in each layer, from how often each kernel runs in a step; what runs once in a step is in none."""
    # Some run once less: before the first layer or after the last, something else does their work.
    return sum(round(count / layers) for count in runs) if runs else None


def saved_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of dense FP8 weights that the sparse regions of a config.json do without: 0.375 of each."""
    if KEY not in config["quantization_config"]:
        return 0
    annotation = Annotation.from_dict(config["quantization_config"][KEY])
    sparse = sum(annotation.regions(module).sparse for module in annotation.modules)
    return 3 * sparse * text_config(config)["hidden_size"] * 3 // 8


def server_rows(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of a running server, and of another to compare it with if there is one."""
    from benchmarks.server_times import time_server

    found = [
        Measured(time_server(url, options.batches, options.contexts, options.steps)) if url else Measured({})
        for url in (options.dense_url, options.url)
    ]
    yield compare(
        {"shape": options.url, "layers": None, "tensor_parallel": None, "kv_cache_dtype": None, "sparsity": None},
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
    try:
        main()
    except SpenseError as error:
        sys.exit(str(error))
