"""A layer's plan: which path it takes when, what it says in the log, and what a dense copy of the weight is worth."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.problem import DENSE_COPY, Problem
from vllm_spense.ops import dense_copies, gemm, layer_plan, path_kernels
from vllm_spense.ops.dense_copies import DenseCopies
from vllm_spense.ops.dispatch import GRANT, SWITCH, Device, Path
from vllm_spense.ops.layer_plan import LayerPlan, op_key, pack, plan_layer, plan_of

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")
DOWN = Problem(1024, 2048, Regions(1024, 1024), "input", torch.float32)
#: µs of a path by number of tokens.
Times = dict[Path, Callable[[int], float]]


def small(out_dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(96, 128, Regions(96, 32), "input", out_dtype)


def test_a_key_leads_to_the_same_plan() -> None:
    problem = small()
    plan = plan_of(op_key(problem, dense_copy=False), CPU)
    assert plan is plan_of(plan.key, CPU)
    assert (plan.problem, plan.paths, plan.tensors) == (problem, (Path.REFERENCE,), ("sparse", "dense"))
    assert plan is not plan_of(op_key(problem, dense_copy=True), CPU)


@pytest.mark.parametrize("path", [Path.REFERENCE], ids=str)
def test_kernels_name_their_tensors_in_order(path: Path) -> None:
    """The op zips them with what `pack` returned."""
    packed = path_kernels.kernel(path).pack(torch.zeros(96, 128, dtype=FP8), small())
    assert tuple(packed) == path_kernels.kernel(path).TENSORS


def test_a_plan_runs_what_it_packed() -> None:
    problem = small()
    generator = torch.Generator().manual_seed(0)
    x, weight = ((torch.randn(rows, 128, generator=generator) * 10).to(FP8) for rows in (5, 96))
    plan, packed = plan_layer(weight, problem, "a", 64, DenseCopies())
    out, addend = plan.run(x, list(packed.values()))
    assert addend is None
    assert torch.equal(out, reference.run(x, reference.pack(weight, problem), problem))
    with pytest.raises(ValueError, match="zip"):
        plan.run(x, list(packed.values())[:1])


def test_what_an_op_adds_up_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may leave two outputs, and `region_gemm` returns one."""
    problem = small(torch.bfloat16)
    weight, x = torch.zeros(96, 128, dtype=FP8), torch.zeros(3, 128, dtype=FP8)
    two = torch.full((3, 96), 2.0, dtype=torch.bfloat16), torch.full((3, 96), 0.5, dtype=torch.bfloat16)
    monkeypatch.setattr(path_kernels, "run", lambda *_: two)
    assert (gemm.region_gemm(x, *gemm.op_arguments(pack(weight, problem), problem)) == 2.5).all()


def test_a_path_is_logged_once_for_each_shape(caplog: pytest.LogCaptureFixture) -> None:
    plan = LayerPlan(Problem(96, 96, Regions(64, 32), "output"), CPU)
    with caplog.at_level(logging.INFO, logger="vllm.spense"):
        for _ in range(3):
            plan.prepare(64)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == "Spense: output-split 96 × 96, 2:4 in 64 and dense in 32, runs on cpu by the reference path"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Times]:
    """A GPU's policy without one: µs by path and tokens, to be filled in."""
    us: Times = {}

    def measured(paths: tuple[Path, ...], _: Problem, tokens: int, __: torch.device) -> dict[Path, float]:
        return {path: us[path](tokens) for path in paths}

    def tensor_names(paths: tuple[Path, ...]) -> tuple[str, ...]:
        return ("compressed", "dense", *((DENSE_COPY,) if Path.DENSE in paths else ()))

    for module in (layer_plan, dense_copies):
        monkeypatch.setattr(module, "describe", lambda _: Device("cuda", (9, 0), bindings=True))
        monkeypatch.setattr(module, "times", measured)
        monkeypatch.setattr(module, "forced", lambda: None)
    monkeypatch.setattr(path_kernels, "tensor_names", tensor_names)
    monkeypatch.delenv(SWITCH, raising=False)
    plan_of.cache_clear()
    yield us
    plan_of.cache_clear()


def test_a_plan_measures_what_is_in_doubt_and_remembers(hopper: Times) -> None:
    asked: list[int] = []
    hopper |= {
        Path.ONE_LAUNCH: lambda tokens: asked.append(tokens) or 40.0 + tokens,
        Path.LIBRARY: lambda tokens: 200.0,
    }
    plan = LayerPlan(DOWN, CPU)
    found = {tokens: plan.path(tokens) for tokens in (1, 64, 65, 100, 128, 129, 512, 513, 8192) for _ in range(2)}
    few, many = dict.fromkeys((1, 64, 65, 100, 128), Path.ONE_LAUNCH), (129, 512, 513, 8192)
    assert found == few | dict.fromkeys(many, Path.LIBRARY)
    assert asked == [128, 256, 512]
    assert plan.us[128] == {Path.ONE_LAUNCH: 168.0, Path.LIBRARY: 200.0}


def test_a_dense_copy_is_kept_where_it_pays_and_there_is_room(
    hopper: Times, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hopper |= {
        Path.ONE_LAUNCH: lambda tokens: 40.0,
        Path.LIBRARY: lambda tokens: 41.0,
        Path.DENSE: lambda tokens: 38.0 if tokens == 256 else 42.0,
    }
    copies = DenseCopies()
    assert not copies.grant("a", DOWN, 8192, CPU), "no budget"
    # Of two and a half copies.
    monkeypatch.setenv(GRANT, str(2.5 * DOWN.n * DOWN.k / 2**30))
    with caplog.at_level(logging.INFO, logger="vllm.spense"):
        granted = [copies.grant(layer, DOWN, 8192, CPU) for layer in ("a", "b", "c", "a")]
    assert granted == [True, True, False, True]
    said = [record.getMessage() for record in caplog.records]
    assert said[0].endswith("is faster with 129 to 256 tokens")
    assert f"no dense copy of c: {GRANT}" in said[1]
    assert DenseCopies().grant("c", DOWN, 8192, CPU), "another model has a budget of its own"
    for dense_copy, paths in (
        (True, {128: Path.ONE_LAUNCH, 256: Path.DENSE, 512: Path.ONE_LAUNCH, 1024: Path.LIBRARY}),
        (False, {128: Path.ONE_LAUNCH, 256: Path.ONE_LAUNCH, 512: Path.ONE_LAUNCH, 1024: Path.LIBRARY}),
    ):
        plan = plan_of(op_key(DOWN, dense_copy), CPU)
        assert {tokens: plan.path(tokens) for tokens in paths} == paths


def test_the_copy_is_the_weight_itself(hopper: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(weight: torch.Tensor, *_: object) -> dict[str, torch.Tensor]:
        return {"compressed": weight[:0], "dense": weight[:0]}

    monkeypatch.setattr(path_kernels, "pack", packed)
    monkeypatch.setattr(DenseCopies, "grant", lambda *_: True)
    monkeypatch.setattr(LayerPlan, "prepare", lambda *_: None)
    weight = torch.zeros(1024, 2048, dtype=FP8)
    plan, tensors = plan_layer(weight, DOWN, "a", 64, DenseCopies())
    assert tensors[DENSE_COPY] is weight
    assert Path.DENSE in plan.paths
    assert plan.key == op_key(DOWN, dense_copy=True)


@pytest.mark.parametrize(
    "us",
    [
        {Path.ONE_LAUNCH: 40.0, Path.LIBRARY: 40.0, Path.DENSE: 39.5},
        {Path.ONE_LAUNCH: 40.0, Path.LIBRARY: 40.0, Path.DENSE: 45.0},
        {Path.ONE_LAUNCH: 39.0, Path.LIBRARY: 60.0, Path.DENSE: 38.9},
    ],
    ids=["faster by little", "slower", "faster than the slower path"],
)
def test_no_dense_copy_for_nothing(us: dict[Path, float], hopper: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper |= {path: lambda _, mine=mine: mine for path, mine in us.items()}
    # Beyond 512 tokens the library path runs alone.
    hopper[Path.LIBRARY] = lambda tokens: us[Path.LIBRARY] if tokens <= 512 else us[Path.DENSE]
    monkeypatch.setenv(GRANT, "8")
    assert not DenseCopies().grant("a", DOWN, 8192, CPU)


def test_no_dense_copy_where_nothing_would_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRANT, "8")
    assert not DenseCopies().grant("a", small(), 8192, CPU)
