"""The instances of `one_launch.cu`: what specializes them, their arguments and their machine code. Needs no GPU."""

from __future__ import annotations

import ctypes

import torch

from vllm_spense.kernels.jit import nvrtc
from vllm_spense.kernels.jit.driver import TensorMap
from vllm_spense.kernels.one_launch.schedule import DENSE_K, ROWS, Tiling
from vllm_spense.kernels.region_gemm.packing import TILE, TILE_BYTES

#: The only architecture that has its instructions.
ARCH = "sm_90a"
#: Tokens of a tile.
MIN_TILE_TOKENS, MAX_TILE_TOKENS = 8, 256
#: Of a thread block, as in one_launch.cuh.
THREADS = 384
#: Of shared memory, per thread block on Hopper; and what it takes for alignment, the epilogue's staging and barriers.
_SHARED_BYTES, _FIXED_SHARED_BYTES = 227 * 1024, 1024 + 8 * 16 * 48 + 256
_MIN_STAGES, _MAX_STAGES = 3, 12


def fits(tiling: Tiling) -> bool:
    """Whether enough steps fit into shared memory to keep the memory busy."""
    return stages(tiling)[0] >= _MIN_STAGES


def stages(tiling: Tiling) -> tuple[int, int]:
    """(steps in flight, bytes of shared memory), as one_launch.cuh lays them out."""
    stage = ROWS * DENSE_K + tiling.tokens * tiling.sparse_k + ROWS // TILE * tiling.sparse_k // TILE * TILE_BYTES
    count = min((_SHARED_BYTES - _FIXED_SHARED_BYTES) // stage, _MAX_STAGES)
    return count, _FIXED_SHARED_BYTES + count * stage


def machine_code(out_dtype: torch.dtype, scaled: bool, tiling: Tiling) -> bytes:
    """The instance of the kernel for these outputs and this way to cut."""
    return nvrtc.cubin("one_launch.cu", ARCH, macros(out_dtype, scaled, tiling))


def macros(out_dtype: torch.dtype, scaled: bool, tiling: Tiling) -> dict[str, int]:
    """What specializes the kernel, see one_launch.cuh."""
    return {
        "TOKENS": tiling.tokens,
        "SPARSE_K": tiling.sparse_k,
        "CLUSTER": tiling.cluster_size,
        "SLICES": tiling.slices,
        "STAGES": stages(tiling)[0],
        "OUT_FLOAT": int(out_dtype == torch.float32),
        "SCALED": int(scaled),
    }


class Arguments(ctypes.Structure):
    """As in one_launch.cuh."""

    _fields_ = (
        *((name, TensorMap) for name in ("x", "values", "metadata", "dense")),
        *((name, ctypes.c_void_p) for name in ("segments", "partials", "semaphores", "out", "x_scale", "w_scale")),
        *((name, ctypes.c_int) for name in ("segments_each", "tokens", "n", "dense_column")),
    )
