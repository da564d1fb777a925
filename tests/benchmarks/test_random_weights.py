"""What the baseline of a speed measurement multiplies: numbers, not zeros."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A8Fp8,
    CompressedTensorsWNA16,
)

from benchmarks.random_weights import fill_int4_before_packing, fill_random, weight_bytes

N, K = 384, 512


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def fp8_layer(n: int, k: int, scales: int, transposed: bool) -> nn.Module:
    """As vLLM keeps an FP8 layer with dummy weights."""
    layer = nn.Module()
    weight = torch.zeros(n, k).to(torch.float8_e4m3fn)
    layer.weight = parameter(weight.t() if transposed else weight)
    layer.weight_scale = parameter(torch.full((scales, 1), -1e-3))
    return layer


@pytest.mark.parametrize("transposed", [False, True])
def test_fp8_layers_keep_the_size_of_their_inputs(transposed: bool) -> None:
    layer = fp8_layer(N, K, N, transposed)
    address = layer.weight.data_ptr()
    fill_random(layer)
    assert layer.weight.data_ptr() == address
    assert layer.weight.is_contiguous() is not transposed
    weight = layer.weight.t() if transposed else layer.weight
    assert (weight.float() == 0).float().mean() < 0.01
    y = torch.randn(64, K) @ weight.float().t() * layer.weight_scale.t()
    assert y.std().item() == pytest.approx(1, rel=0.05)


def test_everything_else_too() -> None:
    model = nn.ModuleDict({"head": nn.Linear(K, N), "norm": nn.RMSNorm(K)})
    for tensor in model.parameters():
        nn.init.uniform_(tensor, -1e-3, 1e-3)
    fill_random(model)
    assert (torch.randn(64, K) @ model["head"].weight.t()).std().item() == pytest.approx(1, rel=0.05)
    assert 0.01 < model["head"].bias.std().item() < 0.1
    assert torch.equal(model["norm"].weight, torch.ones(K))


def test_experts_keep_the_size_of_their_inputs() -> None:
    experts, layer = 3, nn.Module()
    layer.w13_weight = parameter(torch.zeros(experts, N, K).to(torch.float8_e4m3fn))
    layer.w13_weight_scale = parameter(torch.full((experts, N, 1), -1e-3))
    fill_random(layer)
    for weight, scale in zip(layer.w13_weight, layer.w13_weight_scale, strict=True):
        y = torch.randn(64, K) @ weight.float().t() * scale.t()
        assert y.std().item() == pytest.approx(1, rel=0.05)
    assert not torch.equal(layer.w13_weight[0].float(), layer.w13_weight[1].float())


def test_a_skewed_router_prefers_some_experts_and_both_engines_get_the_same() -> None:
    """How many of 512 choices of 8 go to the likeliest eighth of 128 experts."""
    shares = {}
    for skewed in (False, True):
        weights = []
        for others in ((), ("before",)):
            model = nn.ModuleDict({name: nn.Linear(K, N) for name in others})
            model["mlp"] = nn.ModuleDict({"gate": nn.Linear(K, 128, bias=False)})
            fill_random(model, skewed)
            weights.append(model["mlp"]["gate"].weight)
        assert torch.equal(*weights)
        chosen = (torch.randn(512, K) @ weights[0].t()).topk(8, -1).indices
        shares[skewed] = (chosen < 16).float().mean().item()
    assert shares[False] < 0.2
    assert 0.35 < shares[True] < 0.6


def test_scales_that_do_not_fit_are_refused() -> None:
    model = nn.ModuleDict({"down": fp8_layer(N, K, 1, transposed=True)})
    with pytest.raises(ValueError, match=r"down: 1 scales for an FP8 weight of shape \(512, 384\)"):
        fill_random(model)


def test_shared_storage_counts_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(K, N, bias=False), "b": nn.Linear(K, N, bias=False)})
    assert weight_bytes(model) == 2 * N * K * 4
    model["b"].weight = parameter(model["a"].weight.data[: N // 2])
    assert weight_bytes(model) == N * K * 4


def test_weights_of_four_bits_are_filled_before_they_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheme's own step sees the values, as a checkpoint stores them."""
    seen = []
    monkeypatch.setattr(
        CompressedTensorsWNA16, "process_weights_after_loading", lambda _, layer: seen.append(layer.weight_packed)
    )
    monkeypatch.setattr(
        CompressedTensorsW4A8Fp8, "process_weights_after_loading", lambda _, layer: seen.append(layer.weight_packed)
    )
    fill_int4_before_packing()
    for scheme in (CompressedTensorsWNA16, CompressedTensorsW4A8Fp8):
        layer = nn.Module()
        layer.weight_packed = parameter(torch.zeros(N, K // 8, dtype=torch.int32))
        layer.weight_scale = parameter(torch.zeros(N, K // 128))
        layer.bias = parameter(torch.zeros(N))
        scheme.process_weights_after_loading(scheme.__new__(scheme), layer)
        assert seen[-1] is layer.weight_packed
        places = torch.stack([(layer.weight_packed >> 4 * place) & 15 for place in range(8)], -1)
        weight = (places.reshape(N, K) - 8) * layer.weight_scale.repeat_interleave(128, 1)
        assert (torch.randn(64, K) @ weight.t()).std().item() == pytest.approx(1, rel=0.05)
        assert places.unique().tolist() == [*range(16)]
        packed = layer.weight_packed.clone()
        fill_random(layer)
        assert torch.equal(layer.weight_packed, packed)
        assert layer.bias.std() > 0
