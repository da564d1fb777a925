"""The experts' GEMMs of a mixture, one launch for all experts, against dense ones and vLLM's (issue 23).

    python benchmarks/expert_gemm.py

times gate_up and down of two models' layers and writes benchmarks/results/expert_gemm.json. Inputs are random, weights
and routings take turns so that no weight is in the cache when its turn comes, everything runs inside CUDA graphs; times
are medians of one launch. All kernels take turns, because a GPU that gets warm gets slower.

`ideal_us` is what the weights of the experts that have tokens take to arrive at the bandwidth measured in the same run.
`dense_us` is the same kernel with everything dense. `ideal_over_dense` is the speed-up over it that the bytes allow,
1 / (ρ + 0.625 (1 − ρ)), and `of_ideal_speedup` the share of it in `over_dense`. `stock_us` are vLLM's grouped GEMMs on
the same inputs, already sorted by expert: CUTLASS, its choice on Hopper for scales of channels and tokens, and Triton,
with the configuration that it chooses. `stock_missing` says which of them could not run and why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path as File
from typing import Any

import torch

sys.path.insert(0, str(File(__file__).resolve().parents[1]))

from benchmarks.command_line import add_out, first_gpu, mlp_sparsity, positive, run_main
from benchmarks.envelope import print_row, write_result
from vllm_spense.format import Regions
from vllm_spense.kernels.expert_gemm import gemm, mixture, reference
from vllm_spense.kernels.expert_gemm.instances import Tiling
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight
from vllm_spense.kernels.tuning.timing import cold_copies, median_us, medians_us

TOKENS = (1, 8, 32, 64, 128, 256, 1024, 8192)
SPARSITIES = (0.25, 0.375, 0.5)
#: Times of one call are averaged over so many routings.
ROUTINGS = 16

Row = dict[str, Any]
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A mixture's layer."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int

    def regions(self, sparsity: float) -> Regions:
        dense = round(self.intermediate * (1 - 2 * sparsity) / 32) * 32
        return Regions(self.intermediate - dense, dense)


SHAPES = {"qwen3-30b-a3b": Shape(128, 8, 2048, 768), "glm-4.5-air": Shape(128, 8, 4096, 1408)}
#: How tokens choose experts: every expert is as likely, or expert number r (in random order) in proportion to 1 / r.
ROUTING = ("balanced", "skewed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=positive, default=TOKENS)
    parser.add_argument("--sparsities", nargs="+", type=mlp_sparsity, default=SPARSITIES)
    parser.add_argument("--routings", nargs="+", choices=ROUTING, default=ROUTING)
    parser.add_argument("--tilings", nargs="+", type=_tiling, default=[None], help="tokens,sparse_k; else as served")
    add_out(parser, "expert_gemm")
    options = parser.parse_args()

    device = first_gpu()
    torch.manual_seed(0)
    bandwidth = read_bandwidth(device)
    rows: list[Row] = []
    for name in options.shapes:
        for layer in ("gate_up", "down"):
            cases = [(tokens, routing) for tokens in options.tokens for routing in options.routings]
            for row in sweep(SHAPES[name], layer, options.sparsities, cases, options.tilings, bandwidth, device):
                row = {"shape": name, **row}
                print_row(row)
                rows.append(row)
            # After each, so that a run that is cut short leaves what it has.
            write_result(options.out, "expert_gemm", rows)


def _tiling(text: str) -> Tiling:
    tokens, sparse_k = text.split(",")
    return Tiling(int(tokens), int(sparse_k))


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum of 2 GiB reads."""
    x = torch.ones(2**29, device=device)
    return x.nbytes / median_us([x.sum]) * 1e6


@dataclass(frozen=True)
class Routing:
    """Of some tokens: the experts that each takes, and where each expert's rows begin once they are sorted.

    Attributes:
        ids: int64 (tokens, top_k).
        offsets: int32 (experts + 1).
        active: how many experts have tokens.
    """

    ids: torch.Tensor
    offsets: torch.Tensor
    active: int


def route(shape: Shape, tokens: int, kind: str, device: torch.device) -> Routing:
    """A random one: top_k experts of each token, without repetition, drawn by their weights."""
    weights = torch.ones(shape.experts, device=device)
    if kind == "skewed":
        weights /= torch.randperm(shape.experts, device=device) + 1
    gumbel = -torch.empty(tokens, shape.experts, device=device).exponential_().log()
    ids = (weights.log() + gumbel).topk(shape.top_k, -1).indices
    counts = torch.bincount(ids.flatten(), minlength=shape.experts)
    return Routing(ids, torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(), int((counts > 0).sum()))


def sweep(
    shape: Shape,
    layer: str,
    sparsities: Sequence[float],
    cases: Sequence[tuple[int, str]],
    tilings: Sequence[Tiling | None],
    bandwidth: float,
    device: torch.device,
) -> Iterator[Row]:
    """One row for each number of tokens, routing, sparsity and tiling."""

    def problem_of(sparsity: float) -> Problem:
        up, down = reference.problems(shape.hidden, shape.regions(sparsity))
        return up if layer == "gate_up" else down

    dense = problem_of(0)
    weights = packs_of(dense, shape, device)
    packs = {sparsity: packs_of(problem_of(sparsity), shape, device) for sparsity in sparsities}
    for tokens, kind in cases:
        routings = [route(shape, tokens, kind, device) for _ in range(ROUTINGS)]
        x = random_fp8(tokens * shape.top_k, dense.k, device)
        x_scale = torch.rand(len(x), 1, device=device) + 0.5
        calls: dict[Any, list[Call]] = {}
        for cut in tilings:
            for sparsity, copies in ({0: weights} | packs).items():
                problem = problem_of(sparsity)
                calls[cut, sparsity] = [
                    partial(
                        gemm.run, x, x_scale, routing.offsets, packed, problem, cut=cut,
                        **({"offsets_are_old": True} if layer == "down" else mixture.beginning(routing.ids, None)),
                    )
                    for packed, routing in zip(cycle(copies), routings)
                ]  # fmt: skip
        stock, missing = stock_calls(shape, layer, x, x_scale, weights, routings)
        us = dict(zip([*calls, *stock], medians_us([*calls.values(), *stock.values()], replays=9), strict=True))
        active = sum(routing.active for routing in routings) / len(routings)
        for cut in tilings:
            for sparsity in sparsities:
                problem = problem_of(sparsity)
                time, ideal = us[cut, sparsity], active * problem.weight_bytes / bandwidth * 1e6
                flops = 2 * len(x) * problem.n * problem.k
                yield {
                    "layer": layer,
                    "tokens": tokens,
                    "routing": kind,
                    "sparsity": sparsity,
                    "active_experts": round(active, 1),
                    "us": round(time, 2),
                    "ideal_us": round(ideal, 2),
                    "of_ideal": round(ideal / time, 3),
                    "dense_us": round(us[cut, 0], 2),
                    "over_dense": round(us[cut, 0] / time, 3),
                    "ideal_over_dense": round(problem.ideal, 3),
                    "of_ideal_speedup": round(us[cut, 0] / time / problem.ideal, 3),
                    "stock_us": {name: round(us[name], 2) for name in stock},
                    "over_stock": round(min(us[name] for name in stock) / time, 3) if stock else None,
                    "stock_missing": missing,
                    "dense_equivalent_tflops": round(flops / time / 1e6, 1),
                    "tiling": str(cut or gemm.tiling(len(x), shape.experts)),
                }


def packs_of(problem: Problem, shape: Shape, device: torch.device) -> list[reference.Packed]:
    """Packed random weights of all experts, as often as it takes to be cold."""
    weight = torch.stack([random_weight(problem, device) for _ in range(shape.experts)])
    w_scale = torch.rand(shape.experts, problem.n, 1, device=device) + 0.5
    packed = reference.pack(weight, w_scale, problem)
    copies = cold_copies(shape.experts * problem.weight_bytes, device)
    return [packed, *({name: tensor.clone() for name, tensor in packed.items()} for _ in range(copies - 1))]


def stock_calls(
    shape: Shape,
    layer: str,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weights: Sequence[reference.Packed],
    routings: Sequence[Routing],
) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """vLLM's GEMMs that run here by name, and why the others do not.

    Args:
        weights: packed with everything dense: W in its own order of rows, whose outputs nobody looks at.
    """

    def made(make: Callable[..., Call]) -> list[Call]:
        return [make(shape, layer, x, x_scale, packed, routing) for packed, routing in zip(cycle(weights), routings)]

    return runnable({"cutlass": partial(made, cutlass_call), "triton": partial(made, triton_call)})


def runnable(makers: Mapping[str, Callable[[], list[Call]]]) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """Those of vLLM's calls that run here by name, and why the others do not."""
    found: dict[str, list[Call]] = {}
    missing = {}
    for name, make in makers.items():
        try:
            calls = make()
            for call in calls:
                call()
            torch.cuda.synchronize()
            found[name] = calls
        # Whatever it is, it is about vLLM, and is put down in the result.
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
            print(f"vLLM's {name} did not run: {missing[name]}", flush=True)
    return found, missing


def cutlass_call(
    shape: Shape, layer: str, x: torch.Tensor, x_scale: torch.Tensor, packed: reference.Packed, routing: Routing
) -> Call:
    """vLLM's choice on Hopper for weights with a scale for each channel."""
    from vllm import _custom_ops as ops

    device, experts = x.device, shape.experts
    sizes = {name: torch.empty(experts, 3, dtype=torch.int32, device=device) for name in ("gate_up", "down")}
    offsets = routing.offsets.long()
    swap = len(x) <= 64
    ops.get_cutlass_moe_mm_problem_sizes_from_expert_offsets(
        offsets, sizes["gate_up"], sizes["down"], shape.intermediate, shape.hidden, swap
    )
    n, k = packed["dense"].shape[1:]
    k_strides, n_strides = (torch.full((experts,), size, device=device, dtype=torch.int64) for size in (k, n))
    out = torch.empty(len(x), n, dtype=torch.bfloat16, device=device)
    scale = packed["w_scale"].unsqueeze(-1).contiguous()
    return partial(
        ops.cutlass_moe_mm, out, x, packed["dense"], x_scale, scale, offsets[:-1], sizes[layer], k_strides, k_strides,
        n_strides, True, True,
    )  # fmt: skip


def triton_call(
    shape: Shape, layer: str, x: torch.Tensor, x_scale: torch.Tensor, packed: reference.Packed, routing: Routing
) -> Call:
    """With x in the order of tokens, as vLLM's kernel gathers rows itself."""
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.triton_utils import tl

    tokens, top_k = routing.ids.shape
    up_shape = (shape.experts, 2 * shape.intermediate, shape.hidden)
    down_shape = (shape.experts, shape.hidden, shape.intermediate)
    config = fused_moe.try_get_optimal_moe_config(up_shape, down_shape, top_k, "fp8_w8a8", tokens)
    ids = routing.ids.int()
    sorted_ids, expert_ids, padded = fused_moe._prepare_expert_assignment(
        ids, config, tokens, top_k, shape.experts, None
    )
    rows = x[:tokens] if layer == "gate_up" else x
    out = torch.empty(tokens, top_k, packed["dense"].shape[1], dtype=torch.bfloat16, device=x.device)
    return partial(
        fused_moe.invoke_fused_moe_triton_kernel,
        A=rows,
        B=packed["dense"],
        C=out,
        A_scale=x_scale[: len(rows)],
        B_scale=packed["w_scale"].unsqueeze(-1).contiguous(),
        topk_weights=torch.ones(tokens, top_k, device=x.device),
        sorted_token_ids=sorted_ids,
        expert_ids=expert_ids,
        num_tokens_post_padded=padded,
        mul_routed_weight=layer == "down",
        top_k=top_k if layer == "gate_up" else 1,
        config=config,
        compute_type=tl.bfloat16,
        use_fp8_w8a8=True,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=True,
    )


if __name__ == "__main__":
    run_main(main)
