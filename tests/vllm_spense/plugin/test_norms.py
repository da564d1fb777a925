"""A decoder layer's norms hand FP8 to the linear layers after them, where and only where vLLM's model lets them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map_only
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm_models import QuantConfig

from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning.synthetic import random_2of4, random_fp8
from vllm_spense.ops import gemm
from vllm_spense.ops.layer_plan import pack
from vllm_spense.plugin.norms import DeferredGemm, FusedRMSNorm, only_norms_read_layers
from vllm_spense.plugin.pairing import Pairing, Quantized
from vllm_spense.plugin.vllm_internals import stand_in

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def pairing() -> Iterator[Pairing]:
    """Of the model that vLLM is building."""
    assert stand_in(FusedRMSNorm)
    engine = VllmConfig()
    engine.quant_config = QuantConfig(Pairing(activations=False, norms=True))
    with set_current_vllm_config(engine):
        yield engine.quant_config.pairing


def norm_before_gate_up(pairing: Pairing, takes_fp8: bool) -> FusedRMSNorm:
    link = pairing.built_gate_up("model.layers.0.mlp.gate_up_proj")
    RMSNorm(64), (norm := RMSNorm(64))
    link.takes_fp8 = takes_fp8
    return norm


def test_it_goes_on_to_be_vllms_norm(pairing: Pairing) -> None:
    norm, x, residual = RMSNorm(64), torch.randn(3, 64), torch.randn(3, 64)
    assert type(norm) is FusedRMSNorm
    assert norm.name == RMSNorm.name == "rms_norm"
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    torch.testing.assert_close(norm(x), exact)
    # Nobody takes FP8 from it yet, and what has no residual stream beside it stays a tensor.
    waiting = norm_before_gate_up(pairing, takes_fp8=False)
    assert isinstance(waiting(x, residual.clone())[0], torch.Tensor)
    assert isinstance(norm(x), torch.Tensor)


def test_the_layer_after_it_gets_fp8(pairing: Pairing) -> None:
    norm = norm_before_gate_up(pairing, takes_fp8=True)
    norm.weight.data.uniform_(0.5, 2)
    x, residual = torch.randn(2, 5, 64, dtype=torch.float32)
    x[3] = residual[3] = 0
    found, total = norm(x, residual)
    assert isinstance(found, Quantized)
    assert found.values.dtype == FP8
    torch.testing.assert_close(total, x + residual)
    plain = super(FusedRMSNorm, norm).forward(x.clone(), residual.clone())[0].double()
    error = (found.values.double() * found.scale.double() - plain).abs()
    # Half a step of E4M3: 2⁻⁴ of a value, or 2⁻¹⁰ of the row's scale.
    assert (error <= 2**-4 * 1.001 * plain.abs() + 2**-10 * found.scale).all()
    assert (found.values.float().abs().amax(-1)[[0, 1, 2, 4]] == 448).all()
    assert isinstance(norm(x), torch.Tensor)


#: Of a down layer, its first 64 columns 2:4.
WEIGHT = torch.cat([random_2of4(64, 64, torch.device("cpu")), random_fp8(64, 32, torch.device("cpu"))], 1)


def deferred() -> DeferredGemm:
    problem = Problem(64, 96, Regions(64, 32), "input", torch.float32, separate_outputs=True)
    x = random_fp8(5, 96, torch.device("cpu"))
    return DeferredGemm(
        x, *gemm.op_arguments(pack(WEIGHT, problem), problem), torch.rand(5, 1) / 1000, torch.rand(64, 1)
    )


@pytest.mark.parametrize("takes_fp8", [True, False], ids=["before a pruned layer", "at the model's end"])
def test_the_norm_runs_down(pairing: Pairing, takes_fp8: bool) -> None:
    norm = norm_before_gate_up(pairing, takes_fp8)
    down, residual = deferred(), torch.randn(5, 64)
    found, total = norm(down, residual.clone())
    exact = (down.x.double() @ WEIGHT.double().t()) * down.x_scale * down.w_scale.t()
    expected, expected_total = norm(exact.float(), residual.clone())
    torch.testing.assert_close(total, expected_total, rtol=1e-4, atol=1e-4)
    assert isinstance(found, Quantized) == isinstance(expected, Quantized) == takes_fp8
    if takes_fp8:
        assert reference.fp8_difference(found[:2], expected[:2]) is None
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("pipeline", "draft", "alone"),
    [(1, None, True), (2, None, False), (1, object(), False)],
    ids=["alone", "pipeline", "draft model"],
)
def test_who_reads_what_a_decoder_layer_returns(pipeline: int, draft: object, alone: bool) -> None:
    parallel = SimpleNamespace(pipeline_parallel_size=pipeline)
    assert only_norms_read_layers(SimpleNamespace(parallel_config=parallel, speculative_config=draft)) == alone


def test_the_ops_and_their_fakes_agree() -> None:
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.rand(64)
    down = deferred()
    scales = down.x_scale, down.w_scale
    # opcheck compares inputs before and after, which torch cannot in FP8.
    taken = (down.x.float(), down.tensors, down.key, *scales, residual, weight, 1e-6)
    raw = gemm.region_gemm(down.x, down.tensors, down.key)
    for op, arguments, expected in (
        ("add_norm_quant", (x, residual, weight, 1e-6), reference.add_norm_quant(x, residual, weight, 1e-6)),
        ("gemm_add_norm_quant", taken, reference.add_norm_quant(raw, residual, weight, 1e-6, scales)),
        ("quantize", (x,), reference.quantize(x)),
    ):
        run = getattr(torch.ops.spense, op).default
        found = run(*arguments)
        torch.library.opcheck(run, arguments, test_utils=["test_schema"])
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = run(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        for tensor, same, fake in zip(found, expected, fakes, strict=True):
            assert torch.equal(tensor.float(), same.float())
            assert (fake.shape, fake.dtype) == (tensor.shape, tensor.dtype)
