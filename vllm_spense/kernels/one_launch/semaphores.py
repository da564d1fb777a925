"""Semaphores of the one-launch kernel: counters in GPU memory that are zero before a launch and again after it.

Launches that may run at the same time must not share any. Those of one stream never do: each waits for the end of the
one before it. While a graph is captured, that holds for the launches captured in one stream, but nobody knows in which
streams graphs will be replayed: so every stream has a slice of its own, and in every capture another one.

Memory that is made zero during a capture would be zero only once the graph is replayed. So it is set aside before:
slices for `CAPTURES` captures, and as many again whenever fewer than half are left and nothing is being captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from vllm_spense.kernels.lasting import lasting

#: Captures that must find a slice without anything running outside of a capture between them. vLLM captures up to 80
#: numbers of tokens, each in as many pieces as the model has layers and one more, and runs each number once before it.
CAPTURES = 1 << 14


class Semaphores:
    """Slices of one GPU's counters.

    Args:
        zeros: makes so many counters, int64, all zero.
        captures: as `CAPTURES`.
    """

    def __init__(self, zeros: Callable[[int], torch.Tensor], captures: int = CAPTURES) -> None:
        self._zeros = zeros
        self._captures = captures
        #: Counters of a slice: the most that a plan needs so far.
        self._length = 0
        self._unused = torch.empty(0, dtype=torch.int64)
        self._returned: list[torch.Tensor] = []
        self._of_stream: dict[int, torch.Tensor] = {}
        #: The latest capture, and the slices of the streams in it.
        self._capture: int | None = None
        self._of_captured_stream: dict[int, torch.Tensor] = {}
        #: What captures inside of `temporary` took.
        self._lent: list[torch.Tensor] | None = None

    def reserve(self, count: int) -> None:
        """Before a launch that takes `count` counters, and never during a capture."""
        if count > self._length:
            self._length = count
            self._returned.clear()
        self._top_up()

    def take(self, count: int, stream: int, capture: int | None) -> torch.Tensor:
        """At least `count` counters for a launch; as many have been reserved.

        Args:
            stream: its handle.
            capture: the number of the capture that `stream` is in, None if it is in none.

        Raises:
            RuntimeError: all that was reserved for captures is used up.
        """
        assert count <= self._length, (count, self._length)
        if capture is None:
            self._top_up()
            slices = self._of_stream
        else:
            if capture != self._capture:
                self._capture, self._of_captured_stream = capture, {}
            slices = self._of_captured_stream
        if stream not in slices or len(slices[stream]) < count:
            slices[stream] = self._slice()
            if capture is not None and self._lent is not None:
                self._lent.append(slices[stream])
        return slices[stream]

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """Graphs that are captured inside of this are not replayed after it: their slices serve others."""
        assert self._lent is None, "temporary captures are not nested"
        self._lent = []
        try:
            yield
        finally:
            self._returned += (slice for slice in self._lent if len(slice) == self._length)
            self._lent = None

    @property
    def left(self) -> int:
        """How many slices are to be had without new memory."""
        return len(self._returned) + len(self._unused) // max(self._length, 1)

    def _slice(self) -> torch.Tensor:
        if self._returned:
            return self._returned.pop()
        if len(self._unused) < self._length:
            raise RuntimeError(
                f"no semaphores are left for another CUDA graph of the one-launch path: {self._captures} captures at "
                "most may follow each other. Run the model once before each, as vLLM does, or set SPENSE_PATH=library"
            )
        slice, self._unused = self._unused[: self._length], self._unused[self._length :]
        return slice

    def _top_up(self) -> None:
        if self._length and 2 * self.left < self._captures:
            self._unused = self._zeros(self._captures * self._length)


_of_device: dict[torch.device, Semaphores] = {}


def semaphores(device: torch.device) -> Semaphores:
    """Those of a GPU."""
    if device not in _of_device:
        _of_device[device] = Semaphores(
            lambda count: lasting(partial(torch.zeros, count, dtype=torch.int64, device=device))
        )
    return _of_device[device]


@contextmanager
def temporary_captures() -> Iterator[None]:
    """`Semaphores.temporary` on every GPU."""
    with ExitStack() as stack:
        for each in _of_device.values():
            stack.enter_context(each.temporary())
        yield
