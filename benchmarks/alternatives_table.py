"""Rows of `alternatives.py` as the tables that the documents show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.tables import Result, Row, markdown, source

#: Headings and lines.
Table = tuple[list[str], list[list[str]]]
#: What everything is compared with.
STOCK = "fp8"
#: Scheme → what the tables call it, in their order.
LABELS = {
    "fp8": "FP8, stock",
    "spense-25": "Spense 25%",
    "spense-37.5": "Spense 37.5%",
    "spense-50": "Spense 50%",
    "w4a16": "W4A16",
    "w4a8-fp8": "W4A8-FP8",
    "bf16": "BF16",
}
#: Of the README: batch and context of output tokens, and of prefills.
_DECODED, _PREFILLED = ((1, 16), (32, 16), (128, 16), (256, 16), (32, 1024)), ((1, 2048), (8, 1024))


def tables(result: Result) -> list[str]:
    """Output tokens, prefill, memory."""
    rows, lines = result["rows"], []
    for about, table in (
        ("Output tokens, batch × context", decode(rows)),
        ("Prefill, batch × context", prefill(rows)),
        ("Memory, projected to all layers, and start-up", memory(rows)),
    ):
        lines += [f"{about}:", "", *markdown(*table), ""]
    return [*lines, *failures(rows), measured(result)]


def readme(result: Result) -> list[str]:
    """A little of all three."""
    return [*markdown(*short(result["rows"])), "", *failures(result["rows"]), measured(result)]


def decode(rows: Sequence[Row]) -> Table:
    """ms of an output token of stock FP8, and speed-ups over it: batch × context across."""
    cells = sorted({(row["context"], row["batch"]) for row in rows if "ms" in row})
    headings = [f"{batch} × {context}" for context, batch in cells]
    return _table(rows, headings, [_cell("ms", "ratio", batch, context) for context, batch in cells])


def prefill(rows: Sequence[Row]) -> Table:
    """As `decode`, of the time until a whole batch of prompts is read; only batches of 512 tokens and more."""
    cells = sorted({(row["context"], row["batch"]) for row in rows if "ms" in row})
    cells = [(context, batch) for context, batch in cells if context >= 512]
    headings = [f"{batch} × {context}" for context, batch in cells]
    return _table(rows, headings, [_cell("prefill_ms", "prefill_ratio", batch, context) for context, batch in cells])


def memory(rows: Sequence[Row]) -> Table:
    """What runs the linear layers; weights and KV tokens of the whole model; start-up of the layers measured."""
    headings = ["linear layers", "weights, GiB", "KV tokens in 80 GB", "start, s", "search, s"]
    columns: list[Callable[[Sequence[Row]], str]] = [
        lambda mine: ", ".join(mine[0]["linear_kernels"]),
        _weights,
        _kv_tokens,
        lambda mine: f"{mine[0]['start_s']:.0f}",
        lambda mine: "" if mine[0]["search_s"] is None else f"{mine[0]['search_s']:.0f}",
    ]
    return _table(rows, headings, columns)


def short(rows: Sequence[Row]) -> Table:
    """Some batches, and memory."""
    headings = [f"{batch} × {context}" for batch, context in _DECODED]
    headings += [f"prefill {batch} × {context}" for batch, context in _PREFILLED]
    columns = [_cell("ms", "ratio", *cell) for cell in _DECODED]
    columns += [_cell("prefill_ms", "prefill_ratio", *cell) for cell in _PREFILLED]
    return _table(rows, [*headings, "weights, GiB", "KV tokens"], [*columns, _weights, _kv_tokens])


def measured(result: Result) -> str:
    """Of what the times are, and where they come from."""
    row = result["rows"][0]
    return f"{row['shape']}, {row['layers']} layers, KV cache {row['kv_cache_dtype']}. {source(result)}"


def failures(rows: Sequence[Row]) -> list[str]:
    """A sentence for each scheme that did not run."""
    return [f"{LABELS[row['scheme']]} did not run: `{row['failed']}`." for row in rows if "failed" in row]


def _table(rows: Sequence[Row], headings: list[str], columns: Sequence[Callable[[Sequence[Row]], str]]) -> Table:
    lines = []
    for scheme, label in LABELS.items():
        mine = [row for row in rows if row["scheme"] == scheme and "failed" not in row]
        if mine:
            lines.append([label, *(column(mine) for column in columns)])
    return ["", *headings], lines


def _cell(time: str, ratio: str, batch: int, context: int) -> Callable[[Sequence[Row]], str]:
    def text(mine: Sequence[Row]) -> str:
        row = next((row for row in mine if (row["batch"], row["context"]) == (batch, context)), None)
        if row is None:
            return ""
        if row["scheme"] == STOCK:
            return f"{row[time]:.2f} ms"
        return "" if row[ratio] is None else f"{row[ratio]:.2f}"

    return text


def _weights(mine: Sequence[Row]) -> str:
    found = mine[0]["model_weight_bytes"]
    return "" if found is None else f"{found / 2**30:.1f}"


def _kv_tokens(mine: Sequence[Row]) -> str:
    found = mine[0]["kv_tokens"]
    return "" if found is None else f"{found:,}"
