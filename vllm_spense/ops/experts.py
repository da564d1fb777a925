"""All routed experts of a layer in one call: gate and up, activation, down, and the weighted sum of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.problem import sum_dtype
from vllm_spense.kernels.region_gemm.reference import quantize, scaled
from vllm_spense.ops.gemm import LIBRARY

#: f in f(gate) ⊙ up, by the names that servers have for it.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of all E experts of a layer that a rank holds, S sparse and D dense intermediate indices of each.

    Attributes:
        gate_up_sparse: (E, 2·S, H) FP8 E4M3, gate's rows before up's; 2:4 along H.
        gate_up_dense: (E, 2·D, H), likewise.
        gate_up_scale: float32 (E, 2·(S + D)): gate's sparse rows, gate's dense rows, up's sparse and dense rows.
        down_sparse: (E, H, S), 2:4 along S.
        down_dense: (E, H, D).
        down_scale: float32 (E, H).
    """

    gate_up_sparse: torch.Tensor
    gate_up_dense: torch.Tensor
    gate_up_scale: torch.Tensor
    down_sparse: torch.Tensor
    down_dense: torch.Tensor
    down_scale: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def pack(
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    regions: Regions,
    dtype: torch.dtype,
) -> ExpertWeights:
    """Separates the regions of weights as a server loads them; zeros stay stored.

    Args:
        gate_up: FP8 E4M3 (E, 2·I, H), gate's rows before up's.
        gate_up_scale: float32 (E, 2·I, 1).
        down: FP8 E4M3 (E, H, I).
        down_scale: float32 (E, H, 1).
        regions: of this rank.
        dtype: the model's. On a CPU weights are kept in the type that its products are summed in: it has no FP8
            arithmetic, and converting them at every call takes most of its time.
    """
    kept = sum_dtype(dtype) if gate_up.device.type == "cpu" else gate_up.dtype
    halves = gate_up.unflatten(1, (2, regions.intermediate))
    sizes = regions.sparse, regions.dense
    # Copies, because views would keep the whole weight alive.
    gate_up_regions = [each.flatten(1, 2).to(kept, copy=True).contiguous() for each in halves.split(sizes, 2)]
    down_regions = [each.to(kept, copy=True).contiguous() for each in down.split(sizes, 2)]
    return ExpertWeights(
        gate_up_regions[0],
        gate_up_regions[1],
        gate_up_scale.squeeze(-1),
        down_regions[0],
        down_regions[1],
        down_scale.squeeze(-1),
    )


def expert_mlp(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    activation: str = "silu",
) -> torch.Tensor:
    """Σ over each token's experts of w · down(f(gate(x)) ⊙ up(x)), activations in FP8 with a scale for each token.

    Args:
        x: (M, H) in the model's dtype.
        topk_ids: integer (M, k), numbers of this rank's experts; −1 for one that it does not hold.
        topk_weights: (M, k).
        activation: a key of `ACTIVATIONS`.

    Returns:
        (M, H) in the model's dtype.
    """
    return torch.ops.spense.expert_mlp(x, topk_ids, topk_weights, list(weights.tensors().values()), activation)


def _expert_mlp(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    activation: str,
) -> torch.Tensor:
    weights = ExpertWeights(*tensors)
    count, k = len(weights.down_sparse), topk_ids.shape[1]
    flat = topk_ids.flatten().long()
    order = flat.argsort(stable=True)
    # Those of no expert here come first.
    sizes = torch.bincount(flat + 1, minlength=count + 1).tolist()
    x8, x_scale = quantize(x)
    # One row for each token and place, summed in the order of the places.
    parts = torch.zeros(len(flat), x.shape[1], dtype=torch.float32, device=x.device)
    for expert, rows in enumerate(order.split(sizes)[1:]):
        if len(rows):
            tokens = rows // k
            parts[rows] = _one(x8[tokens], x_scale[tokens], weights, expert, ACTIVATIONS[activation], x.dtype)
    parts = parts.view(*topk_ids.shape, x.shape[1]) * topk_weights.unsqueeze(-1).float()
    return parts.sum(1).to(x.dtype)


def _one(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weights: ExpertWeights,
    expert: int,
    activation: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """One expert's outputs, float32 (M, H), for x: (M, H) FP8 with its scales (M, 1)."""
    sums = sum_dtype(dtype)
    of_gate_up = weights.gate_up_sparse[expert], weights.gate_up_dense[expert]
    regions = [F.linear(x.to(sums), each.to(sums)).unflatten(-1, (2, -1)) for each in of_gate_up]
    raw = torch.cat(regions, -1).flatten(-2)
    gate, up = scaled(raw, x_scale, weights.gate_up_scale[expert]).to(dtype).chunk(2, -1)
    mid, mid_scale = quantize(activation(gate) * up)
    sparse, dense = weights.down_sparse[expert], weights.down_dense[expert]
    of_sparse, of_dense = mid.to(sums).split((sparse.shape[-1], dense.shape[-1]), -1)
    raw = torch.addmm(F.linear(of_sparse, sparse.to(sums)), of_dense, dense.to(sums).t())
    return scaled(raw, mid_scale, weights.down_scale[expert])


def _expert_mlp_fake(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    activation: str,
) -> torch.Tensor:
    return torch.empty_like(x)


LIBRARY.define("expert_mlp(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] tensors, str activation) -> Tensor")
LIBRARY.impl("expert_mlp", _expert_mlp, "CompositeExplicitAutograd")
torch.library.register_fake("spense::expert_mlp", _expert_mlp_fake, lib=LIBRARY)
