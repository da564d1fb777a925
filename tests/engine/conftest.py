"""Checkpoints that the engine tests serve. Everything is made once for each test session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import Edit, prune_tiny, tiny_llama, tiny_phi3
from engines import VLLM


@pytest.fixture(autouse=True)
def _vllm_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VLLM.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def dense_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models by name: `llama`, `bias` (a Llama with biases in its MLP), `phi3` (gate and up fused on disk),
    `threes` (a Llama that three ranks can share).
    """
    folder = tmp_path_factory.mktemp("dense")
    return {
        "llama": tiny_llama(folder / "llama"),
        "bias": tiny_llama(folder / "bias", mlp_bias=True),
        "phi3": tiny_phi3(folder / "phi3"),
        "threes": tiny_llama(
            folder / "threes", hidden_size=192, num_attention_heads=6, num_key_value_heads=3, head_dim=32
        ),
    }


@pytest.fixture(scope="session")
def spense_checkpoints(dense_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models pruned: of 384 intermediate indices, 256 are 2:4 and 128 dense."""
    folder = tmp_path_factory.mktemp("spense")
    return {name: prune_tiny(dense, folder / name) for name, dense in dense_models.items()}


@pytest.fixture(scope="session")
def spense_checkpoint(spense_checkpoints: dict[str, Path]) -> Path:
    """The pruned Llama."""
    return spense_checkpoints["llama"]


@pytest.fixture
def edited(spense_checkpoint: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """Copies the pruned Llama, applies a change to its `quantization_config`, and returns the copy."""

    def copy(edit: Edit) -> Path:
        out = shutil.copytree(spense_checkpoint, tmp_path / "edited")
        config = json.loads((out / "config.json").read_text())
        edit(config["quantization_config"])
        (out / "config.json").write_text(json.dumps(config))
        return out

    return copy
