"""The paper's order of methods, on a real model and a small calibration text."""

from __future__ import annotations

from pathlib import Path

import pytest

from offline_prune.calibration.data import heldout_tokens
from offline_prune.checkpoint.evaluate import load_dense, perplexity
from scripts.pruned import Pruning, pruned

CASES = {
    "wanda 2:4": Pruning("wanda", 0.5),
    "sparsegpt 2:4": Pruning("sparsegpt", 0.5),
    "spensegpt 37.5%": Pruning("spensegpt", 0.375),
    "spensegpt+ 37.5%": Pruning("spensegpt+", 0.375),
    "spensegpt+ 25%": Pruning("spensegpt+", 0.25),
    "spensegpt+ 37.5% BF16": Pruning("spensegpt+", 0.375, quantize="none"),
}


@pytest.fixture(scope="module")
def perplexities(smollm2_folder: Path) -> dict[str, float]:
    folders = {"dense": smollm2_folder} | {name: pruned(smollm2_folder, case) for name, case in CASES.items()}
    found = {}
    for name, folder in folders.items():
        model, tokenizer = load_dense(folder)
        found[name] = perplexity(model, heldout_tokens(tokenizer, 8, 256))
    return found


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("dense", "spensegpt+ 25%"),
        ("spensegpt+ 25%", "spensegpt+ 37.5%"),
        ("spensegpt+ 37.5%", "spensegpt 37.5%"),
        ("spensegpt 37.5%", "sparsegpt 2:4"),
        ("sparsegpt 2:4", "wanda 2:4"),
    ],
)
def test_order(better: str, worse: str, perplexities: dict[str, float]) -> None:
    assert perplexities[better] < perplexities[worse], perplexities


def test_fp8_adds_little(perplexities: dict[str, float]) -> None:
    """One to three percent: other roundings, of another CPU too, lead to other masks of so small a text.

    Scales that saturate, or are another row's, cost a hundred times; finer faults are test_quantize's to find.
    """
    assert perplexities["spensegpt+ 37.5%"] < 1.1 * perplexities["spensegpt+ 37.5% BF16"], perplexities
