"""Every path against float64 on a real GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.problem import Problem

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("nvmath", reason="needs nvmath-python")

from vllm_spense.kernels import library, one_launch
from vllm_spense.kernels.synthetic import random_fp8, random_weight

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
TOKENS = (1, 7, 8, 16, 17, 24, 32, 40, 64, 100, 128, 256, 512, 1000, 2048)
PROBLEMS = [
    Problem(n, k, Regions(extent - int(extent * ratio), int(extent * ratio)), split, out_dtype)
    for (split, n, k), ratio, out_dtype in product(
        (("output", 2048, 1024), ("output", 1280, 2560), ("input", 1024, 4096), ("input", 640, 2048)),
        (0.5, 0.25, 0.0, 1.0),
        (torch.bfloat16, torch.float32),
    )
    for extent in (n if split == "output" else k,)
]
TILINGS = (
    one_launch.Tiling(64, 128, 5, 6, 4, sparse_parts=1, dense_parts=1),
    one_launch.Tiling(64, 128, 3, 4, 4, sparse_parts=2, dense_parts=3),
    one_launch.Tiling(128, 256, 3, 3, 4, sparse_parts=1, dense_parts=2),
    one_launch.Tiling(128, 128, 4, 5, 8, sparse_parts=3, dense_parts=1),
)
#: x (M, K) → out (padded M, N), written.
Run = Callable[[torch.Tensor, torch.Tensor], None]


def runners(problem: Problem, weight: torch.Tensor, tokens: int) -> dict[str, Run]:
    """Every way to compute x · weightᵀ."""
    runs: dict[str, Run] = {}
    libraries = library.pack(weight, problem)
    for concurrent in (False, True):
        plan = library.LibraryPlan(problem, library.padded(tokens), DEVICE, library.Choice(concurrent=concurrent))
        runs[f"library, concurrent={concurrent}"] = lambda x, out, plan=plan: plan.run(x, libraries, out)
    tiles = one_launch.pack(weight, problem)
    for tiling in TILINGS:
        if tiling.fits(problem):
            launch = one_launch.OneLaunchPlan(problem, tokens, DEVICE, tiling)
            runs[str(tiling)] = lambda x, out, plan=launch: plan.run(one_launch.kernel_order(x), tiles, out[: len(x)])
    return runs


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


def tolerance(x: torch.Tensor, weight: torch.Tensor, exact: torch.Tensor, out_dtype: torch.dtype) -> float:
    """Twice the error of torch's own FP8 GEMM."""
    one = torch.ones((), device=DEVICE)
    torch_out = torch._scaled_mm(x, weight.t(), one, one, out_dtype=out_dtype, use_fast_accum=True)
    return 2 * error(torch_out, exact)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_path_computes_the_product(problem: Problem) -> None:
    torch.manual_seed(0)
    weight = random_weight(problem, DEVICE)
    for tokens in TOKENS:
        x = random_fp8(tokens, problem.k, DEVICE)
        exact = x.double() @ weight.double().t()
        allowed = tolerance(x, weight, exact, problem.out_dtype)
        for name, run in runners(problem, weight, tokens).items():
            out = torch.full((library.padded(tokens), problem.n), torch.nan, dtype=problem.out_dtype, device=DEVICE)
            run(x, out)
            found = error(out[:tokens], exact)
            assert found <= allowed, f"{name}, {tokens} tokens: error {found:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_path_repeats_itself_to_the_bit(problem: Problem) -> None:
    weight = random_weight(problem, DEVICE)
    x = random_fp8(48, problem.k, DEVICE)
    for name, run in runners(problem, weight, 48).items():
        first, again = (torch.empty(48, problem.n, dtype=problem.out_dtype, device=DEVICE) for _ in range(2))
        run(x, first)
        for _ in range(20):
            run(x, again)
            assert torch.equal(first, again), name


@pytest.mark.parametrize("tokens", [7, 32])
@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if problem.regions.dense_ratio == 0.5], ids=str)
def test_a_captured_graph_follows_its_inputs(problem: Problem, tokens: int) -> None:
    """One plan serves two layers in the graph, as in a model."""
    weights = [random_weight(problem, DEVICE) for _ in range(2)]
    first, second = (runners(problem, weight, tokens) for weight in weights)
    x = random_fp8(tokens, problem.k, DEVICE)
    for name in first:
        outs = [
            torch.empty(library.padded(tokens), problem.n, dtype=problem.out_dtype, device=DEVICE) for _ in range(2)
        ]
        first[name](x, outs[0])
        second[name](x, outs[1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first[name](x, outs[0])
            second[name](x, outs[1])
        for _ in range(3):
            x.copy_(random_fp8(tokens, problem.k, DEVICE))
            for out in outs:
                out.fill_(torch.nan)
            graph.replay()
            for weight, out in zip(weights, outs, strict=True):
                exact = x.double() @ weight.double().t()
                assert error(out[:tokens], exact) <= tolerance(x, weight, exact, problem.out_dtype), name


def test_two_layers_share_a_plan() -> None:
    problem = Problem(1024, 4096, Regions(2048, 2048), "input")
    x = random_fp8(32, problem.k, DEVICE)
    libraries = library.LibraryPlan(problem, 32, DEVICE, library.Choice(concurrent=True))
    launch = one_launch.OneLaunchPlan(problem, 32, DEVICE, TILINGS[1])
    for _ in range(2):
        weight = random_weight(problem, DEVICE)
        exact = x.double() @ weight.double().t()
        for out in (
            libraries.run(x, library.pack(weight, problem)),
            launch.run(one_launch.kernel_order(x), one_launch.pack(weight, problem)),
        ):
            assert error(out, exact) <= tolerance(x, weight, exact, problem.out_dtype)


def test_one_launch_writes_into_a_slice_and_nothing_beside_it() -> None:
    problem = Problem(1024, 2048, Regions(512, 512), "output")
    weight = random_weight(problem, DEVICE)
    x = random_fp8(24, problem.k, DEVICE)
    wide = torch.full((32, problem.n + 128), 7.0, dtype=problem.out_dtype, device=DEVICE)
    out = wide[:24, 64:-64]
    plan = one_launch.OneLaunchPlan(problem, 32, DEVICE, TILINGS[0])
    plan.run(one_launch.kernel_order(x), one_launch.pack(weight, problem), out)
    exact = x.double() @ weight.double().t()
    assert error(out, exact) <= tolerance(x, weight, exact, problem.out_dtype)
    out.fill_(7.0)
    assert torch.equal(wide, torch.full_like(wide, 7.0))


@pytest.mark.parametrize("path", [library, one_launch], ids=lambda path: path.__name__.rpartition(".")[2])
def test_a_search_is_kept_for_the_next_process(path, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    problem = Problem(1536, 1024, Regions(1024, 512), "output")
    weight = random_weight(problem, DEVICE)
    x = random_fp8(24, problem.k, DEVICE)
    out = path.run(x, path.pack(weight, problem), problem)
    exact = x.double() @ weight.double().t()
    assert error(out, exact) <= tolerance(x, weight, exact, problem.out_dtype)
    assert len(list(tmp_path.iterdir())) == 1

    monkeypatch.setattr(path, "search", lambda *arguments: pytest.fail("searched again"))
    for memory in ("plan", "_plan"):
        if clear := getattr(getattr(path, memory, None), "cache_clear", None):
            clear()
    assert torch.equal(path.run(x, path.pack(weight, problem), problem), out)


@pytest.mark.parametrize("path", [library, one_launch], ids=lambda path: path.__name__.rpartition(".")[2])
def test_a_path_takes_any_number_of_tokens(path, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    problem = Problem(256, 1024, Regions(512, 512), "input")
    weight = random_weight(problem, DEVICE)
    packed = path.pack(weight, problem)
    for tokens in (1, 600, 16384):
        x = random_fp8(tokens, problem.k, DEVICE)
        exact = x.double() @ weight.double().t()
        assert error(path.run(x, packed, problem), exact) <= tolerance(x, weight, exact, problem.out_dtype)


@pytest.mark.parametrize("path", [library, one_launch], ids=lambda path: path.__name__.rpartition(".")[2])
def test_a_search_during_capture_says_so(path, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    problem = Problem(4096, 512, Regions(2048, 2048), "output")
    packed = path.pack(random_weight(problem, DEVICE), problem)
    x = random_fp8(16, problem.k, DEVICE)
    with pytest.raises(RuntimeError, match="captured before it ran once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        path.run(x, packed, problem)
