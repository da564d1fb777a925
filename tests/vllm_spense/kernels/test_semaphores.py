"""Semaphores: who shares them, that captures never run dry without saying so, and that searches return theirs."""

from __future__ import annotations

import pytest
import torch

from vllm_spense.kernels.one_launch import semaphores as module
from vllm_spense.kernels.one_launch.semaphores import Semaphores, temporary_captures


class Pool(Semaphores):
    """Of four captures, on a CPU; counts how often memory is made."""

    def __init__(self) -> None:
        super().__init__(self.zeros, captures=4)
        self.made: list[int] = []

    def zeros(self, count: int) -> torch.Tensor:
        self.made.append(count)
        return torch.zeros(count, dtype=torch.int64)


@pytest.fixture
def pool() -> Pool:
    pool = Pool()
    pool.reserve(10)
    return pool


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    starts = [slice.data_ptr() // 8 for slice in (a, b)]
    return starts[0] < starts[1] + len(b) and starts[1] < starts[0] + len(a)


def test_launches_of_one_stream_share(pool: Pool) -> None:
    first = pool.take(10, stream=1, capture=None)
    assert len(first) >= 10
    assert not first.any()
    assert pool.take(7, stream=1, capture=None) is first
    assert not overlap(first, pool.take(10, stream=2, capture=None))


def test_only_launches_of_one_capture_and_stream_share(pool: Pool) -> None:
    eager = pool.take(10, stream=1, capture=None)
    slices = [pool.take(10, stream, capture) for capture, stream in ((5, 1), (5, 2), (6, 1))]
    for index, slice in enumerate(slices):
        assert not any(overlap(slice, other) for other in [eager, *slices[:index]])
    assert pool.take(3, stream=1, capture=6) is slices[2]


def test_memory_is_made_outside_of_captures_only(pool: Pool) -> None:
    for capture in range(4):
        pool.take(10, 1, capture)
    assert pool.made == [40]
    with pytest.raises(RuntimeError, match=r"no semaphores are left for another CUDA graph.*4 captures"):
        pool.take(10, 1, 4)
    # A launch outside makes room for four more.
    pool.take(10, 1, None)
    assert pool.made == [40, 40]
    assert pool.left >= 3


def test_any_number_of_captures_with_launches_between_them(pool: Pool) -> None:
    taken = []
    for capture in range(100):
        pool.take(10, 1, None)
        taken += [pool.take(10, stream, capture) for stream in (1, 2)]
    assert len({slice.data_ptr() for slice in taken}) == 200


def test_a_plan_that_needs_more_gets_more(pool: Pool) -> None:
    small = pool.take(10, 1, None)
    pool.reserve(25)
    large = pool.take(25, 1, None)
    assert len(large) >= 25
    assert not overlap(small, large)
    for capture in range(3):
        assert len(pool.take(25, 1, capture)) >= 25


def test_searches_return_what_they_took(pool: Pool) -> None:
    kept = pool.take(10, 1, capture=0)
    for search in range(1, 100):
        with pool.temporary():
            for graph in range(2):
                assert not overlap(kept, pool.take(10, 1, 2 * search + graph))
    assert pool.made == [40]
    assert pool.left == 3


def test_a_search_that_fails_returns_them_too(pool: Pool) -> None:
    def search() -> None:
        with pool.temporary():
            pool.take(10, 1, 7)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search()
    assert pool.left == 4


def test_what_is_timed_is_temporary(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_of_device", {torch.device("cpu"): pool})
    with temporary_captures():
        pool.take(10, 1, 7)
        assert pool.left == 3
    assert pool.left == 4


def test_no_plan_without_semaphores_sets_any_aside() -> None:
    pool = Pool()
    pool.reserve(0)
    assert pool.made == []
