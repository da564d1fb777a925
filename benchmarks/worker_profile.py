"""Records what runs on the GPU of vLLM's workers, which may be other processes: `LLM.collective_rpc` calls these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

#: Of this process, while one records.
_running: list[profile] = []


@dataclass(frozen=True)
class KernelRun:
    """One run of a kernel, or of a copy.

    Attributes:
        start, end: in microseconds.
    """

    name: str
    start: float
    end: float


def begin(worker: Any) -> None:
    """Starts to record, once all earlier work is done."""
    torch.cuda.synchronize()
    _running.append(profile(activities=[ProfilerActivity.CUDA]))
    _running[-1].__enter__()


def end(worker: Any) -> list[KernelRun]:
    """Everything since `begin`."""
    torch.cuda.synchronize()
    profiler = _running.pop()
    profiler.__exit__(None, None, None)
    return [
        KernelRun(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    ]
