"""Results of decode_speed.py as tables: speed-ups, memory, start-up, and how far `spense estimate` is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from benchmarks.tables import Result, Row, markdown, source
from vllm_spense.estimate import estimate, load
from vllm_spense.model_sizes import Pruned
from vllm_spense.roofline import gpu_named


def decode(result: Result) -> list[str]:
    """Speed-up of an output token, by KV cache, context and batch."""
    return [*decode_rows(result), "", "![Speed-up against batch](../benchmarks/results/decode_speed.png)"]


def decode_rows(result: Result) -> list[str]:
    """As `decode`, without the picture, in the order of batches whatever order they were measured in."""
    rows = sorted(result["rows"], key=lambda row: (row["kv_cache_dtype"], row["context"], row["batch"]))
    return [*speed_ups(rows, "ms", "ratio"), "", source(result)]


def decode_longest(result: Result) -> list[str]:
    """As `decode_rows`, each batch at its longest context, where sparsity helps least."""
    longest: dict[int, int] = {}
    for row in result["rows"]:
        longest[row["batch"]] = max(row["context"], longest.get(row["batch"], 0))
    rows = [row for row in result["rows"] if row["context"] == longest[row["batch"]]]
    rows.sort(key=lambda row: row["batch"])
    return [*speed_ups(rows, "ms", "ratio"), "", source(result)]


def decode_gpu(result: Result) -> list[str]:
    """As `decode_rows`, and the same of the time of a step that the GPU is busy."""
    busy = speed_ups(result["rows"], "gpu", "gpu_ratio")
    return [*speed_ups(result["rows"], "ms", "ratio"), "", "While the GPU is busy:", "", *busy, "", source(result)]


def prefill(result: Result) -> list[str]:
    """Speed-up of reading the prompts of a whole batch."""
    rows = [row for row in result["rows"] if row["kv_cache_dtype"] == result["rows"][0]["kv_cache_dtype"]]
    return [*speed_ups(rows, "prefill", "prefill_ratio"), "", source(result)]


def speed_ups(rows: Sequence[Row], time: str, ratio: str) -> list[str]:
    """Stock's time in ms, and Spense's speed-up at each sparsity."""
    sparsities = sorted({row["sparsity"] for row in rows})
    headings = ["KV cache", "context", "batch", "stock, ms", *(f"{sparsity:.1%}" for sparsity in sparsities)]
    stock_key = "dense_ms" if time == "ms" else f"{time}_dense_ms"
    lines = []
    for kv, context, batch in dict.fromkeys((row["kv_cache_dtype"], row["context"], row["batch"]) for row in rows):
        mine = {
            row["sparsity"]: row
            for row in rows
            if (row["kv_cache_dtype"], row["context"], row["batch"]) == (kv, context, batch)
        }
        stock = next((row[stock_key] for row in mine.values() if row[stock_key]), None)
        ratios = (mine[sparsity][ratio] if sparsity in mine else None for sparsity in sparsities)
        cells = (f"{value:.2f}" if value else "" for value in ratios)
        lines.append([kv, context, batch, f"{stock:.2f}" if stock else "", *cells])
    return markdown(headings, lines)


def memory(result: Result) -> list[str]:
    """Weights in GPU memory against the bytes of the format, and start-up."""
    engines: dict[str, list[str]] = {}
    for row in sorted(result["rows"], key=lambda row: row["sparsity"]):
        if row["dense_weight_bytes"]:
            dense_bytes = row["dense_weight_bytes"]
            engines.setdefault("dense", _engine(dense_bytes, dense_bytes, row["dense_start_s"]))
            engines.setdefault(
                f"{row['sparsity']:.1%}",
                _engine(
                    row["spense_weight_bytes"],
                    row["format_weight_bytes"],
                    row["spense_start_s"],
                    row.get("spense_load_s"),
                    row.get("spense_search_s"),
                ),
            )
    headings = ["in GPU memory, GiB", "by the format, GiB", "more", "start, s", "loading adds, s", "search, s"]
    return [*markdown(["sparsity", *headings], ([name, *cells] for name, cells in engines.items())), "", source(result)]


def _engine(
    held: float, by_format: float, start: float, load: float | None = None, search: float | None = None
) -> list[str]:
    added = ("" if seconds is None else f"{seconds:.1f}" for seconds in (load, search))
    return [f"{held / 2**30:.2f}", f"{by_format / 2**30:.2f}", f"{held / by_format - 1:+.2%}", f"{start:.0f}", *added]


def errors(result: Result) -> list[str]:
    """What `spense estimate` would have said, against what was measured."""
    gpu = gpu_named(result["gpu"]["name"]) if result["gpu"] else None
    if gpu is None:
        return ["This GPU's data sheet is not known to `spense estimate`."]
    rows = [row for row in result["rows"] if row["ratio"]]
    ratios, times = [], []
    for row in rows:
        model, pruned = load(row["shape"], row["sparsity"])
        model = replace(model, num_hidden_layers=row["layers"])
        found = estimate(
            model, Pruned(pruned.mlps[: row["layers"]]), gpu, row["batch"], row["context"], row["kv_cache_dtype"]
        )
        ratios.append(abs(found.speed_up / row["ratio"] - 1))
        times.append(abs(found.dense_ms / row["dense_ms"] - 1))
    lines = (
        [name, f"{median(found):.1%}", f"{max(found):.1%}"]
        for name, found in (("speed-up", ratios), ("stock's ms per output token", times))
    )
    count = f"{len(rows)} measurements of the table above, without a plan cache."
    return [*markdown(["estimate of", "median error", "largest error"], lines), "", count]
