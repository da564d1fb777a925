"""The paper's order of methods, on a real model and a small calibration set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from offline_prune.calibration.data import heldout_tokens
from offline_prune.checkpoint.evaluate import load_dense, perplexity
from offline_prune.pipeline import prune
from offline_prune.settings import PruneSettings

CASES: dict[str, dict[str, Any]] = {
    "wanda 2:4": {"method": "wanda"},
    "sparsegpt 2:4": {"method": "sparsegpt"},
    "spensegpt 37.5%": {"method": "spensegpt", "sparsity": 0.375},
    "spensegpt+ 37.5%": {"method": "spensegpt+", "sparsity": 0.375},
    "spensegpt 25%": {"method": "spensegpt", "sparsity": 0.25},
    "spensegpt+ 25%": {"method": "spensegpt+", "sparsity": 0.25},
    "spensegpt+ 37.5% BF16": {"method": "spensegpt+", "sparsity": 0.375, "quantize": "none"},
}


def measure(folder: Path) -> float:
    model, tokenizer = load_dense(folder)
    return perplexity(model, heldout_tokens(tokenizer, 8, 512))


@pytest.fixture(scope="module")
def perplexities(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    settings = partial(PruneSettings, str(smollm2_folder), calibration="builtin", samples=16, length=256, device="cpu")
    found = {"dense": measure(smollm2_folder)}
    for name, options in CASES.items():
        out = tmp_path_factory.mktemp("quality") / "out"
        prune(settings(out, **options))
        found[name] = measure(out)
    return found


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("dense", "spensegpt+ 25%"),
        ("spensegpt+ 25%", "spensegpt 25%"),
        ("spensegpt+ 25%", "spensegpt+ 37.5%"),
        ("spensegpt 25%", "spensegpt 37.5%"),
        ("spensegpt+ 37.5%", "spensegpt 37.5%"),
        ("spensegpt 37.5%", "sparsegpt 2:4"),
        ("sparsegpt 2:4", "wanda 2:4"),
    ],
)
def test_order(better: str, worse: str, perplexities: dict[str, float]) -> None:
    assert perplexities[better] < perplexities[worse], perplexities


def test_fp8_adds_little(perplexities: dict[str, float]) -> None:
    assert perplexities["spensegpt+ 37.5%"] < 1.02 * perplexities["spensegpt+ 37.5% BF16"], perplexities
