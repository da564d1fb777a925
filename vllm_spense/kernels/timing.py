"""How every search and benchmark of this project times GPU work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

#: In a graph, so that starting it does not count.
_MIN_CALLS = 8


def median_us(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median time of one call in µs, over replays of a CUDA graph that runs all `calls` in turn.

    Give every call its own weights, together larger than the L2 cache, or the cache is what gets measured.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    calls = list(calls) * -(-_MIN_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times)


def cold_copies(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight must take turns so that each is out of the L2 cache when it is used again."""
    return max(2, -(-3 * torch.cuda.get_device_properties(device).L2_cache_size // max(weight_bytes, 1)))
