"""The kernel between gate_up and down against its twin, and what it hands to the next kernel."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("nvmath", reason="needs nvmath-python")

from vllm_spense.format import Regions
from vllm_spense.kernels.elementwise import silu_mul_quant
from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight
from vllm_spense.ops import elementwise_ops, gemm
from vllm_spense.ops.layer_plan import pack, plan_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
#: Of an 8B, a 14B, a 32B and a 70B model's rank, a small model's, and the smallest that regions may have.
SIZES = (32, 1536, 14336, 17408, 25600, 28672)


def inputs(tokens: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_scale, w_scale = torch.rand(tokens, 1, device=DEVICE) / 100, torch.rand(2 * size, 1, device=DEVICE)
    # Last: w_scale is a weight, which the kernel does not wait for.
    return torch.randn(tokens, 2 * size, dtype=dtype, device=DEVICE) * 1000, x_scale, w_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_its_twin(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for tokens in (1, 2, 7, 16, 17, 32, 63, 64, 65, 130, 1000):
        raw, x_scale, w_scale = inputs(tokens, size, dtype)
        raw[0] = 0
        for boundary in {0, size // 16 * 8, size}:
            found = silu_mul_quant.run(raw, x_scale, w_scale, boundary)
            twin = reference.silu_mul_quant(raw, x_scale, w_scale, boundary)
            assert reference.fp8_difference(found, twin) is None, (tokens, boundary)


def test_a_number_that_is_none_stays_visible() -> None:
    raw, x_scale, w_scale = inputs(3, 1536, torch.bfloat16)
    raw[1, 777] = torch.nan
    values, scale = silu_mul_quant.run(raw, x_scale, w_scale, 512)
    output = values.float() * scale
    assert output[1].isnan().all()
    assert output[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 32, 128])
def test_a_captured_mlp_follows_its_inputs(tokens: int) -> None:
    """gate_up, the activation and down: three launches that overlap."""
    hidden, regions = 1024, Regions(3072, 1024)
    up, down = (
        Problem(8192, hidden, regions, "output", projections=2).region_major(),
        Problem(hidden, 4096, regions, "input"),
    )
    weights = {problem: random_weight(problem, DEVICE) for problem in (up, down)}
    packed = {problem: gemm.op_arguments(pack(weight, problem), problem) for problem, weight in weights.items()}
    x, (_, x_scale, w_scale) = random_fp8(tokens, hidden, DEVICE), inputs(tokens, 4096, torch.bfloat16)
    for problem in (up, down):
        plan_of(problem.op_key, DEVICE).prepare(256)

    def mlp() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        raw = gemm.region_gemm(x, *packed[up])
        values, scale = elementwise_ops.silu_mul_quant(raw, x_scale, w_scale, regions.sparse)
        return raw, values, scale, gemm.region_gemm(values, *packed[down])

    mlp()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mlp()
    for _ in range(5):
        x.copy_(random_fp8(tokens, hidden, DEVICE))
        for tensor in captured:
            tensor.view(torch.uint8).fill_(0xFF)
        graph.replay()
        raw, values, scale, y = captured
        exact = x.double() @ weights[up].double().t()
        assert ((raw.double() - exact).norm() / exact.norm()) < 0.004
        twin = reference.silu_mul_quant(raw, x_scale, w_scale, regions.sparse)
        assert reference.fp8_difference((values, scale), twin) is None
        exact = values.double() @ weights[down].double().t()
        assert ((y.double() - exact).norm() / exact.norm()) < 0.004
