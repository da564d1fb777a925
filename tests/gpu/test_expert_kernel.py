"""The experts' GEMMs against float64 on a real GPU: `pytest -m gpu tests/gpu/test_expert_kernel.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from vllm_spense.format import Regions
from vllm_spense.kernels.expert_gemm import gemm, mixture, reference, routing
from vllm_spense.kernels.expert_gemm.instances import Tiling
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.region_gemm.reference import fp8_difference, silu_mul_quant
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
EXPERTS = 12
TILINGS = [Tiling(64, 256), Tiling(128, 256), Tiling(256, 128)]
#: Hidden size and regions: whole tiles; half tiles and steps; everything sparse; everything dense.
SHAPES = [
    (512, Regions(384, 128)),
    (640, Regions(288, 96)),
    (256, Regions(192, 0)),
    (384, Regions(0, 160)),
]
#: Tokens of each expert.
COUNTS = [
    (0, 1, 2, 8, 9, 0, 16, 17, 31, 33, 0, 5),
    (0,) * 7 + (700,) + (0,) * 4,
    (64, 65, 128, 129, 256, 257, 0, 1, 300, 7, 8, 0),
    (0,) * 11 + (3,),
    (0,) * 12,
]


def offsets_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()


class Layer:
    """gate_up or down of some experts, with random scales."""

    def __init__(self, problem: Problem, experts: int = EXPERTS) -> None:
        self.problem = problem
        weight = torch.stack([random_weight(problem, DEVICE) for _ in range(experts)])
        self.packed = reference.pack(weight, torch.rand(experts, problem.n, 1, device=DEVICE) + 0.5, problem)
        self.weights = torch.stack([reference.unpacked(self.packed, problem, expert) for expert in range(experts)])

    def exact(self, x: torch.Tensor, x_scale: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """float64."""
        out = torch.full((len(x), self.problem.n), torch.nan, dtype=torch.float64, device=DEVICE)
        begin = 0
        for expert, count in enumerate(counts):
            end = begin + count
            sums = x[begin:end].double() @ self.weights[expert].double().t()
            out[begin:end] = sums * x_scale[begin:end] * self.packed["w_scale"][expert]
            begin = end
        return out


def require_close(found: torch.Tensor, exact: torch.Tensor, *what: object) -> None:
    """BF16's rounding of each, and the tensor cores' of sums."""
    scale = exact.abs().mean()
    wrong = ~((found.double() - exact).abs() <= 0.008 * exact.abs() + 0.01 * scale)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        pytest.fail(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {(row, column)}: "
            f"found {found[row, column].item()}, expected {exact[row, column].item()}"
        )


def inputs(problem: Problem, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random_fp8(rows, problem.k, DEVICE), torch.rand(rows, 1, device=DEVICE) + 0.5


@pytest.mark.parametrize("cut", TILINGS, ids=str)
@pytest.mark.parametrize(("hidden", "regions"), SHAPES, ids=str)
def test_every_expert_multiplies_its_tokens(hidden: int, regions: Regions, cut: Tiling) -> None:
    for problem in reference.problems(hidden, regions):
        layer = Layer(problem)
        for counts, old, dtype in product(COUNTS, (False, True), (torch.int32, torch.int64)):
            x, x_scale = inputs(problem, sum(counts))
            out = torch.full((len(x), problem.n), torch.nan, dtype=torch.bfloat16, device=DEVICE)
            offsets = offsets_of(counts).to(dtype)
            torch.cuda.synchronize()
            gemm.run(x, x_scale, offsets, layer.packed, problem, out, offsets_are_old=old, cut=cut)
            require_close(out, layer.exact(x, x_scale, counts), problem, counts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_choices_are_counted_as_their_offsets_say(tokens: int, dtype: torch.dtype) -> None:
    problem, _ = reference.problems(512, Regions(384, 128))
    layer = Layer(problem)
    ids = random_choices(tokens, 8, EXPERTS)
    unsorted = torch.zeros(tokens, 512, dtype=torch.bfloat16, device=DEVICE)
    here = (torch.arange(EXPERTS, device=DEVICE).int() - 4).clamp(min=-1)
    for expert_map in (None, here):
        offsets = reference.route(unsorted, ids, EXPERTS, expert_map)[2]
        x, x_scale = inputs(problem, ids.numel())
        out, expected = (torch.zeros(len(x), problem.n, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        gemm.run(x, x_scale, offsets, layer.packed, problem, expected)
        nothing, choices = torch.full_like(offsets, -1), ids.to(dtype)
        torch.cuda.synchronize()
        gemm.run(x, x_scale, nothing, layer.packed, problem, out, ids=choices, expert_map=expert_map)
        assert torch.equal(out, expected), expert_map


def test_rows_of_no_expert_stay_as_they_are() -> None:
    """As with experts of other ranks: their tokens lie before and after."""
    problem, _ = reference.problems(512, Regions(384, 128))
    layer = Layer(problem)
    counts = COUNTS[0]
    rows = sum(counts)
    x, x_scale = inputs(problem, rows + 50)
    out = torch.full((len(x), problem.n), 7.0, dtype=torch.bfloat16, device=DEVICE)
    gemm.run(x, x_scale, offsets_of(counts) + 20, layer.packed, problem, out)
    require_close(out[20 : 20 + rows], layer.exact(x[20 : 20 + rows], x_scale[20 : 20 + rows], counts))
    assert (out[:20] == 7).all()
    assert (out[20 + rows :] == 7).all()


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    """Nor results on when they are computed: twice the same, to the bit."""
    for problem in reference.problems(640, Regions(288, 96)):
        layer = Layer(problem)
        x, x_scale = inputs(problem, 300)
        alone = gemm.run(x, x_scale, offsets_of((0, 0, 300)), {k: v[:3] for k, v in layer.packed.items()}, problem)
        for _ in range(5):
            again = gemm.run(x, x_scale, offsets_of((0, 0, 300)), {k: v[:3] for k, v in layer.packed.items()}, problem)
            assert torch.equal(alone, again)
        poisoned = x.clone()
        poisoned.view(torch.uint8)[1:] = 0x7F
        first = gemm.run(poisoned, x_scale, offsets_of((0, 0, 1, *[0] * 8, 299)), layer.packed, problem)
        require_close(first[:1], layer.exact(x[:1], x_scale[:1], (0, 0, 1)))


def random_choices(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """int32 (tokens, top_k), without repetition; three experts are never chosen."""
    return torch.rand(tokens, experts - 3, device=DEVICE).topk(top_k, -1).indices.int()


def require_twin(found: torch.Tensor, twin: torch.Tensor, *what: object) -> None:
    """Of a whole mixture: where a value's rounding differs, a step of FP8; of a row's largest, steps of all.

    One token was seen to move by 0.04 for that reason. A wrong expert moves it by several times the bound.
    """
    error = float((found.double() - twin.double()).norm() / twin.double().norm())
    assert error < 0.1, (what, error)


def test_tokens_find_their_experts() -> None:
    """Counted in every block, and with more choices than that; all experts here, and some elsewhere."""
    for tokens, top_k, experts, size in ((1, 8, 128, 2048), (77, 4, 12, 96), (512, 8, 128, 7168), (3000, 8, 40, 512)):
        x = torch.randn(tokens, size, dtype=torch.bfloat16, device=DEVICE)
        x[0] = 0
        ids = random_choices(tokens, top_k, experts)
        here = torch.arange(experts, device=DEVICE).int() - experts // 2
        for expert_map, choices in ((None, ids), (None, ids.long()), (here.clamp(min=-1), ids)):
            count = experts if expert_map is None else experts - experts // 2
            twin = reference.route(x, choices, count, expert_map)
            routed = routing.route(x, choices, count, expert_map)
            assert torch.equal(routed.offsets, twin[2]), (tokens, top_k, experts)
            assert torch.equal(routed.places, twin[3]), (tokens, top_k, experts)
            rows = len(twin[0])
            assert fp8_difference((routed.x[:rows], routed.x_scale[:rows]), twin[:2]) is None
            y = torch.randn(tokens * top_k, size, dtype=torch.bfloat16, device=DEVICE)
            weights = torch.rand(tokens, top_k, device=DEVICE)
            sums = routing.weighted_sum(y, routed.places, weights)
            require_close(sums, reference.weighted_sum(y.double(), routed.places, weights.double()))


@pytest.mark.parametrize(("experts", "top_k"), [(12, 8), (128, 8), (4, 8), (1, 8)])
def test_nothing_is_wrong_here(experts: int, top_k: int) -> None:
    """What serving tries before it takes these kernels; also with fewer experts on a rank than a token has."""
    assert mixture.fault(experts, top_k, DEVICE) is None


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_a_captured_mixture_follows_its_routing(tokens: int) -> None:
    hidden, top_k, regions = 512, 8, Regions(288, 96)
    problems = reference.problems(hidden, regions)
    packs = [Layer(problem).packed for problem in problems]
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
    ids, weights = random_choices(tokens, top_k, EXPERTS), torch.rand(tokens, top_k, device=DEVICE)
    mixture.prepare(problems, EXPERTS, top_k, tokens, DEVICE)
    mixture.run(x, ids, weights, *packs, problems)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mixture.run(x, ids, weights, *packs, problems)
    for _ in range(5):
        x.normal_()
        weights.uniform_()
        ids.copy_(random_choices(tokens, top_k, EXPERTS))
        captured.view(torch.uint8).fill_(0xFF)
        graph.replay()
        require_twin(captured, reference.mixture(x, ids, weights, *packs, problems), tokens)
        again = captured.clone()
        graph.replay()
        assert torch.equal(again, captured)


def test_the_activation_without_scales() -> None:
    from vllm_spense.kernels.elementwise import silu_mul_quant as kernel

    raw = torch.randn(37, 2 * 768, dtype=torch.bfloat16, device=DEVICE) * 3
    assert fp8_difference(kernel.run(raw, None, None, 576), silu_mul_quant(raw, None, None, 576)) is None
