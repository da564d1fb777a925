"""The experts' GEMM without a GPU: packed weights and their twin against a plain product, and the order of tiles as the
compiler works it out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch.nn.functional import silu

from vllm_spense.format import Regions
from vllm_spense.kernels.expert_gemm import gemm, instances, mixture, reference, routing
from vllm_spense.kernels.expert_gemm.instances import Tiling
from vllm_spense.kernels.jit import nvrtc, sources
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.region_gemm.reference import quantize
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight

HIDDEN, EXPERTS = 96, 5
REGIONS = [Regions(96, 32), Regions(128, 0), Regions(0, 64)]
#: Tokens of each expert: none, one, some.
COUNTS = (0, 1, 9, 0, 3)


def offsets_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def inputs(problem: Problem, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (E, N, K) and their scales; x and its scales."""
    cpu = torch.device("cpu")
    weight = torch.stack([random_weight(problem, cpu) for _ in range(experts)])
    x = random_fp8(sum(COUNTS), problem.k, cpu)
    return weight, torch.rand(experts, problem.n, 1) + 0.5, x, torch.rand(len(x), 1) + 0.5


@pytest.mark.parametrize("regions", REGIONS, ids=str)
def test_packed_weights_multiply_as_they_were(regions: Regions) -> None:
    for problem in reference.problems(HIDDEN, regions):
        weight, w_scale, x, x_scale = inputs(problem)
        packed = reference.pack(weight, w_scale, problem)
        assert tuple(packed) == reference.TENSORS
        out = torch.full((len(x), problem.n), torch.nan, dtype=torch.bfloat16)
        reference.run(x, x_scale, offsets_of(COUNTS), packed, problem, out)

        expert_of = torch.arange(EXPERTS).repeat_interleave(torch.tensor(COUNTS))
        exact = torch.einsum("tk,tnk->tn", x.double(), weight.double()[expert_of]) * x_scale
        exact *= w_scale.flatten(1)[expert_of]
        if problem.split == "output":
            gate, up = exact.chunk(2, -1)
            at = regions.sparse
            exact = torch.cat([gate[:, :at], up[:, :at], gate[:, at:], up[:, at:]], -1)
        torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("regions", REGIONS, ids=str)
def test_packed_weights_take_the_bytes_that_the_format_says(regions: Regions) -> None:
    for problem in reference.problems(HIDDEN, regions):
        weight, w_scale, *_ = inputs(problem)
        packed = reference.pack(weight, w_scale, problem)
        found = sum(packed[name].nbytes for name in ("compressed", "dense"))
        # Metadata comes in tiles of 64 × 64.
        sn, sk = problem.region_major().sparse_shape
        padding = (-(-sn // 64) * -(-sk // 64) * 512) - sn * sk // 8 if sn * sk else 0
        assert found == EXPERTS * (problem.weight_bytes + padding)


def bands(problem: Problem, cut: Tiling) -> list[tuple[int, ...]]:
    """As tuples of their fields."""
    return [tuple(getattr(band, name) for name, _ in band._fields_) for band in gemm._bands(problem, cut)]


def tiles(counts: Sequence[int], problem: Problem, cut: Tiling) -> Iterator[tuple[int, ...]]:
    """What expert_tiles.cuh shall find, by loops: (expert, row, row_end, column, token, token_end, width, index,
    sparse_steps, dense_steps, shared)."""
    offsets = offsets_of(counts).tolist()
    for rows, _, column, sparse_steps, dense_steps in bands(problem, cut):
        for expert, begin in enumerate(offsets[:-1]):
            for row in range(0, rows, instances.ROWS):
                for token in range(begin, offsets[expert + 1], cut.tokens):
                    end = min(token + cut.tokens, offsets[expert + 1])
                    index = next(i for i, width in enumerate(instances.WIDTHS) if width >= end - token)
                    yield (
                        expert, row, rows, column + row, token, end, instances.WIDTHS[index], index, sparse_steps,
                        dense_steps, int(counts[expert] > cut.tokens),
                    )  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "cut"),
    [
        ((0, 1, 9, 0, 3), Tiling(8, 256)),
        ((0, 0, 40, 0, 0), Tiling(16, 256)),
        ((33, 7, 0, 64, 65), Tiling(32, 128)),
        ((0, 0, 0, 0, 0), Tiling(64, 256)),
        ((300, 0, 256, 1, 17), Tiling(256, 128)),
    ],
    ids=str,
)
@pytest.mark.parametrize("problem", reference.problems(640, Regions(288, 96)), ids=str)
def test_the_order_of_tiles(counts: Sequence[int], cut: Tiling, problem: Problem) -> None:
    expected = list(tiles(counts, problem, cut))
    firsts = torch.tensor([0, *(-(-count // cut.tokens) for count in counts)]).cumsum(0).tolist()
    both = ", ".join("{" + ", ".join(map(str, band)) + "}" for band in bands(problem, cut))
    literals = ", ".join("{" + ", ".join(map(str, tile)) + "}" for tile in expected) or "{}"
    text = f"""
        #include "expert_tiles.cuh"
        #define LIST(...) {{__VA_ARGS__}}
        constexpr int offsets[] = LIST({", ".join(map(str, offsets_of(counts).tolist()))});
        constexpr int first[] = LIST({", ".join(map(str, firsts))});
        constexpr Band bands[] = LIST({both});
        constexpr Order<{cut.tokens}, {instances.ROWS}> order{{offsets, first, {len(counts)}, bands}};
        constexpr int expected[][11] = LIST({literals});
        __device__ constexpr bool same(int position) {{
            const Tile t = order.tile(position);
            const int found[] = {{
                t.expert, t.row, t.row_end, t.column, t.token, t.token_end, t.width, t.index, t.sparse_steps,
                t.dense_steps, t.shared}};
            for (int i = 0; i < 11; ++i)
                if (found[i] != expected[position][i]) return false;
            return true;
        }}
        __device__ constexpr int first_wrong() {{
            for (int position = 0; position < {len(expected)}; ++position)
                if (!same(position)) return position;
            return -1;
        }}
        static_assert(order.count() == {len(expected)}, "another number of tiles");
        static_assert(first_wrong() == -1, "another tile");
        __global__ void nothing() {{}}
    """
    options = ["--gpu-architecture=sm_90a", "--std=c++17"]
    nvrtc.compile_program({"order.cu": text, **sources.with_includes("expert_tiles.cuh")}, options)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mixture_is_the_weighted_sum_of_its_experts(ranks: int) -> None:
    """Also when two ranks have half of the experts each, and add up their parts."""
    tokens, top_k, regions = 11, 2, Regions(96, 32)
    problems = reference.problems(HIDDEN, regions)
    (up, up_scale, *_), (down, down_scale, *_) = (inputs(problem, EXPERTS + 1) for problem in problems)
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(EXPERTS + 1)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k)

    expected = torch.zeros(tokens, HIDDEN)
    for token, (choice, weight) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(choice, weight, strict=True):
            values, scale = quantize(x[token : token + 1])
            gate, up_sums = (scale * (values.float() @ (up[expert].float() * up_scale[expert]).t())).chunk(2, -1)
            values, scale = quantize(silu(gate.bfloat16().float()) * up_sums.bfloat16().float())
            expected[token] += share * (scale * (values.float() @ (down[expert].float() * down_scale[expert]).t()))[0]

    found = torch.zeros_like(expected)
    each = (EXPERTS + 1) // ranks
    for rank in range(ranks):
        mine = slice(rank * each, (rank + 1) * each)
        packs = [
            reference.pack(weight[mine], scale[mine], problem)
            for weight, scale, problem in zip((up, down), (up_scale, down_scale), problems, strict=True)
        ]
        numbers = torch.full((EXPERTS + 1,), -1, dtype=torch.int32)
        numbers[mine] = torch.arange(each, dtype=torch.int32)
        found += reference.mixture(x, ids, weights, *packs, problems, None if ranks == 1 else numbers).float()
    assert (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize(("experts", "top_k"), [(1, 8), (6, 2)])
def test_a_mixture_that_is_wrong_is_found(experts: int, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial before serving, with the twin in the kernels' place: right, wrong, no numbers."""

    def said(factor: float) -> str | None:
        monkeypatch.setattr(mixture, "run", lambda *given: reference.mixture(*given) * factor)
        return mixture.fault.__wrapped__(experts, top_k, torch.device("cpu"))

    assert said(1) is None
    assert "wrong on this machine: relative error 2.0e-01" in (said(1.2) or "")
    assert "relative error nan" in (said(torch.nan) or "")


def test_how_gate_up_begins() -> None:
    """It may read offsets without waiting only where an earlier launch than the one before it wrote them."""
    few, many = (
        torch.zeros(tokens, 8, dtype=torch.int32) for tokens in (routing.COUNTED // 8, routing.COUNTED // 8 + 1)
    )
    expert_map = torch.arange(EXPERTS)
    found = mixture.beginning(few, expert_map)
    assert found["ids"] is few
    assert found["expert_map"] is expert_map
    assert "offsets_are_old" not in found
    assert mixture.beginning(many, expert_map) == {"offsets_are_old": True}
