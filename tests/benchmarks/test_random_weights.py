"""What the baseline of a speed measurement multiplies: numbers, not zeros."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.random_weights import fill_random, weight_bytes

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


def test_scales_that_do_not_fit_are_refused() -> None:
    model = nn.ModuleDict({"down": fp8_layer(N, K, 1, transposed=True)})
    with pytest.raises(ValueError, match=r"down: 1 scales for an FP8 weight of shape \(512, 384\)"):
        fill_random(model)


def test_shared_storage_counts_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(K, N, bias=False), "b": nn.Linear(K, N, bias=False)})
    assert weight_bytes(model) == 2 * N * K * 4
    model["b"].weight = parameter(model["a"].weight.data[: N // 2])
    assert weight_bytes(model) == N * K * 4
