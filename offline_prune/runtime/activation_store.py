"""Where the calibration text's hidden states are kept, and how tensors reach and leave a GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from offline_prune.runtime import distributed
from vllm_spense.errors import SpenseError

#: On the compute device, in (pinned) host memory, or in a file.
Place = Literal["device", "host", "disk"]
PLACES: tuple[str, ...] = get_args(Place)


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, place: Place, folder: Path | None = None
) -> torch.Tensor:
    """An uninitialized tensor at `place`.

    Args:
        folder: for a file; it loses its name before this returns, so that it goes with its process.

    Raises:
        SpenseError: the file cannot be created, or the disk has no room for it.
    """
    if place == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    if place == "host":
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    assert folder is not None
    file, size = folder / f"activations-{distributed.rank()}", math.prod(shape)
    try:
        with file.open("wb") as reserved:
            # A mapped file with holes that the disk has no room for ends in SIGBUS, which nobody can explain.
            os.posix_fallocate(reserved.fileno(), 0, size * dtype.itemsize)
        return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
    except OSError as error:
        raise SpenseError(
            f"{file}: no room for {size * dtype.itemsize / 2**30:.2f} GiB of activations: {error.strerror}"
        ) from None
    finally:
        file.unlink(missing_ok=True)


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
