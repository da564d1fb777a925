"""What lies between gate_up and down, in one launch: scales, SiLU, product, quantization. `reference` has its twin."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from vllm_spense.kernels.jit import driver
from vllm_spense.kernels.jit.nvmath_support import current_stream
from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.reference import FP8, fp8_difference

#: Values that a thread takes at once: the intermediate size is a multiple of it.
WIDTH = 8
#: Thread blocks that share a long row, and the most threads in one.
_CLUSTER, _MAX_THREADS = 8, 512
#: Up to this size a row is short: one thread block's, as an expert's is.
_SHORT = 2048
#: Beyond so many tokens two long rows are taken at once (H100).
_FEW_LONG = 32
#: And rows of at most so many values, beyond so many tokens; other short ones never gain (H200, docs/notes/kernels.md).
_SHORTEST, _FEW_SHORTEST = 768, 2048
#: Sizes and numbers of tokens that `fault` tries: one and several vectors of a thread, full and partial clusters.
_TRIALS = ((64, 1), (768, 2051), (14336, 19), (34816, 130))


@cache
def fault(device: torch.device) -> str | None:
    """Why this kernel must not be used on a GPU, or None: tried out once in each process, against its twin."""
    generator = torch.Generator(device).manual_seed(0)
    for (size, tokens), dtype in ((trial, dtype) for trial in _TRIALS for dtype in (torch.bfloat16, torch.float32)):
        raw = torch.randn(tokens, 2 * size, dtype=dtype, device=device, generator=generator) * 1000
        # While a model loads, torch's default is the model's dtype.
        scales = torch.rand(tokens + 2 * size, dtype=torch.float32, device=device, generator=generator)
        x_scale, w_scale, boundary = scales[:tokens] / 100, scales[tokens:].clone(), size // 4 * 3
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
            were scaled already.
        boundary: columns of a sparse region, a multiple of `WIDTH`.

    Returns:
        float8_e4m3fn (M, I) and its scales, float32 (M, 1).
    """
    tokens, size = raw.shape[0], raw.shape[1] // 2
    out = torch.empty(tokens, size, dtype=FP8, device=raw.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=raw.device)
    if not tokens:
        return out, scale
    at_once = _tokens_at_once(tokens, size)
    kernel = _kernel(size, at_once, raw.dtype == torch.float32, x_scale is not None, raw.device)
    scales = (None if tensor is None else tensor.data_ptr() for tensor in (x_scale, w_scale))
    arguments = Arguments(
        raw.data_ptr(), *scales, out.data_ptr(), scale.data_ptr(), tokens, size,
        boundary,
    )  # fmt: skip
    blocks = _blocks_each(size) * -(-tokens // at_once)
    kernel.launch(blocks, arguments, current_stream(raw.device))
    return out, scale


def prepare(size: int, raw_dtype: torch.dtype, device: torch.device, scaled: bool = True) -> None:
    """Compiles and loads the kernel for every number of tokens."""
    for at_once in {_tokens_at_once(tokens, size) for tokens in (1, max(_FEW_LONG, _FEW_SHORTEST) + 1)}:
        _kernel(size, at_once, raw_dtype == torch.float32, scaled, device)


def _blocks_each(size: int) -> int:
    return 1 if size <= _SHORT else _CLUSTER


def _tokens_at_once(tokens: int, size: int) -> int:
    if size > _SHORT:
        return 1 if tokens <= _FEW_LONG else 2
    return 2 if size <= _SHORTEST and tokens > _FEW_SHORTEST else 1


class Arguments(ctypes.Structure):
    """`Arguments` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("raw", "x_scale", "w_scale", "out", "scale")),
        *((name, ctypes.c_int) for name in ("tokens", "size", "boundary")),
    )


def shape(size: int) -> tuple[int, int]:
    """(threads of a block, vectors of a thread) that cover a row of `size` values."""
    vectors, blocks = -(-size // WIDTH), _blocks_each(size)
    each = -(-vectors // (blocks * _MAX_THREADS))
    warps = -(-vectors // (blocks * each * 32))
    return 32 * warps, each


@cache
def _kernel(size: int, tokens: int, raw_float: bool, scaled: bool, device: torch.device) -> driver.Kernel:
    return driver.elementwise_kernel("silu_mul_quant", macros(size, tokens, raw_float, scaled), device)


def macros(size: int, tokens: int, raw_float: bool, scaled: bool = True) -> dict[str, int]:
    """What specializes the kernel; a cluster takes `tokens` at once."""
    threads, vectors = shape(size)
    return {
        "THREADS": threads,
        "VECTORS": vectors,
        "CLUSTER": _blocks_each(size),
        "TOKENS": tokens,
        "RAW_FLOAT": int(raw_float),
        "SCALED": int(scaled),
    }
