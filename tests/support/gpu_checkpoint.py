"""The checkpoint that engines on a GPU serve in the tests."""

from __future__ import annotations

import os
from pathlib import Path

from scripts.pruned import CACHE, Pruning, pruned
from scripts.smollm2 import smollm2


def dense() -> Path:
    """`SPENSE_TEST_MODEL`, or SmolLM2 from its package."""
    model = os.environ.get("SPENSE_TEST_MODEL")
    return Path(model) if model else smollm2(CACHE / "smollm2-135m")


def checkpoint() -> Path:
    """`SPENSE_TEST_CHECKPOINT`, or `dense` pruned."""
    if folder := os.environ.get("SPENSE_TEST_CHECKPOINT"):
        return Path(folder)
    return pruned(dense(), Pruning("spensegpt+", 0.375))
