"""A mixture of experts after its router, in five launches; seven with many tokens."""

from __future__ import annotations

import torch

from vllm_spense.kernels.elementwise import silu_mul_quant
from vllm_spense.kernels.expert_gemm import gemm, routing
from vllm_spense.kernels.expert_gemm.reference import Packed
from vllm_spense.kernels.region_gemm.problem import Problem


def run(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Packed,
    down: Packed,
    problems: tuple[Problem, Problem],
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ_j weights[t, j] · MLP of expert ids[t, j] (x[t]).

    Nothing is read on the host, so that captured launches serve any routing of as many tokens.

    Args:
        x: bfloat16 (M, hidden).
        ids: int32 or int64 (M, top_k), contiguous: the experts that each token has chosen.
        weights: float32 (M, top_k), contiguous: the router's.
        gate_up, down: what `reference.pack` returned, of this rank's experts.
        problems: of both, as `reference.problems` makes them.
        expert_map: int32, of all experts: this rank's number, or −1; None if this rank has all of them.

    Returns:
        bfloat16 (M, hidden); with an `expert_map` this rank's part of the sum.
    """
    routed = routing.route(x, ids, len(gate_up["w_scale"]), expert_map)
    raw = gemm.run(routed.x, routed.x_scale, routed.offsets, gate_up, problems[0])
    # Rows of no expert hold anything here, and nobody reads what comes of them.
    values, scale = silu_mul_quant.run(raw, None, None, problems[0].regions.sparse)
    # The activation begins after gate_up has, which waited for the offsets.
    y = gemm.run(values, scale, routed.offsets, down, problems[1], offsets_are_old=True)
    return routing.weighted_sum(y, routed.places, weights)


def prepare(problems: tuple[Problem, Problem], experts: int, top_k: int, max_tokens: int, device: torch.device) -> None:
    """Compiles and loads all kernels for every number of tokens up to `max_tokens`."""
    gate_up, down = problems
    routing.prepare(gate_up.k, top_k, experts, device)
    silu_mul_quant.prepare(down.k, torch.bfloat16, device, scaled=False)
    for problem in problems:
        gemm.prepare(problem, experts, max_tokens * top_k, device)
