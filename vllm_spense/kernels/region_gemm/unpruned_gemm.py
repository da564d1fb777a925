"""Unpruned layers: one dense FP8 weight, and scales inside the kernel.

After the GEMMs of attention the compiler has no kernel that could apply the scales. The one-launch kernel serves small
M, where it is faster than the kernel that vLLM would run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_spense.kernels.region_gemm import one_launch
from vllm_spense.kernels.region_gemm.problem import Problem, Scales
from vllm_spense.kernels.tuning.compare import Packed, compare

#: x (M, K), W (N, K), scales of tokens (M, 1) and rows (N, 1) → (M, N) bfloat16.
Gemm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: The one-launch kernel's time must be below this share of vLLM's: timed one after the other its early start counts
#: for more than between the kernels of a layer.
_WORTH_A_CHANGE = 0.97


class StockGemm(NamedTuple):
    """The kernel that vLLM would run, and its version: vLLM's."""

    gemm: Gemm
    version: str


class UnprunedPlan:
    """How unpruned layers (N, K) run on one device: for every M the faster of the one-launch kernel and vLLM's.

    Making one compares them for every number of tokens that the one-launch kernel may serve.

    Attributes:
        faster: whether the one-launch kernel is, by the largest M of each of its plans.
    """

    def __init__(self, n: int, k: int, device: torch.device, stock: StockGemm) -> None:
        self.problem = Problem.unpruned(n, k)
        self.stock = stock
        self.faster: dict[int, bool] = {}
        self._plans: dict[int, one_launch.OneLaunchPlan] = {}
        tokens = one_launch.MIN_TILE_TOKENS
        while tokens <= one_launch.MAX_DENSE_TOKENS:
            self.faster[tokens] = self._compare(tokens, device)
            if self.faster[tokens]:
                self._plans[tokens] = one_launch.plan(self.problem, tokens, device)
            tokens *= 2

    def _compare(self, tokens: int, device: torch.device) -> bool:
        def run_ours(x: torch.Tensor, packed: Packed, scales: Scales | None) -> object:
            return one_launch.plan(self.problem, tokens, device).run(x, packed, scales=scales)

        def run_stock(x: torch.Tensor, packed: Packed, scales: Scales | None) -> object:
            assert scales
            return self.stock.gemm(x, packed["dense"], *scales)

        us = compare(
            self.problem,
            tokens,
            device,
            {"one-launch": run_ours, "stock": run_stock},
            lambda weight: _packed(weight.clone()),
            {"one-launch": one_launch.found(self.problem, tokens, device), "stock": self.stock.version},
        )
        return us["one-launch"] < _WORTH_A_CHANGE * us["stock"]

    def run(self, x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
        """x · Wᵀ · s_x · s_w.

        Args:
            x: (M, K) float8_e4m3fn.
            weight: (N, K) float8_e4m3fn, contiguous.
            x_scale, w_scale: float32 (M, 1) and (N, 1).

        Returns:
            (M, N) bfloat16.
        """
        plan = self._plans.get(one_launch.bucket(len(x)))
        if plan is None:
            return self.stock.gemm(x, weight, x_scale, w_scale)
        return plan.run(x, _packed(weight), scales=(x_scale, w_scale))


def _packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"compressed": weight[:0], "dense": weight}
