"""Fixtures that every test may use: the real model, as it is and pruned, a tiny random one, and a text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model

# `python -m pytest` finds scripts/ and benchmarks/ by itself, plain `pytest` does not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pruned import CACHE, Pruning, pruned
from scripts.smollm2 import smollm2


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, BF16; made once and kept for later runs and the demo."""
    return smollm2(CACHE / "smollm2-135m")


@pytest.fixture(scope="session")
def pruned_folder(smollm2_folder: Path) -> Path:
    """The same model at 37.5% with SpenseGPT+ in FP8, as the demo serves it; made anew when the pruner has changed."""
    return pruned(smollm2_folder, Pruning("spensegpt+", 0.375))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i} sheep jump over {i * i % 97} fences." for i in range(400)))
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
