"""Who applies the scales of a pruned MLP's GEMMs, and what its layers and its neighbours hand on to each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.activation import GeluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaMLP
from vllm_models import (
    HIDDEN,
    MLP,
    I,
    dequantized,
    in_plain_model,
    load,
    sparse_weight,
)

from vllm_spense.kernels.region_gemm import reference
from vllm_spense.ops import gemm
from vllm_spense.plugin.activation import RawSums
from vllm_spense.plugin.config import SpenseConfig
from vllm_spense.plugin.norms import DeferredGemm
from vllm_spense.plugin.pairing import Quantized

pytestmark = pytest.mark.usefixtures("world")


def plain_mlp(config: SpenseConfig) -> Any:
    return LlamaMLP(HIDDEN, I, "silu", quant_config=config, prefix=MLP)


def load_gate_up(layer: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Loads random values, and returns W (2·I, K) with its scales in it."""
    weights = [sparse_weight(I, HIDDEN, (slice(0, 64), slice(None))) for _ in range(2)]
    scales = torch.rand(2, I, 1) + 0.5
    for i in range(2):
        load(layer, weights[i], i)
        load(layer, scales[i], i, name="weight_scale")
        if bias is not None:
            load(layer, bias[i * I : (i + 1) * I], i, name="bias")
    layer.quant_method.process_weights_after_loading(layer)
    return torch.cat([weight.float() * scale for weight, scale in zip(weights, scales, strict=True)])


@pytest.mark.parametrize("fast", [True, False], ids=["Hopper", "elsewhere"])
@pytest.mark.parametrize("case", ["plain", "another activation", "bias", "LoRA"])
def test_who_applies_the_scales_of_gate_and_up(
    config: SpenseConfig, monkeypatch: pytest.MonkeyPatch, case: str, fast: bool
) -> None:
    """The activation after them, if it is ours and nothing else reads the sums. If not, the GEMM where it can."""
    monkeypatch.setattr(gemm, "applies_scales", lambda problem, device: fast)
    engine = get_current_vllm_config()
    monkeypatch.setattr(engine, "lora_config", object() if case == "LoRA" else None)
    mlp = LlamaMLP(HIDDEN, I, "silu", quant_config=config, prefix=MLP, bias=case == "bias")
    if case == "another activation":
        mlp.act_fn = GeluAndMul()
    layer: Any = mlp.gate_up_proj
    bias = torch.randn(2 * I) if case == "bias" else None
    weight = load_gate_up(layer, bias)
    method = layer.quant_method
    defers = case == "plain"
    assert (method.defers_epilogue, method.plan.problem.scaled) == (defers, fast and not defers)
    # In the model's own order unless the activation takes them in any.
    assert method.plan.problem.projections == (1 if defers else 2)
    x = torch.randn(2, 5, HIDDEN)
    found, _ = layer(x)
    assert isinstance(found, RawSums) == defers
    if defers:
        raw = reference.by_projection(found.raw, found.boundary)
        found = reference.scaled(raw, found.x_scale, found.w_scale).view(*found.leading, -1)
    expected = dequantized(x) @ weight.t() + (0 if bias is None else bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3)])
def test_a_plain_mlp_keeps_the_dimensions_of_its_input(config: SpenseConfig, shape: tuple[int, ...]) -> None:
    """As transformers' models have a batch and a sequence."""
    mlp = plain_mlp(config)
    gate, up = load_gate_up(mlp.gate_up_proj).chunk(2)
    down = sparse_weight(HIDDEN, I, (slice(None), slice(0, 64)))
    load(mlp.down_proj, down)
    load(mlp.down_proj, torch.ones(HIDDEN, 1), name="weight_scale")
    mlp.down_proj.quant_method.process_weights_after_loading(mlp.down_proj)
    assert mlp.gate_up_proj.quant_method.defers_epilogue
    x = torch.randn(*shape, HIDDEN)
    rounded = dequantized(x)
    expected = dequantized(F.silu(rounded @ gate.t()) * (rounded @ up.t())) @ down.float().t()
    found = torch.compile(mlp.forward, backend="eager", fullgraph=True, dynamic=True)(x)
    assert found.shape == (*shape, HIDDEN)
    # An activation or two may lie so close to the middle of two FP8 numbers that it is rounded the other way.
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("ranks", "draft", "defers", "scaled"),
    [(1, None, True, False), (2, None, False, True), (1, object(), False, True)],
    ids=["plain", "two ranks", "a draft model"],
)
def test_who_applies_the_scales_of_down(
    config: SpenseConfig, monkeypatch: pytest.MonkeyPatch, ranks: int, draft: object, defers: bool, scaled: bool
) -> None:
    """The norm after it, if down's output goes there and nowhere else; the GEMM where something comes between."""
    engine = get_current_vllm_config()
    monkeypatch.setattr(engine, "speculative_config", draft)
    built = RowParallelLinear(I, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj")
    model: Any = in_plain_model(nn.ModuleDict({"down_proj": built}))
    layer = model.layers[0].mlp["down_proj"]
    layer.quant_method.tp_size = ranks
    weight, scale = sparse_weight(HIDDEN, I, (slice(None), slice(0, 64))), torch.rand(HIDDEN, 1) + 0.5
    load(layer, weight)
    load(layer, scale, name="weight_scale")
    layer.quant_method.process_weights_after_loading(layer)
    problem = layer.quant_method.plan.problem
    assert (problem.scaled, problem.separate_outputs) == (scaled, defers)
    x = torch.randn(5, I)
    found, _ = layer(x)
    assert isinstance(found, DeferredGemm) == defers
    if defers:
        found = found.outputs()
    torch.testing.assert_close(found, dequantized(x) @ (weight.float() * scale).t(), rtol=1e-4, atol=1e-3)


def test_a_plain_mlp_between_its_norms_is_one_graph(config: SpenseConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What modules hand on is no tensor, and the compiler sees through it."""
    engine = get_current_vllm_config()
    monkeypatch.setattr(engine, "model_config", SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr(engine, "quant_config", config)
    model: Any = in_plain_model(plain_mlp(config))
    mlp = model.layers[0].mlp
    up, down, after, before = mlp.gate_up_proj, mlp.down_proj, RMSNorm(HIDDEN), RMSNorm(HIDDEN)
    for i in range(2):
        load(up, sparse_weight(I, HIDDEN, (slice(0, 64), slice(None))), i)
        load(up, torch.ones(I, 1), i, name="weight_scale")
    load(down, sparse_weight(HIDDEN, I, (slice(None), slice(0, 64))))
    load(down, torch.ones(HIDDEN, 1), name="weight_scale")
    for layer in (up, down):
        layer.quant_method.process_weights_after_loading(layer)
    assert (up.quant_method.defers_epilogue, down.quant_method.defers_epilogue) == (True, True)
    handed_on: list[type] = []

    def block(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = before(x, residual)
        sums, _ = up(x)
        z = mlp.act_fn(sums)
        deferred, _ = down(z)
        handed_on[:] = [type(step) for step in (x, sums, z, deferred)]
        return after(deferred, residual)

    x, residual = torch.randn(2, 5, HIDDEN)
    expected = block(x.clone(), residual.clone())
    assert handed_on == [Quantized, RawSums, Quantized, DeferredGemm]
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)
    for found, exact in zip(compiled(x.clone(), residual.clone()), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)
