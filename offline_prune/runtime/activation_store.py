"""Where the calibration text's hidden states are kept."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path

import torch

from offline_prune.runtime import distributed


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
    """
    if place is Place.DEVICE:
        return torch.empty(shape, dtype=dtype, device=device)
    if place is Place.HOST:
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    assert folder is not None
    file = folder / f"activations-{distributed.rank()}"
    tensor = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    file.unlink()
    return tensor
