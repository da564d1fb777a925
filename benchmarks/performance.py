"""Writes the tables of the README and of docs/ from the files in benchmarks/results/.

    python -m benchmarks.performance

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is there is replaced, the text around it stays. A
test holds the documents to this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks import alternatives_table, quality_results, serving_tables
from benchmarks.envelope import RESULTS, ROOT
from benchmarks.first_run import TARGETS
from benchmarks.tables import Result, Row, markdown, source
from scripts.models import KNOWN
from vllm_spense.estimate import estimate, load
from vllm_spense.model_sizes import Pruned
from vllm_spense.roofline import gpu_named

#: Every file that has tables.
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("performance.md", "pruning-at-scale.md", "quality.md")),
    *(ROOT / "docs/notes" / name for name in ("tables.md", "serving.md")),
)
_TABLE = re.compile(r"(<!-- table ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str, results: Path = RESULTS) -> str:
    """The document with all its tables as the files in `results` have them.

    Raises:
        KeyError: there is no table of that name.
    """

    def table(found: re.Match[str]) -> str:
        before, name, after = found.groups()
        benchmarks, make = TABLES[name]
        benchmark = benchmarks.split()[0]
        files = [results / f"{name}.json" for name in benchmarks.split()]
        if files[0].exists():
            content = make(*(json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()))
        else:
            command, where = RUNS.get(benchmark, (f"python benchmarks/{benchmark}.py", "a GPU"))
            content = [f"Not measured yet: `{command}` on {where} makes this table."]
        return "\n".join((before.rstrip("\n"), "", *content, "", after))

    return _TABLE.sub(table, text)


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


def gemm(result: Result) -> list[str]:
    """Speed-up of the path that the policy takes over the best dense GEMM, and its share of the ideal."""
    rows = [row for row in result["rows"] if row["chosen"]]
    tokens = sorted({row["m"] for row in rows})
    lines = []
    for layer, ratio in dict.fromkeys((row["layer"], row["dense_ratio"]) for row in rows):
        mine = {row["m"]: row for row in rows if (row["layer"], row["dense_ratio"]) == (layer, ratio)}
        ideal = next(iter(mine.values()))["ideal"]
        cells = [f"{mine[m]['ratio']:.2f} ({mine[m]['ratio'] / ideal:.0%})" if m in mine else "" for m in tokens]
        lines.append([layer, f"{ratio:g}", f"{ideal:.2f}", *cells])
    return [*markdown(["layer", "ρ", "ideal", *(f"M = {m}" for m in tokens)], lines), "", source(result)]


def paths(result: Result) -> list[str]:
    """µs of the best dense GEMM and speed-up of both paths over it; bold what the policy takes."""
    rows = result["rows"]
    tokens = sorted({row["m"] for row in rows})
    lines: list[list[str]] = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        mine = {(row["dense_ratio"], row["path"], row["m"]): row for row in rows if row["layer"] == layer}
        dense = {m: row["dense_us"] for (_, _, m), row in mine.items()}
        lines.append([layer, "", "", "dense, µs", *(f"{dense[m]:.1f}" for m in tokens)])
        for ratio, path in sorted({key[:2] for key in mine}, key=lambda key: (-key[0], key[1])):
            found = [mine.get((ratio, path, m)) for m in tokens]
            cells = [
                (f"**{row['ratio']:.2f}**" if row["chosen"] else f"{row['ratio']:.2f}") if row else "" for row in found
            ]
            ideal = next(row["ideal"] for row in found if row)
            lines.append(["", f"{ratio:g}", f"{ideal:.2f}", path, *cells])
    return [*markdown(["layer", "ρ", "ideal", "path", *(f"M = {m}" for m in tokens)], lines), "", source(result)]


def experts(result: Result) -> list[str]:
    """Speed-up of the experts' GEMM over vLLM's best, and its share of what the weights' bytes allow."""
    return _by_tokens(
        result, ("shape", "layer", "routing"), lambda row: f"{row['over_stock']:.2f} ({row['of_ideal']:.0%})"
    )


def mixtures(result: Result) -> list[str]:
    """Speed-up of a whole mixture after its router over vLLM's best."""
    return _by_tokens(result, ("shape", "routing"), lambda row: f"{row['over_stock']:.2f}")


def _by_tokens(result: Result, keys: Sequence[str], cell: Callable[[Row], str]) -> list[str]:
    """A line for each of what `keys` and the sparsity tell apart, a column for each number of tokens."""
    rows = result["rows"]
    tokens = sorted({row["tokens"] for row in rows})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        found = cell(row) if row["over_stock"] else ""
        lines.setdefault((*(row[key] for key in keys), f"{row['sparsity']:.1%}"), {})[row["tokens"]] = found
    headings = [*keys, "sparsity", *(f"{m} tokens" for m in tokens)]
    cells = ([*names, *(line.get(m, "") for m in tokens)] for names, line in lines.items())
    return [*markdown(headings, cells), "", source(result)]


def mlp(result: Result) -> list[str]:
    """One MLP inside and outside its GEMMs."""
    lines = (
        [
            row["m"],
            f"{row['scheme']} {row['sparsity']:.1%}" if row["sparsity"] else row["scheme"],
            f"{row['gemm_us']:.1f}",
            f"{row['other_us']:.1f}",
            f"{row['total_us']:.1f}",
            f"{row['ratio']:.2f}",
            row["kernels"],
        ]
        for row in result["rows"]
    )
    headings = ["tokens", "scheme", "GEMMs, µs", "other, µs", "MLP, µs", "speed-up", "kernels"]
    return [*markdown(headings, lines), "", source(result)]


def prune(result: Result) -> list[str]:
    """What pruning a whole model takes."""
    lines = (
        [
            row["shape"],
            row["method"],
            row["gpus"],
            f"{row['samples']} × {row['length']}",
            f"{row['blocks_measured']} × {row['seconds_per_block']:.1f} s",
            f"{row['projected_minutes']:.1f}",
            f"{row['paper_minutes']:.0f}" if row["paper_minutes"] else "",
            f"{row['tensor_core_share']:.0%}" if row["tensor_core_share"] else "",
            f"{row['peak_gpu_gib']:.1f} of {row['planned_gpu_gib']:.1f}",
            f"{row['pinned_host_gib']:.2f} of {row['planned_host_gib']:.2f}",
            f"{row['peak_host_gib']:.1f}",
        ]
        for row in result["rows"]
    )
    headings = ["shape", "method", "GPUs", "tokens", "blocks measured", "model, min", "paper, B200, min"]
    headings += ["tensor cores busy", "GPU, GiB of plan", "pinned, GiB of plan", "rest of process, GiB"]
    return [*markdown(headings, lines), "", source(result)]


def prune_stages(result: Result) -> list[str]:
    """Seconds of one block by stage."""
    rows = result["rows"]
    stages = sorted(
        {stage for row in rows for stage in row["stages"]}, key=lambda stage: -rows[0]["stages"].get(stage, 0)
    )
    lines = ([stage, *(f"{row['stages'].get(stage, 0.0):.2f}" for row in rows)] for stage in stages)
    return [*markdown(["stage", *(f"{row['shape']} {row['method']}" for row in rows)], lines), "", source(result)]


def prune_real(result: Result) -> list[str]:
    """What pruning a whole real model took."""
    stages = ("forward", "Hessian", "prune", "factorize", "quantize")
    lines = (
        [
            row["shape"],
            row["method"],
            f"{row['samples']} × {row['length']}",
            f"{60 * row['projected_minutes']:.0f}",
            *(f"{row['blocks_measured'] * row['stages'][stage]:.0f}" for stage in stages),
        ]
        for row in result["rows"]
    )
    return [*markdown(["model", "method", "tokens", "all, s", *(f"{s}, s" for s in stages)], lines), "", source(result)]


def prune_sentence(result: Result) -> list[str]:
    """The README's sentence."""
    rows = [row for row in result["rows"] if row["shape"] == "qwen3-32b"]
    gpu = result["gpu"]["name"] if result["gpu"] else result["cpu"]
    text = f"{rows[0]['samples']} × {rows[0]['length']} calibration tokens"
    times = " and ".join(f"{row['projected_minutes']:.1f} minutes with `{row['method']}`" for row in rows)
    return [f"Pruning Qwen3-32B's shape on {text} takes one {gpu} {times}, projected from whole blocks."]


def first_run(result: Result) -> list[str]:
    """The README's sentence."""
    [row] = result["rows"]
    took = ", then ".join(f"`make {each}` {row[f'{each}_s'] / 60:.1f}" for each in TARGETS)
    cpu = f"{row['cores']} cores ({result['cpu']}, {row['instructions'] or 'not even AVX2'})"
    file = "[first_run.json](benchmarks/results/first_run.json)"
    return [f"Minutes on {cpu}: {took} ({file})."]


def selection(result: Result) -> list[str]:
    """How far parts of the calibration text choose the dense indices that all of it chooses."""
    lines = (
        [
            row["tokens"],
            f"1/{row['all_tokens'] // row['tokens']}",
            f"{row['overlap_mean']:.1%}",
            f"{row['overlap_least']:.1%}",
        ]
        for row in result["rows"]
    )
    headings = ["tokens", "of the text", "mean over the layers", "least of a layer"]
    return [*markdown(headings, lines), "", source(result)]


#: Result file → the command that makes it, and where, other than the benchmark of that name with its defaults on a GPU.
RUNS: Mapping[str, tuple[str, str]] = {
    "compat": ("make compat", "a CPU"),
    "soak": ("python -m benchmarks.soak", "any machine with vLLM"),
    "prune_time-2gpus": ("torchrun --nproc-per-node 2 benchmarks/prune_time.py", "2 GPUs"),
    "alternatives": ("python benchmarks/alternatives.py --together 4", "a GPU"),
    "peers-int4": (
        'python -m benchmarks.peers --methods "llmcompressor gptq" --out benchmarks/results/peers-int4.json',
        "any machine",
    ),
    "prune_time-shapes": (
        "python benchmarks/prune_time.py --shapes qwen3-32b seed-oss-36b llama-3.1-8b llama-3.3-70b "
        "--methods spensegpt+ --blocks 2 --samples 64 --no-profile --out benchmarks/results/prune_time-shapes.json",
        "a GPU",
    ),
    "prune_time-experts": (
        "python benchmarks/prune_time.py --shapes qwen3-30b-a3b --methods spensegpt+ --no-profile",
        "a GPU",
    ),
    "accuracy-tiny-moe": ("python -m benchmarks.accuracy --models FOLDER", "a GPU"),
}
#: Parts of the tests on a GPU, each with a result file.
GPU_TESTS = ("kernels", "pruning", "scaled", "serving", "serving_h200", "sleep", "modes")
#: Table → result file, further ones that it takes rows from where they exist, and what makes it.
TABLES: Mapping[str, tuple[str, Callable[..., list[str]]]] = {
    "decode": ("decode_speed", decode),
    "decode_long": ("decode_speed-long", decode_rows),
    "decode_kv_auto": ("decode_speed-kv-auto", decode_rows),
    "decode_h200": ("decode_speed-h200", decode_rows),
    "decode_llama": ("decode_speed-llama-3.1-8b", decode_gpu),
    "decode_two": ("decode_speed-tp2", decode_rows),
    "decode_vl": ("decode_speed-qwen3-vl-32b", decode_rows),
    "decode_mixture": ("decode_speed-qwen3-30b-a3b-early", decode_rows),
    "prefill": ("decode_speed", prefill),
    "prefill_h200": ("decode_speed-h200", prefill),
    "memory": ("decode_speed", memory),
    "memory_h200": ("decode_speed-h200", memory),
    "errors": ("decode_speed", errors),
    "gemm": ("gemm_sweep", gemm),
    "paths": ("gemm_sweep", paths),
    "gemm_h200": ("gemm_sweep-h200", gemm),
    "experts": ("expert_gemm", experts),
    "mixtures": ("expert_mixture", mixtures),
    "mlp": ("layer_breakdown", mlp),
    "timeline": ("layer_timeline", serving_tables.timeline),
    "timeline_vl": ("layer_timeline-qwen3-vl-32b", serving_tables.timeline),
    **{f"gpu_tests_{part}": (f"gpu_tests-{part.replace('_', '-')}", serving_tables.gpu_tests) for part in GPU_TESTS},
    "compat": ("compat", serving_tables.compat),
    "compat_readme": ("compat", serving_tables.compat_sentence),
    "soak": ("soak", serving_tables.soak),
    "load": ("serve_load", serving_tables.load),
    "readme": ("decode_speed", decode_longest),
    "alternatives": ("alternatives", alternatives_table.tables),
    "prune": ("prune_time", prune),
    "prune_stages": ("prune_time", prune_stages),
    "prune_readme": ("prune_time", prune_sentence),
    "first_run": ("first_run", first_run),
    "prune_h100": ("prune_time-h100", prune),
    "prune_real": ("prune_time-smollm2-135m", prune_real),
    "prune_shapes": ("prune_time-shapes", prune),
    "prune_gpus": ("prune_time-2gpus", prune),
    "prune_experts": ("prune_time-experts", prune),
    "prune_experts_stages": ("prune_time-experts", prune_stages),
    "prune_tuned": ("prune_time-tuned", prune),
    "prune_tuned_stages": ("prune_time-tuned", prune_stages),
    "selection": ("selection_tokens", selection),
    "gains": ("accuracy-smollm2", quality_results.gains),
    "summary": ("accuracy-smollm2 peers-int4", quality_results.summary),
    "summary_readme": ("accuracy-smollm2 peers-int4", quality_results.headline),
    "perplexity": ("perplexity-smollm2", quality_results.perplexity),
    "accuracy": ("accuracy-smollm2", quality_results.quality),
    "ablations": ("accuracy-smollm2-ablations", quality_results.quality),
    "accuracy_cpu": ("accuracy-smollm2-cpu", quality_results.quality),
    "models": (" ".join(f"accuracy-{k}-{m}" for k in ("default", "heal") for m in KNOWN), quality_results.over_models),
    "models_long": (quality_results.ON_LONG_TEXT, quality_results.over_models),
    "models_tuned": (quality_results.ON_LONG_TEXT, quality_results.over_models_tuned),
    **{f"domains_{model.partition('-')[0]}": (f"accuracy-domains-{model}", quality_results.quality) for model in KNOWN},
    **{f"heal_{model.partition('-')[0]}": (f"accuracy-heal-{model}", quality_results.quality) for model in KNOWN},
    "rates": ("accuracy-rates-smollm2-135m", quality_results.quality),
    "calibration": ("accuracy-calibration-qwen2.5-coder-0.5b", quality_results.quality),
    "mixture_quality": ("accuracy-tiny-moe", quality_results.quality),
    "options": ("accuracy-smollm2-options", quality_results.quality),
    "descent": ("accuracy-smollm2-descent", quality_results.quality),
    "gains_cpu": ("accuracy-smollm2-cpu", quality_results.gains),
    "rounding": ("accuracy-smollm2-rounding", quality_results.quality),
    "rounding_added": ("accuracy-smollm2-rounding", quality_results.rounding),
    "learned": ("learned-smollm2", quality_results.quality),
    "tasks": ("tasks", quality_results.tasks),
    "tasks_coder": ("tasks-coder-pruned tasks-coder-healed-25 tasks-coder-healed-37.5", quality_results.tasks),
    "peers": ("peers-smollm2", quality_results.quality),
    "int4": ("peers-int4", quality_results.quality),
    "fp8_scales": ("fp8_scales", quality_results.fp8_scales),
}


if __name__ == "__main__":
    main()
