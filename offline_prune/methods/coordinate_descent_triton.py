"""Coordinate descent over a block of groups of four as one Triton kernel; its twin in plain torch
is `coordinate_descent.solve_block`."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from offline_prune.methods.triton_tile import ROWS, column
from vllm_spense.format import GROUP

#: Numbers of each group: G, then of each pair (G_zz)⁻¹ as its diagonal and the sum of the others, and (G_zz)⁻¹·G_zk.
_TABLE = GROUP * GROUP + 6 * 7


@triton.jit
def _free(w, table, r0, r1, r2, r3):
    """w minus the product of one row of G with the slopes."""
    return w - (tl.load(table) * r0 + tl.load(table + 1) * r1 + tl.load(table + 2) * r2 + tl.load(table + 3) * r3)


@triton.jit
def _try(best, n0, n1, n2, n3, table, gone0, gone1, stay0, stay1, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """The better of the best pair yet and this, which takes LEFT and RIGHT away: twice its cost, and new values."""
    cost = tl.load(table) * gone0 * gone0 + tl.load(table + 1) * gone0 * gone1 + tl.load(table + 2) * gone1 * gone1
    first = stay0 - tl.load(table + 3) * gone0 - tl.load(table + 5) * gone1
    second = stay1 - tl.load(table + 4) * gone0 - tl.load(table + 6) * gone1
    better = cost < best
    zero = tl.zeros_like(cost)
    # Which of the two that stay, `first` or `second`, is at a place: those before it, less those that go.
    m0 = zero if LEFT == 0 else first
    m1 = zero if (LEFT == 1 or RIGHT == 1) else (first if LEFT == 0 else second)
    m2 = zero if (LEFT == 2 or RIGHT == 2) else (first if RIGHT == 1 else second)
    m3 = zero if RIGHT == 3 else second
    return (
        tl.where(better, cost, best),
        tl.where(better, m0, n0),
        tl.where(better, m1, n1),
        tl.where(better, m2, n2),
        tl.where(better, m3, n3),
    )


@triton.jit
def _descend(
    weight,
    slope,
    change,
    corner,
    tables,
    height,
    width,
    weight_stride,
    corner_stride,
    next_weight,
    next_corner,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The pointers to this problem of a batch.
    problem = tl.program_id(1).to(tl.int64)
    weight += problem * next_weight
    corner += problem * next_corner
    slope += problem * height * width
    change += problem * height * width
    tables += problem * (width // 4) * TABLE
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    exists = (rows < height)[:, None] & (columns < width)[None, :]
    place = rows.to(tl.int64)[:, None]
    tile = tl.load(weight + place * weight_stride + columns[None, :], mask=exists, other=0.0)
    r = tl.load(slope + place * width + columns[None, :], mask=exists, other=0.0)
    made = tl.zeros([ROWS, COLUMNS], tl.float32)
    for group in range(width // 4):
        c = group * 4
        at = tables + group * TABLE
        w0 = column(tile, columns, c)
        w1 = column(tile, columns, c + 1)
        w2 = column(tile, columns, c + 2)
        w3 = column(tile, columns, c + 3)
        r0 = column(r, columns, c)
        r1 = column(r, columns, c + 1)
        r2 = column(r, columns, c + 2)
        r3 = column(r, columns, c + 3)
        v0 = _free(w0, at, r0, r1, r2, r3)
        v1 = _free(w1, at + 4, r0, r1, r2, r3)
        v2 = _free(w2, at + 8, r0, r1, r2, r3)
        v3 = _free(w3, at + 12, r0, r1, r2, r3)
        best = tl.full([ROWS], float("inf"), tl.float32)
        n0, n1, n2, n3 = w0, w1, w2, w3
        best, n0, n1, n2, n3 = _try(best, n0, n1, n2, n3, at + 16, v0, v1, v2, v3, 0, 1)
        best, n0, n1, n2, n3 = _try(best, n0, n1, n2, n3, at + 23, v0, v2, v1, v3, 0, 2)
        best, n0, n1, n2, n3 = _try(best, n0, n1, n2, n3, at + 30, v0, v3, v1, v2, 0, 3)
        best, n0, n1, n2, n3 = _try(best, n0, n1, n2, n3, at + 37, v1, v2, v0, v3, 1, 2)
        best, n0, n1, n2, n3 = _try(best, n0, n1, n2, n3, at + 44, v1, v3, v0, v2, 1, 3)
        best, n0, n1, n2, n3 = _try(best, n0, n1, n2, n3, at + 51, v2, v3, v0, v1, 2, 3)
        d0, d1, d2, d3 = n0 - w0, n1 - w1, n2 - w2, n3 - w3
        in0, in1 = (columns == c)[None, :], (columns == c + 1)[None, :]
        in2, in3 = (columns == c + 2)[None, :], (columns == c + 3)[None, :]
        tile = tl.where(in0, n0[:, None], tl.where(in1, n1[:, None], tile))
        tile = tl.where(in2, n2[:, None], tl.where(in3, n3[:, None], tile))
        made = tl.where(in0, d0[:, None], tl.where(in1, d1[:, None], made))
        made = tl.where(in2, d2[:, None], tl.where(in3, d3[:, None], made))
        later = (columns > c + 3) & (columns < width)
        line = corner + c * corner_stride + columns
        r += d0[:, None] * tl.load(line, mask=later, other=0.0)[None, :]
        r += d1[:, None] * tl.load(line + corner_stride, mask=later, other=0.0)[None, :]
        r += d2[:, None] * tl.load(line + 2 * corner_stride, mask=later, other=0.0)[None, :]
        r += d3[:, None] * tl.load(line + 3 * corner_stride, mask=later, other=0.0)[None, :]
    tl.store(weight + place * weight_stride + columns[None, :], tile, mask=exists)
    tl.store(change + place * width + columns[None, :], made, mask=exists)


def solve_block(
    weight: torch.Tensor,
    slope: torch.Tensor,
    corner: torch.Tensor,
    inverse: torch.Tensor,
    quadratic: torch.Tensor,
    follow: torch.Tensor,
) -> torch.Tensor:
    """`coordinate_descent.solve_block` in one launch: same arguments, same result but for the order of sums."""
    *batch, height, width = weight.shape
    assert slope.is_contiguous()
    change = torch.empty(weight.shape, device=weight.device)
    q = quadratic
    pairs = torch.stack([q[..., 0, 0], 2 * q[..., 0, 1], q[..., 1, 1], *follow.flatten(-2).unbind(-1)], dim=-1)
    tables = torch.cat([inverse.flatten(-2), pairs.flatten(-2)], dim=-1)
    _descend[(triton.cdiv(height, ROWS), *(batch or [1]))](
        weight,
        slope,
        change,
        corner,
        tables,
        height,
        width,
        weight.stride(-2),
        corner.stride(-2),
        weight.stride(0),
        corner.stride(0),
        TABLE=_TABLE,
        ROWS=ROWS,
        COLUMNS=triton.next_power_of_2(width),
        num_warps=1,
    )
    return change
