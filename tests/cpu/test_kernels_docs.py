"""docs/kernels.md quotes the committed measurement, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_result_file() -> None:
    rows = json.loads((ROOT / "benchmarks/results/gemm_sweep.json").read_text())["rows"]
    text = (ROOT / "docs/kernels.md").read_text()
    header, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.count("|") > 10
    ]
    tokens = [int(cell.removeprefix("M = ")) for cell in header[4:]]
    assert tokens == sorted({row["m"] for row in rows})
    layer, quoted = "", 0
    for name, ratio, ideal, path, *cells in lines:
        layer = name or layer
        for m, cell in zip(tokens, cells, strict=True):
            mine = [row for row in rows if (row["layer"], row["m"]) == (layer, m)]
            if path == "dense, µs":
                assert {f"{row['dense_us']:.1f}" for row in mine} == {cell}
                continue
            (row,) = [row for row in mine if (row["path"], row["dense_ratio"]) == (path, float(ratio))] or [None]
            assert cell == (f"{row['ratio']:.2f}" if row else "")
            assert row is None or ideal == f"{row['ideal']:.2f}"
            quoted += row is not None
    assert quoted == len(rows)
