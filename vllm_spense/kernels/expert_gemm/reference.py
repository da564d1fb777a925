"""The experts' weights, packed, and a mixture in plain torch on any device: the twins of all kernels here."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.packing import compress, decompress
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.region_gemm.reference import quantize, silu_mul_quant

Packed = Mapping[str, torch.Tensor]
#: What `pack` returns, in this order.
TENSORS = ("compressed", "dense", "w_scale")


def problems(hidden: int, regions: Regions) -> tuple[Problem, Problem]:
    """gate_up and down of one expert, the same for all experts of a layer.

    Args:
        hidden: the model's hidden size.
        regions: of the expert's intermediate size.
    """
    intermediate = regions.intermediate
    gate_up = Problem(2 * intermediate, hidden, regions, "output", projections=2, scaled=True)
    return gate_up, Problem(hidden, intermediate, regions, "input", scaled=True)


def pack(weight: torch.Tensor, w_scale: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """The weights of all experts of a layer as the kernel reads them.

    Args:
        weight: (E, N, K) float8_e4m3fn; the sparse region of each expert is 2:4.
        w_scale: (E, N) or (E, N, 1), of the rows of `weight`.
        problem: of one expert, as `problems` makes it.

    Returns:
        `compressed`: uint8 (E, bytes), each expert's sparse region as `packing.compress` makes it.
        `dense`: float8_e4m3fn (E, rows, columns), contiguous.
        `w_scale`: float32 (E, N), contiguous.
        Rows of gate_up, and so the columns of its output, are [gate sparse | up sparse | gate dense | up dense].
    """
    compressed, dense, scale = [], [], w_scale.flatten(1).float()
    scales = torch.empty_like(scale)
    for expert, rows in enumerate(weight):
        sparse_region, dense_region = _regions(rows, problem)
        compressed.append(_compressed(sparse_region))
        dense.append(dense_region)
        scales[expert] = problem.by_region(scale[expert]) if problem.split == "output" else scale[expert]
    return {"compressed": torch.stack(compressed), "dense": torch.stack(dense), "w_scale": scales}


def _regions(weight: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(sparse, dense) of one expert, each of all projections."""
    merged = problem.by_region(weight) if problem.split == "output" else weight
    ((sparse, dense),) = problem.region_major().split_regions(merged)
    return sparse.contiguous(), dense.contiguous()


def _compressed(weight: torch.Tensor) -> torch.Tensor:
    """`compress`, which takes no weight without values."""
    return compress(weight) if weight.numel() else torch.empty(0, dtype=torch.uint8, device=weight.device)


def unpacked(packed: Packed, problem: Problem, expert: int) -> torch.Tensor:
    """(N, K) float8_e4m3fn of one expert, rows in the order of the output's columns."""
    merged = problem.region_major()
    out = torch.empty(merged.n, merged.k, dtype=torch.float8_e4m3fn, device=packed["dense"].device)
    ((sparse, dense),) = merged.split_regions(out)
    if sparse.numel():
        sparse.copy_(decompress(packed["compressed"][expert], *merged.sparse_shape))
    dense.copy_(packed["dense"][expert])
    return out


def run(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    packed: Packed,
    problem: Problem,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `gemm.run` computes, in float32."""
    if out is None:
        out = torch.empty(len(x), problem.n, dtype=problem.out_dtype, device=x.device)
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin < end:
            sums = x[begin:end].float() @ unpacked(packed, problem, expert).float().t()
            out[begin:end] = sums * x_scale.view(-1, 1)[begin:end] * packed["w_scale"][expert]
    return out


def route(
    x: torch.Tensor, ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `routing.route` computes; rows of no expert are left out."""
    chosen = ids.flatten().long() if expert_map is None else expert_map.long()[ids.flatten().long()]
    mine = (chosen >= 0).nonzero().squeeze(1)
    order = mine[chosen[mine].argsort(stable=True)]
    places = torch.full_like(chosen, -1)
    places[order] = torch.arange(len(order), device=x.device)
    counts = torch.bincount(chosen[mine], minlength=experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    values, scale = quantize(x)
    rows = order // ids.shape[1]
    return values[rows], scale[rows], offsets, places.int().view_as(ids)


def weighted_sum(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What `routing.weighted_sum` computes."""
    out = torch.zeros(len(places), y.shape[1], dtype=torch.float32, device=y.device)
    for place, weight in zip(places.t().long(), weights.t(), strict=True):
        mine = place >= 0
        out[mine] += weight[mine, None] * y[place[mine]].float()
    return out.to(y.dtype)


def mixture(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Packed,
    down: Packed,
    problems: tuple[Problem, Problem],
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `mixture.run` computes."""
    values, scale, offsets, places = route(x, ids, len(gate_up["w_scale"]), expert_map)
    raw = run(values, scale, offsets, gate_up, problems[0])
    values, scale = silu_mul_quant(raw, None, None, problems[0].regions.sparse)
    return weighted_sum(run(values, scale, offsets, down, problems[1]), places, weights)
