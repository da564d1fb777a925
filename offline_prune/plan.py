"""What a run will need, worked out from shapes before it starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from offline_prune import parts, ranks
from offline_prune.glu import Glu
from offline_prune.model import SourceModel
from offline_prune.place import Place
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

GIB = 2**30
#: Share of the memory that is free which a plan may count on.
USABLE = 0.9
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one rank needs, by what they are for.

    Attributes:
        activations: hidden states of its calibration sequences.
        block: the weights of one decoder block, on the compute device.
        work: the largest of what its passes and its pruning need beside them, on the compute device.
        staging: blocks waiting to be loaded or written, in host memory.
        disk: the checkpoint.
        device: that computes.
        place: of the activations.
        ranks: how many there are.
    """

    activations: int
    block: int
    work: int
    staging: int
    disk: int
    device: torch.device
    place: Place
    ranks: int = 1

    @property
    def on_device(self) -> int:
        return self.block + self.work + (self.activations if self.place == "device" else 0)

    @property
    def host(self) -> int:
        on_device = self.on_device if self.device.type == "cpu" else 0
        return self.staging + on_device + (self.activations if self.place == "host" else 0)

    @property
    def on_disk(self) -> int:
        """Of all ranks together."""
        return self.disk + (self.ranks * self.activations if self.place == "disk" else 0)

    def lines(self) -> list[str]:
        """For people, one item a line."""

        def gib(size: int) -> str:
            return f"{size / GIB:.2f} GiB"

        places = {"device": f"memory of {self.device}", "host": "host memory", "disk": "a file"}
        return [
            *([f"{self.ranks} processes; memory of each:"] if self.ranks > 1 else []),
            f"calibration activations in {places[self.place]}: {gib(self.activations)}",
            f"one block and the work on it in memory of {self.device}: {gib(self.block + self.work)}",
            f"memory of {self.device} in all: {gib(self.on_device)}",
            f"host memory in all: {gib(self.host)}, beyond Python, its libraries and the mapped model",
            f"disk in all: {gib(self.on_disk)}, of it {gib(self.disk)} for the checkpoint",
        ]


def memory_plan(model: SourceModel, settings: PruneSettings, device: torch.device, dtype: torch.dtype) -> MemoryPlan:
    """Works out what the largest block needs, and picks the first place with room for the activations.

    Raises:
        SpenseError: the device has too little memory for one block, or no place has room.
    """
    tokens = settings.samples * settings.length // ranks.size()
    batch = max(settings.length, batch_tokens(settings, device))
    hidden = model.skeleton.config.get_text_config().hidden_size
    mlps = [block.mlp for block in model.blocks if isinstance(block.mlp, Glu)]
    widest = max((mlp.intermediate for mlp in mlps), default=0)
    parameters = max(sum(p.numel() for p in model.module(block.name).parameters()) for block in model.blocks)
    stored = max(
        sum(model.tensors.nbytes(name) for name in model.tensors if name.startswith(f"{block.name}."))
        for block in model.blocks
    )
    streams, tunes = 2 if settings.follows_dense else 1, settings.wanted_tune_steps > 0
    # A float32 weight of down, what becomes of it, its difference, and two products for the loss.
    weights = 5 * 4 * widest * hidden
    # A tree of sums keeps one of each level, and one that is exchanged.
    sums = max(len(parts.cut(settings.samples // ranks.size())).bit_length(), 2 if ranks.size() > 1 else 1)
    phases = {
        # H of the parts of the text, and one batch: residual stream and its norms, the MLP's three wide tensors. What
        # layers that are only rounded see is narrower.
        "observe": sums * 4 * widest**2 + batch * (3 * widest + 6 * hidden) * dtype.itemsize,
        # H and three matrices of its size to factorize it; weights twice as large, and once in the model's type.
        "gate and up": 4 * 4 * hidden**2 + 2 * weights + 4 * widest * hidden * dtype.itemsize,
        # Of each weight: master, start, gradient, two moments, average, as it is served, whether it is kept. Of one
        # batch: the wide tensors and their gradients.
        "tune": (3 * widest * hidden * (7 * 4 + 1) + batch * (8 * widest + 12 * hidden) * 4 if tunes else 0)
        # Both Hessians wait for the rounding of what is tuned.
        + (4 * (widest**2 + hidden**2) if settings.rounds_tuned else 0),
        "down": (5 if settings.layout != "back" else 4) * 4 * widest**2 + 4 * hidden**2 + weights,
    }
    needs = MemoryPlan(
        activations=streams * tokens * hidden * dtype.itemsize,
        # Tuning keeps a copy of the dense MLP.
        block=(parameters + (3 * widest * hidden if tunes else 0)) * dtype.itemsize,
        work=max(phases.values()),
        staging=3 * stored,
        disk=_checkpoint_bytes(model, settings),
        device=device,
        place="device",
        ranks=ranks.size(),
    )
    return _placed(needs, settings)


def batch_tokens(settings: PruneSettings, device: torch.device) -> int:
    """Tokens that pass through a block at once: enough to keep the device busy."""
    return settings.batch_tokens or BATCH_TOKENS[device.type]


def _checkpoint_bytes(model: SourceModel, settings: PruneSettings) -> int:
    size = sum(model.tensors.nbytes(name) for name in model.tensors)
    if settings.quantize == "none":
        return size
    weights = (f"{name}.weight" for name in model.linears())
    return size - sum(
        model.tensors.nbytes(name) - model.tensors.nbytes(name) // model.tensors.dtype(name).itemsize
        for name in weights
        if name in model.tensors
    )


def _placed(needs: MemoryPlan, settings: PruneSettings) -> MemoryPlan:
    device, out = needs.device, settings.out
    host = int(psutil.virtual_memory().available * USABLE) // ranks.on_this_machine()
    room = host if device.type == "cpu" else int(_free(device) * USABLE)
    if room < needs.block + needs.work:
        raise SpenseError(
            f"{device}: {room / GIB:.2f} GiB of memory usable, one block needs {(needs.block + needs.work) / GIB:.2f} "
            "GiB; smaller --batch-tokens or --length may help"
        )
    places: list[Place] = ["device", "host", "disk"] if settings.activations == "auto" else [settings.activations]
    for place in places:
        plan = MemoryPlan(**{**vars(needs), "place": place})
        fits = plan.on_device <= room and (device.type == "cpu" or plan.host <= host)
        if place == "disk" or fits or settings.activations != "auto":
            break
    require_disk_space(out, plan)
    return plan


def _free(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses. What an earlier run of this process left in torch's cache counts as free."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def require_disk_space(out: Path, plan: MemoryPlan) -> None:
    """Raises SpenseError when the checkpoint, and a file of activations, will not fit where they should go."""
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < plan.on_disk:
        raise SpenseError(f"{place}: {free / GIB:.2f} GiB free, the run needs {plan.on_disk / GIB:.2f} GiB")
