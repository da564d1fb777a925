"""The README's picture from made-up results: which speeds and which texts its points are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import speed_quality


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Speeds of Spense alone, quality of two texts in an old file."""
    cell = {"batch": 32, "context": 1024, "kv_cache_dtype": "fp8"}
    decode = [{**cell, "sparsity": s, "ratio": 1 + s} for s in (0.25, 0.5)]
    write(tmp_path, "decode_speed", [*decode, {**cell, "batch": 1, "sparsity": 0.25, "ratio": 9.0}])
    cases = [("dense rounding=after", 0.0, 0.01), ("sparsegpt", 0.5, 0.9)]
    cases += [(method, 0.25, 0.2) for method in speed_quality.COLOURS] + [("spensegpt++", 0.5, 0.4)]
    accuracy = [
        {"model": "m", "method": method, "sparsity": sparsity, "format": form, "domain": domain, "kl": factor * kl}
        for method, sparsity, kl in cases
        for form, factor in (("fp8", 1), ("bf16", 100))
        for domain, factor in (("code", factor), ("prose", 3 * factor))
    ]
    write(tmp_path, "accuracy-smollm2", accuracy)
    return tmp_path


def test_points_are_means_over_the_texts(results: Path) -> None:
    found = speed_quality.points(results)
    assert found["dense"] == [[0.0, pytest.approx(0.02), 1.0]]
    assert found["spensegpt+"] == [[0.25, pytest.approx(0.4), 1.25], [0.5, pytest.approx(1.8), 1.5]]
    assert found.keys() == {"dense", *speed_quality.COLOURS}
    assert speed_quality.texts(results) == "m on code, reference"


def test_four_bits_are_drawn_once_both_are_measured_on_texts_that_all_have(results: Path, tmp_path: Path) -> None:
    cell = {"batch": 32, "context": 1024, "kv_cache_dtype": "fp8", "ms": 1.0}
    schemes = {"fp8": (0.0, 1.0), "w4a16": (0.0, 1.1), "spense-25": (0.25, 1.2), "spense-50": (0.5, 1.4)}
    rows = [{**cell, "scheme": scheme, "sparsity": s, "ratio": ratio} for scheme, (s, ratio) in schemes.items()]
    write(results, "alternatives", [*rows, {"scheme": "w4a8-fp8", "sparsity": 0.0, "failed": "no kernel"}])
    assert "W4A16" not in speed_quality.points(results)
    size = {"heldout": 8, "heldout_length": 512}
    int4 = {"model": "m", "method": "llmcompressor gptq", "sparsity": 0.0, "format": "int4-g64"}
    write(
        results,
        "peers-int4",
        [
            {**int4, **size, "domain": "code", "kl": 0.1},
            {**int4, **size, "domain": "handbook", "kl": 7.0},
            {**int4, **size, "heldout": 40, "domain": "reference", "kl": 7.0},
            {**int4, **size, "domain": "code", "method": "llmcompressor wanda", "kl": 7.0},
        ],
    )
    found = speed_quality.points(results)
    assert found["W4A16"] == [[0.0, 0.1, 1.1]]
    assert "W4A8-FP8" not in found
    # Only code is in both files.
    assert found["spensegpt++"] == [[0.25, pytest.approx(0.2), 1.2], [0.5, pytest.approx(0.4), 1.4]]
    assert speed_quality.texts(results) == "m on code"
    picture = tmp_path / "picture.png"
    speed_quality.draw(found, "m on code", picture)
    assert picture.stat().st_size > 10_000
