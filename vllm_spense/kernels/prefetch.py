"""The weight that is read next, on its way into the cache while nobody else uses the memory.

Between two GEMMs of a model run small kernels that leave the memory idle. The one-launch kernel, once it has asked for
all of its own weight, asks for what the thread blocks of the next GEMM will read first.
"""

from __future__ import annotations

from functools import cache

import torch

from vllm_spense.kernels import one_launch
from vllm_spense.kernels.one_launch import Following, Packed
from vllm_spense.kernels.problem import Problem
from vllm_spense.kernels.schedule import DENSE_K, ROWS, Tiling, schedule

#: How much is asked for: what memory delivers in the small kernels, and less than half of the cache.
FETCHED_BYTES = 16 << 20


def following(problem: Problem, packed: Packed, tokens: int) -> Following:
    """For the launch before the one of this problem and M = `tokens`, so that it fetches this one's first weights.

    Args:
        packed: what `pack` returned, or of a layer that others run only `dense`, float8_e4m3fn (N, K), whose rows its
            kernel may be expected to read all at once.
    """
    dense = packed["dense"]
    if "compressed" in packed:
        plan = one_launch.plan_for(problem, tokens, dense.device)
        segments, tiling, compressed = plan.segments, plan.tiling, packed["compressed"].data_ptr()
    else:
        tiling, compressed = Tiling(one_launch.MIN_TILE_TOKENS, 128, parts=1), 0
        segments = _whole_rows(problem, tiling, dense.device)
    blocks, segments_each, _ = segments.shape
    step_bytes = ROWS * max(DENSE_K, tiling.sparse_k * 5 // 8)
    maps = one_launch.weight_maps(problem, tiling.sparse_k, compressed, dense.data_ptr())
    return {
        **{f"following_{name}": tensor_map for name, tensor_map in maps.items()},
        "following_segments": segments.data_ptr(),
        "following_blocks": blocks,
        "following_segments_each": segments_each,
        "following_sparse_k": tiling.sparse_k,
        "following_steps": max(1, FETCHED_BYTES // (blocks * step_bytes)),
    }


@cache
def _whole_rows(problem: Problem, tiling: Tiling, device: torch.device) -> torch.Tensor:
    tables = schedule(problem, tiling.tokens, tiling, torch.cuda.get_device_properties(device).multi_processor_count)
    return torch.from_numpy(tables.segments).to(device)
