"""2:4 FP8 GEMMs through cuSPARSELt."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from functools import cache

import numpy as np
import torch
from nvmath.bindings import cusparseLt

from vllm_spense.kernels.jit.nvmath_support import CUDA_TYPE, ONE, ZERO, Shape, current_stream, set_attribute

#: cuSPARSELt takes FP8 activations in multiples of this many tokens.
TOKEN_MULTIPLE = 16
#: Bytes past the end of a compressed weight that a GEMM may read, though not use: its steps are 128 columns wide where
#: the metadata of 64 lie together. The library's own size does not count them; compute-sanitizer found 512.
OVERREAD = 1024

_COLUMN_ORDER = 1  # cusparseOrder_t; a row-major matrix is a column-major one, transposed
_NON_TRANSPOSE, _TRANSPOSE = 0, 1  # cusparseOperation_t
_ALIGNMENT = 16

Error = cusparseLt.cuSPARSELtError
#: CONFIG_ID of one of the library's kernels.
Algorithm = int


@cache
def _handle(device_index: int) -> int:
    with torch.cuda.device(device_index):
        return cusparseLt.init()


def version(device: torch.device) -> int:
    return cusparseLt.get_version(_handle(device.index))


def _weight_descriptor(handle: int, n: int, k: int, stack: ExitStack) -> int:
    descriptor = cusparseLt.structured_descriptor_init(
        handle, k, n, k, _ALIGNMENT, CUDA_TYPE[torch.float8_e4m3fn], _COLUMN_ORDER,
        cusparseLt.Sparsity.SPARSITY_50_PERCENT,
    )  # fmt: skip
    stack.callback(cusparseLt.mat_descriptor_destroy, descriptor)
    return descriptor


def compress(weight: torch.Tensor) -> torch.Tensor:
    """The library's own bytes of a 2:4 weight: 0.625 of its size.

    Args:
        weight: (N, K) float8_e4m3fn on a GPU, contiguous, both sizes multiples of 32, 2:4 along K. That it is 2:4
            must have been checked (`layout.require_2of4`): the library's own check answers nothing for FP8.

    Returns:
        uint8 (bytes,), to be read by the installed version of the library only, with `OVERREAD` bytes after it.
    """
    n, k = weight.shape
    assert weight.is_contiguous(), "compress takes a contiguous weight"
    handle = _handle(weight.device.index)
    with ExitStack() as stack:
        descriptor = _weight_descriptor(handle, n, k, stack)
        size, buffer_size = cusparseLt.sp_mma_compressed_size2(handle, descriptor)
        compressed = torch.empty(size, dtype=torch.uint8, device=weight.device)
        buffer = torch.empty(buffer_size, dtype=torch.uint8, device=weight.device)
        cusparseLt.sp_mma_compress2(
            handle, descriptor, True, _TRANSPOSE, weight.data_ptr(), compressed.data_ptr(), buffer.data_ptr(),
            current_stream(weight.device),
        )  # fmt: skip
    return compressed


class SparsePlan:
    """A GEMM with a compressed W; `run` is one library call.

    Args:
        shape: N and K multiples of 32, M of 16.
        algorithm: one of `algorithms` of an equal plan; None takes the library's default, which can be twice slower.

    Raises:
        Error: the library has no such kernel for this shape.
    """

    def __init__(self, shape: Shape, algorithm: Algorithm | None = None) -> None:
        self.device = shape.device
        self._handle = _handle(shape.device.index)
        self._stream = np.zeros(1, np.int64)
        self._stream_address = self._stream.ctypes.data
        with ExitStack() as stack:
            weight = _weight_descriptor(self._handle, shape.n, shape.k, stack)
            x = self._dense_descriptor(shape.k, shape.tokens, shape.x_stride, torch.float8_e4m3fn, stack)
            out = self._dense_descriptor(shape.n, shape.tokens, shape.out_stride, shape.out_dtype, stack)
            matmul = cusparseLt.matmul_descriptor_init(
                self._handle, _TRANSPOSE, _NON_TRANSPOSE, weight, x, out, out, cusparseLt.ComputeType.COMPUTE_32F
            )
            stack.callback(cusparseLt.matmul_descriptor_destroy, matmul)
            self._selection = cusparseLt.matmul_alg_selection_init(self._handle, matmul, cusparseLt.MatmulAlg.DEFAULT)
            stack.callback(cusparseLt.matmul_alg_selection_destroy, self._selection)
            if algorithm is not None:
                set_attribute(
                    cusparseLt.matmul_alg_set_attribute, self._handle, self._selection,
                    attribute=cusparseLt.MatmulAlgAttribute.CONFIG_ID, kind=np.int32, value=algorithm,
                )  # fmt: skip
            self._plan = cusparseLt.matmul_plan_init(self._handle, matmul, self._selection)
            stack.callback(cusparseLt.matmul_plan_destroy, self._plan)
            size = cusparseLt.matmul_get_workspace(self._handle, self._plan)
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._workspace_address = self._workspace.data_ptr()
            weakref.finalize(self, stack.pop_all().close)

    def _dense_descriptor(self, rows: int, columns: int, stride: int, dtype: torch.dtype, stack: ExitStack) -> int:
        descriptor = cusparseLt.dense_descriptor_init(
            self._handle, rows, columns, stride, _ALIGNMENT, CUDA_TYPE[dtype], _COLUMN_ORDER
        )
        stack.callback(cusparseLt.mat_descriptor_destroy, descriptor)
        return descriptor

    def algorithms(self) -> range:
        """Every kernel that the library may have for this shape."""
        end = np.zeros((), np.int32)
        cusparseLt.matmul_alg_get_attribute(
            self._handle, self._selection, cusparseLt.MatmulAlgAttribute.CONFIG_MAX_ID, end.ctypes.data, end.nbytes
        )
        return range(int(end))

    def run(self, x: int, compressed: int, out: int, stream: int) -> None:
        """One call. All tensors as addresses: making views takes the host as long as the call does.

        Args:
            x: (M, K) float8_e4m3fn of the shape's stride.
            compressed: from `compress`, with `OVERREAD` bytes after it.
            out: (M, N) of the shape's dtype and stride.
            stream: CUDA's handle.
        """
        self._stream[0] = stream
        cusparseLt.matmul(
            self._handle, self._plan, ONE, compressed, x, ZERO, out, out, self._workspace_address, self._stream_address,
            1,
        )  # fmt: skip
