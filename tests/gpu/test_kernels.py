"""Every path against float64 on a real GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.problem import DENSE_COPY, Problem, Scales, Split
from vllm_spense.ops.dispatch import Path

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("nvmath", reason="needs nvmath-python")

from vllm_spense.kernels.one_launch.schedule import Tiling
from vllm_spense.kernels.one_launch.semaphores import semaphores
from vllm_spense.kernels.region_gemm import cusparselt, dense, library, one_launch, packing, reference
from vllm_spense.kernels.tuning import autotune
from vllm_spense.kernels.tuning.synthetic import random_2of4, random_fp8, random_weight, unit_scales
from vllm_spense.kernels.tuning.timing import median_us
from vllm_spense.ops import gemm, layer_plan, path_timing
from vllm_spense.ops.layer_plan import op_key, pack, plan_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
TOKENS = (1, 7, 8, 16, 17, 24, 32, 40, 64, 100, 128, 256, 512, 1000, 2048)
PROBLEMS = [
    Problem(n, k, Regions(extent - int(extent * ratio), int(extent * ratio)), split, out_dtype, projections, scaled)
    for (split, n, k, projections), ratio, out_dtype in product(
        (("output", 2048, 1024, 2), ("output", 1280, 2560, 1), ("input", 1024, 4096, 1), ("input", 640, 2048, 1)),
        (0.5, 0.25, 0.0, 1.0),
        (torch.bfloat16, torch.float32),
    )
    for extent in (n // projections if split == "output" else k,)
    for scaled in ((False, True) if out_dtype == torch.bfloat16 else (False,))
]
#: Ways to cut a GEMM for the one-launch path, but for the number of tokens.
CUTS = [
    (sparse_k, splits, cluster)
    for sparse_k in (128, 256)
    for splits, cluster in ((0, False), (2, False), (5, False), (2, True), (3, True), (8, True))
]
#: x (M, K) → out (padded M, N), written.
Run = Callable[[torch.Tensor, torch.Tensor], None]


@cache
def scales_of(problem: Problem, tokens: int) -> Scales | None:
    """Random ones, always the same."""
    if scales := unit_scales(problem, tokens, DEVICE):
        for scale in scales:
            scale.uniform_(0.5, 2)
    return scales


def product_of(x: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """What every path shall compute, in float64."""
    exact = x.double() @ weight.double().t()
    if scales := scales_of(problem, len(x)):
        exact = exact * scales[0] * scales[1].t()
    return exact


def runners(problem: Problem, weight: torch.Tensor, tokens: int) -> dict[str, Run]:
    """Every way to compute x · weightᵀ."""
    runs: dict[str, Run] = {}
    libraries = library.pack(weight, problem)
    scales = scales_of(problem, tokens)
    for concurrent, sms, first in ((False, 0, False), (True, 0, False), (True, 52, True)):
        choice = library.Choice(concurrent=concurrent, sms=sms, dense_first=first)
        plan = library.LibraryPlan(problem, library.padded(tokens), DEVICE, choice)
        runs[f"library, {concurrent=}, {sms=}"] = lambda x, out, plan=plan: plan.run(x, libraries, out, scales)
    for cut in CUTS:
        tiling = Tiling(one_launch.tile_tokens(tokens), *cut)
        if one_launch.fits(tiling):
            launch = one_launch.OneLaunchPlan(problem, tokens, DEVICE, tiling)
            runs[str(tiling)] = lambda x, out, plan=launch: plan.run(x, libraries, out[: len(x)], scales)
    return runs


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


def tolerance(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> float:
    """Twice the error of torch's own FP8 GEMM."""
    one = torch.ones((), device=DEVICE)
    torch_out = torch._scaled_mm(x, weight.t(), one, one, out_dtype=out_dtype, use_fast_accum=True)
    return 2 * error(torch_out, x.double() @ weight.double().t())


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_path_computes_the_product(problem: Problem) -> None:
    torch.manual_seed(0)
    weight = random_weight(problem, DEVICE)
    for tokens in TOKENS:
        x = random_fp8(tokens, problem.k, DEVICE)
        exact = product_of(x, weight, problem)
        allowed = tolerance(x, weight, problem.out_dtype)
        for name, run in runners(problem, weight, tokens).items():
            out = torch.full((library.padded(tokens), problem.n), torch.nan, dtype=problem.out_dtype, device=DEVICE)
            run(x, out)
            found = error(out[:tokens], exact)
            assert found <= allowed, f"{name}, {tokens} tokens: error {found:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("tokens", [48, 320])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_path_repeats_itself_to_the_bit(problem: Problem, tokens: int) -> None:
    weight = random_weight(problem, DEVICE)
    x = random_fp8(tokens, problem.k, DEVICE)
    for name, run in runners(problem, weight, tokens).items():
        first, again = (torch.empty(tokens, problem.n, dtype=problem.out_dtype, device=DEVICE) for _ in range(2))
        run(x, first)
        for _ in range(20):
            run(x, again)
            assert torch.equal(first, again), name


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_workspace_changes_nothing(problem: Problem) -> None:
    """Whatever an earlier launch has left in it."""
    tokens = 48
    weight, x = one_launch.pack(random_weight(problem, DEVICE), problem), random_fp8(tokens, problem.k, DEVICE)
    scales = unit_scales(problem, tokens, DEVICE)
    plan = one_launch.OneLaunchPlan(problem, tokens, DEVICE, Tiling(64, 128, splits=3))
    workspace = torch.full((plan.partial_floats,), torch.nan, device=DEVICE)
    expected = plan.run(x, weight, scales=scales)
    for _ in range(3):
        assert torch.equal(plan.run(x, weight, scales=scales, workspace=workspace), expected)


@pytest.mark.parametrize("tokens", [7, 32, 200])
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
                exact = product_of(x, weight, problem)
                assert error(out[:tokens], exact) <= tolerance(x, weight, problem.out_dtype), name


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_separate_outputs_are_those_of_the_regions(out_dtype: torch.dtype) -> None:
    problem = Problem(1024, 4096, Regions(2560, 1536), "input", out_dtype, separate_outputs=True)
    weight = random_weight(problem, DEVICE)
    packed = library.pack(weight, problem)
    for tokens in (7, 100, 512):
        x = random_fp8(tokens, problem.k, DEVICE)
        in_turn, at_once = (
            library.LibraryPlan(problem, library.padded(tokens), DEVICE, library.Choice(concurrent=concurrent))
            for concurrent in (False, True)
        )
        whole, nothing = in_turn.sums(x, packed)
        assert nothing is None
        assert error(whole, x.double() @ weight.double().t()) <= tolerance(x, weight, out_dtype)
        outputs = at_once.sums(x, packed)
        for found, columns in zip(outputs, (slice(0, 2560), slice(2560, None)), strict=True):
            exact = x[:, columns].double() @ weight[:, columns].double().t()
            assert found is not None
            assert found.shape == (tokens, problem.n)
            assert error(found, exact) <= tolerance(x, weight, out_dtype)
        assert torch.equal(at_once.run(x, packed), outputs[0].add_(outputs[1]))


def test_a_search_tries_kernels_for_a_share_of_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 256 tokens neither GEMM fills it, and at 1024 both do. Which kernel wins is up to the GPU."""
    problem = Problem(4096, 14336, Regions(10752, 3584), "input", separate_outputs=True)
    tried: list[library.Choice] = []

    class Seen(library.LibraryPlan):
        def __init__(self, *arguments, **settings) -> None:
            super().__init__(*arguments, **settings)
            tried.append(self.choice)

    monkeypatch.setattr(library, "LibraryPlan", Seen)
    weight = random_weight(problem, DEVICE)
    for tokens, shares in ((256, True), (1024, False)):
        tried.clear()
        found = library.search(problem, tokens, DEVICE)
        assert any(choice.sms for choice in tried) == shares
        assert {choice.dense_first for choice in tried if choice.concurrent} == {False, True}
        x = random_fp8(tokens, problem.k, DEVICE)
        out = Seen(problem, tokens, DEVICE, found).run(x, library.pack(weight, problem))
        assert error(out, x.double() @ weight.double().t()) <= tolerance(x, weight, torch.bfloat16)


def test_two_layers_share_a_plan() -> None:
    problem = Problem(1024, 4096, Regions(2048, 2048), "input")
    x = random_fp8(32, problem.k, DEVICE)
    libraries = library.LibraryPlan(problem, 32, DEVICE, library.Choice(concurrent=True))
    launches = [one_launch.OneLaunchPlan(problem, 32, DEVICE, Tiling(32, *cut)) for cut in CUTS]
    for _ in range(2):
        weight = random_weight(problem, DEVICE)
        exact = x.double() @ weight.double().t()
        packed = library.pack(weight, problem)
        for plan in (libraries, *launches):
            out = plan.run(x, packed)
            assert error(out, exact) <= tolerance(x, weight, problem.out_dtype)


@pytest.mark.parametrize("tokens", [32, 128, 600])
def test_launches_of_two_streams_do_not_disturb_each_other(tokens: int) -> None:
    """Nor do they wait for each other, where both together have more thread blocks than there is room for."""
    problem = Problem(1024, 8192, Regions(4096, 4096), "input")
    weight = random_weight(problem, DEVICE)
    packed = library.pack(weight, problem)
    xs = [random_fp8(tokens, problem.k, DEVICE) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in xs]
    for tiling in (Tiling(one_launch.tile_tokens(tokens), *cut) for cut in CUTS):
        if not one_launch.fits(tiling):
            continue
        plan = one_launch.OneLaunchPlan(problem, tokens, DEVICE, tiling)
        alone = [plan.run(x, packed) for x in xs]
        torch.cuda.synchronize()
        outs: list[list[torch.Tensor]] = [[], []]
        for _ in range(50):
            for x, stream, found in zip(xs, streams, outs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(plan.run(x, packed))
        torch.cuda.synchronize()
        for expected, found in zip(alone, outs, strict=True):
            assert all(torch.equal(out, expected) for out in found), tiling


@pytest.mark.parametrize("tokens", [32, 256])
def test_graphs_replayed_at_once_do_not_disturb_each_other(tokens: int) -> None:
    """Each has several launches, which share semaphores among themselves but not with those of another graph."""
    problem = Problem(1024, 8192, Regions(4096, 4096), "input")
    packed = library.pack(random_weight(problem, DEVICE), problem)
    xs = [random_fp8(tokens, problem.k, DEVICE) for _ in range(2)]
    for tiling in (Tiling(tokens, 128), Tiling(tokens, 128, 3)):
        plan = one_launch.OneLaunchPlan(problem, tokens, DEVICE, tiling)
        alone = [plan.run(x, packed) for x in xs]
        graphs, outs = [torch.cuda.CUDAGraph() for _ in xs], []
        for x, graph in zip(xs, graphs, strict=True):
            with torch.cuda.graph(graph):
                outs.append([plan.run(x, packed) for _ in range(8)])
        streams = [torch.cuda.Stream() for _ in xs]
        for _ in range(20):
            for out in outs[0] + outs[1]:
                out.fill_(torch.nan)
            torch.cuda.synchronize()
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            for expected, found in zip(alone, outs, strict=True):
                assert all(torch.equal(out, expected) for out in found), tiling


def test_a_plan_is_not_made_during_a_capture() -> None:
    problem = Problem(1024, 4096, Regions(2048, 2048), "input")
    with pytest.raises(RuntimeError, match="captured before it ran once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        one_launch.OneLaunchPlan(problem, 32, DEVICE, Tiling(32, 128, 3))


def test_timing_returns_its_semaphores() -> None:
    problem = Problem(1024, 4096, Regions(2048, 2048), "input")
    packed = library.pack(random_weight(problem, DEVICE), problem)
    x = random_fp8(32, problem.k, DEVICE)
    plan = one_launch.OneLaunchPlan(problem, 32, DEVICE, Tiling(32, 128, 3))
    plan.run(x, packed)
    left = semaphores(DEVICE).left
    for _ in range(3):
        median_us([lambda: plan.run(x, packed)])
        assert semaphores(DEVICE).left == left


@pytest.mark.parametrize(("n", "k"), [(32, 32), (64, 64), (160, 96), (96, 352), (1024, 512)])
def test_cusparselt_compresses_as_documented(n: int, k: int) -> None:
    weight = random_2of4(n, k, DEVICE)
    weight.view(torch.uint8).mul_(torch.rand(n, k, device=DEVICE) > 0.2)
    compressed = cusparselt.compress(weight)
    assert torch.equal(compressed, packing.compress(weight))
    assert torch.equal(packing.decompress(compressed, n, k).view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize(
    ("out_dtype", "scaled"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)]
)
def test_the_op_agrees_with_its_reference_twin(out_dtype: torch.dtype, scaled: bool) -> None:
    """Whatever the policy chooses, on either side of every border."""
    for split, projections in (("output", 1), ("output", 2), ("input", 1)):
        regions = Regions(256 // projections, 256 // projections)
        problem = Problem(512, 512, regions, split, out_dtype, projections, scaled)
        weight = random_weight(problem, DEVICE)
        packed = pack(weight, problem)
        twin = reference.pack(weight, problem)
        plan_of(problem.op_key, DEVICE).prepare(2048)
        for tokens in (1, 8, 64, 65, 128, 256, 257, 512, 513, 1000, 2048):
            x, scales = random_fp8(tokens, problem.k, DEVICE), scales_of(problem, tokens)
            exact = product_of(x, weight, problem)
            allowed = tolerance(x, weight, out_dtype)
            assert error(gemm.region_gemm(x, *gemm.op_arguments(packed, problem), scales), exact) <= allowed
            assert error(reference.run(x, twin, problem, scales), exact) <= allowed


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("split", "n", "k", "projections"), [("output", 1024, 512, 1), ("output", 2048, 512, 2), ("input", 512, 1024, 1)]
)
def test_a_dense_copy_computes_the_same(split: Split, n: int, k: int, projections: int, scaled: bool) -> None:
    separate = split == "input" and not scaled
    problem = Problem(n, k, Regions(512, 512), split, projections=projections, scaled=scaled, separate_outputs=separate)
    weight = random_weight(problem, DEVICE)
    dense.prepare(problem, 1, 512, DEVICE)
    for tokens in (1, 40, 256, 512):
        x = random_fp8(tokens, k, DEVICE)
        out = dense.run(x, {DENSE_COPY: weight}, problem, scales_of(problem, tokens))
        assert error(out, product_of(x, weight, problem)) <= tolerance(x, weight, torch.bfloat16)


def test_an_op_runs_the_copy_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(512, 1024, Regions(512, 512), "input", separate_outputs=True)
    weight = random_weight(problem, DEVICE)
    packed = pack(weight, problem) | {DENSE_COPY: weight}
    x, ran = random_fp8(256, problem.k, DEVICE), []
    monkeypatch.setattr(layer_plan, "choose", lambda paths, tokens, us: Path.DENSE)
    monkeypatch.setattr(dense, "run", lambda *arguments, run=dense.run: ran.append(1) or run(*arguments))
    plan_of.cache_clear()
    assert plan_of(op_key(problem, dense_copy=True), DEVICE).tensors == tuple(packed)
    out = gemm.region_gemm(x, *gemm.op_arguments(packed, problem))
    plan_of.cache_clear()
    assert ran
    assert error(out, x.double() @ weight.double().t()) <= tolerance(x, weight, torch.bfloat16)


def test_paths_are_timed_against_each_other_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    problem = Problem(768, 2048, Regions(1024, 1024), "input", separate_outputs=True)
    paths = (Path.ONE_LAUNCH, Path.LIBRARY, Path.DENSE)
    times = path_timing.times(paths, problem, 256, DEVICE)
    assert set(times) == set(paths)
    assert all(us > 0 for us in times.values())

    monkeypatch.setattr(autotune, "medians_us", lambda *_: pytest.fail("timed again"))
    path_timing.times.cache_clear()
    assert path_timing.times(paths, problem, 256, DEVICE) == times
    # But not where a search has found something else, or the kernel is another.
    monkeypatch.setattr(one_launch, "found", lambda *_: {"source": "of tomorrow"})
    path_timing.times.cache_clear()
    with pytest.raises(pytest.fail.Exception, match="timed again"):
        path_timing.times(paths, problem, 256, DEVICE)


@pytest.mark.parametrize("path", [library, one_launch], ids=lambda path: path.__name__.rpartition(".")[2])
def test_a_search_is_kept_for_the_next_process(path, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    problem = Problem(1536, 1024, Regions(1024, 512), "output")
    weight = random_weight(problem, DEVICE)
    x = random_fp8(24, problem.k, DEVICE)
    out = path.run(x, path.pack(weight, problem), problem)
    exact = x.double() @ weight.double().t()
    assert error(out, exact) <= tolerance(x, weight, problem.out_dtype)
    assert len(list(tmp_path.glob("*.json"))) == 1

    monkeypatch.setattr(path, "search", lambda *arguments: pytest.fail("searched again"))
    for memory in ("plan", "_choice", "_found"):
        if clear := getattr(getattr(path, memory, None), "cache_clear", None):
            clear()
    assert torch.equal(path.run(x, path.pack(weight, problem), problem), out)


def test_a_second_stream_must_pay_where_the_host_is_the_limit() -> None:
    at_once = library.Choice(concurrent=True, us=100)
    for us, tokens, worth_it in ((102, 1024, False), (104, 1024, True), (102, 512, True), (102, 2048, True)):
        in_turn = library.Choice(us=us)
        found = library.host_aware([at_once, in_turn, library.Choice(us=120)], tokens)
        assert found == (at_once if worth_it else in_turn)


@pytest.mark.parametrize("path", [library, one_launch], ids=lambda path: path.__name__.rpartition(".")[2])
def test_a_path_takes_any_number_of_tokens(path, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    problem = Problem(256, 1024, Regions(512, 512), "input")
    weight = random_weight(problem, DEVICE)
    packed = path.pack(weight, problem)
    for tokens in (1, 600, 4096, 16384):
        x = random_fp8(tokens, problem.k, DEVICE)
        exact = x.double() @ weight.double().t()
        assert error(path.run(x, packed, problem), exact) <= tolerance(x, weight, problem.out_dtype)


@pytest.mark.parametrize("path", [library, one_launch], ids=lambda path: path.__name__.rpartition(".")[2])
def test_a_search_during_capture_says_so(path, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    problem = Problem(4096, 512, Regions(2048, 2048), "output")
    packed = path.pack(random_weight(problem, DEVICE), problem)
    x = random_fp8(16, problem.k, DEVICE)
    with pytest.raises(RuntimeError, match="captured before it ran once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        path.run(x, packed, problem)
