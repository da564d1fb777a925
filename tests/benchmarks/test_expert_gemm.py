"""expert_gemm and expert_mixture without a GPU: routings, and rows that say what could not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks import expert_gemm, expert_mixture
from benchmarks.expert_gemm import Routing, Shape, route, sweep
from vllm_spense.kernels.expert_gemm import reference

CPU = torch.device("cpu")
SHAPE = Shape(experts=8, top_k=2, hidden=64, intermediate=128)


@pytest.mark.parametrize("kind", expert_gemm.ROUTING)
def test_a_routing_sends_every_token_to_different_experts(kind: str) -> None:
    routing = route(SHAPE, 500, kind, CPU)
    assert (routing.ids.sort(-1).values.diff(dim=-1) > 0).all()
    counts = torch.bincount(routing.ids.flatten(), minlength=8)
    assert torch.equal(routing.offsets.diff(), counts.int())
    assert routing.active == int((counts > 0).sum())
    busiest = float(counts.max() / counts.sum())
    assert busiest > 0.2 if kind == "skewed" else busiest < 0.2


def test_shapes_have_the_sparsity_that_is_asked_for() -> None:
    for shape in expert_gemm.SHAPES.values():
        for sparsity in expert_gemm.SPARSITIES:
            assert shape.regions(sparsity).mlp_sparsity == pytest.approx(sparsity, abs=0.001)


@pytest.mark.parametrize("layer", ["gate_up", "down"])
def test_a_row_says_what_ran_and_what_did_not(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(x, x_scale, offsets, packed, problem, *, cut, **begin):
        assert begin == {"offsets_are_old": True} if layer == "down" else set(begin) == {"ids", "expert_map"}
        return reference.run(x, x_scale, offsets, packed, problem)

    def medians(candidates: Sequence[Sequence[Callable[[], object]]], replays: int) -> list[float]:
        for calls in candidates:
            calls[0]()
        return [10.0, 8.0, 20.0][: len(candidates)]

    def one(shape, layer, x, x_scale, packed, routing: Routing) -> Callable[[], object]:
        return lambda: None

    def none(*_: object) -> Callable[[], object]:
        raise RuntimeError("not here")

    for name, stand_in in {"cutlass_call": one, "triton_call": none, "medians_us": medians}.items():
        monkeypatch.setattr(expert_gemm, name, stand_in)
    monkeypatch.setattr(expert_gemm.gemm, "run", twin)
    monkeypatch.setattr(expert_gemm, "cold_copies", lambda weight_bytes, device: 1)
    monkeypatch.setattr(expert_gemm.torch.cuda, "synchronize", lambda: None)
    (row,) = sweep(SHAPE, layer, [0.375], [(4, "balanced")], [None], 3e12, CPU)
    assert (row["us"], row["dense_us"], row["over_dense"]) == (8.0, 10.0, 1.25)
    # Of 1.25 times as fast, where bytes allow 1 / (0.25 + 0.75 · 0.625).
    assert row["of_ideal_speedup"] == pytest.approx(1.25 * (0.25 + 0.75 * 0.625), abs=0.001)
    assert row["stock_us"] == {"cutlass": 20.0}
    assert row["over_stock"] == 2.5
    assert row["stock_missing"] == {"triton": "RuntimeError: not here"}
    weights = row["active_experts"] * 64 * 128 * (2 if layer == "gate_up" else 1) * (0.25 + 0.75 * 0.625)
    assert row["ideal_us"] == pytest.approx(weights / 3e12 * 1e6, abs=0.02)


def test_a_whole_mixture_against_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def medians(candidates: Sequence[Sequence[Callable[[], object]]], replays: int) -> list[float]:
        for calls in candidates:
            seen.append(calls[0]())
        return [10.0, 8.0, 20.0]

    def some(shape, x, shares, weights, choices) -> list[Callable[[], object]]:
        return [lambda: None for _ in choices]

    def none(*_: object) -> list[Callable[[], object]]:
        raise RuntimeError("not here")

    for name, stand_in in {"cutlass_calls": none, "triton_calls": some, "medians_us": medians}.items():
        monkeypatch.setattr(expert_mixture, name, stand_in)
    monkeypatch.setattr(expert_mixture.mixture, "run", reference.mixture)
    monkeypatch.setattr(expert_gemm, "cold_copies", lambda weight_bytes, device: 1)
    monkeypatch.setattr(expert_gemm.torch.cuda, "synchronize", lambda: None)
    (row,) = expert_mixture.sweep(SHAPE, [0.375], [(4, "skewed")], CPU)
    assert (row["us"], row["dense_us"], row["over_dense"]) == (8.0, 10.0, 1.25)
    assert (row["stock_us"], row["over_stock"]) == ({"triton": 20.0}, 2.5)
    assert row["stock_missing"] == {"cutlass": "RuntimeError: not here"}
    dense, sparse, _ = seen
    assert dense.shape == sparse.shape == (4, SHAPE.hidden)
