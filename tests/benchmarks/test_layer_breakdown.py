"""layer_breakdown without a GPU: every scheme computes the same MLP, and rows add up."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import layer_breakdown, mlp_schemes
from benchmarks.layer_breakdown import schemes, with_ratios
from benchmarks.mlp_schemes import SlideSparse, Spense, Stock, compiled, expand_weight, quantize, random_6of8
from vllm_spense.kernels.region_gemm.reference import by_projection
from vllm_spense.kernels.tuning.synthetic import random_weight
from vllm_spense.layout import excess_groups
from vllm_spense.ops.layer_plan import pack

CPU = torch.device("cpu")
TOKENS = 5


@pytest.fixture(autouse=True)
def _stock_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's CUTLASS kernel computes; a CPU has none."""

    def gemm(self: Stock, part: Any, x: torch.Tensor, x_scale: torch.Tensor, weights: Any) -> torch.Tensor:
        return (x.float() @ weights[part].float().t() * x_scale * self.scales[part].t()).to(torch.bfloat16)

    monkeypatch.setattr(Stock, "gemm", gemm)


def run(scheme: Stock, weights: Any) -> torch.Tensor:
    """Without a compiler, on the same activations for every scheme."""
    scheme.__dict__["compiled"] = (scheme.enter, scheme.between, scheme.leave)
    x, residual = torch.randn(2, TOKENS, scheme.sizes.hidden, generator=torch.Generator().manual_seed(0))
    values, scale = scheme.run(x.bfloat16(), residual.bfloat16(), weights)
    return values.float() * scale


def test_every_scheme_computes_the_mlp() -> None:
    """Within what two sums in bfloat16 instead of one add, and what FP8 makes of that: 0.025. Other weights: 0.4."""
    torch.manual_seed(0)
    stock, slide, *spenses = schemes("tiny", (0.25, 0.375, 0.5), CPU)
    assert [type(scheme) for scheme in spenses] == [Spense] * 3
    for scheme in (slide, *spenses):
        if isinstance(scheme, SlideSparse):
            dense = {part: random_6of8(*scheme.sizes.shape(part), CPU) for part in scheme.problems}
            weights = {part: scheme.pack(part, expand_weight(weight)) for part, weight in dense.items()}
        else:
            dense = {part: random_weight(problem, CPU) for part, problem in scheme.problems.items()}
            weights = {part: pack(weight, scheme.problems[part]) for part, weight in dense.items()}
            # It runs region by region.
            dense["gate_up"] = by_projection(dense["gate_up"].t(), scheme.regions.sparse).t().contiguous()
        found, expected = run(scheme, weights), run(stock, dense)
        assert (found - expected).norm() <= 0.06 * expected.norm(), scheme.name
        assert (run(stock, stock.weights()) - expected).norm() > 0.2 * expected.norm()


def test_six_weights_in_any_place_fit_into_three_windows() -> None:
    weight = torch.zeros(28, 8)
    for row, pruned in enumerate(combinations(range(8), 2)):
        weight[row] = torch.tensor([0.0 if column in pruned else column + 1.0 for column in range(8)])
    fp8 = weight.to(torch.float8_e4m3fn)
    expanded = expand_weight(fp8)
    assert expanded.shape == (28, 12)
    assert not excess_groups(expanded).any()
    x = torch.randn(3, 8)
    (slide,) = (scheme for scheme in schemes("tiny", (), CPU) if isinstance(scheme, SlideSparse))
    torch.testing.assert_close(slide.lift(x) @ expanded.float().t(), x @ weight.t())


def test_seven_weights_do_not() -> None:
    with pytest.raises(AssertionError, match="more than six"):
        expand_weight(torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 0]]).to(torch.float8_e4m3fn))


def test_random_6of8_has_two_zeros_in_eight() -> None:
    zeros = (random_6of8(64, 64, CPU).float() == 0).unflatten(1, (-1, 8)).sum(-1)
    assert (zeros == 2).all()


def test_quantization_is_vllms() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    with set_current_vllm_config(VllmConfig()):
        theirs = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
    x = torch.cat((torch.randn(4, 64), torch.zeros(1, 64))).bfloat16()
    for mine, other in zip(quantize(x), theirs.forward_native(x), strict=True):
        assert torch.equal(mine.float(), other.float())


def test_bytes_are_those_of_the_formats() -> None:
    stock, slide, spense = schemes("qwen3-32b", (0.375,), torch.device("meta"))
    assert stock.weight_bytes == 3 * 5120 * 25600
    assert slide.weight_bytes / stock.weight_bytes == 0.625 * 1.5
    assert spense.weight_bytes / stock.weight_bytes == 0.25 + 0.75 * 0.625
    assert slide.sparsity == 0.25


def test_one_graph_serves_every_number_of_tokens() -> None:
    call = compiled(lambda x: quantize(x)[1], Spense.options)
    torch._dynamo.utils.counters.clear()
    for tokens in (64, 32, 7):
        assert call(torch.zeros(tokens, 4)).shape == (tokens, 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_rows_name_the_kernels_and_the_speed_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole program, but for the clock and the compiler."""
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(layer_breakdown, "median_us", lambda calls, replays: [call() for call in calls] and next(times))
    monkeypatch.setattr(layer_breakdown, "cold_copies", lambda weight_bytes, device: 2)
    monkeypatch.setattr(layer_breakdown, "kernels", lambda call: {"one": 1, "two": 2})
    monkeypatch.setattr(layer_breakdown, "first_gpu", lambda: CPU)
    monkeypatch.setattr(mlp_schemes, "compiled", lambda function, options: function)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["x", "--shape", "tiny", "--tokens", "2", "16", "--out", str(out)])
    layer_breakdown.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["m"], row["scheme"]) for row in rows] == [
        (m, name) for m in (2, 16) for name in ("stock", "slidesparse 6:8", "spense", "spense", "spense")
    ]
    for row in rows:
        assert row["kernels"] == 3
        assert row["other_us"] == row["total_us"] - row["gemm_us"] == 1
    assert rows[0]["ratio"] == 1 < rows[1]["ratio"]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_ratios_are_of_equal_tokens() -> None:
    rows = [
        {"m": m, "scheme": name, "total_us": us}
        for name, m, us in (("stock", 8, 10.0), ("stock", 1, 9.0), ("spense", 8, 8.0), ("spense", 1, 6.0))
    ]
    assert [(row["m"], row["ratio"]) for row in with_ratios(rows)] == [(1, 1.0), (1, 1.5), (8, 1.0), (8, 1.25)]
