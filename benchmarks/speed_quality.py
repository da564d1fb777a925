"""Draws the README's picture: speed-up of an output token against what is lost, from result files.

    python -m benchmarks.speed_quality

The speed is that of one batch size and context, of `alternatives.json` where it exists and else of `decode_speed.json`;
the cost is the KL divergence from the dense BF16 model of `accuracy-smollm2.json` and of `peers-int4.json`, averaged
over the texts that both have and over seeds. A scheme is drawn once its speed and its quality are measured. The points
and what they are averaged over are stored in the picture, so that a test can tell a stale one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import alternatives_table, quality_tables
from benchmarks.envelope import RESULTS

PICTURE = Path(__file__).with_suffix(".png")
#: The fields of the picture's metadata that hold `points()` as JSON, and `texts()`.
POINTS, TEXTS = "Points", "Texts"
#: Which of the measured cells the picture shows.
BATCH, CONTEXT, KV_CACHE = 32, 1024, "fp8"
#: Method → colour, in the order of the labels. At 50% the first two have nothing to select and are SparseGPT.
COLOURS = {"spensegpt++": "#0b6e4f", "spensegpt+": "#2f6fb5", "spensegpt": "#7a8a99"}
_LAST_POINT = {"spensegpt+": "sparsegpt", "spensegpt": "sparsegpt"}
#: Schemes of four-bit weights, which share a quality: like FP8's, it is that of rounded weights, not of activations.
INT4, _INT4_COLOUR = ("w4a16", "w4a8-fp8"), "#b3541e"
_INK, _SOFT, _GRID = "#22282e", "#6b7780", "#dde2e6"

Row = Mapping[str, Any]


def main() -> None:
    draw(points(), texts(), PICTURE)


def points(results: Path = RESULTS) -> dict[str, list[list[float]]]:
    """Method or scheme → [MLP sparsity, KL in nats, speed-up over dense FP8], by rising sparsity.

    `dense` is the unpruned model rounded to the nearest FP8 values, which is what the speed-up compares with.
    """
    accuracy, int4 = _quality(results)
    speed, others = _speeds(results)
    found = {"dense": [[0.0, _kl(accuracy, "dense rounding=after", 0.0), 1.0]]}
    for method in COLOURS:
        name = {0.5: _LAST_POINT.get(method, method)}
        found[method] = [[s, _kl(accuracy, name.get(s, method), s), speed[s]] for s in sorted(speed)]
    for scheme in INT4:
        if int4 and scheme in others:
            found[alternatives_table.LABELS[scheme]] = [[0.0, _kl(int4, quality_tables.INT4, 0.0), others[scheme]]]
    return found


def texts(results: Path = RESULTS) -> str:
    """What the KL is averaged over."""
    accuracy, _ = _quality(results)
    return quality_tables.measured_on(accuracy)


def _speeds(results: Path) -> tuple[dict[float, float], dict[str, float]]:
    """Speed-ups over stock FP8: MLP sparsity → Spense's, and other schemes'."""
    rows = [row for row in _rows(results, "alternatives") if "ms" in row] or _rows(results, "decode_speed")
    rows = [
        row
        for row in rows
        if (row["batch"], row["context"], row["kv_cache_dtype"]) == (BATCH, CONTEXT, KV_CACHE) and row["ratio"]
    ]
    others = {row["scheme"]: row["ratio"] for row in rows if "scheme" in row and not row["sparsity"]}
    return {row["sparsity"]: row["ratio"] for row in rows if row["sparsity"]}, others


def _quality(results: Path) -> tuple[list[Row], list[Row]]:
    """Rows of `accuracy.py` and of GPTQ in four bits, of the texts that both have; of all where there is no GPTQ."""
    int4 = [row for row in _rows(results, "peers-int4") if row["method"] == quality_tables.INT4]
    return quality_tables.on_common_texts(_rows(results, "accuracy-smollm2"), int4)


def _rows(results: Path, name: str) -> list[Row]:
    file = results / f"{name}.json"
    return quality_tables.renamed(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.exists() else []


def _kl(rows: Sequence[Row], method: str, sparsity: float) -> float:
    found = [
        row["kl"] for row in rows if (row["method"], row["sparsity"]) == (method, sparsity) and row["format"] != "bf16"
    ]
    return statistics.mean(found)


def draw(found: Mapping[str, Sequence[Sequence[float]]], averaged: str, file: Path) -> None:
    """Writes the picture.

    Args:
        found: as `points` gives it.
        averaged: over what.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, MultipleLocator

    figure = Figure(figsize=(7.8, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    ((_, dense_kl, _),) = found["dense"]

    def label(text: str, x: float, y: float, offset: tuple[float, float], side: str, colour: str) -> None:
        axes.annotate(
            text,
            (x, y),
            offset,
            textcoords="offset points",
            ha=side,
            va="center",
            color=colour,
            weight="bold",
            fontsize=11,
        )

    def dot(x: float, y: float, colour: str) -> None:
        axes.plot([x], [y], "o", color=colour, markersize=8, markeredgecolor="white", markeredgewidth=1.4, zorder=3)

    edge = axes.get_yaxis_transform()
    for sparsity, _, speed in found["spensegpt++"]:
        axes.axhline(speed, color=_GRID, linewidth=1, zorder=0)
        axes.text(1.01, speed, f"{100 * sparsity:g}%", transform=edge, va="center", color=_SOFT)
    speeds = [y for points in found.values() for _, _, y in points]
    top = max(speeds) + 0.08
    axes.text(1.01, top, "MLP weights\nthat are zero", transform=edge, va="top", color=_SOFT, fontsize=9)
    for method, colour in reversed(COLOURS.items()):
        xs, ys = ([point[i] for point in found[method]] for i in (1, 2))
        axes.plot([dense_kl, xs[0]], [1.0, ys[0]], color=colour, linewidth=1.6, linestyle=(0, (1, 2)), zorder=1)
        axes.plot(xs, ys, color=colour, linewidth=2.2, zorder=2)
        for x, y in zip(xs, ys, strict=True):
            dot(x, y, colour)
    _, x, y = found["spensegpt"][-1]
    dot(x, y, _INK)
    label("spensegpt++", *found["spensegpt++"][-1][1:], (0, 14), "center", COLOURS["spensegpt++"])
    label("spensegpt+", *found["spensegpt+"][1][1:], (16, 26), "left", COLOURS["spensegpt+"])
    label("spensegpt", *found["spensegpt"][1][1:], (10, -12), "left", COLOURS["spensegpt"])
    label("sparsegpt (2:4)", x, y, (0, 14), "center", _INK)
    dot(dense_kl, 1.0, _INK)
    label("dense FP8", dense_kl, 1.0, (11, 0), "left", _INK)
    for scheme in INT4:
        name = alternatives_table.LABELS[scheme]
        for _, x, y in found.get(name, ()):
            dot(x, y, _INT4_COLOUR)
            label(name, x, y, (11, 0), "left", _INT4_COLOUR)
    axes.set(xlim=(0, 0.9), ylim=(min(speeds) - 0.02, top))
    axes.yaxis.set_major_locator(MultipleLocator(0.1))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%.1f×"))
    about = f"quality lost: KL divergence from the dense model, nats per token\n({averaged})"
    axes.set_xlabel(about, color=_INK)
    axes.set_ylabel("decoding speed over dense FP8", color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    figure.savefig(file, dpi=160, metadata={POINTS: json.dumps(found), TEXTS: averaged})


if __name__ == "__main__":
    main()
