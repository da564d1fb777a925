"""A mixture of experts after its router, in five launches; seven with many tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.elementwise import silu_mul_quant
from vllm_spense.kernels.expert_gemm import gemm, reference, routing
from vllm_spense.kernels.expert_gemm.reference import Packed
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning.synthetic import random_weight

#: Of this rank's experts, and of a token's choices: the most that tests compile the kernels for.
MAX_EXPERTS, MAX_TOP_K = 512, 16
#: What `fault` tries: tokens for each expert, one number for each way to cut; and sizes.
_TRIAL_TOKENS, _TRIAL_HIDDEN, _TRIAL_REGIONS = (1, 40, 130), 256, Regions(96, 32)
#: Relative to the twin's norm. Sums in another order round some activations to other FP8 values, which was seen to
#: move a single token by 0.04.
_TRIAL_ERROR = 0.1


@cache
def fault(experts: int, top_k: int, device: torch.device) -> str | None:
    """Why these kernels must not be used on a GPU, or None: tried out once in each process, against their twin."""
    generator = torch.Generator(device).manual_seed(0)
    problems = reference.problems(_TRIAL_HIDDEN, _TRIAL_REGIONS)

    def random_pack(problem: Problem) -> Packed:
        weight = torch.stack([random_weight(problem, device) for _ in range(experts)])
        # While a model loads, torch's default is the model's dtype.
        w_scale = torch.rand(experts, problem.n, dtype=torch.float32, device=device, generator=generator) + 0.5
        return reference.pack(weight, w_scale, problem)

    gate_up, down = map(random_pack, problems)
    for each in _TRIAL_TOKENS:
        tokens = -(-each * experts // top_k)
        x = torch.randn(tokens, _TRIAL_HIDDEN, dtype=torch.bfloat16, device=device, generator=generator)
        # Some are another rank's, but never all of a token: a sum of nothing has no relative error.
        chances = torch.rand(tokens, experts + top_k, dtype=torch.float32, device=device, generator=generator)
        ids = chances.topk(top_k, -1).indices.int()
        ids.masked_fill_(ids >= experts, -1)
        ids[:, 0] = torch.arange(tokens, device=device) % experts
        weights = torch.rand(tokens, top_k, dtype=torch.float32, device=device, generator=generator)
        try:
            found = run(x, ids, weights, gate_up, down, problems).double()
        except RuntimeError as error:
            return f"its kernels failed when they were tried: {error}"
        expected = reference.mixture(x, ids, weights, gate_up, down, problems).double()
        off = float((found - expected).norm() / expected.norm())
        # A NaN is no small error either.
        if not off < _TRIAL_ERROR:
            return f"its kernels are wrong on this machine: relative error {off:.1e} with {tokens} tokens"
    return None


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
    begin = beginning(ids, expert_map)
    raw = gemm.run(routed.x, routed.x_scale, routed.offsets, gate_up, problems[0], **begin)
    # Rows of no expert hold anything here, and nobody reads what comes of them.
    values, scale = silu_mul_quant.run(raw, None, None, problems[0].regions.sparse)
    # The activation begins once every thread block of gate_up has waited for the end of the sorting.
    y = gemm.run(values, scale, routed.offsets, down, problems[1], offsets_are_old=True)
    return routing.weighted_sum(y, routed.places, weights)


def beginning(ids: torch.Tensor, expert_map: torch.Tensor | None) -> dict[str, Any]:
    """How gate_up learns which rows are whose before they are sorted: arguments of `gemm.run`.

    Three launches have the offsets when the last of them begins; one alone is still writing them, so gate_up counts as
    well.
    """
    return {"offsets_are_old": True} if routing.ranked(ids) else {"ids": ids, "expert_map": expert_map}


def prepare(problems: tuple[Problem, Problem], experts: int, top_k: int, max_tokens: int, device: torch.device) -> None:
    """Compiles and loads all kernels for every number of tokens up to `max_tokens`."""
    gate_up, down = problems
    routing.prepare(gate_up.k, top_k, experts, device)
    silu_mul_quant.prepare(down.k, torch.bfloat16, device, scaled=False)
    for problem in problems:
        gemm.prepare(problem, experts, max_tokens * top_k, device)
