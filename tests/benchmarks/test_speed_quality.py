"""The README's picture from made-up results: which speeds, models and texts its points are of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import speed_quality

CELL = {"batch": 32, "context": 1024, "kv_cache_dtype": "fp8", "ms": 1.0}
THREE = "spensegpt++ calibration=builtin,calibration=builtin-code,calibration=generated"
HEALED = f"{THREE} healed samples=9"


def rows(method: str, sparsity: float, kl: float, form: str = "fp8", models: str = "ab") -> Iterator[dict[str, Any]]:
    """Of each model and two texts; the second text loses three times as much."""
    for model in models:
        for domain, factor in (("code", 1), ("prose", 3)):
            yield {
                "model": model,
                "method": method,
                "sparsity": sparsity,
                "format": form,
                "domain": domain,
                "kl": factor * kl,
            }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    schemes = {"fp8": (0.0, 1.0), "w4a16": (0.0, 1.1), "spense-25": (0.25, 1.2), "spense-37.5": (0.375, 1.4)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in speed_quality.FILES}
    found["alternatives"] = [
        *({**CELL, "scheme": scheme, "sparsity": s, "ratio": ratio} for scheme, (s, ratio) in schemes.items()),
        {**CELL, "batch": 1, "scheme": "w4a16", "sparsity": 0.0, "ratio": 9.0},
        {"scheme": "w4a8-fp8", "sparsity": 0.0, "failed": "no kernel"},
    ]
    found["accuracy-long-smollm2-135m"] = [*rows("dense", 0.0, 0.0, "bf16"), *rows("spensegpt+", 0.25, 0.2)]
    found["accuracy-code-smollm2-135m"] = [*rows(THREE, 0.25, 0.1), *rows(THREE, 0.375, 0.15, models="a")]
    found["accuracy-code-gemma3-270m"] = [*rows(THREE, 0.375, 0.25, models="b"), *rows(THREE, 0.25, 9.0, "bf16")]
    found["accuracy-healed-smollm2-135m"] = [*rows(THREE, 0.25, 9.0), *rows(HEALED, 0.375, 0.05)]
    found["peers-int4-models"] = [*rows("llmcompressor gptq", 0.0, 0.3, "int4-g64")]
    found["accuracy-domains-smollm2-135m"] = [*rows("dense rounding=after", 0.0, 0.01), *rows("spensegpt+", 0.25, 9.0)]
    for name, content in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": content}))
    return tmp_path


def test_points_are_means_over_models_and_texts(results: Path, tmp_path: Path) -> None:
    found = speed_quality.points(results)
    assert found == {
        "dense": [[0.0, pytest.approx(0.02), 1.0]],
        "healed": [[0.375, pytest.approx(0.1), 1.4]],
        # What another file has of the same case does not count.
        "spensegpt++": [[0.25, pytest.approx(0.2), 1.2], [0.375, pytest.approx(0.4), 1.4]],
        "spensegpt+": [[0.25, pytest.approx(0.4), 1.2]],
        "W4A16": [[0.0, pytest.approx(0.6), 1.1]],
    }
    assert speed_quality.texts(results) == "a, b on code, prose"
    picture = tmp_path / "picture.png"
    speed_quality.draw(found, "a, b on code, prose", picture)
    assert picture.stat().st_size > 10_000


def test_what_not_all_models_have_is_not_drawn(results: Path) -> None:
    (results / "accuracy-code-gemma3-270m.json").write_text('{"rows": []}')
    (results / "peers-int4-models.json").write_text(json.dumps({"rows": [*rows("llmcompressor gptq", 0.0, 0.3)][:3]}))
    found = speed_quality.points(results)
    assert found["spensegpt++"] == [[0.25, pytest.approx(0.2), 1.2]]
    assert "W4A16" not in found
