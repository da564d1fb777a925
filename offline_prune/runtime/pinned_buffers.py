"""How tensors reach and leave a GPU: through pinned host memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch


def pinned_bytes(size: int) -> int:
    """What a tensor of so many bytes takes of pinned memory: torch allocates powers of two."""
    return 1 << (size - 1).bit_length()


class _Buffers:
    """Pinned host memory, allocated once for each name and used again and again.

    torch's own cache of it would grow with every block.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (like.shape, like.dtype):
            buffer = self._buffers[name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        return buffer


class Inbox(_Buffers):
    """Through which tensors reach a GPU."""

    def fill(self, prefix: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Copies tensors into pinned memory, over those of the call before: a GPU must have read them.

        Args:
            prefix: what all names begin with and the other calls' names do not.
        """
        return {name: self._buffer(name.removeprefix(prefix), tensor).copy_(tensor) for name, tensor in tensors}


class Outbox(_Buffers):
    """Through which tensors leave a GPU."""

    def post(
        self, prefix: str, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
        """Starts to copy tensors into host memory, where they overwrite those of the call before.

        Args:
            prefix: what their names begin with and the other calls' names do not.
            tensors: those that are in host memory already stay where they are.

        Returns:
            The tensors in host memory, and what to wait for before they are read: None where nothing was copied.
        """
        posted, arrived = dict(tensors), None
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                buffer = self._buffer(name.removeprefix(prefix), tensor)
                posted[name] = buffer.copy_(tensor, non_blocking=True)
                stream = torch.cuda.current_stream(tensor.device)
                arrived = arrived or torch.cuda.Event()
                arrived.record(stream)
        return posted, arrived
