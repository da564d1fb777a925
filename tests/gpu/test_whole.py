"""Unpruned layers: the one-launch kernel with scales, against float64 and beside vLLM's kernel."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("nvmath", reason="needs nvmath-python")
pytest.importorskip("vllm", reason="needs vLLM's kernel")

import vllm._custom_ops  # noqa: F401 - registers the kernel

from vllm_spense.kernels.one_launch.schedule import Tiling
from vllm_spense.kernels.region_gemm import one_launch
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning.synthetic import random_fp8
from vllm_spense.ops.unpruned_ops import prepare_unpruned, unpruned_gemm
from vllm_spense.plugin.vllm_internals import stock_gemm

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
#: Of SmolLM2, whose sizes are multiples of no tile, and of a 4B model.
SHAPES = [(960, 576), (576, 576), (6144, 2560), (2560, 4096)]


def exact(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().t() * x_scale.double() * w_scale.double().t()


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_way_to_cut_it(n: int, k: int) -> None:
    torch.manual_seed(0)
    problem = Problem.unpruned(n, k)
    weight, w_scale = random_fp8(n, k, DEVICE), torch.rand(n, 1, device=DEVICE)
    for tokens in (1, 7, 8, 17, 32, 64, 100, 128):
        x, x_scale = random_fp8(tokens, k, DEVICE), torch.rand(tokens, 1, device=DEVICE)
        expected = exact(x, weight, x_scale, w_scale)
        allowed = 2 * error(stock_gemm().gemm(x, weight, x_scale, w_scale), expected)
        for splits, cluster in ((0, False), (3, False), (2, True), (4, True)):
            tiling = Tiling(one_launch.tile_tokens(tokens), 128, splits, cluster)
            plan = one_launch.OneLaunchPlan(problem, tokens, DEVICE, tiling)
            out = torch.full((tokens, n), torch.nan, dtype=torch.bfloat16, device=DEVICE)
            plan.run(x, {"compressed": weight[:0], "dense": weight}, out, (x_scale, w_scale))
            assert error(out, expected) <= allowed, (tokens, tiling)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_op_for_any_number_of_tokens(n: int, k: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    weight, w_scale = random_fp8(n, k, DEVICE), torch.rand(n, 1, device=DEVICE)
    prepare_unpruned(n, k, DEVICE, stock_gemm())
    for tokens in (1, 33, 128, 129, 1000):
        x, x_scale = random_fp8(tokens, k, DEVICE), torch.rand(tokens, 1, device=DEVICE)
        out = unpruned_gemm(x, weight, x_scale, w_scale)
        assert error(out, exact(x, weight, x_scale, w_scale)) < 0.004
