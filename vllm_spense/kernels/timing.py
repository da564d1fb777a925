"""How every search and benchmark of this project times GPU work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

#: µs of work in a graph, so that starting it does not count.
_MIN_WORK_US = 400


def median_us(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median time of one call in µs, over replays of a CUDA graph that runs all `calls` in turn.

    Give every call its own weights, together larger than the L2 cache, or the cache is what gets measured.
    """
    for call in calls:
        call()
    once = _elapsed_us(lambda: [call() for call in calls])
    calls = list(calls) * max(1, round(_MIN_WORK_US / once))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return median(_elapsed_us(graph.replay) for _ in range(replays)) / len(calls)


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
