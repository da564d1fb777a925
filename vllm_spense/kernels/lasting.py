"""GPU memory whose contents outlast a sleeping engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def lasting(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` returns, in memory of torch's own.

    While an engine loads a model that is to sleep, vLLM gives its thread a pool, and drops what is in it at level 2.
    Weights are loaded again then; counters and tables that were made beside them are not. The pool is that thread's
    alone, so these are made in another.

    Args:
        make: makes a tensor and keeps no other memory.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_made, make).result()


def _made(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    tensor = make()
    if tensor.is_cuda:
        # Made on this thread's stream, which no stream of the caller's waits for.
        torch.cuda.synchronize(tensor.device)
    return tensor
