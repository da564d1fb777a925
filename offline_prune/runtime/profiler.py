"""Where a run's time and memory go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import psutil
import torch

_active: ContextVar[Profiler | None] = ContextVar("profiler", default=None)


class Profiler:
    """Seconds by stage, and peaks of memory.

    A stage entered inside another one stops the outer one's clock meanwhile, so the seconds add up to the whole.

    Attributes:
        seconds: by stage.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._process = psutil.Process()
        self._host_before = self._host_peak = self._host_memory()
        self._pinned_before = 0
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator[Profiler]:
        """Makes `stage` count here."""
        if self.device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self.device)
            # Pinned memory that an earlier run let go counts until torch is asked for some.
            torch.cuda.synchronize(self.device)
            torch.empty(1, pin_memory=True)
            torch.cuda.reset_peak_host_memory_stats()
            self._pinned_before = self._pinned("current")
        token = _active.set(self)
        try:
            yield self
        finally:
            _active.reset(token)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._lap()
        self._stack.append(name)
        try:
            yield
        finally:
            self._lap()
            self._stack.pop()

    @property
    def peak_host(self) -> int:
        """Bytes of host memory beyond mapped files and what was there at first, the most seen between two stages.

        With a GPU these are libraries that woke up and kernels that were compiled: the first run of a process pays for
        them. What the run itself puts into host memory is pinned then, and drivers do not count that here.
        """
        return self._host_peak - self._host_before

    @property
    def peak_pinned(self) -> int:
        """Bytes of pinned host memory that tensors of this run took; 0 on a CPU."""
        return self._pinned("peak") - self._pinned_before if self.device.type == "cuda" else 0

    @property
    def peak_device(self) -> int:
        """Bytes of GPU memory that tensors took; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _lap(self) -> None:
        # Asking takes a while, during which a GPU still has something to do.
        self._host_peak = max(self._host_peak, self._host_memory())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def _pinned(self, which: str) -> int:
        return torch.cuda.host_memory_stats()[f"active_bytes.{which}"]

    def _host_memory(self) -> int:
        """Bytes of this process's own memory: what it allocated, not the files it mapped."""
        used = self._process.memory_info()
        return used.rss - used.shared


def stage(name: str) -> AbstractContextManager[None]:
    """Counts the time inside towards a stage of the running profiler, if one is running."""
    profiler = _active.get()
    return nullcontext() if profiler is None else profiler.stage(name)


def spent() -> dict[str, float]:
    """Seconds by stage so far, of the running profiler."""
    profiler = _active.get()
    return {} if profiler is None else dict(profiler.seconds)
