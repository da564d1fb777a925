"""All routed experts of a layer in one call: gate and up, activation, down, and the weighted sum of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F

from vllm_spense.format import Regions
from vllm_spense.kernels.expert_gemm import reference
from vllm_spense.kernels.region_gemm.problem import Problem, sum_dtype
from vllm_spense.kernels.region_gemm.reference import quantize, scaled
from vllm_spense.ops.dispatch import ONE_LAUNCH_CAPABILITY
from vllm_spense.ops.gemm import LIBRARY
from vllm_spense.ops.machine import describe

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

    Where the kernel runs them, the sparse regions are compressed, uint8 (E, bytes), and gate_up's scales are in the
    order of its rows there: gate's and up's sparse ones, gate's and up's dense ones (`expert_gemm.reference.pack`).
    """

    gate_up_sparse: torch.Tensor
    gate_up_dense: torch.Tensor
    gate_up_scale: torch.Tensor
    down_sparse: torch.Tensor
    down_dense: torch.Tensor
    down_scale: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def by_kernel(self) -> bool:
        return self.gate_up_sparse.dtype == torch.uint8

    @property
    def problems(self) -> tuple[Problem, Problem]:
        """gate_up and down of one expert."""
        dense = self.gate_up_dense.shape[1] // 2
        return _problems(self.down_scale.shape[1], self.gate_up_scale.shape[1] // 2 - dense, dense)

    @property
    def packed(self) -> tuple[reference.Packed, reference.Packed]:
        """gate_up and down as the kernel takes them."""
        gate_up = {"compressed": self.gate_up_sparse, "dense": self.gate_up_dense, "w_scale": self.gate_up_scale}
        return gate_up, {"compressed": self.down_sparse, "dense": self.down_dense, "w_scale": self.down_scale}


@cache
def _problems(hidden: int, sparse: int, dense: int) -> tuple[Problem, Problem]:
    return reference.problems(hidden, Regions(sparse, dense))


def reason_against_kernel(
    hidden: int, regions: Regions, count: int, top_k: int, dtype: torch.dtype, activation: str, device: torch.device
) -> str | None:
    """Why the kernel cannot run a layer's experts on this device, or None if it can; this tries it out.

    Args:
        regions, count: of this rank, of each expert and how many of them.
        top_k: experts of a token.
        dtype: the model's.
        activation: a key of `ACTIVATIONS`.
    """
    machine = describe(device)
    if machine.capability != ONE_LAUNCH_CAPABILITY:
        return "they need compute capability {}.{}, and this is {}".format(*ONE_LAUNCH_CAPABILITY, machine)
    if not machine.bindings:
        return "nvmath-python is not installed (pip install 'nvmath-python[cu13]>=1.0')"
    if dtype != torch.bfloat16 or activation != "silu":
        return f"they compute SiLU in bfloat16, not {activation} in {str(dtype).removeprefix('torch.')}"
    sizes, multiple = (hidden, regions.sparse, regions.dense), Problem.weight_multiple
    if any(size % multiple for size in sizes):
        return f"hidden size and regions {sizes} are not all multiples of {multiple}"
    from vllm_spense.kernels.expert_gemm import mixture

    if count > mixture.MAX_EXPERTS or top_k > mixture.MAX_TOP_K:
        return (
            f"they take {mixture.MAX_EXPERTS} experts on a GPU and {mixture.MAX_TOP_K} of a token, and these are "
            f"{count} and {top_k}"
        )
    return mixture.fault(count, top_k, device)


def prepare(weights: ExpertWeights, top_k: int, max_tokens: int) -> None:
    """Compiles and loads what runs up to `max_tokens` tokens, before anything is captured."""
    if weights.by_kernel:
        from vllm_spense.kernels.expert_gemm import mixture

        mixture.prepare(weights.problems, len(weights.down_scale), top_k, max_tokens, weights.down_scale.device)


def pack(
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    regions: Regions,
    dtype: torch.dtype,
    by_kernel: bool = False,
) -> ExpertWeights:
    """Separates the regions of weights as a server loads them; zeros stay stored, unless the kernel runs them.

    Args:
        gate_up: FP8 E4M3 (E, 2·I, H), gate's rows before up's.
        gate_up_scale: float32 (E, 2·I, 1).
        down: FP8 E4M3 (E, H, I).
        down_scale: float32 (E, H, 1).
        regions: of this rank.
        dtype: the model's. On a CPU weights are kept in the type that its products are summed in: it has no FP8
            arithmetic, and converting them at every call takes most of its time.
        by_kernel: whether the kernel runs them; see `reason_against_kernel`.
    """
    if by_kernel:
        of_gate_up, of_down = _problems(gate_up.shape[2], regions.sparse, regions.dense)
        return ExpertWeights(
            *reference.pack(gate_up, gate_up_scale, of_gate_up).values(),
            *reference.pack(down, down_scale, of_down).values(),
        )
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
    if weights.by_kernel:
        from vllm_spense.kernels.expert_gemm import mixture

        choices, shares = topk_ids.contiguous(), topk_weights.float().contiguous()
        return mixture.run(x.contiguous(), choices, shares, *weights.packed, weights.problems)
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
