"""The clock and the power of a GPU while it runs something for long."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_spense.kernels.jit import driver
from vllm_spense.kernels.jit.nvrtc import compile_program
from vllm_spense.kernels.jit.sources import with_includes
from vllm_spense.kernels.one_launch.semaphores import temporary_captures
from vllm_spense.kernels.tuning.timing import Graph

SOURCE = Path(__file__).with_suffix(".cu")
#: Thread blocks for each multiprocessor, so that all get one of those that read the time.
_BLOCKS_EACH = 8

Call = Callable[[], object]


@dataclass(frozen=True)
class Sustained:
    """Calls that run for long: µs of one, the multiprocessors' clock in GHz, watts."""

    us: float
    ghz: float
    watts: float


class Arguments(ctypes.Structure):
    """As in gpu_clock.cu."""

    _fields_ = (("readings", ctypes.c_void_p),)


class Watch:
    """Runs calls for a while and looks at the clock meanwhile.

    Args:
        milliseconds: that they run before they are measured, and while they are.
    """

    def __init__(self, device: torch.device, milliseconds: int) -> None:
        self.device, self.milliseconds = device, milliseconds
        self._blocks = torch.cuda.get_device_properties(device).multi_processor_count * _BLOCKS_EACH
        self._kernel = driver.load(compiled(driver.arch(device)), "gpu_clock", 1, 0, device)
        self._readings = torch.zeros(2, self._blocks, 2, dtype=torch.int64, device=device)

    def sustained(self, calls: Sequence[Call]) -> Sustained:
        """Of calls that take turns in a CUDA graph; each should have its own weight."""
        with temporary_captures():
            return self._sustained(Graph(calls))

    def _sustained(self, work: Graph) -> Sustained:
        replays = max(1, round(self.milliseconds * 1e3 / (work.us_of_a_call() * work.calls)))
        self._readings.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(replays):
            work.graph.replay()
        self._read(0)
        start.record()
        for _ in range(replays):
            work.graph.replay()
        end.record()
        self._read(1)
        start.synchronize()
        watts = power(self.device)
        torch.cuda.synchronize(self.device)
        us = start.elapsed_time(end) * 1e3 / replays / work.calls
        return Sustained(us, ghz(*self._readings.cpu()), watts)

    def _read(self, which: int) -> None:
        arguments = Arguments(self._readings[which].data_ptr())
        self._kernel.launch(self._blocks, arguments, torch.cuda.current_stream(self.device).cuda_stream)


def ghz(first: torch.Tensor, second: torch.Tensor) -> float:
    """The median clock of the multiprocessors between two readings, int64 (n, 2): cycles and nanoseconds of each, zero
    where there is none."""
    there = (first[:, 1] > 0) & (second[:, 1] > first[:, 1])
    cycles, nanoseconds = (second - first)[there].double().unbind(1)
    return float((cycles / nanoseconds).median())


def power(device: torch.device) -> float:
    """Watts at this moment; waits for nothing that the GPU does."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=power.draw.instant", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)


def compiled(arch: str) -> bytes:
    """Machine code."""
    sources = {SOURCE.name: SOURCE.read_text(encoding="utf-8")} | with_includes("ptx.cuh")
    return compile_program(sources, [f"--gpu-architecture={arch}", "--std=c++17"]).cubin
