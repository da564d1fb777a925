"""Draws the README's picture: speed-up of an output token against what pruning costs, from two result files.

    python -m benchmarks.speed_quality

The speed is `decode_speed.json`'s at one batch size and context; the cost is the KL divergence of
`accuracy-smollm2.json`, averaged over its texts and seeds. The points drawn are stored in the picture, so that a test
can tell a stale one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.envelope import RESULTS

PICTURE = Path(__file__).with_suffix(".png")
#: The field of the picture's metadata that holds `points()` as JSON.
POINTS = "Points"
#: Which of the measured cells the picture shows.
BATCH, CONTEXT, KV_CACHE = 32, 1024, "fp8"
#: Method → colour, in the order of the labels. At 50% the first two have nothing to select and are SparseGPT.
COLOURS = {"spensegpt++": "#0b6e4f", "spensegpt+": "#2f6fb5", "spensegpt": "#7a8a99"}
_LAST_POINT = {"spensegpt+": "sparsegpt", "spensegpt": "sparsegpt"}
_INK, _SOFT, _GRID = "#22282e", "#6b7780", "#dde2e6"

Row = Mapping[str, Any]


def main() -> None:
    draw(points(), PICTURE)


def points(results: Path = RESULTS) -> dict[str, list[list[float]]]:
    """Method → [MLP sparsity, KL in nats, speed-up over dense FP8], by rising sparsity.

    `dense` is the unpruned model rounded to the nearest FP8 values, which is what the speed-up compares with.
    """
    decode, accuracy = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        for name in ("decode_speed", "accuracy-smollm2")
    )
    speed = {
        row["sparsity"]: row["ratio"]
        for row in decode
        if (row["batch"], row["context"], row["kv_cache_dtype"]) == (BATCH, CONTEXT, KV_CACHE)
    }
    found = {"dense": [[0.0, _kl(accuracy, "dense rounding=after", 0.0), 1.0]]}
    for method in COLOURS:
        name = {0.5: _LAST_POINT.get(method, method)}
        found[method] = [[s, _kl(accuracy, name.get(s, method), s), speed[s]] for s in sorted(speed)]
    return found


def _kl(rows: Sequence[Row], method: str, sparsity: float) -> float:
    found = [row["kl"] for row in rows if (row["method"], row["sparsity"], row["format"]) == (method, sparsity, "fp8")]
    return statistics.mean(found)


def draw(found: Mapping[str, Sequence[Sequence[float]]], file: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter

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
    axes.text(1.01, 1.44, "MLP weights\nthat are zero", transform=edge, va="center", color=_SOFT, fontsize=9)
    for method, colour in reversed(COLOURS.items()):
        xs, ys = ([point[i] for point in found[method]] for i in (1, 2))
        axes.plot([dense_kl, xs[0]], [1.0, ys[0]], color=colour, linewidth=1.6, linestyle=(0, (1, 2)), zorder=1)
        axes.plot(xs, ys, color=colour, linewidth=2.2, zorder=2)
        for x, y in zip(xs, ys, strict=True):
            dot(x, y, colour)
    _, x, y = found["spensegpt"][-1]
    dot(x, y, _INK)
    label("spensegpt++", *found["spensegpt++"][-1][1:], (0, 14), "center", COLOURS["spensegpt++"])
    label("spensegpt+", *found["spensegpt+"][1][1:], (42, 36), "left", COLOURS["spensegpt+"])
    label("spensegpt", *found["spensegpt"][1][1:], (10, -12), "left", COLOURS["spensegpt"])
    label("sparsegpt (2:4)", x, y, (0, 14), "center", _INK)
    dot(dense_kl, 1.0, _INK)
    label("dense FP8", dense_kl, 1.0, (11, 0), "left", _INK)
    axes.set(xlim=(0, 0.9), ylim=(0.98, 1.46), yticks=[1.0, 1.1, 1.2, 1.3, 1.4])
    axes.yaxis.set_major_formatter(FormatStrFormatter("%.1f×"))
    axes.set_xlabel("quality lost: KL divergence from the dense model, nats per token", color=_INK)
    axes.set_ylabel("decoding speed over dense FP8", color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    figure.savefig(file, dpi=160, metadata={POINTS: json.dumps(found)})


if __name__ == "__main__":
    main()
