"""`spense::region_gemm` against float64, eager and compiled, and its registration."""

from dataclasses import replace

import pytest
import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.problem import OUT_DTYPES, Problem, Scales, Split
from vllm_spense.ops import gemm
from vllm_spense.ops.dispatch import Device
from vllm_spense.ops.layer_plan import pack

FP8 = torch.float8_e4m3fn


def make(problem: Problem, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) and W (N, K), FP8, with values of all sizes that FP8 has."""
    generator = torch.Generator().manual_seed(tokens)
    return tuple(
        (torch.randn(rows, problem.k, generator=generator) * 100).clamp(-448, 448).to(FP8)
        for rows in (tokens, problem.n)
    )


def problem(split: Split, sparse: int, dense: int, out_dtype: torch.dtype = torch.float32) -> Problem:
    n, k = (sparse + dense, 96) if split == "output" else (96, sparse + dense)
    return Problem(n, k, Regions(sparse, dense), split, out_dtype)


def run(x: torch.Tensor, weight: torch.Tensor, p: Problem, scales: Scales | None = None) -> torch.Tensor:
    return gemm.region_gemm(x, *gemm.op_arguments(pack(weight, p), p), scales)


@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
@pytest.mark.parametrize(("sparse", "dense"), [(96, 32), (128, 0), (0, 128)])
@pytest.mark.parametrize("split", ["output", "input"])
def test_against_float64(split: Split, sparse: int, dense: int, tokens: int) -> None:
    p = problem(split, sparse, dense)
    x, weight = make(p, tokens)
    exact = x.double() @ weight.double().t()
    found = run(x, weight, p)
    assert found.dtype == torch.float32
    # K products, each exact, summed in float32: at most K roundings of a partial sum.
    bound = p.k * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().t())
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("split", ["output", "input"])
def test_bfloat16_sums(split: Split) -> None:
    p = problem(split, 96, 32, torch.bfloat16)
    x, weight = make(p, 8)
    found = run(x, weight, p)
    assert found.dtype == torch.bfloat16
    # One rounding of the result, and for input-split one of the sparse region's sum.
    size = x.double().abs() @ weight.double().abs().t()
    assert (
        (found.double() - x.double() @ weight.double().t()).abs() <= 2 * torch.finfo(torch.bfloat16).eps * size
    ).all()


@pytest.mark.parametrize("split", ["output", "input"])
def test_a_scaled_problem_multiplies_by_the_scales(split: Split) -> None:
    p = replace(problem(split, 96, 32), scaled=True)
    x, weight = make(p, 8)
    scales = torch.rand(8, 1) / 100, torch.rand(p.n, 1)
    found = run(x, weight, p, scales)
    exact = x.double() @ weight.double().t() * scales[0] * scales[1].t()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-2)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = gemm.region_gemm(mode.from_tensor(x), *gemm.op_arguments(pack(weight, p), p), scales)
    assert (fake.shape, fake.dtype) == (found.shape, found.dtype)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_merged_projections_are_scaled_by_their_own_rows(out_dtype: torch.dtype) -> None:
    p = Problem(128, 96, Regions(32, 32), "output", out_dtype, projections=2, scaled=True)
    x, weight = make(p, 7)
    scales = torch.rand(7, 1) / 100, torch.rand(128, 1) + 0.5
    found = run(x, weight, p, scales)
    assert found.dtype == out_dtype
    size = x.double().abs() @ weight.double().abs().t() * scales[0] * scales[1].t()
    exact = x.double() @ weight.double().t() * scales[0] * scales[1].t()
    # A rounding of the sum, one of the product, and float32's on the way.
    assert ((found.double() - exact).abs() <= (2 * torch.finfo(out_dtype).eps + 1e-5) * size).all()


HOPPER = Device("cuda", (9, 0), bindings=True)


@pytest.mark.parametrize(
    ("device", "p", "expected"),
    [
        (HOPPER, problem("output", 96, 32, torch.bfloat16), True),
        (replace(HOPPER, one_launch_fault="a compiler's bug"), problem("output", 96, 32, torch.bfloat16), True),
        (HOPPER, problem("output", 96, 32, torch.float32), False),
        (HOPPER, problem("output", 88, 40, torch.bfloat16), False),
        (replace(HOPPER, capability=(10, 0)), problem("output", 96, 32, torch.bfloat16), False),
        (replace(HOPPER, capability=(8, 9)), problem("output", 96, 32, torch.bfloat16), False),
        (replace(HOPPER, bindings=False), problem("output", 96, 32, torch.bfloat16), False),
        (Device("cpu"), problem("output", 96, 32, torch.bfloat16), False),
    ],
    ids=["Hopper", "libraries alone", "float16 models", "odd regions", "Blackwell", "Ada", "no bindings", "CPU"],
)
def test_where_a_gemm_applies_scales(
    monkeypatch: pytest.MonkeyPatch, device: Device, p: Problem, expected: bool
) -> None:
    monkeypatch.setattr(gemm, "describe", lambda _: device)
    assert gemm.applies_scales(p, torch.device("cpu")) == expected


@pytest.mark.parametrize("split", ["output", "input"])
def test_registration(split: Split) -> None:
    p = problem(split, 96, 32)
    x, weight = make(p, 5)
    # opcheck compares inputs before and after, which torch cannot in FP8.
    arguments = (x.float(), *gemm.op_arguments(pack(weight, p), p))
    torch.library.opcheck(torch.ops.spense.region_gemm.default, arguments)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize(("split", "projections"), [("output", 2), ("input", 1)])
def test_a_problem_comes_back_from_its_key(split: Split, projections: int, out_dtype: torch.dtype) -> None:
    for scaled, separate in ((False, False), (True, False), *([(False, True)] if split == "input" else [])):
        regions = Regions(96, 256 // projections - 96)
        p = Problem(256, 256, regions, split, out_dtype, projections, scaled, separate)
        assert Problem.from_op_key(p.op_key) == p


def test_one_graph_for_every_number_of_tokens() -> None:
    p = problem("output", 96, 32)
    _, weight = make(p, 1)
    packed = pack(weight, p)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return gemm.region_gemm(x, *gemm.op_arguments(packed, p)) * 2

    compiled = torch.compile(doubled, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (3, 5, 17):
        x, _ = make(p, tokens)
        assert torch.equal(compiled(x), doubled(x))
    assert len(graphs) == 1


def test_packed_weights_do_not_keep_the_whole_weight() -> None:
    p = problem("input", 96, 32)
    _, weight = make(p, 1)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in pack(weight, p).values())


def test_merged_projections_keep_their_rows_order() -> None:
    p = Problem(128, 96, Regions(32, 32), "output", torch.float32, projections=2)
    x, weight = make(p, 7)
    found = run(x, weight, p)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1)


def test_projections_run_region_by_region_and_come_back_in_order() -> None:
    p = Problem(128, 96, Regions(48, 16), "output", torch.float32, projections=2)
    x, weight = make(p, 7)
    raw = run(x, p.by_region(weight), p.region_major())
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(reference.by_projection(raw, 48).double(), exact, rtol=1e-5, atol=1)
    torch.testing.assert_close(raw[:, 48:96].double(), exact[:, 64:112], rtol=1e-5, atol=1)
    assert torch.equal(reference.by_projection(raw, 64), raw)
