"""Where the calibration text's hidden states are kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, get_args

import torch

from offline_prune.runtime import distributed

#: On the compute device, in (pinned) host memory, or in a file.
Place = Literal["device", "host", "disk"]
PLACES: tuple[str, ...] = get_args(Place)


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, place: Place, folder: Path | None = None
) -> torch.Tensor:
    """An uninitialized tensor at `place`.

    Args:
        folder: for a file; it loses its name before this returns, so that it goes with its process.
    """
    if place == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    if place == "host":
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    assert folder is not None
    file = folder / f"activations-{distributed.rank()}"
    tensor = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    file.unlink()
    return tensor
