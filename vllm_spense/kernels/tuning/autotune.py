"""Several ways to run one GEMM, timed against each other.

The times that searches keep are the best of many, measured one search after the other on a GPU that gets warm: good
enough to find a kernel, too rough to choose between two paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning.plan_cache import environment, load_or_find
from vllm_spense.kernels.tuning.timing import medians_us, require_no_capture

#: By name, the same call on several weights, see `timing.median_us`.
Candidates = Mapping[str, Sequence[Callable[[], object]]]


@dataclass(frozen=True)
class Medians:
    """Of one call, in µs, by name."""

    us: dict[str, float]


def times(
    problem: Problem,
    tokens: int,
    device: torch.device,
    found: Mapping[str, object],
    candidates: Callable[[], Candidates],
) -> dict[str, float]:
    """Median time of one call of each rival in µs; all of them take turns. Measured once, then kept beside the plans.

    Args:
        found: by name, what runs, as JSON: they are measured again when it is another.
        candidates: makes their calls.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def measured() -> Medians:
        require_no_capture(problem, tokens)
        calls = candidates()
        medians = medians_us(list(calls.values()))
        return Medians({name: round(us, 2) for name, us in zip(calls, medians, strict=True)})

    def known(us: object) -> Medians:
        # A damaged file of the plan cache may hold anything.
        if not isinstance(us, dict) or not all(isinstance(time, float) for time in us.values()):
            raise TypeError(f"{us} are no times by name")
        if us.keys() != set(found):
            raise ValueError(f"found times of {sorted(us)}, expected of {sorted(found)}")
        return Medians(us)

    key = {"path": "candidates", **environment(device), **problem.describe(), "tokens": tokens, "candidates": found}
    return load_or_find(key, known, measured).us
