"""How searches time their candidates, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from vllm_spense.kernels.tuning import timing


def test_results_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of hundreds of copies of a small weight, at thousands of tokens, would fill a GPU."""
    alive: set[int] = set()
    most = 0

    class Result:
        def __init__(self) -> None:
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    def elapsed_us(work: Callable[[], object]) -> float:
        work()
        return 1.0

    monkeypatch.setattr(timing, "_elapsed_us", elapsed_us)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    found = timing.medians_us([[Result] * 20, [Result] * 5])
    # As often as fill 400 µs.
    assert found == [pytest.approx(1 / (20 * 400)), pytest.approx(1 / (5 * 400))]
    assert most == 1


class Graph:
    def replay(self) -> None:
        pass
