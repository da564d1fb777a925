"""The reference path: plain torch on any device, and the twin that every faster kernel is tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from vllm_spense.kernels.region_gemm.problem import Problem, Scales

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max
#: As vLLM's: rows of zeros have a scale too.
_SMALLEST_SCALE = 1 / (_FP8_MAX * 512)
#: What `pack` returns, in this order.
TENSORS = ("sparse", "dense")


def pack(weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """Separates the regions of `weight` (N, K) FP8 E4M3; zeros stay stored.

    Returns:
        `sparse` and `dense`; output-split: (P·S, K) and (P·D, K) of all P projections, input-split: (N, S) and (N, D).
        On a GPU FP8 E4M3. On a CPU in the problem's out_dtype: it has no FP8 arithmetic, and converting at every call
        takes most of its time.
    """
    dtype = problem.out_dtype if weight.device.type == "cpu" else weight.dtype
    # Copies, because views would keep the whole weight alive.
    sparse, dense = (
        torch.cat([rows.to(dtype) for rows in region]) for region in zip(*problem.split_regions(weight), strict=True)
    )
    return {"sparse": sparse, "dense": dense}


def prepare(problem: Problem, min_tokens: int, max_tokens: int, device: torch.device) -> None:
    """Nothing to prepare: torch's kernels take any number of tokens."""


def run(
    x: torch.Tensor, packed: Mapping[str, torch.Tensor], problem: Problem, scales: Scales | None = None
) -> torch.Tensor:
    """X·Wᵀ, or X·Wᵀ · s_x · s_w if the problem is scaled.

    Args:
        x: (M, K) FP8 E4M3.
        packed: what `pack` returned.
        scales: of a scaled problem's tokens and rows.

    Returns:
        (M, N) in the problem's out_dtype, which the GEMMs run in: it holds every E4M3 number exactly.
    """
    raw = _raw_sums(x, packed, problem)
    if scales is None:
        return raw
    return scaled(raw, *scales).to(raw.dtype)


def _raw_sums(x: torch.Tensor, packed: Mapping[str, torch.Tensor], problem: Problem) -> torch.Tensor:
    x, sparse, dense = (tensor.to(problem.out_dtype) for tensor in (x, packed["sparse"], packed["dense"]))
    if problem.split == "output":
        regions = [F.linear(x, region).unflatten(-1, (problem.projections, -1)) for region in (sparse, dense)]
        return torch.cat(regions, dim=-1).flatten(-2)
    x_sparse, x_dense = x.split((problem.regions.sparse, problem.regions.dense), dim=-1)
    return torch.addmm(F.linear(x_sparse, sparse), x_dense, dense.t())


def silu_mul_quant(
    raw: torch.Tensor, x_scale: torch.Tensor | None, w_scale: torch.Tensor | None, boundary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) · up in FP8, everything before the quantization in float32.

    Args:
        raw: (M, 2·I), gate_up's raw sums by region, see `by_projection`.
        x_scale: float32, one for each of the M tokens.
        w_scale: float32, one for each of the 2·I rows of the weight, gate's before up's. Both are None for sums that
            were scaled already.
        boundary: columns of a sparse region.

    Returns:
        float8_e4m3fn (M, I) and its scales, float32 (M, 1).
    """
    sums = by_projection(raw, boundary).float()
    gate, up = (sums if x_scale is None or w_scale is None else scaled(sums, x_scale, w_scale)).chunk(2, -1)
    return quantize(F.silu(gate) * up)


def by_projection(raw: torch.Tensor, boundary: int) -> torch.Tensor:
    """Columns [gate sparse | up sparse | gate dense | up dense] of gate_up's output → [gate | up].

    Args:
        raw: (M, 2·I).
        boundary: columns of a sparse region; all I of them leave `raw` as it is.
    """
    rest = raw.shape[-1] // 2 - boundary
    gate_sparse, up_sparse, gate_dense, up_dense = raw.split((boundary, boundary, rest, rest), -1)
    return torch.cat([gate_sparse, gate_dense, up_sparse, up_dense], -1)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) → float8_e4m3fn (M, K) and its scales, float32 (M, 1)."""
    scale = (x.abs().amax(-1, keepdim=True).float() / _FP8_MAX).clamp(min=_SMALLEST_SCALE)
    return (x.float() * scale.reciprocal()).clamp(-_FP8_MAX, _FP8_MAX).to(FP8), scale


def add_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    scales: Scales | None = None,
    addend: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMS norm of x + residual in FP8, everything before the quantization in float32.

    Args:
        x: (M, K) in the model's dtype, or a GEMM's raw sums.
        residual: (M, K) in the model's dtype.
        weight: (K,), of the norm.
        epsilon: added to the mean square.
        scales: that raw sums still have to be multiplied by, of the tokens and columns of x.
        addend: (M, K), the other part of raw sums that came in two.

    Returns:
        float8_e4m3fn (M, K), its scales, float32 (M, 1), and x + residual in the model's dtype.
    """
    x = x.float() if addend is None else x.float() + addend.float()
    total = (x if scales is None else scaled(x, *scales)) + residual.float()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + epsilon) * weight.float()
    return *quantize(normed), total.to(residual.dtype)


def scaled(raw: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Raw sums (M, N) times the scales of tokens and columns, in float32."""
    return raw.float() * x_scale.view(-1, 1) * w_scale.view(1, -1)


def fp8_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    """In words, what of one (FP8, scales) lies outside of the other's rounding; None if nothing does."""
    (values, scale), (twin_values, twin_scale) = found, expected
    if not torch.allclose(scale, twin_scale, rtol=1e-5, atol=0):
        return "scales"
    # Of a value near the middle between two FP8 numbers, either may be taken: 2⁻³ of it apart, or one subnormal step.
    if not torch.allclose(values.float(), twin_values.float(), rtol=0.13, atol=2**-9):
        return "values"
    agreeing = (values.view(torch.uint8) == twin_values.view(torch.uint8)).float().mean()
    return None if agreeing > 0.99 else f"{1 - agreeing:.2%} of the values"
