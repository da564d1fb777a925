"""What lies before a linear layer, in one launch: addition to the residual stream, RMS norm, quantization; or only the
last of them. `reference` has the twins."""

from __future__ import annotations

import ctypes
from functools import cache, partial

import torch

from vllm_spense.kernels.jit import driver
from vllm_spense.kernels.jit.nvmath_support import current_stream
from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.problem import Scales
from vllm_spense.kernels.region_gemm.reference import FP8, fp8_difference

#: Values that a thread takes at once: sizes are multiples of it.
WIDTH = 8
_MAX_THREADS = 1024
#: (size, tokens) that `fault` tries: one and several vectors of a thread, full and partial warps.
_TRIALS = ((64, 1), (5120, 19), (18432, 130))
_EPSILON = 1e-6


@cache
def fault(device: torch.device) -> str | None:
    """Why this kernel must not be used on a GPU, or None: tried out once in each process, against its twins."""
    generator = torch.Generator(device).manual_seed(0)
    for size, tokens in _TRIALS:
        x, residual = torch.randn(2, tokens, size, dtype=torch.bfloat16, device=device, generator=generator)
        weight = torch.rand(size, dtype=torch.bfloat16, device=device, generator=generator)
        # vLLM's default type while it loads a model is the model's.
        rand = partial(torch.rand, dtype=torch.float32, device=device, generator=generator)
        scales = rand(tokens, 1), rand(size, 1)
        ways: tuple[tuple[Scales | None, torch.Tensor | None], ...] = (
            (None, None),
            (scales, None),
            (scales, x.flip(0)),
        )
        try:
            found = [add_norm_quant(x, residual, weight, _EPSILON, *way) for way in ways]
            plain = quantize(x)
        except RuntimeError as error:
            return f"its kernel failed when it was tried: {error}"
        reason = fp8_difference(plain, reference.quantize(x))
        for (*fp8, total), way in zip(found, ways, strict=True):
            *expected, twin_total = reference.add_norm_quant(x, residual, weight, _EPSILON, *way)
            reason = reason or fp8_difference(fp8, expected) or (None if torch.equal(total, twin_total) else "sums")
        if reason:
            return f"its kernel is wrong on this machine, {tokens} × {size}: {reason}"
    return None


def add_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    scales: Scales | None = None,
    addend: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As its twin in `reference`.

    Args:
        x, residual: (M, K) bfloat16, contiguous. K is a multiple of `WIDTH`.
        weight: (K,) bfloat16.
        scales: of the tokens and columns of x, contiguous; None if x is no raw sums.
        addend: as x, of raw sums.
    """
    assert addend is None or scales is not None
    total = torch.empty_like(x)
    return *_launch(x, residual, weight, total, epsilon, scales, addend), total


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As its twin in `reference`, of bfloat16 (M, K), contiguous."""
    return _launch(x, None, None, None, 0, None)


def prepare(size: int, device: torch.device) -> None:
    """Compiles and loads the kernels."""
    for norm, scaled in ((False, False), (True, False), (True, True)):
        _kernel(size, norm, scaled, device)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    total: torch.Tensor | None,
    epsilon: float,
    scales: Scales | None,
    addend: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, size = x.shape
    out = torch.empty(tokens, size, dtype=FP8, device=x.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    if tokens:
        tensors = (x, addend, residual, weight, out, scale, total, *(scales or (None, None)))
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        arguments = Arguments(*addresses, size, epsilon)
        kernel = _kernel(size, weight is not None, scales is not None, x.device)
        kernel.launch(tokens, arguments, current_stream(x.device))
    return out, scale


class Arguments(ctypes.Structure):
    """`Arguments` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "addend", "residual", "weight")),
        *((name, ctypes.c_void_p) for name in ("out", "scale", "sum", "x_scale", "w_scale")),
        ("size", ctypes.c_int),
        ("epsilon", ctypes.c_float),
    )


def shape(size: int) -> tuple[int, int]:
    """(threads of a block, vectors of a thread) that cover a row of `size` values."""
    vectors = -(-size // WIDTH)
    each = -(-vectors // _MAX_THREADS)
    return 32 * -(-vectors // (each * 32)), each


@cache
def _kernel(size: int, norm: bool, scaled: bool, device: torch.device) -> driver.Kernel:
    return driver.elementwise_kernel("norm_quant", macros(size, norm, scaled), device)


def macros(size: int, norm: bool, scaled: bool) -> dict[str, int]:
    """What specializes the kernel."""
    threads, vectors = shape(size)
    return {"THREADS": threads, "VECTORS": vectors, "NORM": int(norm), "SCALED": int(scaled)}
