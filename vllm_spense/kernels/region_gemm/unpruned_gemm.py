"""Layers that nothing was pruned in: one dense FP8 weight, and scales inside the kernel.

Behind attention's layers the compiler has no kernel that could take the scales in. The one-launch kernel serves small
M, if it is faster there than the kernel that vLLM would run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from vllm_spense.kernels.region_gemm import one_launch
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning import autotune
from vllm_spense.kernels.tuning.synthetic import random_fp8, unit_scales
from vllm_spense.kernels.tuning.timing import cold_copies

#: x (M, K), W (N, K), scales of tokens (M, 1) and rows (N, 1) → (M, N) bfloat16.
Gemm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: Beyond this, tensor cores limit a dense GEMM more than memory does.
MOST_TOKENS = 128


class Stock(NamedTuple):
    """The kernel that vLLM would run, and what says that it is another: vLLM's version."""

    gemm: Gemm
    version: str


def prepare(n: int, k: int, device: torch.device, stock: Stock) -> dict[int, bool]:
    """Compares the kernel with vLLM's, for every number of tokens it may serve.

    Returns:
        Whether it is faster, by the largest M of each of its plans.
    """
    tokens, faster = one_launch.MIN_TILE_TOKENS, {}
    while tokens <= MOST_TOKENS:
        faster[tokens] = _faster(_problem(n, k), tokens, device, stock)
        if faster[tokens]:
            one_launch.plan(_problem(n, k), tokens, device)
        tokens *= 2
    return faster


def run(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, stock: Stock
) -> torch.Tensor:
    """x · Wᵀ · s_x · s_w by the faster of both kernels.

    Args:
        x: (M, K) float8_e4m3fn.
        weight: (N, K) float8_e4m3fn, contiguous.
        x_scale, w_scale: float32 (M, 1) and (N, 1).
        stock: what runs where the one-launch kernel does not.

    Returns:
        (M, N) bfloat16.
    """
    (n, k), m = weight.shape, len(x)
    problem, tokens = _problem(n, k), one_launch.bucket(m)
    if m > MOST_TOKENS or not _faster(problem, tokens, x.device, stock):
        return stock.gemm(x, weight, x_scale, w_scale)
    plan = one_launch.plan(problem, tokens, x.device)
    return plan.run(x, _packed(weight), scales=(x_scale, w_scale))


def _packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"compressed": weight[:0], "dense": weight}


@cache
def _problem(n: int, k: int) -> Problem:
    return Problem.whole(n, k)


@cache
def _faster(problem: Problem, tokens: int, device: torch.device, stock: Stock) -> bool:
    def calls() -> autotune.Rivals:
        plan = one_launch.plan(problem, tokens, device)
        x, scales = random_fp8(tokens, problem.k, device), unit_scales(problem, tokens, device)
        assert scales
        weights = [random_fp8(problem.n, problem.k, device) for _ in range(cold_copies(problem.weight_bytes, device))]
        return {
            "one-launch": [partial(plan.run, x, _packed(weight), scales=scales) for weight in weights],
            "stock": [partial(stock.gemm, x, weight, *scales) for weight in weights],
        }

    found = {"one-launch": one_launch.found(problem, tokens, device), "stock": stock.version}
    times = autotune.times(problem, tokens, device, found, calls)
    return times["one-launch"] < times["stock"]
