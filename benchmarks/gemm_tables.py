"""Results of GEMMs, of mixtures of experts and of one MLP as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.tables import Result, Row, markdown, source


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


def clocks(result: Result) -> list[str]:
    """GEMMs that run until their own power has settled the clock: speed-up over the best dense one, in cycles too."""
    rows = result["rows"]
    ratios = sorted({row["dense_ratio"] for row in rows}, reverse=True)
    lines = []
    for layer, m in dict.fromkeys((row["layer"], row["m"]) for row in rows):
        mine = {row["dense_ratio"]: row for row in rows if (row["layer"], row["m"]) == (layer, m)}
        dense = next(iter(mine.values()))
        cells = []
        for row in (mine[ratio] for ratio in ratios):
            at = f"{row['spense_ghz']:.2f} GHz, {row['spense_watts']:.0f} W"
            cells.append(f"{row['ratio']:.2f} ({row['ratio_in_cycles']:.2f}; {at})")
        lines.append(
            [layer, m, f"{dense['dense_us']:.0f}", f"{dense['dense_ghz']:.2f}", f"{dense['dense_watts']:.0f}", *cells]
        )
    headings = ["layer", "tokens", "dense, µs", "GHz", "W", *(f"ρ = {ratio:g}" for ratio in ratios)]
    return [*markdown(headings, lines), "", source(result)]


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
