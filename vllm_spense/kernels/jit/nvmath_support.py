"""What the two library bindings share: the shape of a GEMM, CUDA's type codes, host scalars and attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

#: cudaDataType_t
CUDA_TYPE = {torch.float8_e4m3fn: 28, torch.bfloat16: 14, torch.float32: 0}

_ZERO, _ONE = np.zeros((), np.float32), np.ones((), np.float32)
#: Addresses of α and β: the libraries read them from host memory while they enqueue a call.
ZERO, ONE = _ZERO.ctypes.data, _ONE.ctypes.data


@dataclass(frozen=True)
class Shape:
    """out[m, n] = Σ_k x[m, k] · W[n, k], with x and W FP8 E4M3.

    Attributes:
        n, k: size of W, which is contiguous.
        tokens: M.
        x_stride, out_stride: elements from row to row.
    """

    n: int
    k: int
    tokens: int
    x_stride: int
    out_stride: int
    out_dtype: torch.dtype
    device: torch.device


def set_attribute(setter: Callable[..., None], *target: int, attribute: int, kind: type, value: int) -> None:
    """Calls one of the bindings' `…_set_attribute` functions with a scalar of NumPy type `kind`."""
    data: np.ndarray = np.array(value, kind)
    setter(*target, attribute, data.ctypes.data, data.nbytes)


def current_stream(device: torch.device) -> int:
    # Inductor's way: torch.cuda.current_stream makes an object first, which takes as long as a library's call.
    return torch._C._cuda_getCurrentRawStream(device.index)
