"""A mixture of experts after its router, against vLLM's with the same choices (issue 23).

    python benchmarks/expert_mixture.py

times everything between the router and the sum over a token's experts, of two models' layers, and writes
benchmarks/results/expert_mixture.json. As in expert_gemm.py inputs are random, weights and routings take turns, and all
kernels run in turn inside CUDA graphs; times are medians of one mixture.

`stock_us` are vLLM's dense FP8 experts: CUTLASS, its choice on Hopper for scales of channels and tokens, and Triton,
with the configuration that it chooses; each quantizes its input itself. `stock_missing` says which could not run, and
why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path as File

import torch

sys.path.insert(0, str(File(__file__).resolve().parents[1]))

from benchmarks.command_line import add_out, first_gpu, mlp_sparsity, positive, run_main
from benchmarks.envelope import print_row, write_result
from benchmarks.expert_gemm import (
    ROUTING,
    ROUTINGS,
    SHAPES,
    SPARSITIES,
    TOKENS,
    Call,
    Row,
    Shape,
    packs_of,
    route,
    runnable,
)
from vllm_spense.kernels.expert_gemm import mixture, reference
from vllm_spense.kernels.tuning.timing import medians_us

#: gate_up and down.
Weights = tuple[reference.Packed, reference.Packed]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=positive, default=TOKENS)
    parser.add_argument("--sparsities", nargs="+", type=mlp_sparsity, default=SPARSITIES)
    parser.add_argument("--routings", nargs="+", choices=ROUTING, default=ROUTING)
    add_out(parser, "expert_mixture")
    options = parser.parse_args()

    device = first_gpu()
    torch.manual_seed(0)
    rows: list[Row] = []
    for name in options.shapes:
        cases = [(tokens, routing) for tokens in options.tokens for routing in options.routings]
        for row in sweep(SHAPES[name], options.sparsities, cases, device):
            row = {"shape": name, **row}
            print_row(row)
            rows.append(row)
        # After each, so that a run that is cut short leaves what it has.
        write_result(options.out, "expert_mixture", rows)


def sweep(
    shape: Shape, sparsities: Sequence[float], cases: Sequence[tuple[int, str]], device: torch.device
) -> Iterator[Row]:
    """One row for each number of tokens, routing and sparsity."""
    problems = {sparsity: reference.problems(shape.hidden, shape.regions(sparsity)) for sparsity in (0, *sparsities)}
    weights: dict[float, list[Weights]] = {
        sparsity: list(zip(*(packs_of(problem, shape, device) for problem in both), strict=False))
        for sparsity, both in problems.items()
    }
    for tokens, kind in cases:
        x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
        shares = torch.rand(tokens, shape.top_k, device=device)
        choices = [route(shape, tokens, kind, device).ids.int().contiguous() for _ in range(ROUTINGS)]
        calls: dict[float, list[Call]] = {
            sparsity: [
                partial(mixture.run, x, ids, shares, *packed, problems[sparsity])
                for packed, ids in zip(cycle(copies), choices)
            ]
            for sparsity, copies in weights.items()
        }
        makers = {
            name: partial(make, shape, x, shares, weights[0], choices)
            for name, make in {"cutlass": cutlass_calls, "triton": triton_calls}.items()
        }
        stock, missing = runnable(makers)
        us = dict(zip([*calls, *stock], medians_us([*calls.values(), *stock.values()], replays=9), strict=True))
        for sparsity in sparsities:
            yield {
                "tokens": tokens,
                "routing": kind,
                "sparsity": sparsity,
                "us": round(us[sparsity], 2),
                "dense_us": round(us[0], 2),
                "over_dense": round(us[0] / us[sparsity], 3),
                "stock_us": {name: round(us[name], 2) for name in stock},
                "over_stock": round(min(us[name] for name in stock) / us[sparsity], 3) if stock else None,
                "stock_missing": missing,
            }


def cutlass_calls(
    shape: Shape, x: torch.Tensor, shares: torch.Tensor, weights: Sequence[Weights], choices: Sequence[torch.Tensor]
) -> list[Call]:
    """vLLM's choice on Hopper for weights with a scale for each channel."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import run_cutlass_moe_fp8

    device, rows = x.device, len(x) * shape.top_k
    of_hidden, of_intermediate, of_both = (
        torch.full((shape.experts,), size, device=device, dtype=torch.int64)
        for size in (shape.hidden, shape.intermediate, 2 * shape.intermediate)
    )
    # For what the two GEMMs read and write, one after the other.
    widest = max(shape.hidden, 2 * shape.intermediate)
    first, second = (torch.empty(rows, widest, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(x)

    def call(gate_up: reference.Packed, down: reference.Packed, ids: torch.Tensor) -> None:
        values, scale = ops.scaled_fp8_quant(x, None, use_per_token_if_dynamic=True)
        run_cutlass_moe_fp8(
            out, values, gate_up["dense"], down["dense"], ids, MoEActivation.SILU, shape.experts, None,
            gate_up["w_scale"].unsqueeze(-1), down["w_scale"].unsqueeze(-1), scale, None, of_hidden, of_intermediate,
            of_both, of_hidden, first, second, None, torch.bfloat16, True, True, False, shares, None,
        )  # fmt: skip

    return [partial(call, *packed, ids) for packed, ids in zip(cycle(weights), choices)]


def triton_calls(
    shape: Shape, x: torch.Tensor, shares: torch.Tensor, weights: Sequence[Weights], choices: Sequence[torch.Tensor]
) -> list[Call]:
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def call(gate_up: reference.Packed, down: reference.Packed, ids: torch.Tensor) -> None:
        config = fp8_w8a8_moe_quant_config(
            gate_up["w_scale"].unsqueeze(-1),
            down["w_scale"].unsqueeze(-1),
            per_act_token_quant=True,
            per_out_ch_quant=True,
        )
        fused_experts(x, gate_up["dense"], down["dense"], shares, ids, quant_config=config)

    return [partial(call, *packed, ids) for packed, ids in zip(cycle(weights), choices)]


if __name__ == "__main__":
    run_main(main)
