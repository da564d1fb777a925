"""The experts' GEMMs on a GPU: how they are cut, and their launch."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache

import torch

from vllm_spense.kernels.expert_gemm.instances import (
    DENSE_K,
    ROWS,
    THREADS,
    WIDTHS,
    Arguments,
    Band,
    Choices,
    Tiling,
    machine_code,
    stages,
)
from vllm_spense.kernels.expert_gemm.reference import Packed
from vllm_spense.kernels.jit import driver
from vllm_spense.kernels.jit.driver import TensorMap
from vllm_spense.kernels.jit.nvmath_support import current_stream
from vllm_spense.kernels.region_gemm.packing import TILE, TILE_BYTES, metadata_shape, value_bytes
from vllm_spense.kernels.region_gemm.problem import Problem


def tiling(rows: int, experts: int) -> Tiling:
    """How the GEMMs of so many rows, of all experts together, are cut: measured on an H200 (docs/notes/kernels.md).

    Few tokens for each expert leave room for wide steps, which read weights best; many are cut widely, so that a weight
    is read from the cache less often.
    """
    average = rows / experts
    if average <= 32:
        return Tiling(64, 256)
    if average < 128:
        return Tiling(128, 256)
    return Tiling(256, 128)


def run(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    packed: Packed,
    problem: Problem,
    out: torch.Tensor | None = None,
    *,
    offsets_are_old: bool = False,
    ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    cut: Tiling | None = None,
) -> torch.Tensor:
    """out[t] = x_scale[t] · w_scale[e] · (W[e] · x[t]) for the tokens t of every expert e, in one launch.

    Nothing is read on the host, so that a captured launch serves any routing of as many rows.

    Args:
        x: (R, K) float8_e4m3fn, tokens sorted by their expert; rows may be strided by a multiple of 16.
        x_scale: float32, one for each row of x.
        offsets: int32 or int64 (E + 1): rows [offsets[e], offsets[e + 1]) belong to expert e.
        packed: what `reference.pack` returned for this problem.
        out: bfloat16 (R, N) to write into, contiguous. Rows outside of all experts stay as they are.
        offsets_are_old: the kernel enqueued before this one did not write `offsets`, and cannot have begun before they
            were written: weights then arrive while it still runs.
        ids: int32 or int64 (M, top_k), contiguous: the choices of experts that `offsets`, which is then not read, would
            count. They are as old as `offsets_are_old` says of offsets.
        expert_map: int32, of all experts: the number here of each that `ids` names, or −1; None if they are the same.
        cut: how; the best way known if None.

    Returns:
        `out`; columns of gate_up's as `pack` orders them.
    """
    rows, experts = len(x), len(packed["w_scale"])
    if out is None:
        out = torch.empty(rows, problem.n, dtype=torch.bfloat16, device=x.device)
    if not rows:
        return out
    cut = cut or tiling(rows, experts)
    arguments = Arguments(
        **_weight_maps(problem, cut, experts, packed["compressed"].data_ptr(), packed["dense"].data_ptr()),
        x=_x_maps(x.data_ptr(), rows, problem.k, x.stride(0), cut.tokens),
        offsets=offsets.data_ptr(),
        out=out.data_ptr(),
        x_scale=x_scale.data_ptr(),
        w_scale=packed["w_scale"].data_ptr(),
        n=problem.n,
        dense_column=problem.regions.sparse if problem.split == "input" else 0,
        offset_words=offsets.element_size() // 4,
        offsets_are_old=offsets_are_old,
        bands=_bands(problem, cut),
    )
    if ids is not None:
        map_address = None if expert_map is None else expert_map.data_ptr()
        arguments.choices = Choices(ids.data_ptr(), map_address, ids.element_size() // 4)
        arguments.choice_count = ids.numel()
    kernel, blocks = _kernel(cut, experts, x.device)
    kernel.launch(blocks, arguments, current_stream(x.device))
    return out


def prepare(problem: Problem, experts: int, max_rows: int, device: torch.device) -> None:
    """Compiles and loads the kernel for every number of rows up to `max_rows`."""
    rows = 1
    while rows < 2 * max_rows:
        _kernel(tiling(min(rows, max_rows), experts), experts, device)
        rows *= 2


@cache
def _kernel(cut: Tiling, experts: int, device: torch.device) -> tuple[driver.Kernel, int]:
    """With the number of its thread blocks."""
    shared_bytes = stages(cut, experts)[1]
    kernel = driver.load(machine_code(cut, experts), "expert_gemm", THREADS, shared_bytes, device)
    return kernel, torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _bands(problem: Problem, cut: Tiling) -> ctypes.Array[Band]:
    """In the order of execution: the longer tiles first, because the shorter ones level what they leave."""
    merged = problem.region_major()
    (sn, sk), (dn, dk) = merged.sparse_shape, merged.dense_shape
    sparse, dense = -(-sk // cut.sparse_k), -(-dk // DENSE_K)
    if problem.split == "input":
        return (Band * 2)(_band(problem.n, 0, sparse, dense))
    return (Band * 2)(_band(dn, sn, 0, dense), _band(sn, 0, sparse, 0))


def _band(rows: int, column: int, sparse_steps: int, dense_steps: int) -> Band:
    return Band(rows, -(-rows // ROWS), column, sparse_steps, dense_steps)


@lru_cache(maxsize=4096)
def _x_maps(address: int, rows: int, k: int, stride: int, most: int) -> ctypes.Array[ctypes.Array[ctypes.c_uint64]]:
    maps = (TensorMap * len(WIDTHS))()
    for index, width in enumerate(WIDTHS):
        if width <= most:
            maps[index] = driver.tensor_map(address, (1, rows, k), (stride * rows, stride), (width, 128), 128)
    return maps


@cache
def _weight_maps(
    problem: Problem, cut: Tiling, experts: int, compressed: int, dense: int
) -> dict[str, ctypes.Array[ctypes.c_uint64]]:
    merged = problem.region_major()
    (sn, sk), (dn, dk) = merged.sparse_shape, merged.dense_shape
    maps = {}
    if sn * sk:
        half, box = cut.sparse_k // 2, cut.sparse_k // TILE * TILE_BYTES
        row_tiles, pitch = metadata_shape(sn, sk)
        values = value_bytes(sn, sk)
        each = values + row_tiles * pitch
        maps["values"] = driver.tensor_map(compressed, (experts, sn, sk // 2), (each, sk // 2), (ROWS, half), half)
        # In items of 8 bytes, because a box has no more than 256 in a row.
        maps["metadata"] = driver.tensor_map(
            compressed + values, (experts, row_tiles, pitch // 8), (each, pitch), (ROWS // TILE, box // 8), 0, item=8
        )
    if dn * dk:
        maps["dense"] = driver.tensor_map(dense, (experts, dn, dk), (dn * dk, dk), (ROWS, DENSE_K), DENSE_K)
    return maps
