"""What is trained: float32 masters of a checkpoint's weights, and the rounded values that the model computes with.

Master, gradient and moments of a weight are this rank's rows of it. After every step the masters are rounded as the
file will hold them, and the model's own parameters become the result. So the loss is that of the rounded weights, and
their gradient goes to the masters as if nothing were rounded (straight-through).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from offline_prune.checkpoint.verify import Checkpoint
from offline_prune.checkpoint.writer import stored_form
from offline_prune.healing.models import Language
from offline_prune.healing.settings import Train
from offline_prune.methods.fp8 import FP8_MAX, dequantize, round_to_fp8
from offline_prune.model.loading import DRAFT_LAYER, SourceModel
from offline_prune.runtime import distributed
from vllm_spense.conformance import SCALE_SUFFIX
from vllm_spense.errors import SpenseError


@dataclass
class TrainedWeight:
    """One tensor of the checkpoint.

    Attributes:
        name: in the files.
        parameter: the model's; on several ranks a `DTensor` split along its rows.
        master: float32, this rank's rows.
        scales: float32 (rows, 1) of its FP8 form, never changed; None where it is not FP8.
        removed: bool like `master`, True where the sparse region has zeros; None where nothing is sparse.
        dtype: of the tensor in the file.
        rows: of the whole tensor.
        rms: root mean square of the whole tensor's non-zero values at the start; 1 where all are zero, as in norms that
            multiply by 1 + weight.
    """

    name: str
    parameter: nn.Parameter
    master: torch.Tensor
    scales: torch.Tensor | None
    removed: torch.Tensor | None
    dtype: torch.dtype
    rows: int
    rms: float

    def collect_gradient(self, parameter: torch.Tensor) -> None:
        """Adds the parameter's gradient to the master's, in float32, and frees it. For a hook."""
        found = _local(parameter.grad).float()
        parameter.grad = None
        self.master.grad = found if self.master.grad is None else self.master.grad.add_(found)

    @torch.no_grad()
    def masked_gradient(self) -> torch.Tensor:
        """The master's gradient, which is 0 from here on where the weight stays zero."""
        if self.master.grad is None:
            raise SpenseError(f"{self.name}: found no gradient, expected a weight that the model runs on text")
        if self.removed is not None:
            self.master.grad.masked_fill_(self.removed, 0.0)
        return self.master.grad

    @torch.no_grad()
    def constrain(self) -> None:
        """Keeps zeros zero, and the others where FP8 does not saturate."""
        if self.scales is not None:
            limit = FP8_MAX * self.scales
            self.master.clamp_(-limit, limit)
        if self.removed is not None:
            self.master.masked_fill_(self.removed, 0.0)

    @torch.no_grad()
    def serve(self) -> None:
        """Gives the model the master's values as the file will hold them."""
        served = self.master.to(self.dtype) if self.scales is None else round_to_fp8(self.master, self.scales)
        _local(self.parameter).copy_(served)

    @torch.no_grad()
    def stored(self) -> torch.Tensor:
        """This rank's rows as the file will hold them, in host memory."""
        return stored_form(self.master, self.scales, self.dtype)["weight"].cpu()

    def gathered(self, stored: torch.Tensor) -> torch.Tensor:
        """The whole tensor, on every rank, of what `stored` returned on each."""
        if distributed.size() == 1:
            return stored
        # Split as torch.chunk does: all ranks but the last have as many rows, which the last ones may lack.
        height = -(-self.rows // distributed.size())
        mine = stored.new_zeros((height, *stored.shape[1:]))
        mine[: len(stored)] = stored
        mine = mine.view(torch.uint8).to(self.master.device)
        parts = [torch.empty_like(mine) for _ in range(distributed.size())]
        dist.all_gather(parts, mine)
        return torch.cat(parts).view(self.dtype)[: self.rows].cpu()


def trained_names(student: SourceModel, checkpoint: Checkpoint, train: Train) -> dict[str, str]:
    """Full names of the parameters to train → their names in the files."""
    stored = {student.tensors.stored(name): name for name in student.tensors}
    if train is Train.MLP:
        return {stored[name]: name for name in _sparse_parts(checkpoint)}
    linears = set(student.linears())
    found: dict[str, str] = {}
    for owner, module in student.text.named_modules(prefix=student.text_name):
        if DRAFT_LAYER.match(f"{owner}."):
            continue
        if owner in linears or "norm" in type(module).__name__.lower():
            names = [f"{owner}.{key}" for key, _ in module.named_parameters(recurse=False)]
            found |= {name: student.tensors.stored(name) for name in names if name in student.tensors}
    return found


def _sparse_parts(checkpoint: Checkpoint) -> dict[str, list[tuple[slice, ...]]]:
    """Weight of each pruned layer, by its name in the files → indices of its sparse parts."""
    found: dict[str, list[tuple[slice, ...]]] = {}
    annotation = checkpoint.annotation
    for module in annotation.modules:
        regions = annotation.regions(module)
        gate, up, down = (f"{layer}.weight" for layer in annotation.layers(module))
        sparse = slice(regions.sparse)
        found[gate] = found[up] = [(sparse,)]
        if annotation.projections.fused:
            found[gate].append((slice(regions.intermediate, regions.intermediate + regions.sparse),))
        found[down] = [(slice(None), sparse)]
    return found


def _removed(whole: torch.Tensor, parts: list[tuple[slice, ...]]) -> torch.Tensor:
    found = torch.zeros_like(whole, dtype=torch.bool)
    for part in parts:
        found[part] = whole[part] == 0
    return found


def trained_weights(
    student: Language, checkpoint: Checkpoint, names: dict[str, str], device: torch.device
) -> list[TrainedWeight]:
    """Masters of the values that the checkpoint holds, and the hooks that collect their gradients."""
    found = []
    sparse = _sparse_parts(checkpoint)
    for name, stored in names.items():
        files, parameter = checkpoint.tensors, student.source.skeleton.get_parameter(name)
        value = files.read(stored)
        scale = f"{stored}{SCALE_SUFFIX}"
        scales = files.read(scale).float() if scale in files else None
        whole = value.float() if scales is None else dequantize(value, scales)
        kept = whole[whole != 0].double()
        removed = _removed(whole, sparse[stored]) if stored in sparse else None
        weight = TrainedWeight(
            name=stored,
            parameter=parameter,
            master=_my_rows(whole).to(device).clone().requires_grad_(),
            scales=None if scales is None else _my_rows(scales).to(device),
            removed=None if removed is None else _my_rows(removed).to(device),
            dtype=value.dtype,
            rows=len(whole),
            rms=float(kept.square().mean().sqrt()) if len(kept) else 1.0,
        )
        parameter.register_post_accumulate_grad_hook(weight.collect_gradient)
        found.append(weight)
    return found


def _my_rows(tensor: torch.Tensor) -> torch.Tensor:
    """As FSDP2 splits parameters."""
    parts = tensor.chunk(distributed.size())
    return parts[distributed.rank()] if distributed.rank() < len(parts) else tensor[:0]


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
