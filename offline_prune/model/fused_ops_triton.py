"""A block's norms, rotary embedding and gated activation, each one Triton kernel.

In the model's code these are some twenty kernels that read and write whole activations, in float32 in part. Here every
value is read and written once, and rounded where the model's code rounds it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Values that one program of a norm holds at least.
_TILE = 4096
#: Values that one program of the activation computes.
_STRIP = 4096
#: Attention heads that one program rotates.
_HEADS = 16


@triton.jit
def _norm(x, weight, out, height, width, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    exists = (rows < height)[:, None] & (columns < width)[None, :]
    place = rows[:, None] * width + columns[None, :]
    value = tl.load(x + place, mask=exists, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    normalized = (wide * scale[:, None]).to(value.dtype).to(tl.float32)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out + place, (factor[None, :] * normalized).to(value.dtype), mask=exists)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean x² + ε) over the last dimension in float32, rounded, times weight.

    Args:
        x: float (…, n).
        weight: of x's type, (n,).
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    height = x.numel() // width
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE // columns)
    _norm[(triton.cdiv(height, rows),)](x, weight, out, height, width, eps, ROWS=rows, COLUMNS=columns, num_warps=8)
    return out


@triton.jit
def _gate(gate, up, out, count, STRIP: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * STRIP + tl.arange(0, STRIP)
    exists = place < count
    value = tl.load(gate + place, mask=exists, other=0.0)
    wide = value.to(tl.float32)
    activated = tl.div_rn(wide, 1.0 + tl.exp(-wide)).to(value.dtype).to(tl.float32)
    factor = tl.load(up + place, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + place, (activated * factor).to(value.dtype), mask=exists)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate), rounded, times up; both float of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _gate[(triton.cdiv(gate.numel(), _STRIP),)](gate, up, out, gate.numel(), STRIP=_STRIP, num_warps=8)
    return out


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    out,
    heads,
    length,
    x_sequence,
    x_head,
    x_position,
    out_sequence,
    out_head,
    out_position,
    angle_sequence,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    sequence = (tl.program_id(0) // length).to(tl.int64)
    position = (tl.program_id(0) % length).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    half: tl.constexpr = WIDTH // 2
    other = (column + half) % WIDTH
    exists = (head < heads)[:, None] & (column >= 0)[None, :]
    start = x + sequence * x_sequence + position * x_position + head[:, None] * x_head
    value = tl.load(start + column[None, :], mask=exists, other=0.0)
    swapped = tl.load(start + other[None, :], mask=exists, other=0.0).to(tl.float32)
    swapped = tl.where((column < half)[None, :], -swapped, swapped)
    angle = sequence * angle_sequence + position * WIDTH + column
    first = (value.to(tl.float32) * tl.load(cos + angle).to(tl.float32)[None, :]).to(value.dtype).to(tl.float32)
    second = (swapped * tl.load(sin + angle).to(tl.float32)[None, :]).to(value.dtype).to(tl.float32)
    place = sequence * out_sequence + position * out_position + head[:, None] * out_head + column[None, :]
    tl.store(out + place, (first + second).to(value.dtype), mask=exists)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: x·cos + (−x₂, x₁)·sin for the halves x₁, x₂ of each head, both products rounded.

    Args:
        x: float (sequences, heads, length, n), n a power of two, its last dimension dense.
        cos, sin: of x's type, (sequences or 1, length, n).

    Returns:
        As x, in memory too.
    """
    sequences, heads, length, width = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    _rotate[(sequences * length, triton.cdiv(heads, _HEADS))](
        x,
        cos,
        sin,
        out,
        heads,
        length,
        *x.stride()[:3],
        *out.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0,
        WIDTH=width,
        HEADS=_HEADS,
        num_warps=4,
        # Or a product and the sum become one instruction, and the product is not rounded.
        enable_fp_fusion=False,
    )
    return out
