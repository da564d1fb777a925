"""Where the calibration text's hidden states are kept."""

from __future__ import annotations

import math
import os
from enum import StrEnum
from pathlib import Path

import torch

from offline_prune.runtime import distributed
from vllm_spense.errors import SpenseError


class Place(StrEnum):
    """On the compute device, in (pinned) host memory, or in a file."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, place: Place, folder: Path | None = None
) -> torch.Tensor:
    """An uninitialized tensor at `place`.

    Args:
        folder: for a file; it loses its name before this returns, so that it goes with its process.

    Raises:
        SpenseError: the file cannot be created, or the disk has no room for it.
    """
    if place is Place.DEVICE:
        return torch.empty(shape, dtype=dtype, device=device)
    if place is Place.HOST:
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
