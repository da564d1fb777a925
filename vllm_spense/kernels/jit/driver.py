"""CUDA's driver: loads machine code and launches it, describes tensors to the copy engine, orders streams."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from cuda.bindings import driver

from vllm_spense.kernels.jit import nvrtc

#: A CUtensorMap's bytes. Not of characters: ctypes would copy those up to the first zero only.
TensorMap = ctypes.c_uint64 * 16
_SWIZZLES = {
    0: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
    64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
}
_TYPES = {
    1: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    8: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_INT64,
}


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status.value:
        raise RuntimeError(f"CUDA: {status!r}")
    return values[0] if len(values) == 1 else values


@dataclass(frozen=True)
class Kernel:
    """A loaded function, and how it is launched: `threads` a block, `shared_bytes` of dynamic shared memory.

    A launch may overlap the end of the kernel before it: the code must wait (`griddepcontrol.wait`) before it touches
    anything but weights.
    """

    function: Any
    threads: int
    shared_bytes: int

    def launch(self, blocks: int, arguments: ctypes.Structure, stream: int) -> None:
        """Enqueues one launch; the arguments, one structure, are copied."""
        config = _config(blocks, self.threads, self.shared_bytes, stream)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _checked(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


class Event:
    """Orders work of two streams, named by their handles: torch's own takes stream objects, which take time to make."""

    def __init__(self) -> None:
        flags = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        self._event = _checked(driver.cuEventCreate(flags))
        weakref.finalize(self, driver.cuEventDestroy, self._event)

    def record(self, stream: int) -> None:
        _checked(driver.cuEventRecord(self._event, stream))

    def hold(self, stream: int) -> None:
        """What is enqueued in `stream` from now on waits for what was recorded."""
        _checked(driver.cuStreamWaitEvent(stream, self._event, 0))


# Launches of a model repeat, and making one takes longer than what is launched may run.
@lru_cache(maxsize=1024)
def _config(blocks: int, threads: int, shared_bytes: int, stream: int) -> driver.CUlaunchConfig:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [_overlap()], 1
    return config


@cache
def _overlap() -> driver.CUlaunchAttribute:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def load(cubin: bytes, name: str, threads: int, shared_bytes: int, device: torch.device) -> Kernel:
    """The function `name` of machine code, for torch's context on `device`."""
    with torch.cuda.device(device):
        # Makes torch's context the current one, should nothing have yet.
        torch.cuda.current_stream().synchronize()
        module = _checked(driver.cuModuleLoadData(cubin))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return Kernel(function, threads, shared_bytes)


def elementwise_kernel(name: str, macros: Mapping[str, int], device: torch.device) -> Kernel:
    """The function `name` of `name`.cu, one of the sources that include elementwise.cuh.

    Args:
        macros: what specializes it, with the THREADS of a block.
    """
    return load(nvrtc.cubin(f"{name}.cu", arch(device), macros), name, macros["THREADS"], 0, device)


@cache
def arch(device: torch.device) -> str:
    """The GPU's architecture as NVRTC calls it, with all instructions of its own."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def capture_number(stream: int) -> int | None:
    """Of the graph capture that the current stream, of this handle, is in: each has another; None if it is in none."""
    if not torch.cuda.is_current_stream_capturing():
        return None
    # The older function of CUDA 12's bindings refuses captures of launches that overlap.
    query = getattr(driver, "cuStreamGetCaptureInfo_v3", driver.cuStreamGetCaptureInfo)
    return int(_checked(query(stream))[1])


def tensor_map(
    address: int,
    shape: tuple[int, int, int],
    strides: tuple[int, int],
    box: tuple[int, int],
    swizzle: int,
    item: int = 1,
) -> ctypes.Array[ctypes.c_uint64]:
    """How the copy engine reads boxes out of matrices that lie one after the other; what lies outside reads as zero.

    Args:
        address: of the first matrix, a multiple of 16.
        shape: (matrices, rows, columns), in items.
        strides: bytes from matrix to matrix and from row to row, multiples of 16.
        box: (rows, columns), each at most 256.
        swizzle: bytes of a box's row, 64 or 128, that are spread over banks; 0 for none.
        item: bytes of an item, 1 or 8.
    """
    sizes, boxes = driver.cuuint64_t, driver.cuuint32_t
    encoded = _checked(
        driver.cuTensorMapEncodeTiled(
            _TYPES[item], 3, address, [sizes(size) for size in reversed(shape)],
            [sizes(stride) for stride in reversed(strides)], [boxes(size) for size in (*reversed(box), 1)],
            [boxes(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, _SWIZZLES[swizzle],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip
    return TensorMap.from_buffer_copy(ctypes.string_at(encoded.getPtr(), ctypes.sizeof(TensorMap)))
