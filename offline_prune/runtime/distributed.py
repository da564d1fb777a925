"""Processes that prune together, started by torchrun, each on a device of its own.

Every rank takes its share of the calibration text through the blocks and decides its share of a weight's rows. Sums
over tokens, and the rows, are put together, so that all ranks hold the same weights. In a process that is alone nothing
here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from offline_prune.runtime.profiler import stage
from vllm_spense.errors import SpenseError

T = TypeVar("T")

#: Others wait while the first rank fetches and tokenizes the calibration text. torchrun ends those whose peers died.
_PATIENCE = timedelta(hours=4)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started work together: through NCCL on GPUs, Gloo on CPUs."""
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def on_this_machine() -> int:
    """How many ranks share this machine's memory."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


def require_power_of_two(most: int | None = None) -> None:
    """
    Raises:
        SpenseError: torchrun started a number of processes that `all_reduce` cannot pair, or more than `most`.
    """
    if size() & (size() - 1) or size() > (most or size()):
        raise SpenseError(
            f"--nproc-per-node: found {size()}, expected a power of two" + (f" of at most {most}" if most else "")
        )


def is_first() -> bool:
    """Whether this is the process that talks and writes."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that all ranks have, a view; its length is a multiple of their number."""
    return tensor.chunk(size())[rank()]


def all_reduce(tensor: torch.Tensor) -> None:
    """Replaces a tensor by its sum over all ranks, to the same bits on each.

    Neighbours add theirs, then pairs of neighbours, and so on: the upper levels of `deterministic_reduce`'s
    tree, whose order a collective sum would not promise. Their number is a power of two (`require_power_of_two`).
    """
    if size() == 1:
        return
    with stage("exchange"):
        other = torch.empty_like(tensor)
        for level in range(size().bit_length() - 1):
            partner = rank() ^ 1 << level
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, tensor, partner), dist.P2POp(dist.irecv, other, partner)]
            ):
                work.wait()
            tensor += other


def row_parallel(height: int, rows_of: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """`rows_of(all rows)` of a function that treats each row for itself; each rank does some.

    Args:
        height: number of rows.
        rows_of: rows → float (…, rows, n).

    Returns:
        float (…, height, n), to the same bits on every rank.
    """
    if size() == 1:
        return rows_of(slice(None))
    mine = slice(height * rank() // size(), height * (rank() + 1) // size())
    part = rows_of(mine)
    whole = part.new_zeros(*part.shape[:-2], height, part.shape[-1])
    whole[..., mine, :] = part
    all_reduce(whole)
    return whole


def broadcast_from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on all of them.

    Args:
        make: returns something that can be pickled; called on the first rank only.

    Raises:
        SpenseError: on every rank, when `make` did.
    """
    if size() == 1:
        return make()
    made: list[T | SpenseError | None] = [None]
    if is_first():
        try:
            made = [make()]
        except SpenseError as error:
            made = [error]
    dist.broadcast_object_list(made)
    (thing,) = made
    if isinstance(thing, SpenseError):
        raise thing
    return thing  # type: ignore[return-value]
