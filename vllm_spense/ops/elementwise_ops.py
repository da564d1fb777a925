"""The custom elementwise ops between the GEMMs: `spense::silu_mul_quant`, `spense::add_norm_quant`, `spense::quantize`,
and `spense::gemm_add_norm_quant`, which is a GEMM of two regions together with the norm that follows it.

Each ends in a kernel that lets the next GEMM begin early. Elsewhere than on the GPUs that they are written for, traced
torch is faster than an op that Inductor cannot fuse with anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.problem import Problem, Scales
from vllm_spense.ops.dispatch import ONE_LAUNCH_CAPABILITY, Path, reason_against
from vllm_spense.ops.gemm import LIBRARY
from vllm_spense.ops.layer_plan import plan_of, problem_of
from vllm_spense.ops.machine import describe

logger = logging.getLogger("vllm.spense")

#: Where neither the GEMM nor a kernel of ours takes the scales, Inductor fuses them into what follows. They add reads
#: to SiLU·mul·quant, and beyond a number of reads it would write its input out first, in a kernel of its own.
INDUCTOR_OPTIONS = {"realize_reads_threshold": 16, "realize_opcount_threshold": 100}


def silu_mul_quant(
    raw: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, boundary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) · up in FP8: what `kernels.reference.silu_mul_quant` computes, from and to the same."""
    return torch.ops.spense.silu_mul_quant(raw, x_scale, w_scale, boundary)


def fuses_activation(problem: Problem, device: torch.device) -> bool:
    """Whether `silu_mul_quant` has a kernel for what a merged gate_up puts out; makes it ready if so."""
    if device.type == "cpu":
        return True
    if reason_against(Path.ONE_LAUNCH, problem, describe(device)):
        return False
    from vllm_spense.kernels.elementwise import silu_mul_quant as fast

    if fault := fast.fault(device):
        logger.warning("Spense: SiLU · mul · quantize is left to the compiler: %s", fault)
        return False
    fast.prepare(problem.n // 2, problem.out_dtype, device)
    return True


def add_norm_quant(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMS norm of x + residual in FP8: what `kernels.reference.add_norm_quant` computes, from and to the same."""
    return torch.ops.spense.add_norm_quant(x, residual, weight, epsilon)


def gemm_add_norm_quant(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    key: str,
    scales: Scales,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMS norm of X·Wᵀ · s_x · s_w + residual in FP8: GEMM and norm in one op, because the GEMM leaves one or two
    outputs, depending on M, and the norm adds them up as it reads them.

    Args:
        x, tensors, key: as `ops.region_gemm` takes them, of a problem that is not scaled.
        scales: float32, of the M tokens and N rows.
        residual, weight, epsilon: as `add_norm_quant` takes them.
    """
    return torch.ops.spense.gemm_add_norm_quant(x, list(tensors), key, *scales, residual, weight, epsilon)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) in FP8 and its scales, float32 (M, 1)."""
    return torch.ops.spense.quantize(x)


def fuses_norm(size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `add_norm_quant` and `quantize` have a kernel for rows of `size` values; makes it ready if so."""
    if device.type == "cpu":
        return True
    described = describe(device)
    if not described.bindings or described.capability != ONE_LAUNCH_CAPABILITY or dtype != torch.bfloat16:
        return False
    from vllm_spense.kernels.elementwise import norm_quant as fast

    if size % fast.WIDTH:
        return False
    if fault := fast.fault(device):
        logger.warning("Spense: norm · quantize is left to the compiler: %s", fault)
        return False
    fast.prepare(size, device)
    return True


def _silu_mul_quant(
    raw: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, boundary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if raw.device.type == "cpu":
        return reference.silu_mul_quant(raw, x_scale, w_scale, boundary)
    from vllm_spense.kernels.elementwise import silu_mul_quant as fast

    return fast.run(raw, x_scale, w_scale, boundary)


def _silu_mul_quant_fake(
    raw: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, boundary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, size = raw.shape[0], raw.shape[1] // 2
    return raw.new_empty((tokens, size), dtype=torch.float8_e4m3fn), x_scale.new_empty((tokens, 1))


def _add_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    scales: Scales | None = None,
    addend: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.device.type == "cpu":
        return reference.add_norm_quant(x, residual, weight, epsilon, scales, addend)
    from vllm_spense.kernels.elementwise import norm_quant as fast

    return fast.add_norm_quant(x.contiguous(), residual.contiguous(), weight, epsilon, scales, addend)


def _add_norm_quant_fake(
    x: torch.Tensor, residual: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_quantize_fake(x), residual.new_empty(x.shape)


def _gemm_add_norm_quant(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    key: str,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raw, addend = plan_of(key, x.device).run(x, tensors)
    return _add_norm_quant(raw, residual, weight, epsilon, (x_scale, w_scale), addend)


def _gemm_add_norm_quant_fake(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    key: str,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    residual: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _add_norm_quant_fake(x.new_empty((x.shape[0], problem_of(key).n)), residual)


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if x.device.type == "cpu":
        return reference.quantize(x)
    from vllm_spense.kernels.elementwise import norm_quant as fast

    return fast.quantize(x.contiguous())


def _quantize_fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)


LIBRARY.define("silu_mul_quant(Tensor raw, Tensor x_scale, Tensor w_scale, int boundary) -> (Tensor, Tensor)")
LIBRARY.impl("silu_mul_quant", _silu_mul_quant, "CompositeExplicitAutograd")
torch.library.register_fake("spense::silu_mul_quant", _silu_mul_quant_fake, lib=LIBRARY)
LIBRARY.define("add_norm_quant(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor, Tensor)")
LIBRARY.impl("add_norm_quant", _add_norm_quant, "CompositeExplicitAutograd")
torch.library.register_fake("spense::add_norm_quant", _add_norm_quant_fake, lib=LIBRARY)
LIBRARY.define(
    "gemm_add_norm_quant(Tensor x, Tensor[] tensors, str key, Tensor x_scale, Tensor w_scale, Tensor residual, "
    "Tensor weight, float epsilon) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("gemm_add_norm_quant", _gemm_add_norm_quant, "CompositeExplicitAutograd")
torch.library.register_fake("spense::gemm_add_norm_quant", _gemm_add_norm_quant_fake, lib=LIBRARY)
LIBRARY.define("quantize(Tensor x) -> (Tensor, Tensor)")
LIBRARY.impl("quantize", _quantize, "CompositeExplicitAutograd")
torch.library.register_fake("spense::quantize", _quantize_fake, lib=LIBRARY)
