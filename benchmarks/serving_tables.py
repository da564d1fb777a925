"""Tables of what works with vLLM, on GPUs and on its releases, of servers, and of where a layer's time goes."""

from __future__ import annotations

from benchmarks.tables import Result, markdown, source


def gpu_tests(result: Result) -> list[str]:
    """How the tests ended that need a GPU, and what they recorded."""
    lines = []
    for file in dict.fromkeys(row["file"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["file"] == file]
        counts = [sum(row[ending] for row in mine) for ending in ("passed", "failed", "skipped")]
        recorded = [f"{name}: {value}" for row in mine for name, value in row["recorded"].items()]
        name = f"`{file.rpartition('.')[2]}.py`"
        lines.append([name, *counts, f"{sum(row['seconds'] for row in mine):.0f}", "; ".join(recorded)])
    return [*markdown(["tests", "passed", "failed", "skipped", "s", "recorded"], lines), "", source(result)]


def compat(result: Result) -> list[str]:
    """How the tests ended on each release of vLLM."""
    names = ("torch", "transformers", "compressed-tensors")
    lines = (
        [
            row["version"],
            *(row["versions"][name] for name in names),
            row["passed"],
            len(row["failed"]),
            row["skipped"],
            ", ".join(f"`{name.rpartition('::')[2]}`" for name in row["failed"]),
        ]
        for row in result["rows"]
    )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["rows"]))
    headings = ["vLLM", *names, "passed", "failed", "skipped", "which failed"]
    return [*markdown(headings, lines), "", f"{result['cpu']}, commit {commits}: `make compat`."]


def compat_sentence(result: Result) -> list[str]:
    """The README's sentence."""
    passed = [row["version"] for row in result["rows"] if not row["failed"]]
    failed = [row["version"] for row in result["rows"] if row["failed"]]
    end = f"; not all on {', '.join(failed)}" if failed else ""
    return [f"`make compat` passes on vLLM's CPU builds {', '.join(passed)}{end} ([notes](docs/notes/serving.md))."]


def soak(result: Result) -> list[str]:
    """A client's day at each server."""
    lines = []
    for row in result["rows"]:
        wrong = [name for name, said in row["checks"].items() if said]
        end = row["sigterm"]
        lines.append(
            [
                row["server"],
                f"{len(row['checks']) - len(wrong)} of {len(row['checks'])}",
                f"{row['clients']} × {row['seconds']:.0f} s",
                row["streams"],
                row["dropped"],
                row["cancelled"],
                len(row["wrong"]),
                row["tokens"],
                f"{row['grown_mib']:+.0f}",
                f"{end['seconds']:.1f} s, code {end['code']}, {end['processes_left']} processes left",
            ]
        )
    headings = ["server", "checks passed", "clients", "streams", "dropped", "cancelled", "wrong", "tokens"]
    headings += ["memory since halfway, MiB", "SIGTERM while busy"]
    checks = ", ".join(result["rows"][0]["checks"])
    return [*markdown(headings, lines), "", f"The checks: {checks}.", "", source(result)]


def load(result: Result, *others: Result) -> list[str]:
    """Servers of one shape under load: a line for each type of KV cache, number of concurrent requests and scheme."""
    rows = [row for each in (result, *others) for row in each["rows"]]
    keys = ("ttft_ms", "ttft_p99_ms", "tpot_ms", "tpot_p99_ms")
    lines = [
        [
            row["kv_cache_dtype"],
            row["concurrency"],
            f"Spense {row['sparsity']:.1%}" if row["sparsity"] else "stock",
            f"{row['requests_per_s']:.2f}",
            f"{row['output_tokens_per_s']:.0f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            *(f"{row[key]:.0f}" if key.startswith("ttft") else f"{row[key]:.1f}" for key in keys),
        ]
        for row in sorted(rows, key=lambda row: (row["kv_cache_dtype"], row["concurrency"], row["sparsity"]))
    ]
    headings = ["KV cache", "at once", "", "requests/s", "output tokens/s", "speed-up"]
    headings += ["TTFT, ms", "p99", "TPOT, ms", "p99"]
    first = result["rows"][0]
    lengths = f"{first['input']} tokens in, {first['output']} out"
    about = f"{first['shape']}, {first['layers']} layers, {lengths}; medians and 99th percentiles."
    return [*markdown(headings, lines), "", about, "", " ".join(map(source, (result, *others)))]


def timeline(result: Result) -> list[str]:
    """Where the time of a decoder layer goes, by tokens: stock against Spense, and what the GEMMs could take."""
    rows = result["rows"]
    roles = ["o", "gate_up", "down", "qkv", "attention", "other"]
    lines = []
    for tokens, sparsity in dict.fromkeys((row["tokens"], row["sparsity"]) for row in rows):
        mine = [row for row in rows if (row["tokens"], row["sparsity"]) == (tokens, sparsity)]
        us = {role: sum(row["us"] for row in mine if row["role"] == role) for role in roles}
        least = {row["role"]: max(row["bytes_us"], row["products_us"]) for row in mine if row["bytes_us"]}
        cells = (f"{us[role]:.1f}" + (f" of {least[role]:.1f}" if role in least else "") for role in roles)
        name = "stock" if sparsity is None else f"Spense {sparsity:.1%}"
        lines.append([tokens, name, *cells, f"{sum(us.values()):.1f}", len(mine)])
    lines.sort(key=lambda line: line[0])
    return [*markdown(["tokens", "", *roles, "all, µs", "kernels"], lines), "", source(result)]
