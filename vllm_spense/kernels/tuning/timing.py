"""How every search and benchmark of this project times GPU work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from vllm_spense.kernels.one_launch.semaphores import temporary_captures

#: µs of work in a graph, so that starting it does not count.
_MIN_WORK_US = 400


def require_no_capture(problem: object, tokens: int) -> None:
    """What a GEMM needs is searched for, timed and made before it is captured in a CUDA graph.

    Raises:
        RuntimeError: one is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a GEMM of {tokens} tokens was captured before it ran once: {problem}")


def median_us(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median time of one call in µs, over replays of a CUDA graph that runs all `calls` in turn.

    Give every call its own weights, together larger than the L2 cache, or the cache is what gets measured.
    """
    return medians_us([calls], replays)[0]


def medians_us(candidates: Sequence[Sequence[Callable[[], object]]], replays: int = 7) -> list[float]:
    """As `median_us`, for each of `candidates`; their graphs take turns, because a GPU that gets warm gets slower."""
    with temporary_captures():
        graphs = [Graph(calls) for calls in candidates]
        for graph in graphs:
            graph.us_of_a_call()
        times = zip(*([graph.us_of_a_call() for graph in graphs] for _ in range(replays)), strict=True)
        return [median(of_one) for of_one in times]


class Graph:
    """The calls, as often as it takes to be long enough, in a CUDA graph. Made inside `temporary_captures`.

    Attributes:
        calls: how many a replay runs.
        graph: to replay.
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        _run(calls)
        once = _elapsed_us(partial(_run, calls))
        calls = list(calls) * max(1, round(_MIN_WORK_US / once))
        self.calls = len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            _run(calls)

    def us_of_a_call(self) -> float:
        return _elapsed_us(self.graph.replay) / self.calls


def _run(calls: Sequence[Callable[[], object]]) -> None:
    """One after the other. Their results are let go: hundreds, of copies of a small weight, would fill a GPU."""
    for call in calls:
        call()


def _elapsed_us(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def cold_copies(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight must take turns so that each is out of the L2 cache when it is used again."""
    return max(2, -(-3 * torch.cuda.get_device_properties(device).L2_cache_size // max(weight_bytes, 1)))
