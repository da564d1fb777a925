"""Memory that is made outside of the pool that vLLM gives the thread which loads a model."""

from __future__ import annotations

import threading

import pytest
import torch

from vllm_spense.kernels.lasting import lasting


def test_it_is_made_in_another_thread() -> None:
    made_in: list[int] = []

    def make() -> torch.Tensor:
        made_in.append(threading.get_ident())
        return torch.arange(3)

    assert lasting(make).tolist() == [0, 1, 2]
    assert made_in != [threading.get_ident()]


def test_errors_reach_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        lasting(lambda: torch.zeros(1 // 0))
