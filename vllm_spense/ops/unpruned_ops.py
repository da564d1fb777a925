"""The custom op of unpruned layers' GEMMs, `spense::unpruned_gemm`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.ops.dispatch import Path, in_words, reason_against
from vllm_spense.ops.gemm import LIBRARY
from vllm_spense.ops.machine import describe, forced

if TYPE_CHECKING:
    from vllm_spense.kernels.region_gemm.unpruned_gemm import StockGemm, UnprunedPlan

logger = logging.getLogger("vllm.spense")


class UnprunedGemms:
    """The op, and the plans that it finds by the size of the weight: all it gets is tensors."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, int, torch.device], UnprunedPlan] = {}

    def prepare(self, n: int, k: int, device: torch.device, stock: StockGemm) -> bool:
        """Whether `unpruned_gemm` is to run layers (N, K): makes their plan if so, and says in the log what it is.

        Args:
            stock: vLLM's kernel, which they run for as many tokens as it is faster.
        """
        if (n, k, device) in self._plans:
            return any(self._plans[n, k, device].faster.values())
        if forced() not in (None, Path.ONE_LAUNCH):
            return False
        if reason_against(Path.ONE_LAUNCH, Problem.unpruned(n, k), describe(device)):
            return False
        from vllm_spense.kernels.region_gemm import one_launch, unpruned_gemm

        plan = self._plans[n, k, device] = unpruned_gemm.UnprunedPlan(n, k, device, stock)
        by_tokens = [("one-launch" if wins else "stock", tokens) for tokens, wins in plan.faster.items()]
        beyond = ("stock", one_launch.MAX_DENSE_TOKENS + 1)
        logger.info("Spense: unpruned %d × %d: %s", n, k, in_words([*by_tokens, beyond]))
        return any(plan.faster.values())

    def run(self, x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
        """The op's implementation."""
        return self._plans[*weight.shape, x.device].run(x, weight, x_scale, w_scale)


_GEMMS = UnprunedGemms()
prepare_unpruned = _GEMMS.prepare


def unpruned_gemm(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """x · Wᵀ · s_x · s_w, for a layer that `prepare_unpruned` knows.

    Args:
        x: (M, K) FP8 E4M3.
        weight: (N, K) FP8 E4M3, contiguous.
        x_scale, w_scale: float32 (M, 1) and (N, 1).

    Returns:
        (M, N) bfloat16.
    """
    return torch.ops.spense.unpruned_gemm(x, weight, x_scale, w_scale)


def _unpruned_gemm_fake(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.bfloat16)


LIBRARY.define("unpruned_gemm(Tensor x, Tensor weight, Tensor x_scale, Tensor w_scale) -> Tensor")
LIBRARY.impl("unpruned_gemm", _GEMMS.run, "CUDA")
torch.library.register_fake("spense::unpruned_gemm", _unpruned_gemm_fake, lib=LIBRARY)
