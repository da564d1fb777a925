"""Which device computes."""

from __future__ import annotations

import torch

from vllm_spense.errors import SpenseError


def pick_device(name: str) -> torch.device:
    """`auto`: the first GPU if there is one.

    Raises:
        SpenseError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind == "cuda" and (not index or index.isdigit()):
        if int(index or 0) < torch.cuda.device_count():
            return torch.device("cuda", int(index or 0))
        raise SpenseError(f"--device: found {name}, but torch sees {torch.cuda.device_count()} GPUs")
    raise SpenseError(f"--device: found {name}, expected auto, cpu, cuda or cuda:N")
