"""The one-launch path: tile shapes and the launch of `one_launch_kernel.gemm`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import torch
import triton

from vllm_spense.kernels import one_launch_kernel
from vllm_spense.kernels.one_launch_pack import HALF, SPARSE_COLUMNS, kernel_order, pack, reason_against
from vllm_spense.kernels.plan_cache import environment, load_or_find
from vllm_spense.kernels.problem import Problem
from vllm_spense.kernels.synthetic import random_fp8, random_weight
from vllm_spense.kernels.timing import cold_copies, median_us

__all__ = ["OneLaunchPlan", "Tiling", "kernel_order", "pack", "plan", "reason_against", "run", "search"]

#: Tensor cores want 16 tokens; with more than 64 registers run out.
_MIN_TOKEN_BLOCK, _MAX_TOKEN_BLOCK = 16, 64
#: What one launch takes. It needs FP32 slots for them, and beyond 64 tokens, reading the weights once for each token
#: block, it is only a way to do without a second copy of the weights.
MAX_TOKENS = 512


@dataclass(frozen=True)
class Tiling:
    """Tile shapes of one launch.

    Attributes:
        rows: output rows of a program, a multiple of 64.
        dense_columns: columns of a step in the dense region, 128 or 256; a step in the sparse region has 256.
        sparse_stages, dense_stages: steps in flight.
        warps: of a program, 4 or 8.
        sparse_parts, dense_parts: programs that share one row block of a region. They take equal time where
            dense_parts is 1.6 · sparse_parts times the ratio of the regions' sizes along K.
    """

    rows: int
    dense_columns: int
    sparse_stages: int
    dense_stages: int
    warps: int
    sparse_parts: int
    dense_parts: int

    def fits(self, problem: Problem) -> bool:
        """Whether both regions have whole row blocks and steps, and at least a step for each part."""
        (sparse_rows, sparse_columns), (dense_rows, dense_columns) = problem.sparse_shape, problem.dense_shape
        sparse_fits = sparse_rows % self.rows == 0 and sparse_columns >= self.sparse_parts * SPARSE_COLUMNS
        dense_fits = (
            dense_rows % self.rows == 0
            and dense_columns % self.dense_columns == 0
            and dense_columns >= self.dense_parts * self.dense_columns
        )
        return (sparse_fits or not problem.regions.sparse) and (dense_fits or not problem.regions.dense)


def token_block(tokens: int) -> int:
    """Tokens that a program computes at once: the power of two ≥ `tokens`, between 16 and 64."""
    return min(_MAX_TOKEN_BLOCK, max(_MIN_TOKEN_BLOCK, 1 << (tokens - 1).bit_length()))


def run(x: torch.Tensor, packed: Mapping[str, torch.Tensor], problem: Problem) -> torch.Tensor:
    """As `OneLaunchPlan.run`, with the best plan for these tokens, for x in its ordinary order and any M.

    Putting x in order costs a small kernel; where x is made, `kernel_order` costs nothing.

    Raises:
        RuntimeError: a search would be needed while a CUDA graph is being captured.
    """
    out = torch.empty(x.shape[0], problem.n, dtype=problem.out_dtype, device=x.device)
    for x_part, out_part in zip(kernel_order(x).split(MAX_TOKENS), out.split(MAX_TOKENS), strict=True):
        plan(problem, x_part.shape[0], x.device).run(x_part, packed, out_part)
    return out


def plan(problem: Problem, tokens: int, device: torch.device) -> OneLaunchPlan:
    """The plan for up to `tokens` rows, at most MAX_TOKENS, by powers of two; searches for it the first time."""
    assert tokens <= MAX_TOKENS, tokens
    return _plan(problem, max(_MIN_TOKEN_BLOCK, 1 << (tokens - 1).bit_length()), device)


@cache
def _plan(problem: Problem, max_tokens: int, device: torch.device) -> OneLaunchPlan:
    key = {
        "path": "one-launch",
        **environment(device),
        "triton": triton.__version__,
        **problem.describe(),
        "tokens": max_tokens,
    }
    tiling = load_or_find(key, Tiling, lambda: search(problem, max_tokens, device))
    return OneLaunchPlan(problem, max_tokens, device, tiling)


class OneLaunchPlan:
    """All that a launch needs but its tensors. One plan serves any number of layers, on one stream at a time.

    Args:
        problem: the GEMM; `reason_against` must be None for it.
        max_tokens: the largest M that will be run.
    """

    def __init__(self, problem: Problem, max_tokens: int, device: torch.device, tiling: Tiling) -> None:
        assert tiling.fits(problem), (tiling, problem)
        self.problem = problem
        self.max_tokens = max_tokens
        self.tiling = tiling
        shared = problem.split == "input"
        (sparse_rows, sparse_columns), (dense_rows, dense_columns) = problem.sparse_shape, problem.dense_shape
        has_sparse, has_dense = problem.regions.sparse > 0, problem.regions.dense > 0
        sparse_blocks = sparse_rows // tiling.rows if has_sparse else 0
        dense_blocks = dense_rows // tiling.rows if has_dense else 0
        # An empty region leaves nothing in the slots that are summed.
        sparse_parts, dense_parts = tiling.sparse_parts * has_sparse, tiling.dense_parts * has_dense
        self._programs = sparse_blocks * sparse_parts + dense_blocks * dense_parts
        tiles = (sparse_columns // SPARSE_COLUMNS, dense_columns // HALF)
        self._sizes = (*tiles, sparse_blocks, dense_blocks, sparse_parts, dense_parts)
        self._shapes = {
            "SHARED": shared,
            "TOKEN_BLOCK": token_block(max_tokens),
            "ROW_BLOCK": tiling.rows,
            "DENSE_COLUMNS": tiling.dense_columns,
            "SPARSE_STAGES": tiling.sparse_stages,
            "DENSE_STAGES": tiling.dense_stages,
            # Triton's interpreter, for tests without a GPU, knows no PTX.
            "PTX": device.type != "cpu",
            "num_warps": tiling.warps,
        }
        groups = self._token_blocks(max_tokens) * (problem.n // tiling.rows)
        alone = max(sparse_parts, dense_parts) == 1 and not (shared and has_sparse and has_dense)
        slots = 0 if alone else groups * (sparse_parts + dense_parts)
        self._slots = torch.empty(slots * tiling.rows * token_block(max_tokens), dtype=torch.float32, device=device)
        # The kernel leaves every counter at zero again.
        self._arrivals = torch.zeros(groups, dtype=torch.int32, device=device)

    def _token_blocks(self, tokens: int) -> int:
        return -(-tokens // token_block(self.max_tokens))

    def run(self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
        """One launch.

        Args:
            x: (M, K) float8_e4m3fn in kernel order, M ≤ max_tokens; rows may be strided by a multiple of 16.
            packed: what `pack` returned for this problem.
            out: (M, N) of the problem's out_dtype to write into; rows may be strided.

        Returns:
            (M, N) raw sums, without scales.
        """
        tokens = x.shape[0]
        assert tokens <= self.max_tokens, (tokens, self.max_tokens)
        if out is None:
            out = torch.empty(tokens, self.problem.n, dtype=self.problem.out_dtype, device=x.device)
        one_launch_kernel.gemm[(self._token_blocks(tokens), self._programs)](
            x, packed["sparse_tiles"], packed["dense_tiles"], out, self._slots, self._arrivals,
            tokens, x.stride(0), out.stride(0), *self._sizes, **self._shapes,
        )  # fmt: skip
        return out


def candidates(problem: Problem, max_tokens: int) -> Iterator[Tiling]:
    """Tile shapes worth timing: those that won for some shape on an H100 (docs/kernels.md)."""
    shapes = ((64, 128, 4, 5, 4), (64, 128, 5, 6, 4), (64, 256, 4, 4, 4), (128, 256, 3, 3, 4), (128, 128, 4, 5, 8))
    if max_tokens > _MAX_TOKEN_BLOCK:
        parts = [(1, 1)]  # token blocks make programs enough
    elif problem.regions.sparse and problem.regions.dense:
        parts = [(1, 1), (1, 2), (2, 1), (2, 3), (3, 1), (3, 2)]
    else:
        parts = [(1, 1), (2, 2), (3, 3), (4, 4)]
    for shape, (sparse_parts, dense_parts) in product(shapes, parts):
        tiling = Tiling(*shape, sparse_parts, dense_parts)
        if tiling.fits(problem):
            yield tiling


def search(problem: Problem, max_tokens: int, device: torch.device) -> Tiling:
    """Compiles and times all `candidates` on random weights that are cold in the cache.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a GEMM of {max_tokens} tokens was captured before it ran once: {problem}")
    weight = random_weight(problem, device)
    packs = [pack(weight, problem) for _ in range(cold_copies(problem.weight_bytes, device))]
    del weight
    x = random_fp8(max_tokens, problem.k, device)
    out = torch.empty(max_tokens, problem.n, dtype=problem.out_dtype, device=device)

    def run(tiling: Tiling) -> None:
        OneLaunchPlan(problem, max_tokens, device, tiling).run(x, packs[0], out)

    def time(tiling: Tiling) -> float:
        plan = OneLaunchPlan(problem, max_tokens, device, tiling)
        return median_us([partial(plan.run, x, packed, out) for packed in packs])

    tilings = list(candidates(problem, max_tokens))
    # The first run of each tile shape compiles it, which threads do at once.
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, {replace(tiling, sparse_parts=1, dense_parts=1) for tiling in tilings}))
    return min(tilings, key=time)
