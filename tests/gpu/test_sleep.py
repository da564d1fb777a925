"""An engine in CUDA graphs that sleeps, wakes and loads its weights again: the same tokens, and no memory lost.

    pytest -m gpu --noconftest tests/gpu/test_sleep.py

One engine serves all of it. `SPENSE_TEST_CHECKPOINT` and `SPENSE_TEST_MODEL` as in test_serving.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("nvmath", reason="needs nvmath-python")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpu_checkpoint
from engines import PROMPTS
from lifecycle import Step, live

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

ROUNDS = 20
#: The first rounds fill pools; after them what a round leaves is what it loses.
SETTLED = 4
MAX_GROWTH_BYTES = 64 << 20

RELOADED: list[Step] = [("reload", None), ("generate",)]
LEVEL_1: list[Step] = [("sleep", 1), ("memory",), ("wake",), ("generate",)]
#: As its documentation has it: the weights are not kept, and the KV cache comes back when they are there.
LEVEL_2: list[Step] = [("sleep", 2), ("memory",), ("wake", ["weights"]), ("reload", None), ("wake", ["kv_cache"])]
LEVEL_2 += [("generate",)]


@pytest.fixture(scope="module")
def life() -> list[tuple[Step, Any]]:
    """Every step with what came of it."""
    arguments = {
        "model": str(gpu_checkpoint.checkpoint()),
        "enable_sleep_mode": True,
        "max_model_len": 512,
        "gpu_memory_utilization": 0.3,
        "seed": 0,
    }
    steps: list[Step] = [("generate",), ("memory",), *RELOADED]
    for i in range(ROUNDS):
        steps += [*(LEVEL_2 if i % 2 else LEVEL_1), ("memory",)]
    return list(zip(steps, live(arguments, PROMPTS, steps), strict=True))


def test_nothing_is_refused(life: list[tuple[Step, Any]]) -> None:
    wrong = [(step, found) for step, found in life if step[0] in ("sleep", "wake", "reload") and found is not None]
    assert not wrong, wrong[0]


def test_tokens_are_the_same(life: list[tuple[Step, Any]]) -> None:
    """After weights were loaded again in place, after both levels, and after twenty rounds."""
    said = [found for step, found in life if step == ("generate",)]
    assert len(said) == 2 + ROUNDS
    assert len({tuple(tokens) for tokens in said[0]}) > 1
    wrong = [i for i, found in enumerate(said) if found != said[0]]
    assert not wrong, f"other tokens after the first {wrong[0]} generations"


def test_no_memory_is_lost(life: list[tuple[Step, Any]], record_property: Callable[[str, object], None]) -> None:
    measured = [found for step, found in life if step == ("memory",)]
    start, asleep, awake = measured[0], measured[1::2], measured[2::2]
    growth = awake[-1] - awake[SETTLED]
    record_property(
        "awake", f"{start / 2**20:.0f} MiB at first, {growth / 2**20:+.1f} MiB in {ROUNDS - SETTLED} rounds"
    )
    record_property("asleep", f"{max(asleep) / 2**20:.0f} MiB")
    assert growth <= MAX_GROWTH_BYTES
    # What takes most of the memory, the KV cache, is given back.
    assert max(asleep) < start / 2
