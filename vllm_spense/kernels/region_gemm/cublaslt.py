"""Dense FP8 GEMMs through cuBLASLt."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from functools import cache

import numpy as np
import torch
from nvmath.bindings import cublasLt

from vllm_spense.kernels.jit.nvmath_support import CUDA_TYPE, ONE, ZERO, Shape, set_attribute

_COMPUTE_32F = 68  # cublasComputeType_t
_TRANSPOSE = 1  # cublasOperation_t
#: Far more than the library returns for one problem, which is about eight.
_MAX_ALGORITHMS = 64
#: Split-K algorithms need room for partial sums.
_MAX_WORKSPACE_BYTES = 64 << 20

Error = cublasLt.cuBLASLtError
#: The library's opaque description of one of its kernels, in hex.
Algorithm = str


@cache
def _handle(device_index: int) -> int:
    with torch.cuda.device(device_index):
        return cublasLt.create()


def version() -> int:
    return cublasLt.get_version()


class DensePlan:
    """A GEMM with a dense W; `run` is one library call.

    Args:
        shape: N and K multiples of 16.
        accumulate: add to `out` instead of writing it.
        algorithm: one of `algorithms` of an equal plan; None takes the library's first choice.
        sms: multiprocessors that the library is to make do with, because something else runs meanwhile; 0 for all.

    Raises:
        Error: the library does not know the algorithm, or not for this shape.
    """

    def __init__(
        self, shape: Shape, accumulate: bool = False, algorithm: Algorithm | None = None, sms: int = 0
    ) -> None:
        self.device = shape.device
        self._handle = _handle(shape.device.index)
        self._beta = ONE if accumulate else ZERO
        with ExitStack() as stack:
            self._matmul = cublasLt.matmul_desc_create(_COMPUTE_32F, CUDA_TYPE[torch.float32])
            stack.callback(cublasLt.matmul_desc_destroy, self._matmul)
            attributes = cublasLt.MatmulDescAttribute
            for attribute, kind, value in (
                (attributes.TRANSA, np.int32, _TRANSPOSE),
                # The tensor cores' own precision, as vLLM's CUTLASS kernels have it.
                (attributes.FAST_ACCUM, np.int8, 1),
                (attributes.SM_COUNT_TARGET, np.int32, sms),
            ):
                set_attribute(
                    cublasLt.matmul_desc_set_attribute, self._matmul, attribute=attribute, kind=kind, value=value
                )
            # Row-major matrices are column-major ones, transposed.
            self._weight = self._layout(shape.k, shape.n, shape.k, torch.float8_e4m3fn, stack)
            self._x = self._layout(shape.k, shape.tokens, shape.x_stride, torch.float8_e4m3fn, stack)
            self._out = self._layout(shape.n, shape.tokens, shape.out_stride, shape.out_dtype, stack)
            self._algorithm = np.frombuffer(bytes.fromhex(algorithm or self.algorithms()[0]), np.uint8)
            self._algorithm_address = self._algorithm.ctypes.data
            result = cublasLt.MatmulHeuristicResult()
            cublasLt.matmul_algo_check(
                self._handle, self._matmul, self._weight, self._x, self._out, self._out,
                self._algorithm_address, result.ptr,
            )  # fmt: skip
            self._workspace = torch.empty(int(result.workspace_size), dtype=torch.uint8, device=self.device)
            weakref.finalize(self, stack.pop_all().close)

    def _layout(self, rows: int, columns: int, stride: int, dtype: torch.dtype, stack: ExitStack) -> int:
        layout = cublasLt.matrix_layout_create(CUDA_TYPE[dtype], rows, columns, stride)
        stack.callback(cublasLt.matrix_layout_destroy, layout)
        return layout

    def algorithms(self) -> list[Algorithm]:
        """Every kernel that the library's heuristics offer for this shape, its own favourite first."""
        results = cublasLt.MatmulHeuristicResult(_MAX_ALGORITHMS)
        found = np.zeros((), np.int32)
        with ExitStack() as stack:
            preference = cublasLt.matmul_preference_create()
            stack.callback(cublasLt.matmul_preference_destroy, preference)
            set_attribute(
                cublasLt.matmul_preference_set_attribute, preference,
                attribute=cublasLt.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES, kind=np.uint64,
                value=_MAX_WORKSPACE_BYTES,
            )  # fmt: skip
            cublasLt.matmul_algo_get_heuristic(
                self._handle, self._matmul, self._weight, self._x, self._out, self._out, preference,
                _MAX_ALGORITHMS, results.ptr, found.ctypes.data,
            )  # fmt: skip
        return [result["algo"].tobytes().hex() for result in results._data[: int(found)]]

    def run(self, x: int, weight: int, out: int, stream: int) -> None:
        """One call. All tensors as addresses: making views takes the host as long as the call does.

        Args:
            x: (M, K) float8_e4m3fn of the shape's stride.
            weight: (N, K) float8_e4m3fn, contiguous.
            out: (M, N) of the shape's dtype and stride.
            stream: CUDA's handle.
        """
        cublasLt.matmul(
            self._handle, self._matmul, ONE, weight, self._weight, x, self._x, self._beta, out, self._out, out,
            self._out, self._algorithm_address, self._workspace.data_ptr(), self._workspace.numel(), stream,
        )  # fmt: skip
