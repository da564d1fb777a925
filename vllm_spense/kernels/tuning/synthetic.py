"""Random weights that are valid input of every path: what searches, benchmarks and tests run on."""

from __future__ import annotations

from itertools import combinations

import torch

from vllm_spense.format import GROUP, KEPT
from vllm_spense.kernels.region_gemm.problem import Problem, Scales

#: Rows made at once, which bounds the temporary memory.
_CHUNK = 4096


def random_fp8(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(rows, columns) float8_e4m3fn, about normally distributed, none of them zero.

    Zeros would draw less power and flatter the times, and −0.0 has no place in a weight.
    """
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    for chunk in out.split(_CHUNK):
        noise = torch.randn(chunk.shape, device=device) * 16
        chunk.copy_(noise + noise.sign() / 64)
    return out


def random_2of4(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """As `random_fp8`, with two random columns of every group of four zero."""
    patterns = torch.tensor(
        [[column in kept for column in range(GROUP)] for kept in combinations(range(GROUP), KEPT)], device=device
    )
    out = random_fp8(rows, columns, device)
    for chunk in out.view(torch.uint8).split(_CHUNK):
        keep = patterns[torch.randint(len(patterns), (len(chunk), columns // GROUP), device=device)]
        chunk.mul_(keep.flatten(1))
    return out


def random_weight(problem: Problem, device: torch.device) -> torch.Tensor:
    """W (N, K) of a problem."""
    out = torch.empty(problem.n, problem.k, dtype=torch.float8_e4m3fn, device=device)
    for sparse, dense in problem.split_regions(out):
        sparse.copy_(random_2of4(*problem.sparse_shape, device))
        dense.copy_(random_fp8(*problem.dense_shape, device))
    return out


def unit_scales(problem: Problem, tokens: int, device: torch.device) -> Scales | None:
    """Of a scaled problem, all one; None for others."""
    if not problem.scaled:
        return None
    # While a model loads, torch's default is the model's dtype.
    ones = torch.ones(tokens + problem.n, 1, dtype=torch.float32, device=device)
    return ones[:tokens], ones[tokens:]
