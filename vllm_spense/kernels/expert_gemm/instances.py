"""The instances of `expert_gemm.cu`: what specializes them, their arguments and their machine code. Needs no GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from vllm_spense.kernels.jit import nvrtc
from vllm_spense.kernels.jit.driver import TensorMap
from vllm_spense.kernels.region_gemm.packing import TILE, TILE_BYTES

#: The only architecture that has its instructions.
ARCH = "sm_90a"
#: Of W in a tile, and columns of a dense step, as in expert_gemm.cuh.
ROWS, DENSE_K = 128, 128
#: Of a thread block, as in expert_gemm.cuh.
THREADS = 384
#: Tokens that a tile can be wide.
WIDTHS = (8, 16, 32, 64, 128, 256)
#: Of shared memory: what it takes for alignment and barriers; for the epilogue's squares of eight warps; and for each
#: expert.
_FIXED_SHARED_BYTES, _SQUARES_BYTES, _EXPERT_BYTES = 1024 + 256, 8 * 16 * 48, 8
#: KiB of shared memory that a thread block may have on Hopper; and what it takes with tiles of at most so many tokens,
#: so that thread blocks of neighbouring launches find room beside it. As in expert_gemm.cuh.
_SHARED_KIB, _LEAN_SHARED_KIB, _LEAN_TOKENS = 227, 200, 64
_MAX_STAGES = 12


@dataclass(frozen=True)
class Tiling:
    """How the GEMMs are cut.

    Attributes:
        tokens: the most of a tile, one of `WIDTHS`; a tile is as wide as its expert's tokens need.
        sparse_k: columns of a sparse step, 128 or 256.
    """

    tokens: int
    sparse_k: int


def stages(tiling: Tiling, experts: int) -> tuple[int, int]:
    """(steps in flight, bytes of shared memory), as expert_gemm.cuh lays them out."""
    stage = ROWS * DENSE_K + tiling.tokens * tiling.sparse_k + ROWS // TILE * tiling.sparse_k // TILE * TILE_BYTES
    squares = 1 if tiling.tokens < 128 else 2
    fixed = _FIXED_SHARED_BYTES + squares * _SQUARES_BYTES + _EXPERT_BYTES * (experts + 1)
    shared_kib = _LEAN_SHARED_KIB if tiling.tokens <= _LEAN_TOKENS else _SHARED_KIB
    count = min((1024 * shared_kib - fixed) // stage, _MAX_STAGES)
    return count, fixed + count * stage


def machine_code(tiling: Tiling, experts: int) -> bytes:
    """The instance of the kernel for this way to cut and so many experts."""
    return nvrtc.cubin("expert_gemm.cu", ARCH, macros(tiling, experts))


def macros(tiling: Tiling, experts: int) -> dict[str, int]:
    """What specializes the kernel, see expert_gemm.cuh."""
    return {
        "MAX_TOKENS": tiling.tokens,
        "SPARSE_K": tiling.sparse_k,
        "STAGES": stages(tiling, experts)[0],
        "EXPERTS": experts,
    }


class Band(ctypes.Structure):
    """As in expert_tiles.cuh."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("rows", "row_tiles", "column", "sparse_steps", "dense_steps"))


class Choices(ctypes.Structure):
    """As in expert_route.cuh."""

    _fields_ = (("ids", ctypes.c_void_p), ("expert_map", ctypes.c_void_p), ("words", ctypes.c_int))


class Arguments(ctypes.Structure):
    """As in expert_gemm.cuh."""

    _fields_ = (
        *((name, TensorMap) for name in ("values", "metadata", "dense")),
        ("x", TensorMap * len(WIDTHS)),
        *((name, ctypes.c_void_p) for name in ("offsets", "out", "x_scale", "w_scale")),
        ("choices", Choices),
        *((name, ctypes.c_int) for name in ("choice_count", "n", "dense_column", "offset_words", "offsets_are_old")),
        ("bands", Band * 2),
        ("unused", ctypes.c_int * 3),
    )
