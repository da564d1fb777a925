"""Draws the README's picture: speed-up of an output token against what is lost, from result files.

    python -m benchmarks.speed_quality

The speed is that of one batch size and context in `alternatives.json`. The cost is the KL divergence from the dense
BF16 model, the mean over models, texts and seeds of the files that `quality.md` compares methods with on several
models; dense FP8's is in `accuracy-domains-*.json`. A scheme is drawn once its speed and its quality are measured. The
points and what they are averaged over are stored in the picture, so that a test can tell a stale one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

from benchmarks import alternatives_table, quality_results, quality_tables
from benchmarks.envelope import RESULTS
from benchmarks.tables import Result, Row
from scripts.models import KNOWN

PICTURE = Path(__file__).with_suffix(".png")
#: The fields of the picture's metadata that hold `points()` as JSON, and `texts()`.
POINTS, TEXTS = "Points", "Texts"
#: Which of the measured cells the picture shows.
BATCH, CONTEXT, KV_CACHE = 32, 1024, "fp8"
#: Result files of what is lost; earlier ones count where several have the same.
FILES = (
    *quality_results.ON_LONG_TEXT.split(),
    "peers-int4-models",
    *(f"accuracy-domains-{model}" for model in KNOWN),
)
_DEFAULT = "spensegpt++, a third code, a third generated"
#: Label of a line → what `quality_tables.label` calls it, its colour, and which side of the label its last point is on.
#: `spensegpt++` is on the default's text.
LINES = {
    "healed": (f"{_DEFAULT}, healed", "#d08a00", "right"),
    "spensegpt++": (_DEFAULT, "#0b6e4f", "left"),
    "spensegpt+": ("spensegpt+", "#2f6fb5", "center"),
}
#: Schemes of four-bit weights, which share a quality: like FP8's, it is that of rounded weights, not of activations.
INT4, _INT4_COLOUR = ("w4a16", "w4a8-fp8"), "#b3541e"
DENSE = "dense"
_INK, _SOFT, _GRID = "#22282e", "#6b7780", "#dde2e6"


def main() -> None:
    draw(points(), texts(), PICTURE)


def points(results: Path = RESULTS) -> dict[str, list[list[float]]]:
    """Label → [MLP sparsity, KL in nats, speed-up over dense FP8], by rising sparsity.

    `DENSE` is the unpruned model rounded to the nearest FP8 values, which is what the speed-up compares with.
    """
    speed, others = _speeds(results)
    losses, _ = _losses(results)
    found = {DENSE: [[0.0, losses["dense rounding=after", 0.0], 1.0]]}
    for label, (method, *_) in LINES.items():
        found[label] = [[s, losses[method, s], speed[s]] for s in sorted(speed) if (method, s) in losses]
    int4 = quality_tables.SUMMARIZED[quality_tables.INT4], 0.0
    for scheme in INT4:
        if int4 in losses and scheme in others:
            found[alternatives_table.LABELS[scheme]] = [[0.0, losses[int4], others[scheme]]]
    return found


def texts(results: Path = RESULTS) -> str:
    """What the KL is averaged over."""
    return quality_tables.measured_on(_losses(results)[1])


def _speeds(results: Path) -> tuple[dict[float, float], dict[str, float]]:
    """Speed-ups over stock FP8: MLP sparsity → Spense's, and other schemes'."""
    rows = [
        row
        for row in _result(results, "alternatives")["rows"]
        if "ms" in row and (row["batch"], row["context"], row["kv_cache_dtype"]) == (BATCH, CONTEXT, KV_CACHE)
    ]
    others = {row["scheme"]: row["ratio"] for row in rows if not row["sparsity"]}
    return {row["sparsity"]: row["ratio"] for row in rows if row["sparsity"]}, others


def _losses(results: Path) -> tuple[dict[tuple[str, float], float], list[Row]]:
    """Mean KL by label and sparsity of whatever all models have on all texts, and the rows that it is the mean of."""
    measured = quality_results.merged(_result(results, name) for name in FILES)
    rows = [row for row in measured if row["method"] != "dense" and row["format"] != "bf16"]
    by_case: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        by_case.setdefault((quality_tables.label(row["method"]), row["sparsity"]), []).append(row)
    everywhere = {(row["model"], row["domain"]) for row in rows}
    whole = {
        case: mine for case, mine in by_case.items() if {(row["model"], row["domain"]) for row in mine} == everywhere
    }
    means = {case: statistics.mean(row["kl"] for row in mine) for case, mine in whole.items()}
    return means, [row for mine in whole.values() for row in mine]


def _result(results: Path, name: str) -> Result:
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


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
    ((_, dense_kl, _),) = found[DENSE]

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
    shown = sorted({(sparsity, speed) for name in LINES for sparsity, _, speed in found[name]})
    for sparsity, speed in shown:
        axes.axhline(speed, color=_GRID, linewidth=1, zorder=0)
        axes.text(1.01, speed, f"{100 * sparsity:g}%", transform=edge, va="center", color=_SOFT)
    speeds = [y for points in found.values() for _, _, y in points]
    top = max(speeds) + 0.08
    axes.text(1.01, top, "MLP weights\nthat are zero", transform=edge, va="top", color=_SOFT, fontsize=9)
    for name, (_, colour, side) in reversed(LINES.items()):
        xs, ys = ([point[i] for point in found[name]] for i in (1, 2))
        axes.plot([dense_kl, xs[0]], [1.0, ys[0]], color=colour, linewidth=1.6, linestyle=(0, (1, 2)), zorder=1)
        axes.plot(xs, ys, color=colour, linewidth=2.2, zorder=2)
        for x, y in zip(xs, ys, strict=True):
            dot(x, y, colour)
        label(name, xs[-1], ys[-1], (0, 14), side, colour)
    dot(dense_kl, 1.0, _INK)
    label("dense FP8", dense_kl, 1.0, (11, 0), "left", _INK)
    for scheme in INT4:
        name = alternatives_table.LABELS[scheme]
        for _, x, y in found.get(name, ()):
            dot(x, y, _INT4_COLOUR)
            label(name, x, y, (11, 0), "left", _INT4_COLOUR)
    losses = [x for points in found.values() for _, x, _ in points]
    axes.set(xlim=(0, 1.1 * max(losses)), ylim=(min(speeds) - 0.02, top))
    axes.yaxis.set_major_locator(MultipleLocator(0.1))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%.1f×"))
    about = "\n".join(["quality lost: KL divergence from the dense model, nats per token", *wrap(f"({averaged})", 75)])
    axes.set_xlabel(about, color=_INK)
    axes.set_ylabel("decoding speed over dense FP8", color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    figure.savefig(file, dpi=160, metadata={POINTS: json.dumps(found), TEXTS: averaged})


if __name__ == "__main__":
    main()
