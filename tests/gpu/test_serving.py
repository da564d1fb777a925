"""vLLM on a real GPU: the library path generates what the reference path generates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("nvmath", reason="needs nvmath-python")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from checkpoints import prune_tiny, tiny_llama
from engines import Run, generate, require_same_or_tied, spread

from vllm_spense.policy import SWITCH

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

STOCK = "compressed-tensors"


def test_the_library_path_against_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager and in CUDA graphs, at every number of tokens that twenty prompts make.

    BF16 sums in another order round other activations to other FP8 values. How much that moves the numbers is
    measured on stock vLLM itself, as it goes from eager to compiled.
    """
    checkpoint = prune_tiny(tiny_llama(tmp_path / "dense"), tmp_path / "spense")
    ours = {compiled: Run(checkpoint, "spense", compiled, dtype="bfloat16") for compiled in (False, True)}
    stock = {compiled: Run(checkpoint, STOCK, compiled, dtype="bfloat16") for compiled in (False, True)}
    monkeypatch.setenv(SWITCH, "library")
    # A process for each engine: the next one wants the GPU memory of the last.
    found = {run: generate([run])[run] for run in (*ours.values(), *stock.values())}
    monkeypatch.setenv(SWITCH, "reference")
    reference = generate([ours[False]])[ours[False]]
    tolerance = 2 * spread(found[stock[True]], found[stock[False]])
    for compiled in (False, True):
        for other in (reference, found[stock[compiled]]):
            distance = spread(found[ours[compiled]], other)
            print(f"compiled {compiled}: {distance:.4f} nats, tolerance {tolerance:.4f}")
            assert distance <= tolerance
            require_same_or_tied(found[ours[compiled]], other, tolerance)
    assert found[ours[False]] != reference
