"""Weights that are replaced while an engine runs: the tokens of an engine that was started with them, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import prune_tiny, tiny_llama
from engines import PROMPTS
from lifecycle import live

pytestmark = pytest.mark.engine

PROMPT = PROMPTS[:6]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of the same shape with other weights, pruned to the same regions."""
    folder = tmp_path_factory.mktemp("other")
    return prune_tiny(tiny_llama(folder / "dense", rope_theta=1e4, initializer_range=0.12), folder / "spense")


@pytest.fixture(scope="module")
def said(spense_checkpoint: Path, dense_models: dict[str, Path], other: Path) -> dict[str, Any]:
    """One engine's tokens after each step, and what it said to the last."""
    arguments = {"model": str(spense_checkpoint), "dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    steps = [
        ("generate",),
        ("zero",),
        ("generate",),
        ("reload", None),
        ("generate",),
        ("reload", str(other)),
        ("generate",),
        ("update", str(spense_checkpoint), "as they are"),
        ("generate",),
        ("update", str(dense_models["llama"]), "bfloat16"),
    ]
    answers = live(arguments, PROMPT, steps)
    names = ["first", "", "zero", "reload", "reloaded", "reload other", "other", "update", "updated", "trained"]
    return dict(zip(names, answers, strict=True))


def test_the_same_checkpoint_again(said: dict[str, Any]) -> None:
    assert said["zero"] != said["first"]
    assert said["reload"] is None
    assert said["reloaded"] == said["first"]


@pytest.mark.exhaustive
def test_another_checkpoint_of_the_same_shape(said: dict[str, Any], other: Path) -> None:
    assert said["reload other"] is None
    arguments = {"model": str(other), "dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    assert said["other"] == live(arguments, PROMPT, [("generate",)])[0] != said["first"]


def test_tensors_that_a_trainer_sends(said: dict[str, Any]) -> None:
    """As the server's weight update hands them to the layers' loaders, in the checkpoint's form."""
    assert said["update"] is None
    assert said["updated"] == said["first"]


def test_weights_that_are_not_quantized_are_refused(said: dict[str, Any]) -> None:
    assert "FormatError: a weight has the wrong dtype (layer: model.layers.0.mlp." in said["trained"]
    assert "found: torch.bfloat16; expected: torch.float8_e4m3fn" in said["trained"]
