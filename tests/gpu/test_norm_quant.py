"""The kernel before linear layers against its twins, and what it hands to the next kernel."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("nvmath", reason="needs nvmath-python")

from vllm_spense.format import Regions
from vllm_spense.kernels.elementwise import norm_quant, silu_mul_quant
from vllm_spense.kernels.region_gemm import one_launch, reference
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning.synthetic import random_weight
from vllm_spense.ops import elementwise_ops, gemm
from vllm_spense.ops.layer_plan import pack, plan_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
EPSILON = 1e-6
#: A small model's hidden size, of an 8B, a 32B and a 70B model, and more than a thread block takes at once.
SIZES = (8, 576, 4096, 5120, 8192, 25600)


def inputs(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, residual = torch.randn(2, tokens, size, dtype=torch.bfloat16, device=DEVICE) * 3
    return x, residual, torch.rand(size, dtype=torch.bfloat16, device=DEVICE) + 0.5


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_its_twins(size: int) -> None:
    torch.manual_seed(0)
    for tokens in (1, 2, 7, 32, 130, 1000):
        x, residual, weight = inputs(tokens, size)
        x[0] = residual[0] = 0
        scales = torch.rand(tokens, 1, device=DEVICE), torch.rand(size, 1, device=DEVICE)
        for way in ((None, None), (scales, None), (scales, torch.randn_like(x) * 3)):
            *found, total = norm_quant.add_norm_quant(x, residual, weight, EPSILON, *way)
            *expected, twin_total = reference.add_norm_quant(x, residual, weight, EPSILON, *way)
            assert torch.equal(total, twin_total)
            assert reference.fp8_difference(found, expected) is None, tokens
        assert reference.fp8_difference(norm_quant.quantize(x), reference.quantize(x)) is None, tokens


def test_a_number_that_is_none_stays_visible() -> None:
    x, residual, weight = inputs(3, 576)
    x[1, 77] = torch.nan
    for values, scale, *_ in (norm_quant.add_norm_quant(x, residual, weight, EPSILON), norm_quant.quantize(x)):
        output = values.float() * scale
        assert output[1].isnan().all()
        assert output[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kernel", [norm_quant, silu_mul_quant, one_launch], ids=lambda kernel: kernel.__name__)
def test_kernels_are_tried_while_a_model_loads(kernel: ModuleType) -> None:
    """With its type as torch's default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert kernel.fault.__wrapped__(DEVICE) is None
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tokens", [1, 32, 128, 300])
def test_captured_launches_that_overlap_follow_their_inputs(tokens: int) -> None:
    """down with the norm after it, and gate_up, twice: each reads what the one before has written."""
    hidden, regions = 1024, Regions(3072, 1024)
    up = Problem(8192, hidden, regions, "output", projections=2)
    down = Problem(hidden, 4096, regions, "input", separate_outputs=True)
    weights = {problem: random_weight(problem, DEVICE) for problem in (up, down)}
    packed = {problem: gemm.op_arguments(pack(weight, problem), problem) for problem, weight in weights.items()}
    for problem in (up, down):
        plan_of(problem.op_key, DEVICE).prepare(512)
    z, residual, weight = torch.randn(tokens, 4096, device=DEVICE).bfloat16(), *inputs(tokens, hidden)[1:]
    w_scale = torch.rand(hidden, 1, device=DEVICE) / 64

    def layers() -> list[tuple[torch.Tensor, ...]]:
        steps, stream, x = [], residual, z
        for _ in range(2):
            quantized, x_scale = elementwise_ops.quantize(x)
            values, scale, stream = elementwise_ops.gemm_add_norm_quant(
                quantized, *packed[down], (x_scale, w_scale), stream, weight, EPSILON
            )
            raw = gemm.region_gemm(values, *packed[up])
            x = raw[:, :4096].contiguous()
            steps.append((x_scale, values, scale, stream, raw))
        return steps

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    for _ in range(5):
        z.copy_(torch.randn(tokens, 4096, device=DEVICE))
        for tensor in (tensor for step in captured for tensor in step):
            tensor.view(torch.uint8).fill_(0xFF)
        graph.replay()
        x, before = z, residual
        for x_scale, values, scale, stream, raw in captured:
            quantized, exact_scale = reference.quantize(x)
            torch.testing.assert_close(x_scale, exact_scale, rtol=1e-5, atol=0)
            y = quantized.double() @ weights[down].double().t() * x_scale * w_scale.t()
            exact = y + before.double()
            # Two BF16 sums that nearly cancel leave a percent; another input, or another weight, leaves most of it.
            assert ((stream.double() - exact).norm() / exact.norm()) < 0.03
            normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPSILON) * weight.double()
            # E4M3 rounds by up to 2⁻⁴, and by less on average.
            assert ((values.double() * scale - normed).norm() / normed.norm()) < 0.04
            exact = values.double() @ weights[up].double().t()
            assert ((raw.double() - exact).norm() / exact.norm()) < 0.004
            x, before = raw[:, :4096], stream
