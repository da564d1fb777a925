"""Which device computes, and how precisely."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from vllm_spense.errors import SpenseError


def pick_device(name: str) -> torch.device:
    """`auto`: a GPU if there is one. A process that torchrun started gets the GPU of its local rank.

    Raises:
        SpenseError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind != "cuda" or (index and not index.isdigit()):
        raise SpenseError(f"--device: found {name}, expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if dist.is_torchelastic_launched():
        if index:
            raise SpenseError(f"--device: found {name}, expected auto, cpu or cuda: torchrun gives each process a GPU")
        index = os.environ["LOCAL_RANK"]
        if int(index) >= count:
            raise SpenseError(f"--nproc-per-node: found {os.environ['LOCAL_WORLD_SIZE']}, but torch sees {count} GPUs")
    elif int(index or 0) >= count:
        raise SpenseError(f"--device: found {name}, but torch sees {count} GPUs")
    return torch.device("cuda", int(index or 0))


def compute_dtype(device: torch.device) -> torch.dtype:
    """What hidden states and the weights that they meet are kept in: bfloat16 where the device has instructions for it,
    which are faster than float32's."""
    if device.type == "cuda":
        return torch.bfloat16
    # Older versions of torch cannot tell.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32
