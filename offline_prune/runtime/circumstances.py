"""What a run that goes on must have in common with the one that was cut off, beside its settings and its input."""

from __future__ import annotations

import torch

from offline_prune.runtime import distributed
from offline_prune.runtime.versions import versions


def circumstances(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Whatever else decides the bits of a result, by name."""
    return {
        "processes": distributed.size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(dtype),
        **versions(),
    }
