"""SparseGPT's walk over a block of columns as one Triton kernel; `sparsegpt.solve_block` is its plain twin."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from offline_prune.methods.fp8 import FP8_MAX
from offline_prune.methods.triton_tile import ROWS, column


@triton.jit
def _score(tile, columns, c, corner, corner_stride):
    """(w_c / U_cc)² of each row."""
    ratio = tl.div_rn(column(tile, columns, c), tl.load(corner + c * (corner_stride + 1)))
    return ratio * ratio


@triton.jit
def _two_lowest(tile, columns, c, corner, corner_stride):
    """Bit j is set where column c + j has one of the two lowest scores of its group; of equal ones the later."""
    s0 = _score(tile, columns, c, corner, corner_stride)
    s1 = _score(tile, columns, c + 1, corner, corner_stride)
    s2 = _score(tile, columns, c + 2, corner, corner_stride)
    s3 = _score(tile, columns, c + 3, corner, corner_stride)
    # b_ij: j goes before i does.
    b01 = (s1 <= s0).to(tl.int32)
    b02 = (s2 <= s0).to(tl.int32)
    b03 = (s3 <= s0).to(tl.int32)
    b12 = (s2 <= s1).to(tl.int32)
    b13 = (s3 <= s1).to(tl.int32)
    b23 = (s3 <= s2).to(tl.int32)
    first = (b01 + b02 + b03 < 2).to(tl.int32)
    second = (1 - b01 + b12 + b13 < 2).to(tl.int32)
    third = (2 - b02 - b12 + b23 < 2).to(tl.int32)
    fourth = (3 - b03 - b13 - b23 < 2).to(tl.int32)
    return first | (second << 1) | (third << 2) | (fourth << 3)


@triton.jit
def _to_fp8(ratio, LARGEST: tl.constexpr):
    """The nearest E4M3 value in float32, ties to even, by arithmetic that every GPU and the interpreter have."""
    ratio = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
    power = (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power, 0.015625) * 0.125  # Three bits of mantissa; below 2⁻⁶ values are subnormal.
    nearest = (tl.div_rn(ratio, step) + 12582912.0) - 12582912.0  # Adding 1.5 · 2²³ rounds to an integer.
    return nearest * step


@triton.jit
def _walk(
    weight,
    errors,
    corner,
    roles,
    prunable,
    scales,
    height,
    width,
    weight_stride,
    corner_stride,
    next_weight,
    next_corner,
    ROUND: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The pointers to this problem of a batch.
    problem = tl.program_id(1).to(tl.int64)
    weight += problem * next_weight
    corner += problem * next_corner
    errors += problem * height * width
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    exists = (rows < height)[:, None] & (columns < width)[None, :]
    place = rows.to(tl.int64)[:, None]
    tile = tl.load(weight + place * weight_stride + columns[None, :], mask=exists, other=0.0)
    may_prune = tl.load(prunable + rows, mask=rows < height, other=0).to(tl.int32)
    if ROUND:
        scale = tl.load(scales + problem * height + rows, mask=rows < height, other=1.0)
    made = tl.zeros([ROWS, COLUMNS], tl.float32)
    pruned = tl.zeros([ROWS], tl.int32)
    for c in range(width):
        role = tl.load(roles + c)
        if role == 0:
            pruned = _two_lowest(tile, columns, c, corner, corner_stride) * may_prune
        before = column(tile, columns, c)
        goes = (role >= 0) & (((pruned >> tl.maximum(role, 0)) & 1) == 1)
        after = tl.where(goes, 0.0, before)
        if ROUND:
            after = _to_fp8(tl.div_rn(after, scale), LARGEST) * scale
        error = tl.div_rn(before - after, tl.load(corner + c * (corner_stride + 1)))
        right = (columns > c) & (columns < width)
        factor = tl.load(corner + c * corner_stride + columns, mask=right, other=0.0)
        here = (columns == c)[None, :]
        tile = tl.where(here, after[:, None], tile - error[:, None] * factor[None, :])
        made = tl.where(here, error[:, None], made)
    tl.store(weight + place * weight_stride + columns[None, :], tile, mask=exists)
    tl.store(errors + place * width + columns[None, :], made, mask=exists)


def solve_block(
    weight: torch.Tensor,
    corner: torch.Tensor,
    roles: list[int],
    prunable: torch.Tensor,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    """`sparsegpt.solve_block` in one launch: same arguments, same result but for the order of sums."""
    *batch, height, width = weight.shape
    errors = torch.empty(weight.shape, device=weight.device)
    assert scales is None or scales.is_contiguous()
    _walk[(triton.cdiv(height, ROWS), *(batch or [1]))](
        weight,
        errors,
        corner,
        torch.tensor(roles, dtype=torch.int32).to(weight.device, non_blocking=True),
        prunable,
        scales,
        height,
        width,
        weight.stride(-2),
        corner.stride(-2),
        weight.stride(0),
        corner.stride(0),
        ROUND=scales is not None,
        LARGEST=FP8_MAX,
        ROWS=ROWS,
        COLUMNS=triton.next_power_of_2(width),
        num_warps=1,
    )
    return errors
