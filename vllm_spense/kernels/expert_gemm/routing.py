"""Around the experts' GEMMs: tokens to their experts, and back. Each kernel's twin is in `reference`."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch

from vllm_spense.kernels.expert_gemm.instances import Choices
from vllm_spense.kernels.jit import driver, nvrtc
from vllm_spense.kernels.jit.nvmath_support import current_stream

FP8 = torch.float8_e4m3fn
#: Values that a thread takes at once: hidden sizes are multiples of it.
WIDTH = 8
#: Choices that expert_ranks.cu sorts in one thread block.
CHUNK = 1024
#: Up to so many choices every block of expert_route.cu counts them itself (H200).
COUNTED = 1536
_MAX_THREADS, _SUM_THREADS = 256, 128


class Routed(NamedTuple):
    """Tokens as the experts' GEMMs take them.

    Attributes:
        x: float8_e4m3fn (M · top_k, K), sorted by expert; rows after those of this rank's experts hold anything.
        x_scale: float32 (M · top_k, 1).
        offsets: int32 (E + 1): the first row of each expert, and one past the last.
        places: int32 (M, top_k): the row of each token's choice, −1 if another rank has its expert.
    """

    x: torch.Tensor
    x_scale: torch.Tensor
    offsets: torch.Tensor
    places: torch.Tensor


def ranked(ids: torch.Tensor) -> bool:
    """Whether so many choices take three launches."""
    return ids.numel() > COUNTED


def route(x: torch.Tensor, ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None = None) -> Routed:
    """Quantizes tokens and sorts them by expert: one launch up to `COUNTED` choices, three with more.

    The kernel enqueued next begins only when what was enqueued before the last launch of these has ended: it may read
    `ids`, and the offsets if there are three, without waiting.

    Args:
        x: bfloat16 (M, K), K a multiple of `WIDTH`; rows may be strided by a multiple of it.
        ids: int32 or int64 (M, top_k), contiguous: the experts that each token has chosen.
        experts: of this rank.
        expert_map: int32, of all experts: this rank's number, or −1; None if this rank has all of them.
    """
    (tokens, size), top_k, device = x.shape, ids.shape[1], x.device
    routed = Routed(
        torch.empty(tokens * top_k, size, dtype=FP8, device=device),
        torch.empty(tokens * top_k, 1, dtype=torch.float32, device=device),
        torch.empty(experts + 1, dtype=torch.int32, device=device),
        torch.empty(tokens, top_k, dtype=torch.int32, device=device),
    )
    if not tokens:
        routed.offsets.zero_()
        return routed
    stream = current_stream(device)
    map_address = None if expert_map is None else expert_map.data_ptr()
    choices = Choices(ids.data_ptr(), map_address, ids.element_size() // 4)
    arguments = RouteArguments(
        x=x.data_ptr(),
        choices=choices,
        out=routed.x.data_ptr(),
        scale=routed.x_scale.data_ptr(),
        offsets=routed.offsets.data_ptr(),
        places=routed.places.data_ptr(),
        tokens=tokens,
        size=size,
        x_stride=x.stride(0),
    )
    in_three = ranked(ids)
    if in_three:
        count = -(-tokens * top_k // CHUNK)
        chunks = torch.empty(count, experts, dtype=torch.int32, device=device)
        arguments.chunks = chunks.data_ptr()
        ranks = RankArguments(
            choices, routed.places.data_ptr(), chunks.data_ptr(), routed.offsets.data_ptr(), tokens, count
        )
        in_chunks, over_chunks = _rank_kernels(top_k, experts, device)
        in_chunks.launch(count, ranks, stream)
        over_chunks.launch(1, ranks, stream)
    kernel = _route_kernel(size, top_k, experts, in_three, device)
    kernel.launch(tokens if in_three else tokens + 1, arguments, stream)
    return routed


def weighted_sum(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """out[t] = Σ_j weights[t, j] · y[places[t, j]], in float32.

    Args:
        y: bfloat16 (R, N), contiguous, N a multiple of `WIDTH`.
        places: int32 (M, top_k), contiguous; negative ones do not count.
        weights: float32 (M, top_k), contiguous.

    Returns:
        bfloat16 (M, N).
    """
    (tokens, top_k), n = places.shape, y.shape[1]
    out = torch.empty(tokens, n, dtype=torch.bfloat16, device=y.device)
    if tokens:
        blocks_each = -(-n // (WIDTH * _SUM_THREADS))
        addresses = (tensor.data_ptr() for tensor in (y, places, weights, out))
        arguments = SumArguments(*addresses, n, blocks_each)
        _sum_kernel(top_k, y.device).launch(tokens * blocks_each, arguments, current_stream(y.device))
    return out


def prepare(size: int, top_k: int, experts: int, device: torch.device) -> None:
    """Compiles and loads the kernels for every number of tokens."""
    for in_three in (False, True):
        _route_kernel(size, top_k, experts, in_three, device)
    _rank_kernels(top_k, experts, device)
    _sum_kernel(top_k, device)


class RouteArguments(ctypes.Structure):
    """`Arguments` of expert_route.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("choices", Choices),
        *((name, ctypes.c_void_p) for name in ("out", "scale", "offsets", "places", "chunks")),
        *((name, ctypes.c_int) for name in ("tokens", "size", "x_stride")),
    )


class RankArguments(ctypes.Structure):
    """`Arguments` of expert_ranks.cu."""

    _fields_ = (
        ("choices", Choices),
        *((name, ctypes.c_void_p) for name in ("places", "chunks", "offsets")),
        *((name, ctypes.c_int) for name in ("tokens", "chunk_count")),
    )


class SumArguments(ctypes.Structure):
    """`Arguments` of expert_sum.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "places", "weights", "out")),
        *((name, ctypes.c_int) for name in ("n", "blocks_each")),
    )


def route_macros(size: int, top_k: int, experts: int, in_three: bool) -> dict[str, int]:
    """What specializes expert_route.cu."""
    vectors = -(-size // WIDTH)
    each = -(-vectors // _MAX_THREADS)
    threads = 32 * -(-vectors // (32 * each))
    return {"THREADS": threads, "VECTORS": each, "TOP_K": top_k, "EXPERTS": experts, "RANKED": int(in_three)}


def rank_macros(top_k: int, experts: int) -> dict[str, int]:
    """What specializes expert_ranks.cu."""
    return {"TOP_K": top_k, "EXPERTS": experts}


def sum_macros(top_k: int) -> dict[str, int]:
    """What specializes expert_sum.cu."""
    return {"THREADS": _SUM_THREADS, "TOP_K": top_k}


@cache
def _route_kernel(size: int, top_k: int, experts: int, in_three: bool, device: torch.device) -> driver.Kernel:
    return driver.elementwise_kernel("expert_route", route_macros(size, top_k, experts, in_three), device)


@cache
def _rank_kernels(top_k: int, experts: int, device: torch.device) -> tuple[driver.Kernel, driver.Kernel]:
    code = nvrtc.cubin("expert_ranks.cu", driver.arch(device), rank_macros(top_k, experts))
    in_chunks, over_chunks = (driver.load(code, name, CHUNK, 0, device) for name in ("expert_ranks", "expert_offsets"))
    return in_chunks, over_chunks


@cache
def _sum_kernel(top_k: int, device: torch.device) -> driver.Kernel:
    return driver.elementwise_kernel("expert_sum", sum_macros(top_k), device)
