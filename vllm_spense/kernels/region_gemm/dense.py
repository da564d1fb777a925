"""The dense path: a weight with all its zeros as one dense GEMM, where a copy of it is kept for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm import library
from vllm_spense.kernels.region_gemm.problem import DENSE_COPY, Problem, Scales

#: What `pack` returns.
TENSORS = (DENSE_COPY,)


def all_dense(problem: Problem) -> Problem:
    """The same GEMM without a sparse region."""
    extent = problem.projections * problem.regions.intermediate
    return replace(problem, regions=Regions(0, extent), projections=1, separate_outputs=False)


def pack(weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """A copy of W (N, K)."""
    return {DENSE_COPY: weight.clone()}


def prepare(problem: Problem, min_tokens: int, max_tokens: int, device: torch.device) -> None:
    """As `library.prepare`."""
    library.prepare(all_dense(problem), min_tokens, max_tokens, device)


def found(problem: Problem, tokens: int, device: torch.device) -> dict[str, object]:
    """As `library.found`."""
    return library.found(all_dense(problem), tokens, device)


def run(
    x: torch.Tensor, packed: Mapping[str, torch.Tensor], problem: Problem, scales: Scales | None = None
) -> torch.Tensor:
    """As `library.run`, of a `packed` with the copy in it."""
    return library.run(x, {"dense": packed[DENSE_COPY].unsqueeze(0)}, all_dense(problem), scales)
