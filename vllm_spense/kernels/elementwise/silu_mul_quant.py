"""What lies between gate_up and down, in one launch: scales, SiLU, product, quantization. `reference` has its twin."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from vllm_spense.kernels.jit import driver
from vllm_spense.kernels.jit.nvmath_support import current_stream
from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.reference import FP8, fp8_difference

#: Values that a thread takes at once: the intermediate size is a multiple of it.
WIDTH = 8
#: Up to this size a row is short: one thread block's, as an expert's is.
_SHORT = 2048
#: Up to this size one of many long rows is better off with fewer threads.
_MIDDLE = 16384
#: Up to this size one block has the registers for a row.
_LONGEST = 34816
#: Short rows of at most so many values gain from two at once; others never do (H200, docs/notes/kernels.md).
_SHORTEST = 768


@dataclass(frozen=True)
class Way:
    """How the rows are shared out.

    Attributes:
        cluster: thread blocks of a row: 1, 2, 4 or 8.
        tokens: rows that a cluster takes at once.
        threads: at most, of a block.
        hold: the weight's scales are in registers before the rows are there.
    """

    cluster: int
    tokens: int = 1
    threads: int = 512
    hold: bool = False

    def shape(self, size: int) -> tuple[int, int]:
        """(threads of a block, vectors of a thread) that cover a row of `size` values."""
        vectors = -(-size // WIDTH)
        each = -(-vectors // (self.cluster * self.threads))
        warps = -(-vectors // (self.cluster * each * 32))
        return 32 * warps, each


Ways = Sequence[tuple[int, Way]]
#: Ways, each with the fewest tokens that it is for: of rows of more than `_MIDDLE` values, of more than `_SHORT`, of
#: short ones and of the shortest (H200). With few tokens several blocks share a row, with many each has its own.
_OF_LONG: Ways = ((0, Way(4, hold=True)), (48, Way(2, threads=1024, hold=True)), (96, Way(1, threads=1024)))
_OF_MIDDLING: Ways = (*_OF_LONG, (192, Way(1, threads=512)))
#: Where fewer than eight blocks have not the registers for a row: beyond `_LONGEST`, and where sums are float32 (H100).
_IN_EIGHT: Ways = ((0, Way(8)), (33, Way(8, tokens=2)))
_OF_SHORT: Ways = ((0, Way(1)),)
_OF_SHORTEST: Ways = (*_OF_SHORT, (2049, Way(1, tokens=2)))
#: Sizes and numbers of tokens that `fault` tries: one and several vectors of a thread, full and partial clusters.
_TRIALS = ((64, 1), (768, 2051), (14336, 19), (34816, 130))


@cache
def fault(device: torch.device) -> str | None:
    """Why this kernel must not be used on a GPU, or None: tried out once in each process, against its twin."""
    generator = torch.Generator(device).manual_seed(0)
    for (size, tokens), dtype in ((trial, dtype) for trial in _TRIALS for dtype in (torch.bfloat16, torch.float32)):
        # While a model loads, torch's default is the model's dtype.
        scales = torch.rand(tokens + 2 * size, dtype=torch.float32, device=device, generator=generator)
        x_scale, w_scale, boundary = scales[:tokens] / 100, scales[tokens:].clone(), size // 4 * 3
        raw = torch.randn(tokens, 2 * size, dtype=dtype, device=device, generator=generator) * 1000
        try:
            found = run(raw, x_scale, w_scale, boundary)
        except RuntimeError as error:
            return f"its kernel failed when it was tried: {error}"
        expected = reference.silu_mul_quant(raw, x_scale, w_scale, boundary)
        if reason := fp8_difference(found, expected):
            return f"its kernel is wrong on this machine, {tokens} × {size}: {reason}"
    return None


def run(
    raw: torch.Tensor, x_scale: torch.Tensor | None, w_scale: torch.Tensor | None, boundary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) · up in FP8.

    Args:
        raw: (M, 2·I) bfloat16 or float32, gate_up's raw sums by region, contiguous. I is a multiple of `WIDTH`.
        x_scale: float32, one for each of the M tokens.
        w_scale: float32, one for each of the 2·I rows of the weight, gate's before up's. Both are None for sums that
            were scaled already. The kernel reads w_scale before the launch before it has ended.
        boundary: columns of a sparse region, a multiple of `WIDTH`.

    Returns:
        float8_e4m3fn (M, I) and its scales, float32 (M, 1).
    """
    tokens, size = raw.shape[0], raw.shape[1] // 2
    out = torch.empty(tokens, size, dtype=FP8, device=raw.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=raw.device)
    if not tokens:
        return out, scale
    raw_float = raw.dtype == torch.float32
    way = [way for fewest, way in _ways(size, raw_float) if tokens >= fewest][-1]
    kernel = _kernel(size, way, raw_float, x_scale is not None, raw.device)
    scales = (None if tensor is None else tensor.data_ptr() for tensor in (x_scale, w_scale))
    arguments = Arguments(
        raw.data_ptr(), *scales, out.data_ptr(), scale.data_ptr(), tokens, size,
        boundary,
    )  # fmt: skip
    kernel.launch(way.cluster * -(-tokens // way.tokens), arguments, current_stream(raw.device))
    return out, scale


def prepare(size: int, raw_dtype: torch.dtype, device: torch.device, scaled: bool = True) -> None:
    """Compiles and loads the kernel for every number of tokens."""
    raw_float = raw_dtype == torch.float32
    for _, way in _ways(size, raw_float):
        _kernel(size, way, raw_float, scaled, device)


def _ways(size: int, raw_float: bool) -> Ways:
    if size <= _SHORT:
        return _OF_SHORTEST if size <= _SHORTEST else _OF_SHORT
    if raw_float or size > _LONGEST:
        return _IN_EIGHT
    return _OF_LONG if size > _MIDDLE else _OF_MIDDLING


class Arguments(ctypes.Structure):
    """`Arguments` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("raw", "x_scale", "w_scale", "out", "scale")),
        *((name, ctypes.c_int) for name in ("tokens", "size", "boundary")),
    )


@cache
def _kernel(size: int, way: Way, raw_float: bool, scaled: bool, device: torch.device) -> driver.Kernel:
    return driver.elementwise_kernel("silu_mul_quant", macros(size, way, raw_float, scaled), device)


def macros(size: int, way: Way, raw_float: bool, scaled: bool = True) -> dict[str, int]:
    """What specializes the kernel."""
    threads, vectors = way.shape(size)
    return {
        "THREADS": threads,
        "VECTORS": vectors,
        "CLUSTER": way.cluster,
        "TOKENS": way.tokens,
        "HOLD": int(way.hold),
        "RAW_FLOAT": int(raw_float),
        "SCALED": int(scaled),
    }
