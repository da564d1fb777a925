"""Several ways to run one GEMM, timed against each other on the same random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from vllm_spense.kernels.region_gemm.problem import Problem, Scales
from vllm_spense.kernels.tuning import autotune
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight, unit_scales
from vllm_spense.kernels.tuning.timing import cold_copies

Packed = Mapping[str, torch.Tensor]
#: x (M, K), a packed weight, scales of a scaled problem → whatever the GEMM returns.
Run = Callable[[torch.Tensor, Packed, Scales | None], object]


def compare(
    problem: Problem,
    tokens: int,
    device: torch.device,
    runs: Mapping[str, Run],
    pack: Callable[[torch.Tensor], Packed],
    found: Mapping[str, object],
) -> Mapping[str, float]:
    """µs of one call of each of `runs`, M = `tokens`; measured once, then kept on disk.

    Args:
        pack: makes of a weight (N, K) what `runs` take; the copies that it makes take turns, so that none of them is in
            the cache when it is used again.
        found: by name, what runs, as JSON: all are measured again when it is something else.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def calls() -> autotune.Candidates:
        weight = random_weight(problem, device)
        packs = [pack(weight) for _ in range(cold_copies(problem.weight_bytes, device))]
        x, scales = random_fp8(tokens, problem.k, device), unit_scales(problem, tokens, device)
        return {name: [partial(run, x, packed, scales) for packed in packs] for name, run in runs.items()}

    return autotune.times(problem, tokens, device, found, calls)
