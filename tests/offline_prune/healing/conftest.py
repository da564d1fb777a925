"""Text long enough for some steps, and a pruned Llama in FP8."""

from __future__ import annotations

from pathlib import Path

import pytest
from heal_runs import Pair, make_pair


@pytest.fixture(scope="session")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "text.txt"
    path.write_text(" ".join(f"{i} sheep jump over {i * i % 97} fences." for i in range(2000)))
    return path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, long_text: Path) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), long_text)
