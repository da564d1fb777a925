"""`spense::region_gemm` against float64, eager and compiled, and its registration."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.problem import COPY, OUT_DTYPES, Problem, Split
from vllm_spense.ops import gemm
from vllm_spense.ops.dispatch import GRANT, SWITCH, Device, Path

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


@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
@pytest.mark.parametrize(("sparse", "dense"), [(96, 32), (128, 0), (0, 128)])
@pytest.mark.parametrize("split", ["output", "input"])
def test_against_float64(split: Split, sparse: int, dense: int, tokens: int) -> None:
    p = problem(split, sparse, dense)
    x, weight = make(p, tokens)
    exact = x.double() @ weight.double().t()
    found = gemm.region_gemm(x, gemm.pack(weight, p), p)
    assert found.dtype == torch.float32
    # K products, each exact, summed in float32: at most K roundings of a partial sum.
    bound = p.k * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().t())
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("split", ["output", "input"])
def test_bfloat16_sums(split: Split) -> None:
    p = problem(split, 96, 32, torch.bfloat16)
    x, weight = make(p, 8)
    found = gemm.region_gemm(x, gemm.pack(weight, p), p)
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
    found = gemm.region_gemm(x, gemm.pack(weight, p), p, scales)
    exact = x.double() @ weight.double().t() * scales[0] * scales[1].t()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-2)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = gemm.region_gemm(mode.from_tensor(x), gemm.pack(weight, p), p, scales)
    assert (fake.shape, fake.dtype) == (found.shape, found.dtype)


@pytest.mark.parametrize("split", ["output", "input"])
def test_registration(split: Split) -> None:
    p = problem(split, 96, 32)
    x, weight = make(p, 5)
    packed = gemm.pack(weight, p)
    # opcheck compares inputs before and after, which torch cannot in FP8.
    arguments = (x.float(), list(packed.values()), " ".join([p.spelled, *packed]))
    torch.library.opcheck(torch.ops.spense.region_gemm.default, arguments)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize(("split", "parts"), [("output", 2), ("input", 1)])
def test_a_problem_is_read_as_it_is_spelled(split: Split, parts: int, out_dtype: torch.dtype) -> None:
    for scaled, apart in ((False, False), (True, False), *([(False, True)] if split == "input" else [])):
        p = Problem(256, 256, Regions(96, 256 // parts - 96), split, out_dtype, parts, scaled, apart)
        assert Problem.read(p.spelled) == p


def test_one_graph_for_every_number_of_tokens() -> None:
    p = problem("output", 96, 32)
    _, weight = make(p, 1)
    packed = gemm.pack(weight, p)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x: gemm.region_gemm(x, packed, p) * 2, backend=backend, fullgraph=True, dynamic=True
    )
    for tokens in (3, 5, 17):
        x, _ = make(p, tokens)
        assert torch.equal(compiled(x), gemm.region_gemm(x, packed, p) * 2)
    assert len(graphs) == 1


def test_packed_weights_do_not_keep_the_whole_weight() -> None:
    p = problem("input", 96, 32)
    _, weight = make(p, 1)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in gemm.pack(weight, p).values())


def test_merged_projections_keep_their_rows_order() -> None:
    p = Problem(128, 96, Regions(32, 32), "output", torch.float32, parts=2)
    x, weight = make(p, 7)
    found = gemm.region_gemm(x, gemm.pack(weight, p), p)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1)


def test_projections_run_region_by_region_and_come_back_in_order() -> None:
    p = Problem(128, 96, Regions(48, 16), "output", torch.float32, parts=2)
    x, weight = make(p, 7)
    raw = gemm.region_gemm(x, gemm.pack(p.by_region(weight), p.merged()), p.merged())
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(reference.by_projection(raw, 48).double(), exact, rtol=1e-5, atol=1)
    torch.testing.assert_close(raw[:, 48:96].double(), exact[:, 64:112], rtol=1e-5, atol=1)
    assert torch.equal(reference.by_projection(raw, 64), raw)


def test_a_path_is_named_once_for_each_shape(caplog: pytest.LogCaptureFixture) -> None:
    p = problem("output", 64, 32)
    with caplog.at_level(logging.INFO, logger="vllm.spense"):
        for _ in range(3):
            gemm.prepare(p, 64, torch.device("cpu"))
    said = [record.getMessage() for record in caplog.records if "output-split 96 × 96" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("runs on cpu by the reference path")


def test_the_turns_of_paths_are_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def path(_problem: Problem, tokens: int, _device: torch.device, _copied: bool) -> Path:
        return Path.ONE_LAUNCH if tokens <= 128 else Path.LIBRARY

    monkeypatch.setattr(gemm, "_path", path)
    turns = gemm._turns(problem("output", 64, 32), 8192, torch.device("cpu"))
    assert turns == "one-launch (to 128 tokens), then library"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Path, Callable[[int], float]]]:
    """A GPU's policy without one: µs by path and tokens, to be filled in."""
    times: dict[Path, Callable[[int], float]] = {}

    def measured(paths: tuple[Path, ...], _: Problem, tokens: int, __: torch.device) -> dict[Path, float]:
        return {path: times[path](tokens) for path in paths}

    monkeypatch.setattr(gemm, "describe", lambda _: Device("cuda", (9, 0), bindings=True))
    monkeypatch.setattr(gemm, "_times", measured)
    monkeypatch.setattr(gemm, "_copies", {})
    monkeypatch.delenv(SWITCH, raising=False)
    caches = (gemm._path, gemm._paths, gemm._dense_wins)
    for cached in caches:
        cached.cache_clear()
    yield times
    for cached in caches:
        cached.cache_clear()


def test_a_dense_copy_is_kept_where_it_wins_and_there_is_room(
    hopper: dict[Path, Callable[[int], float]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    p = problem("input", 1024, 1024)
    weight = torch.zeros(p.n, p.k, dtype=FP8)
    hopper |= {
        Path.ONE_LAUNCH: lambda tokens: 40.0,
        Path.LIBRARY: lambda tokens: 41.0,
        Path.DENSE: lambda tokens: 38.0 if tokens == 256 else 42.0,
    }
    assert gemm.dense_copy(weight, p, 8192, "a") == {}, "nothing is granted"
    # Of two and a half copies.
    monkeypatch.setenv(GRANT, str(2.5 * p.n * p.k / 2**30))
    with caplog.at_level(logging.INFO, logger="vllm.spense"):
        kept = [gemm.dense_copy(weight, p, 8192, layer) for layer in ("a", "b", "c", "a")]
    assert [list(copy) for copy in kept] == [[COPY], [COPY], [], [COPY]]
    assert kept[0][COPY] is weight
    said = [record.getMessage() for record in caplog.records]
    assert said[0].endswith("is faster with 129 to 256 tokens")
    assert f"no dense copy of c: {GRANT}" in said[1]
    device = weight.device
    for copied, paths in (
        (True, {128: Path.ONE_LAUNCH, 256: Path.DENSE, 512: Path.ONE_LAUNCH, 1024: Path.LIBRARY}),
        (False, {128: Path.ONE_LAUNCH, 256: Path.ONE_LAUNCH, 512: Path.ONE_LAUNCH, 1024: Path.LIBRARY}),
    ):
        assert {tokens: gemm._path(p, tokens, device, copied) for tokens in paths} == paths


@pytest.mark.parametrize("dense", [39.5, 45.0], ids=["by little", "never"])
def test_no_dense_copy_for_nothing(
    dense: float, hopper: dict[Path, Callable[[int], float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem("input", 1024, 1024)
    hopper |= {path: lambda tokens: 40.0 for path in Path} | {Path.DENSE: lambda tokens: dense}
    monkeypatch.setenv(GRANT, "8")
    assert gemm.dense_copy(torch.zeros(p.n, p.k, dtype=FP8), p, 8192, "a") == {}


def test_no_dense_copy_that_beats_the_slower_path_only(
    hopper: dict[Path, Callable[[int], float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem("input", 1024, 1024)
    hopper |= {
        Path.ONE_LAUNCH: lambda tokens: 40.0,
        Path.LIBRARY: lambda tokens: 60.0 if tokens <= 512 else 40.0,
        Path.DENSE: lambda tokens: 39.5,
    }
    monkeypatch.setenv(GRANT, "8")
    assert gemm.dense_copy(torch.zeros(p.n, p.k, dtype=FP8), p, 8192, "a") == {}


def test_no_dense_copy_where_nothing_would_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRANT, "8")
    p = problem("input", 96, 32)
    _, weight = make(p, 1)
    assert gemm.dense_copy(weight, p, 8192, "a") == {}
