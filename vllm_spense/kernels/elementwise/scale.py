"""Sums and scales what the libraries' GEMMs left, in one launch and in place."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from vllm_spense.kernels.jit import driver
from vllm_spense.kernels.jit.nvmath_support import current_stream

#: Values that a thread takes at once: N is a multiple of it.
WIDTH = 8
_THREADS = 128
#: What specializes the kernel.
MACROS = {"THREADS": _THREADS}


def run(out: torch.Tensor, addend: torch.Tensor | None, x_scale: torch.Tensor, w_scale: torch.Tensor) -> None:
    """out = (out + addend) · s_x · s_w, computed in float32.

    Args:
        out, addend: bfloat16 (M, N), contiguous.
        x_scale, w_scale: float32, one for each of the M tokens and N columns.
    """
    tokens, n = out.shape
    blocks_each = -(-n // (WIDTH * _THREADS))
    tensors = (out, addend, x_scale, w_scale)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    _kernel(out.device).launch(tokens * blocks_each, Arguments(*addresses, n, blocks_each), current_stream(out.device))


class Arguments(ctypes.Structure):
    """`Arguments` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "addend", "x_scale", "w_scale")),
        *((name, ctypes.c_int) for name in ("n", "blocks_each")),
    )


@cache
def _kernel(device: torch.device) -> driver.Kernel:
    return driver.elementwise_kernel("scale", MACROS, device)
