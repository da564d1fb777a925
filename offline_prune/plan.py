"""What a run will need, worked out from shapes before it starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from offline_prune.glu import Glu
from offline_prune.model import SourceModel
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, by what they are for.

    Attributes:
        activations: hidden states and attention outputs of all calibration sequences, in host memory.
        block: the weights of one decoder block, on the compute device.
        hessians: Hessians and their factorization, on the compute device.
        batch: activations of one batch inside a block, on the compute device.
        pending: tensors waiting to be written, in host memory.
        disk: the checkpoint.
    """

    activations: int
    block: int
    hessians: int
    batch: int
    pending: int
    disk: int

    def host(self, device: torch.device) -> int:
        return self.activations + self.pending + (self.on_device() if device.type == "cpu" else 0)

    def on_device(self) -> int:
        return self.block + self.hessians + self.batch

    def lines(self, device: torch.device) -> list[str]:
        """For people, one item a line."""

        def gib(size: int) -> str:
            return f"{size / GIB:.2f} GiB"

        where = "host memory" if device.type == "cpu" else f"memory of {device}"
        return [
            f"calibration activations in host memory: {gib(self.activations)}",
            f"one block, its Hessians and one batch in {where}: {gib(self.on_device())}",
            f"host memory in all: {gib(self.host(device))}, beyond Python and its libraries",
            f"checkpoint on disk: {gib(self.disk)}",
        ]


def memory_plan(model: SourceModel, settings: PruneSettings, dtype: torch.dtype) -> MemoryPlan:
    """Estimates from the shapes of the largest block."""
    tokens = settings.samples * settings.length
    batch = max(settings.length, settings.batch_tokens)
    hidden = model.skeleton.config.get_text_config().hidden_size
    mlps = [block.mlp for block in model.blocks if isinstance(block.mlp, Glu)]
    widest = max((mlp.intermediate for mlp in mlps), default=0)
    parameters = max(sum(p.numel() for p in model.module(block.name).parameters()) for block in model.blocks)
    on_disk = sum(model.tensors.nbytes(name) for name in model.tensors)
    if settings.quantize == "fp8":
        on_disk -= sum(
            model.tensors.nbytes(f"{name}.weight") // 2 for name in model.linears() if f"{name}.weight" in model.tensors
        )
    # The column loop holds the float32 weight, its result, one block of it and the products of its loss.
    weights = 4 * 4 * 2 * widest * hidden
    return MemoryPlan(
        activations=2 * tokens * hidden * dtype.itemsize,
        block=parameters * dtype.itemsize + weights,
        # The sum, its mirror, the damped copy, the Cholesky factor and its inverse.
        hessians=4 * (5 * widest**2 + 2 * hidden**2),
        batch=batch * (4 * widest + 8 * hidden) * 4,
        pending=min(on_disk, 4 * GIB),
        disk=on_disk,
    )


def require_disk_space(out: Path, plan: MemoryPlan) -> None:
    """Raises SpenseError when the checkpoint will not fit where it should go."""
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < plan.disk:
        raise SpenseError(f"{place}: {free / GIB:.2f} GiB free, the checkpoint needs {plan.disk / GIB:.2f} GiB")
