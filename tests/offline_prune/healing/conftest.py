"""Text long enough for some steps, a pruned Llama in FP8, and the same precision on every CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from heal_runs import Pair, healed, make_pair

from offline_prune.healing import pipeline
from offline_prune.healing.report import HealReport


@pytest.fixture(scope="session")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "text.txt"
    path.write_text(" ".join(f"{i} sheep jump over {i * i % 97} fences." for i in range(2000)))
    return path


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this CPU is fastest in: losses are compared with those of float32 models."""
    monkeypatch.setattr(pipeline, "compute_dtype", lambda device: torch.float32)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, long_text: Path) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), long_text)


@pytest.fixture(scope="session")
def whole(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HealReport]:
    """`pair` healed in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "compute_dtype", lambda device: torch.float32)
        return out, healed(pair, out)
